"""Headers, indexes, pickles and zips that hypothesis makes up: every reader of tensors answers with tensors or one UserError."""

import contextlib
import json
import math
import pickle
import struct
import zipfile

import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcomes import answer, bounded, counted

from mergekit_vl.backbones.micro import Micro
from mergekit_vl.checkpoints import torch_io
from mergekit_vl.errors import UserError
from mergekit_vl.registry.plugins import registry
from mergekit_vl.storage import model_files, tuned

GOOD = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]},
}
DATA = struct.pack("<4f", 1, 2, 3, 4) + bytes(8)


@pytest.fixture(scope="module")
def micro():
    return Micro().build("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, micro):
    folder = tmp_path_factory.mktemp("fuzz")
    hostile.safetensors(folder / "good.safetensors", json.dumps(GOOD).encode(), DATA)
    for words in (["check", folder / "good.safetensors"], *_commands(folder / "good.safetensors", folder / "out")):
        assert answer(*words) == 0
    torch_io.read(folder / "good.safetensors")  # all that is imported is there before memory is counted
    return folder


def _commands(path, out):
    return ["merge", path, path, "--strategy", "linear", "--force", "--threads", "1", "-o", out], ["verify", out]


def answered(folder, path):
    """What opens can be merged, and the merge repeated; what does not is refused by every door."""
    opened = answer("check", path)
    with bounded(), contextlib.suppress(UserError):
        torch_io.read(path)
    if opened == 0:
        merge, verify = _commands(path, folder / "out")
        if answer(*merge) == 0:
            answer(*verify)


def nested(values, extend, depth):
    for _ in range(depth):
        values = values | extend(values)
    return values


numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63)]),
    st.integers(),
)
junk = nested(
    st.one_of(
        st.none(),
        st.booleans(),
        numbers,
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "mergekit_vl", "\ud800"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    depth=3,
)


def _places(value, path=()):
    """The place of everything in nested mappings and lists."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@st.composite
def edited_json(draw, good):
    """Good JSON with one to three of its values replaced, removed or doubled."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(value) if place]
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        holder = value
        for key in path:
            holder = holder[key]
        if draw(st.booleans()):
            holder[last] = draw(junk)
        elif isinstance(holder, dict):
            kept = holder.pop(last)
            holder[draw(st.text(max_size=5))] = kept
        else:
            holder.append(draw(numbers))
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def edited_bytes(draw, good):
    """Good bytes, some of them flipped, cut, put in, or repeated."""
    raw = bytearray(draw(good))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(raw)))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(raw):
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            raw[at:at] = draw(st.binary(max_size=9))
        elif kind == 2:
            del raw[at : at + draw(st.integers(1, 40))]
        elif kind == 3:
            raw[at : at + 8] = draw(st.sampled_from([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 62)]))
        else:
            raw[at:at] = raw[at : at + draw(st.integers(1, 60))]
    return bytes(raw)


headers = st.one_of(
    edited_json({**GOOD, "__metadata__": {"format": "pt", "mergekit_vl": '{"adapter":"prompt"}'}}),
    edited_json(GOOD),
    edited_bytes(st.just(json.dumps(GOOD).encode())),
    junk.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
    st.builds(
        lambda told: json.dumps({**GOOD, "__metadata__": {"mergekit_vl": json.dumps(told)}}).encode(),
        junk | st.fixed_dictionaries({"adapter": junk, "head": junk, "names": junk, "strategy": junk, "models": junk}),
    ),
)


@counted(8_000)
@given(header=headers, length=st.none() | numbers, data=st.sampled_from([DATA, DATA[:16], b"", DATA + b"\0"]))
def test_safetensors_headers(folder, header, length, data):
    path = folder / "a.safetensors"
    told = len(header) if length is None else length % (1 << 64)
    path.write_bytes(struct.pack("<Q", told) + header + data)
    answered(folder, path)


shards = st.sampled_from(
    ["good.safetensors", "../fuzz/good.safetensors", "model.safetensors.index.json", "/etc/hostname", ".", ""]
)


@counted(2_000)
@given(
    index=st.one_of(
        edited_json({"metadata": {"total_size": 24}, "weight_map": {"a": "good.safetensors", "b": "good.safetensors"}}),
        st.fixed_dictionaries(
            {"weight_map": st.dictionaries(st.sampled_from(["a", "b", "c"]), shards | st.text(max_size=6))}
        ).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
        edited_bytes(st.just(b'{"weight_map":{"a":"good.safetensors","b":"good.safetensors"}}')),
    )
)
def test_indexes(folder, index):
    path = folder / "model.safetensors.index.json"
    path.write_bytes(index)
    answered(folder, path)


small = numbers.map(hostile.integer)
scalars = st.one_of(
    small,
    st.sampled_from([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"G" + bytes(8), b"h\x00", b"\x8f"]),
    st.text(max_size=6).map(hostile.text),
)
tuples = st.lists(small, max_size=4).map(lambda values: hostile.tuple_of(*values)) | scalars
kinds = st.sampled_from(["FloatStorage", "BFloat16Storage", "ByteStorage", "UntypedStorage", "QInt8Storage", "x"])
stores = (
    st.builds(
        hostile.storage,
        st.sampled_from(["0", "0", "0", "1", "../0", ""]),
        kinds,
        st.sampled_from([hostile.integer(n) for n in (1, 2, 4, 16)]) | scalars,
    )
    | scalars
)
functions = st.builds(
    hostile.named,
    st.sampled_from(
        ["torch._utils", "torch", "collections", "__torch__", "__torch__.a", "os", "builtins", "torch.storage"]
    ),
    st.sampled_from(
        "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter _rebuild_parameter_with_state _rebuild_qtensor "
        "_rebuild_sparse_tensor _rebuild_from_type_v2 _rebuild_wrapper_subclass Size OrderedDict M system eval float32 Tensor".split()
    ),
)
described = st.builds(hostile.tensor, tuples, tuples, small | scalars, stores)
fitting = st.builds(
    lambda n, stride: hostile.tensor(hostile.integers(n), hostile.integers(stride)),
    st.integers(0, 5),
    st.integers(0, 2),
)
values = nested(
    described | fitting | scalars | functions,
    lambda inner: st.one_of(
        st.builds(lambda f, arguments: hostile.called(f, *arguments), functions, st.lists(inner, max_size=8)),
        st.builds(lambda f, state: f + b")\x81" + state + b"b", functions, inner),
        st.builds(lambda f, arguments: b"(" + f + b"".join(arguments) + b"o", functions, st.lists(inner, max_size=3)),
        st.dictionaries(st.sampled_from(["w", "v", "state_dict", "module.w"]), inner, max_size=3).map(
            lambda items: hostile.mapping(**items)
        ),
        st.lists(inner, max_size=3).map(lambda each: b"](" + b"".join(each) + b"e"),
        st.lists(inner, max_size=3).map(lambda each: hostile.tuple_of(*each)),
        st.lists(inner, max_size=3).map(lambda each: b"(" + b"".join(each) + b"Q"),
        inner.map(lambda each: each + b"q\x00"),
        inner.map(lambda each: each + b"2s"),
    ),
    depth=3,
)
OPCODES = [bytes([n]) for n in pickle.__dict__["_Unpickler"].dispatch]
soup = st.lists(st.sampled_from(OPCODES) | scalars | fitting | st.binary(max_size=3), max_size=30).map(b"".join)
mappings = st.dictionaries(
    st.sampled_from(["w", "v", "state_dict", "model", ""]), values | fitting, min_size=1, max_size=4
).map(lambda items: hostile.mapping(**items))
bodies = st.one_of(mappings, mappings, values, soup, edited_bytes(mappings))


@counted(3_000)
@given(body=bodies, stored=st.sampled_from([hostile.FOUR, hostile.FOUR * 4, b"", b"\x01"]))
def test_pickles_in_zips(folder, body, stored):
    answered(folder, hostile.archive(folder / "a.pt", body, {"0": stored}))


@counted(1_000)
@given(
    body=bodies,
    keys=st.lists(st.sampled_from(["0", "0", "1", "x"]), max_size=2),
    count=numbers.map(lambda n: struct.pack("<q", (n + 2**63) % 2**64 - 2**63)),
    edit=st.data(),
)
def test_pickles_before_torch_1_6(folder, body, keys, count, edit):
    path = hostile.legacy(folder / "legacy.pt", body, keys, count + hostile.FOUR)
    path.write_bytes(edit.draw(edited_bytes(st.just(path.read_bytes()))))
    answered(folder, path)


def _zip(folder, members, comment):
    with zipfile.ZipFile(folder / "b.pt", "w") as file:
        for name, (raw, compression) in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            file.writestr(info, raw)
        file.comment = comment
    return (folder / "b.pt").read_bytes()


names = st.sampled_from(
    ["a/data.pkl", "a/data/0", "a/data/0/", "a/byteorder", "b/data/0", "data.pkl", "a/", "a/constants.pkl", "\xe4/x"]
)
contents = st.tuples(
    st.sampled_from([hostile.FOUR, hostile.program(hostile.mapping(w=hostile.tensor())), b"little", b"big", b""]),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@counted(1_000)
@given(
    members=st.lists(st.tuples(names, contents), max_size=3),
    good=st.booleans(),
    comment=st.sampled_from([b"", b"", b"hello", b"PK\x05\x06" + bytes(18)]),
    edit=st.data(),
)
def test_zips(folder, members, good, comment, edit):
    start = [("a/data.pkl", (hostile.program(hostile.mapping(w=hostile.tensor())), 0)), ("a/data/0", (hostile.FOUR, 0))]
    raw = _zip(folder, (start if good else []) + members, comment)
    (folder / "b.pt").write_bytes(edit.draw(edited_bytes(st.just(raw))))
    answered(folder, folder / "b.pt")


PROMPT = {"adapter": "prompt", "backbone": "micro", "init": "a photo of a", "names": []}
HEAD = {"names": ["a", "b"], "normalise": True, "unseen": "refuse", "chosen": {"l2": 1.0}}
TOWER = {"adapter": "tower", "backbone": "micro", "head": HEAD, "chosen": {}}
SHAPES = st.lists(st.integers(0, 3) | st.just(128), max_size=3)
PARTS = [
    "ctx",
    "token_prefix",
    "weight",
    "bias",
    "start.weight",
    "start.bias",
    "head.weight",
    "head.bias",
    "visual.proj",
    "w",
]


@counted(1_000)
@given(
    told=edited_json(PROMPT)
    | edited_json({"adapter": "linear_head", **HEAD})
    | edited_json(TOWER)
    | junk.map(json.dumps),
    shapes=st.dictionaries(st.sampled_from(PARTS), SHAPES, max_size=5),
)
def test_adapters(folder, micro, told, shapes):
    """Files of a run as somebody else may have changed them."""
    header, place = {"__metadata__": {"mergekit_vl": told if isinstance(told, str) else told.decode()}}, 0
    for name, shape in shapes.items():
        end = place + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, end]}
        place = end
    path = hostile.safetensors(folder / "adapter.safetensors", json.dumps(header).encode(), bytes(place))
    for load, adapters in ((model_files.load_adapter, registry().adapter), (tuned.load_tuned, registry())):
        with bounded(), contextlib.suppress(UserError):
            load(path, micro, adapters)
