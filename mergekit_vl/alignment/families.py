"""The architectures whose symmetries are known: tables from tensor names to the roles of their axes.

A family is a table from a tensor's name to the roles of its axes: `w` the residual stream of a tower, `h` the hidden units of a block's
MLP, `qkv` (or `q`, `k`, `v`) and `o` what its heads write and read, `.` an axis that stays. What no table names is unknown: a block with an
unknown tensor is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]
Roles = dict[str, tuple[str, ...]]
"""By tensor, for each axis the name of the group that permutes it, or `.`."""
KNOWN = "open_clip's transformers, timm's ViT, CLIP of transformers, ResNets of timm, torchvision and open_clip, timm's ConvNeXt"


@dataclass(frozen=True)
class Transformers:
    """A family of transformers: `signs` follow the tower's prefix and tell it; `block` matches a block's own prefix."""

    signs: tuple[str, ...]
    block: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    beside: Mapping[str, str] = field(default_factory=dict)
    """Tensors of open_clip around a tower that it holds as `trunk`."""
    either: tuple[str, ...] = ()
    """One of these is there as well."""


def _norms(*names: str) -> dict[str, str]:
    return {f"{name}.{part}": "w" for name in names for part in ("weight", "bias")}


def _linear(name: str, out: str, into: str) -> dict[str, str]:
    return {f"{name}.weight": f"{out} {into}", f"{name}.bias": out}


OPEN_CLIP = Transformers(
    ("transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.ln_1.weight"),
    r"transformer\.resblocks\.\d+\.",
    {
        **_norms("ln_1", "ln_2"),
        **{"attn.in_proj_weight": "qkv w", "attn.in_proj_bias": "qkv"},
        **_linear("attn.out_proj", "w", "o"),
        **_linear("mlp.c_fc", "h", "w"),
        **_linear("mlp.c_proj", "w", "h"),
        **{"ls_1.gamma": "w", "ls_2.gamma": "w"},
    },
    {
        **{
            "class_embedding": "w",
            "positional_embedding": ". w",
            "conv1.weight": "w",
            "cls_emb": "w",
            "attn_mask": ".",
        },
        **_norms("ln_pre", "ln_post", "ln_final"),
        **{"token_embedding.weight": ". w", "proj": "w .", "text_projection": "w ."},
        **_linear("text_projection", ".", "w"),
    },
)
TIMM = Transformers(
    ("blocks.0.attn.qkv.weight", "blocks.0.norm1.weight", "patch_embed.proj.weight", "pos_embed"),
    r"blocks\.\d+\.",
    {
        **_norms("norm1", "norm2"),
        **_linear("attn.qkv", "qkv", "w"),
        **_linear("attn.proj", "w", "o"),
        **_linear("mlp.fc1", "h", "w"),
        **_linear("mlp.fc2", "w", "h"),
        **{"ls1.gamma": "w", "ls2.gamma": "w"},
    },
    {
        **{"cls_token": ". . w", "dist_token": ". . w", "reg_token": ". . w", "pos_embed": ". . w"},
        **_linear("patch_embed.proj", "w", "."),
        **_norms("norm_pre", "norm", "fc_norm"),
        **_linear("head", ".", "w"),
        **_linear("head_dist", ".", "w"),
        **{"attn_pool.latent": ".", "attn_pool.pos_embed": ". w"},
        **_linear("attn_pool.kv", ".", "w"),
        **{f"attn_pool.{name}.*": "." for name in ("q", "proj", "norm", "mlp.fc1", "mlp.fc2")},
    },
    {
        **_linear("head.proj", ".", "w"),
        **_linear("head.mlp.fc1", ".", "w"),
        **_linear("head.mlp.fc2", ".", "."),
    },
    either=("norm.weight", "fc_norm.weight"),
)
TRANSFORMERS = Transformers(
    ("encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.layer_norm1.weight"),
    r"encoder\.layers\.\d+\.",
    {
        **_norms("layer_norm1", "layer_norm2"),
        **_linear("self_attn.q_proj", "q", "w"),
        **_linear("self_attn.k_proj", "k", "w"),
        **_linear("self_attn.v_proj", "v", "w"),
        **_linear("self_attn.out_proj", "w", "o"),
        **_linear("mlp.fc1", "h", "w"),
        **_linear("mlp.fc2", "w", "h"),
    },
    {
        **{"embeddings.class_embedding": "w", "embeddings.position_ids": "."},
        **{f"embeddings.{name}.weight": ". w" for name in ("position_embedding", "token_embedding")},
        **_linear("embeddings.patch_embedding", "w", "."),
        **_norms("pre_layrnorm", "post_layernorm", "final_layer_norm"),
    },
)
CONVNEXT = Transformers(  # its streams stay, so all but its MLPs is free
    ("stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.mlp.fc1.weight"),
    r"stages\.\d+\.blocks\.\d+\.",
    {
        **{"conv_dw.*": ".", "norm.*": ".", "gamma": ".", "shortcut.*": ".", "ls.*": "."},
        **_linear("mlp.fc1", "h", "."),
        **_linear("mlp.fc2", ".", "h"),
        **{"mlp.grn.weight": "h", "mlp.grn.bias": "h"},
    },
    {"stem.*": ".", "stages.*": ".", "head.*": ".", "norm_pre.*": "."},
    {"head.*": "."},
)
FAMILIES = (OPEN_CLIP, TIMM, TRANSFORMERS, CONVNEXT)
RESNET_SIGNS = ("layer1.0.conv1.weight", "layer1.0.bn1.running_var", "layer1.0.conv2.weight", "bn1.running_var")
NORM = ("weight", "bias", "running_mean", "running_var")


def roles_of(shapes: Shapes, notes: list[str]) -> Roles:
    """The roles of all axes of the tensors that a family knows; `notes` are told of towers that look alike and are not."""
    roles: Roles = {}
    for family in FAMILIES:
        for prefix in _prefixes(shapes, family.signs, family.either):
            roles |= _transformer(family, prefix, shapes, notes)
    for prefix in _prefixes(shapes, RESNET_SIGNS):
        roles |= _resnet(prefix, shapes, notes)
    for projection, tower in (("visual_projection", "vision_model."), ("text_projection", "text_model.")):
        if f"{tower}embeddings.position_embedding.weight" in roles:
            roles[f"{projection}.weight"] = (".", f"{tower}|w")
    return roles


def _prefixes(shapes: Shapes, signs: tuple[str, ...], either: tuple[str, ...] = ()) -> list[str]:
    """The prefixes under which every sign is there, and one of `either`."""
    found = [name.removesuffix(signs[0]) for name in shapes if name.endswith(signs[0])]
    found = [p for p in found if (not p or p.endswith(".")) and all(p + sign in shapes for sign in signs)]
    return [p for p in found if not either or any(p + sign in shapes for sign in either)]


def few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    """The roles of a name; a key that ends in `*` covers what begins like it."""
    if name in table:
        return table[name]
    return next((roles for key, roles in table.items() if key.endswith("*") and name.startswith(key[:-1])), None)


def _named(roles: str, prefix: str, block: str = "") -> tuple[str, ...]:
    """Roles as names of groups: a stream is the tower's, all others are the block's."""
    return tuple(role if role == "." else f"{prefix}{'' if role == 'w' else block}|{role}" for role in roles.split())


def _transformer(family: Transformers, prefix: str, shapes: Shapes, notes: list[str]) -> Roles:
    roles: Roles = {}
    blocks: dict[str, dict[str, str | None]] = {}
    around = prefix.removesuffix("trunk.") if prefix.endswith("trunk.") else prefix
    pooled = f"{prefix}attn_pool.kv.weight" in shapes
    for name in shapes:
        if not name.startswith(around):
            continue
        inner = name.startswith(prefix)
        own = name.removeprefix(prefix if inner else around)
        if inner and (block := re.match(family.block, own)):
            blocks.setdefault(block[0], {})[name] = _look_up(family.inside, own[block.end() :])
        elif (found := _look_up(family.outside if inner else family.beside, own)) is not None:
            free = pooled and own.startswith(("head", "fc_norm"))  # they read the pool's answer
            roles[name] = (".",) if free else _named(found, prefix)
    unknown = [name for tensors in blocks.values() for name, found in tensors.items() if found is None]
    unknown += [name for name in shapes if name.startswith(f"{prefix}patch_embed.") and name not in roles]
    if pooled and f"{prefix}norm_pre.weight" in shapes:
        unknown.append(
            f"{prefix}norm_pre.weight"
        )  # a Perception Encoder's, whose queries and keys turn with their place
    if unknown:
        notes.append(
            f"the tower of {next(iter(blocks[min(blocks)]))} stays as it is: {few(unknown)} tells another kind"
        )
        return {}
    for each in sorted(blocks, key=lambda block: [int(number) for number in re.findall(r"\d+", block)]):
        roles |= {name: _named(found, prefix, each) for name, found in blocks[each].items() if found}
    return roles


def _resnet(prefix: str, shapes: Shapes, notes: list[str]) -> Roles:
    """A ResNet whose norms follow their convolutions: s0 .. s4 are its streams, a and b the channels within a block."""
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    blocks = sorted({(int(m[1]), int(m[2])) for name in own if (m := re.match(r"layer(\d)\.(\d+)\.", name))})
    table, stream = _stem(own), {0: "s0"}
    for layer, i in blocks:
        block = f"layer{layer}.{i}."
        if i == 0:
            shortened = any(name.startswith(f"{block}downsample.") for name in own)
            stream[layer] = f"s{layer}" if shortened else stream[layer - 1]
        into, out = stream[layer - 1] if i == 0 else stream[layer], stream[layer]
        inside = {name.removeprefix(block): shape for name, shape in own.items() if name.startswith(block)}
        known = _residual_block(inside, block, into, out)
        if unknown := [block + name for name in inside if name not in known]:
            notes.append(f"the tower of {prefix}conv1.weight stays as it is: {few(unknown)} tells another kind")
            return {}
        table |= {block + name: roles for name, roles in known.items()}
    for name, shape in own.items():
        norm = own.get(re.sub(r"conv(\d)\.weight$", r"bn\1.weight", name))
        if re.search(r"(^|\.)conv\d\.weight$", name) and norm and norm[0] != shape[0]:
            notes.append(f"the tower of {prefix}conv1.weight stays as it is: its norms do not follow the convolutions")
            return {}
    last = stream[blocks[-1][0]]
    table |= {f"attnpool.{name}_proj.weight": f". {last}" for name in "qkv"}
    table |= {"attnpool.positional_embedding": f". {last}", "fc.weight": f". {last}", "fc.bias": "."}
    table |= {f"attnpool.{name}_proj.bias": "." for name in "qkvc"} | {"attnpool.c_proj.weight": "."}
    return {prefix + name: _named(roles, prefix) for name, roles in table.items() if name in own}


def _stem(own: Shapes) -> dict[str, str]:
    """One convolution; timm's three as conv1.0, conv1.3, conv1.6; open_clip's three as conv1, conv2, conv3."""
    chain = [name for name in ("conv1", "conv1.0", "conv1.3", "conv1.6", "conv2", "conv3") if f"{name}.weight" in own]
    norms = {1: ["bn1"]}.get(len(chain), ["conv1.1", "conv1.4", "bn1"] if "conv1.0" in chain else ["bn1", "bn2", "bn3"])
    table: dict[str, str] = {}
    before = "."
    for i, (conv, norm) in enumerate(zip(chain, norms), 1):
        out = "s0" if i == len(chain) else f"stem{i}"
        table |= {f"{conv}.weight": f"{out} {before}", f"{norm}.num_batches_tracked": "."}
        table |= {f"{norm}.{part}": out for part in NORM}
        before = out
    return table


def _residual_block(inside: Shapes, block: str, into: str, out: str) -> dict[str, str]:
    first, second = inside.get("conv1.weight"), inside.get("conv2.weight")
    grouped = first and second and first[0] != second[1]
    a, b = (".", ".") if grouped else (f"{block}a", f"{block}b")
    squeezed = f"{block}se"
    chain = [into, a, b, out] if "conv3.weight" in inside else [into, a, out]
    table: dict[str, str] = {}
    for i, (read, written) in enumerate(zip(chain, chain[1:]), 1):
        table |= {f"conv{i}.weight": f"{written} {read}", f"bn{i}.num_batches_tracked": "."}
        table |= {f"bn{i}.{part}": written for part in NORM}
    for n in range(3):
        table |= {f"downsample.{n}.weight": f"{out} {into}", f"downsample.{n}.num_batches_tracked": "."}
        table |= {f"downsample.{n}.{part}": out for part in NORM[1:]}
    table |= {"se.fc1.weight": f"{squeezed} {out}", "se.fc1.bias": squeezed}
    return table | {"se.fc2.weight": f"{out} {squeezed}", "se.fc2.bias": out}
