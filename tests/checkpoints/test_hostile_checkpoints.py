"""Checkpoints from strangers: no byte is read that is not the tensor's, and whatever a file says, the answer is one UserError."""

import json
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from hostile import (
    FOUR,
    archive,
    called,
    integer,
    integers,
    legacy,
    mapping,
    named,
    program,
    safetensors,
    storage,
    tensor,
    text,
    tuple_of,
)

from mergekit_vl.checkpoints import torch_io
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.errors import UserError


def refused(path, match):
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: .*{match}"):
        torch_io.read(path)


@pytest.mark.parametrize(
    "place",
    [
        dict(offset=3),  # a second row past the end: 3 + 1 + 3
        dict(shape=integers(5)),
        dict(shape=integers(2, 2), strides=integers(4, 1)),  # 1 + 4 + 1 elements
        dict(shape=integers(2, 1 << 40), strides=integers(0, 1)),
        dict(of=storage(elements=5), shape=integers(5)),  # the storage says more than its member has
        dict(of=storage(kind="DoubleStorage")),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, place):
    refused(archive(tmp_path / "a.pt", mapping(w=tensor(**place))), "w reaches to|the storage of w has")


@pytest.mark.parametrize("number", [integer(-1), integer(1 << 63), b"G" + bytes(8), b"N", text("2"), b")", b"\x88"])
@pytest.mark.parametrize("where", ["offset", "shape", "strides", "elements"])
def test_sizes_are_whole_numbers_from_0(tmp_path, number, where):
    given = {"offset": number} if where == "offset" else {where: tuple_of(number)}
    given = {"of": storage(elements=number)} if where == "elements" else given
    refused(archive(tmp_path / "a.pt", mapping(w=tensor(**given))), "w has sizes, strides or an offset")


def test_shapes_that_are_none(tmp_path):
    for shape, strides in [(b"N", b"N"), (integers(4), b")"), (text("4"), text("1")), (b"]", b"]")]:
        refused(archive(tmp_path / "a.pt", mapping(w=tensor(shape, strides))), "w has no shape with as many strides")
    many = integers(*[1] * 65)
    refused(archive(tmp_path / "a.pt", mapping(w=tensor(many, many))), "w has 65 dimensions")


def test_what_torch_saves_in_strides_is_read_piece_by_piece(tmp_path):
    base = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32)
    state = {
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "outer": base[:6].reshape(6, 1).expand(6, 4),
        "transposed": base[:12].reshape(3, 4).T,
        "channels_last": base.reshape(2, 3, 4, 5).clone(memory_format=torch.channels_last),
        "part": base[7:67].reshape(3, 4, 5)[:, 1:3, ::2],
        "scalar": torch.tensor(7.0).expand(4, 3, 2),
        "empty": torch.empty(0, 3).T,
    }
    for name, new in [("zip.pt", True), ("legacy.pt", False)]:
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=new)
        checkpoint = open_checkpoint(str(tmp_path / name))
        for key, wanted in state.items():
            flat = wanted.reshape(-1).numpy()
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    assert np.array_equal(checkpoint.raw(key, start, stop), flat[start:stop]), key


def test_what_expands_counts_against_the_file(tmp_path):
    refused(
        archive(tmp_path / "a.pt", mapping(w=tensor(integers(1 << 40), integers(0)))),
        "its tensors expand to 4,398,047 MB, more than 8 times the file",
    )
    found = open_checkpoint(str(archive(tmp_path / "b.pt", mapping(w=tensor(integers(1 << 20, 2), integers(0, 1))))))
    assert found.bytes == 1 << 23
    assert found.raw("w", 999_999, 1_000_002).tolist() == [2, 1, 2]


def test_a_legacy_file_is_held_to_the_same_bounds(tmp_path):
    good = struct.pack("<q", 4) + FOUR
    found = torch_io.read(legacy(tmp_path / "good.pt", mapping(w=tensor()), ["0"], good))
    assert found["w"].tolist() == [1, 2, 3, 4]
    cases = [
        (mapping(w=tensor(offset=1)), ["0"], good, "w reaches to byte 20 of a storage of 16"),
        (mapping(w=tensor()), ["0"], struct.pack("<q", -4) + FOUR, "it ends in its tensors"),
        (mapping(w=tensor()), ["0"], struct.pack("<q", 1 << 62) + FOUR, "it ends in its tensors"),
        (mapping(w=tensor()), ["0"], struct.pack("<q", 3) + FOUR, "the storage of w has 16 bytes, and 12 are there"),
        (mapping(w=tensor()), [], good, "w: its bytes are missing"),
        (mapping(w=tensor()), ["0", "0"], good + good, "its list of storages is broken"),
        (mapping(w=tensor(of=storage(elements=4, kind="FloatStorage"))), ["9"], good, "dtype unknown cannot be merged"),
        (
            mapping(w=tensor(), v=tensor(of=storage(kind="IntStorage"))),
            ["0"],
            good,
            "w: its bytes are of two dtypes",
        ),
    ]
    for i, (body, keys, data, match) in enumerate(cases):
        refused(legacy(tmp_path / f"{i}.pt", body, keys, data), match)


def edited(path, out, edit):
    raw = bytearray(path.read_bytes())
    edit(raw)
    out.write_bytes(raw)
    return out


@pytest.fixture
def saved(tmp_path):
    torch.save({"first": torch.arange(4.0), "second": torch.arange(4.0) + 10}, tmp_path / "saved.pt")
    return tmp_path / "saved.pt"


def test_a_flipped_bit_of_a_tensor_is_found_as_it_is_read(saved, tmp_path):
    def flip(raw):
        raw[raw.index(struct.pack("<4f", 10, 11, 12, 13)) + 3] ^= 1

    damaged = edited(saved, tmp_path / "flipped.pt", flip)
    refused(damaged, "the CRC of second differs")
    checkpoint = open_checkpoint(str(damaged))
    with pytest.raises(UserError, match="the CRC of second differs"):
        checkpoint.hash(damaged)

    def flip_name(raw):
        raw[raw.index(b"second")] ^= 1

    refused(edited(saved, tmp_path / "renamed.pt", flip_name), "the CRC of its data.pkl differs")


def test_a_file_written_without_crcs_is_read(saved, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "no_crc.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch_io.read(tmp_path / "no_crc.pt")["w"].tolist() == [1, 1, 1]


def test_the_hash_of_a_file_with_crcs_is_that_of_its_bytes(saved):
    from blake3 import blake3

    assert open_checkpoint(str(saved)).hash(saved) == blake3(saved.read_bytes()).hexdigest()


def test_a_zip_is_one_archive_read_one_way(saved, tmp_path):
    whole = saved.read_bytes()
    cases = {
        "two": whole + whole,
        "before": b"PK\x03\x04" + whole,
        "after": whole + b"\0",
        "comment_with_an_end": whole[:-2] + struct.pack("<H", 22) + b"PK\x05\x06" + bytes(18),
        "end_moved": whole[:-6] + struct.pack("<I", 0) + whole[-2:],
    }
    for name, raw in cases.items():
        (tmp_path / f"{name}.pt").write_bytes(raw)
        refused(tmp_path / f"{name}.pt", "damaged checkpoint: ")

    (tmp_path / "comment.pt").write_bytes(whole[:-2] + b"\x05\x00hello")
    assert torch_io.read(tmp_path / "comment.pt")["first"].tolist() == [0, 1, 2, 3]

    names = [b"saved/data/0", b"saved/data/1"]

    def swap_in_directory(raw):
        first, second = (raw.rindex(name) for name in names)
        raw[first : first + 12], raw[second : second + 12] = names[1], names[0]

    refused(edited(saved, tmp_path / "swapped.pt", swap_in_directory), "its directory and its member .* do not agree")

    def same_place(raw):
        first, second = (raw.rindex(name) - 4 for name in names)
        raw[second : second + 4] = raw[first : first + 4]

    refused(edited(saved, tmp_path / "same.pt", same_place), "is not where the member before it ends")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_within_archives(tmp_path):
    archive(tmp_path / "a.pt", mapping(w=tensor()))
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as file:
        file.writestr("other/data/0", FOUR)
    refused(tmp_path / "a.pt", "two archives in one")
    archive(tmp_path / "b.pt", mapping(w=tensor()))
    with zipfile.ZipFile(tmp_path / "b.pt", "a") as file:
        file.writestr("archive/data/0", FOUR)
    refused(tmp_path / "b.pt", "is in it twice")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", program(mapping(w=tensor())))
    refused(tmp_path / "c.pt", "data.pkl is compressed")
    inner = archive(tmp_path / "inner.pt", mapping(w=tensor())).read_bytes()
    whole = tensor(integers(len(inner)), of=storage(kind="ByteStorage", elements=len(inner)))
    found = torch_io.read(archive(tmp_path / "d.pt", mapping(w=whole), {"0": inner}))  # only bytes
    assert bytes(found["w"].numpy()) == inner


def test_big_endian_files_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data.pkl", program(mapping(w=tensor())))
        file.writestr("a/byteorder", b"big")
        file.writestr("a/data/0", FOUR)
    refused(tmp_path / "a.pt", "its numbers are big-endian")


def test_tensors_of_other_kinds_are_named_and_not_left_out(tmp_path):
    sparse = torch.eye(3).to_sparse()
    cases = {
        "sparse": (sparse, "w is a sparse tensor, which cannot be merged"),
        "complex": (torch.ones(2, dtype=torch.complex64), "w: dtype ComplexFloatStorage cannot be merged"),
        "float8": (torch.ones(2).to(torch.float8_e4m3fn), "w: dtype float8_e4m3fn cannot be merged"),
        "negative": (
            torch.ones(2, dtype=torch.complex64).conj().imag,
            "w is a tensor with a conjugate or negative bit",
        ),
        "meta": (torch.ones(2, device="meta"), "w is a meta tensor no storage tensor, which cannot be merged"),
    }
    for name, (value, match) in cases.items():
        torch.save({"a": torch.ones(2), "w": value}, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", match)


def test_unsigned_integers_and_parameters_with_attributes_are_read(tmp_path):
    tagged = torch.nn.Parameter(torch.ones(2))
    tagged.tag = "x"
    torch.save({"u": torch.tensor([1, 65535], dtype=torch.uint16), "p": tagged}, tmp_path / "a.pt")
    found = torch_io.read(tmp_path / "a.pt")
    assert found["u"].tolist() == [1, 65535] and found["p"].tolist() == [1, 1]


SCRIPT = named("__torch__", "M") + b")\x81"


def test_small_files_with_large_costs(tmp_path):
    shared = SCRIPT + b"}bq\x00"
    for k in range(30):
        both = mapping(a=b"h" + bytes([k]), b=b"h" + bytes([k]))
        shared += b"0" + SCRIPT + both + b"bq" + bytes([k + 1])
    many = named("collections", "OrderedDict") + b"]q\x00(" + (b"NN\x86" * 1000) + b"e\x85R0"
    cases = {
        "memo": (b"K\x01r" + struct.pack("<I", 1 << 27), "remembers a value as number 134,217,728"),
        "deep": (b"}N" + b"\x85" * 600_000 + b"K\x01s", "tuples more than 100 deep"),
        "deep by marks": (b"(" * 200 + b"t" * 200, "tuples more than 100 deep"),
        "operations": (b"N0" * 1_000_001, "more than 2,000,000 operations"),
        "dictionaries": (b"}" * 600_000, "more than 500,000 values"),
        "module": (mapping(**{"module." * 100_000 + "w": tensor()}), "no name, or one of more than 4096 bytes"),
        "itself": (SCRIPT + b"q\x00" + mapping(a=b"h\x00") + b"b", "more than 100 deep, or one holds itself"),
        "shared": (shared, "more than 100,000 attributes"),
        "copies": (many + (named("collections", "OrderedDict") + b"h\x00\x85R0") * 1000, "more than 500,000 values"),
        "huge": (mapping(w=tensor(integers(1 << 62), integers(0))), "expand to"),
    }
    for name, (body, match) in cases.items():
        refused(archive(tmp_path / f"{name}.pt", body), match)


def test_keys_are_never_hashed(tmp_path):
    """n * (2**61 - 1) have one hash in Python: a dictionary of 20,000 would take minutes."""
    keys = b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 20_000))
    body = b"}(" + keys + b"u0" + mapping(w=tensor())
    assert list(torch_io.read(archive(tmp_path / "a.pt", body))) == ["w"]


def test_one_file_does_not_change_how_the_next_is_read(tmp_path):
    states = mapping(__setstate__=named("a", "B"), __dict__=b"}", __class__=named("a", "B"))
    polluting = b"".join(
        named(module, name) + tuple_of(b"}", states) + b"b0"
        for module, name in [("__torch__", "X"), ("a", "B"), ("collections", "OrderedDict"), ("torch", "FloatStorage")]
    )
    archive(tmp_path / "pollute.pt", polluting + mapping(w=tensor()))
    archive(tmp_path / "ts.pt", SCRIPT + mapping(w=tensor()) + b"b")
    for name in ("pollute.pt", "ts.pt", "pollute.pt", "ts.pt"):
        assert torch_io.read(tmp_path / name)["w"].tolist() == [1, 2, 3, 4]


def test_an_ordered_dictionary_as_python_2_pickled_it(tmp_path):
    """OrderedDict([["w", tensor]]), names as bytes."""
    pair = b"](U\x01w" + tensor() + b"e"
    path = archive(tmp_path / "a.pt", called(named("collections", "OrderedDict"), b"](" + pair + b"e"))
    assert torch_io.read(path)["w"].tolist() == [1, 2, 3, 4]


def test_what_is_no_state_dict(tmp_path):
    v3 = called(named("torch._utils", "_rebuild_tensor_v3"), *[b"N"] * 6, named("torch", "float32"))
    cases = [
        (b"N", "no weights in it"),
        (b"K\x01", "no weights in it"),
        (tensor(), "no weights in it"),
        (b"]" + tensor() + b"a", "no weights in it"),
        (b"}" + tuple_of(text("a")) + tensor() + b"s", "a tensor has no name"),
        (mapping(__metadata__=tensor()), "one is called __metadata__"),
        (mapping(**{"_orig_mod.a": tensor(), "a": tensor()}), "two tensors have the same name"),
        (mapping(w=tensor(of=b"N")), "w has no storage"),
        (mapping(w=v3), "w has no storage"),
        (mapping(w=tensor(of=storage("7"))), "w: its bytes are missing"),
        (b"\x82\x01", "an operation 0x82"),
        (b"h\x05", "its pickle is broken"),
        (b"t", "its pickle ends early"),
        (b"0", "its pickle ends early"),
        (b"\x8d" + b"\xff" * 8, "its pickle ends early"),
        (b"\x96" + b"\xff" * 8, "its pickle ends early"),
    ]
    for i, (body, match) in enumerate(cases):
        refused(archive(tmp_path / f"{i}.pt", body), match)


ENTRY = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":null,"shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":5,"shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":null,"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":4,"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":"4","data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":{"0":4},"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4.0],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[null],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[true,4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":null}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":1}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16,32]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":["0","16"]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0.0,16.0]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[1,17]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,99999999999999999999999]}}',
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % (b"9" * 5000),
        b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % b",".join([b"9" * 18] * 10_000),
        b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":%s,"a":%s}' % (ENTRY, ENTRY),
        b'{"a":%s,"b":%s}' % (ENTRY, ENTRY),
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":[]}',
        b'{"a":null}',
        b'{"__metadata__":[],"a":%s,"b":null}' % ENTRY,
        b'{"__metadata__":{"mergekit_vl":5},"a":%s}' % ENTRY,
        b'{"__metadata__":"x","a":%s}' % ENTRY,
        b'{"\\ud800":%s}' % ENTRY,
        b'{"\xff":%s}' % ENTRY,
        b"\xef\xbb\xbf{}",
        ("{}".encode("utf-16")),
        b"[]",
        b"{",
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{" + b",".join(b'"%d":[]' % i for i in range(200_000)) + b"}",
    ],
)
def test_a_safetensors_header_that_is_none(tmp_path, header):
    refused(safetensors(tmp_path / "a.safetensors", header, FOUR), "")


def test_header_lengths_that_are_none(tmp_path):
    for length in (0, 1, 10_000, 1 << 62, (1 << 63) + 1, (1 << 64) - 1):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":%s}' % ENTRY + FOUR)
        refused(tmp_path / "a.safetensors", "damaged or truncated safetensors")
    for raw in (b"", b"\0" * 7, b"\0" * 8, b"\0" * 9):
        (tmp_path / "a.safetensors").write_bytes(raw)
        refused(tmp_path / "a.safetensors", "damaged or truncated safetensors")


def index_of(shard, **more):
    return json.dumps({"weight_map": {"w": shard}, **more})


def test_an_index_that_is_none(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    safetensors(tmp_path / "a.safetensors", b'{"w":%s}' % ENTRY, FOUR)
    (tmp_path / "inner").mkdir()
    safetensors(tmp_path / "inner" / "b.safetensors", b'{"w":%s}' % ENTRY, FOUR)
    outside = [f"../{tmp_path.name}/a.safetensors", str(tmp_path / "a.safetensors")]
    names = [*outside, index.name, "inner/../a.safetensors", "./a.safetensors", "b.safetensors", "inner", "", "."]
    whole = ["", "[]", "null", "{}", "[" * 100_000, *(json.dumps({"weight_map": each}) for each in ([], "a", None))]
    whole += [index_of(each) for each in (*names, 1, None, [], "a" * 5000, "a\0", "a\udc80")]
    whole += [index_of("a.safetensors", metadata=each) for each in ("x", [1], 5)]
    whole += [index_of("a.safetensors", metadata={"total_size": each}) for each in ("16", 17, True, [])]
    whole += ['{"weight_map":{"w":"a.safetensors","w":"a.safetensors"}}']
    for content in whole:
        index.write_text(content)
        refused(index, "")
        with pytest.raises(UserError):
            torch_io.read(tmp_path)
    for content in (
        index_of("inner/b.safetensors", metadata={"total_size": 16, "more": [{}]}),
        index_of("a.safetensors", metadata=None),
        index_of("a.safetensors", metadata={"total_size": 16.0}),
    ):
        index.write_text(content)
        assert torch_io.read(index)["w"].tolist() == [1, 2, 3, 4]


def test_names_are_data(tmp_path):
    for name in ("", " ", "a\\nb", "a\\u0000b", "\\u001b]0;x\\u0007", "\\u00e9\\ud83d\\ude00", "x" * 3000):
        path = safetensors(tmp_path / "a.safetensors", b'{"%s":%s}' % (name.encode(), ENTRY), FOUR)
        assert [*torch_io.read(path).values()][0].tolist() == [1, 2, 3, 4]


TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
GOOD_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 8, "patch_size": 16, "head_width": 4},
    "text_cfg": TEXT,
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "[]",
        "{}",
        '{"model_cfg": []}',
        *(
            json.dumps({"model_cfg": {**GOOD_CONFIG, key: value}})
            for key in GOOD_CONFIG
            for value in (None, [], "x", -1)
        ),
        json.dumps({"model_cfg": {**GOOD_CONFIG, "text_cfg": {**TEXT, "width": "x"}}}),
        json.dumps({"model_cfg": {**GOOD_CONFIG, "text_cfg": {**TEXT, "width": 7}}}),
        json.dumps({"model_cfg": {**GOOD_CONFIG, "text_cfg": {**TEXT, "surprise": 1}}}),
        json.dumps({"model_cfg": {**GOOD_CONFIG, "surprise": 1}}),
        json.dumps({"model_cfg": GOOD_CONFIG, "preprocess_cfg": [1]}),
    ],
)
def test_a_config_of_open_clip_that_is_none(tmp_path, content):
    from mergekit_vl.backbones.clip import Clip

    (tmp_path / "open_clip_config.json").write_text(content)
    torch.save({"w": torch.ones(2)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError):
        Clip(arch=f"local-dir:{tmp_path}").build("cpu")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"layers": 10**9}, "1,000,000,000 layers"),
        ({"layers": [1, 10**9]}, "1,000,000,000 layers"),
        ({"width": 10**6}, "GiB, more than this machine has"),
        ({"image_size": 10**7, "patch_size": 1}, "GiB, more than this machine has"),
    ],
)
def test_a_config_that_asks_for_a_model_without_end_is_refused_before_it_is_built(tmp_path, change, told):
    from mergekit_vl.backbones.clip import Clip

    config = {**GOOD_CONFIG, "vision_cfg": {**GOOD_CONFIG["vision_cfg"], **change}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save({"w": torch.ones(2)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=told):
        Clip(arch=f"local-dir:{tmp_path}").build("cpu")
