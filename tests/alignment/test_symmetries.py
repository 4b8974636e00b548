"""Every permutation of a known family gives the same network, and what is not known is left alone."""

import json

import numpy as np
import pytest
import torch

from mergekit_vl.alignment.permuted import Permuted
from mergekit_vl.alignment.rebasin import _reorder
from mergekit_vl.alignment.symmetries import find, heads_told
from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import Arrays

VISION = {"layers": 2, "width": 24, "head_width": 6, "patch_size": 8, "image_size": 16, "ls_init_value": 0.5}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}


def randomised(model, seed=0):
    """Every number of the model drawn, so that no symmetry is there by chance (norms start as ones, biases as zeros)."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            values = torch.randn(tensor.shape, generator=generator) / fan**0.5
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model.eval()


def arrays(model):
    return {k: v.numpy() for k, v in model.state_dict().items() if v.is_floating_point()}


def shapes_of(tensors):
    return {name: array.shape for name, array in tensors.items()}


def shuffled(tensors, groups, seed=1):
    """The tensors after a random permutation of every group."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of(tensors)
    orders = {p.tensor: {} for g in groups for p in g.places}
    for place in (p for g in groups for p in g.places):
        orders[place.tensor][place.axis] = np.arange(shapes[place.tensor][place.axis])
    for group in groups:
        units, dims, _ = group.parts[0][0].positions.shape
        heads = rng.permutation(units)
        within = [np.stack([rng.permutation(dims) for _ in range(units)]) for _ in group.parts]
        _reorder(orders, group, [(heads[:, None] * dims + each).reshape(-1) for each in within])
    source = Permuted(Arrays({name: (array, "F32") for name, array in tensors.items()}), shapes, orders)
    return {
        name: source.read(name, 0, array.size, np.dtype(np.float32)).reshape(array.shape)
        for name, array in tensors.items()
    }


def loaded(model, tensors):
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=False)
    return model


def clip(**vision):
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CLIP(8, VISION | vision, TEXT), {"visual": 4, "text": 2}, 16


def custom_clip():
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CustomTextCLIP(8, VISION, TEXT | {"proj_bias": True}), {"visual": 4, "text": 2}, 16


def clip_resnet():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": [1, 2, 1, 1], "width": 8, "head_width": 8, "image_size": 32, "patch_size": None}
    return open_clip.CLIP(8, vision, TEXT), {"text": 2}, 32


def clip_of_timm(name="test_vit", **more):
    open_clip = pytest.importorskip("open_clip")
    timm = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": 32} | more
    return open_clip.CLIP(8, timm, TEXT), {"visual": 2, "text": 2}, 32


def timm(name, size=32, heads=0, **more):
    library = pytest.importorskip("timm")
    return library.create_model(name, **more), {"visual": heads} if heads else {}, size


def torchvision_resnet():
    library = pytest.importorskip("torchvision")
    return library.models.ResNet(library.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5), {}, 32


def transformers_clip():
    library = pytest.importorskip("transformers")
    both = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 8,
    }
    vision = both | {"image_size": 16, "patch_size": 8}
    text = both | {"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}
    config = library.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    return library.CLIPModel(config), {"visual": 4, "text": 4}, 16


MODELS = {
    "transformers_clip": transformers_clip,
    "open_clip": clip,
    "open_clip_average_pool": lambda: clip(pool_type="avg"),
    "open_clip_custom_text": custom_clip,
    "open_clip_resnet": clip_resnet,
    "open_clip_of_timm": clip_of_timm,
    "open_clip_of_timm_mlp": lambda: clip_of_timm(timm_proj="mlp"),
    "timm_vit": lambda: timm("test_vit", heads=2, img_size=32),
    "timm_vit_registers": lambda: timm(
        "test_vit", heads=2, img_size=32, reg_tokens=2, init_values=0.5, pre_norm=True, global_pool="avg"
    ),
    "timm_vit_attention_pool": lambda: timm("test_vit", heads=2, img_size=32, global_pool="map"),
    "timm_deit_distilled": lambda: timm(
        "deit_tiny_distilled_patch16_224", heads=3, img_size=32, depth=2, num_classes=5
    ),
    "timm_resnet": lambda: timm("test_resnet"),
    "timm_resnet18": lambda: timm("resnet18", layers=(1, 2, 1, 1), num_classes=5),
    "torchvision_resnet": torchvision_resnet,
    "timm_resnet50d": lambda: timm("resnet50d", layers=(1, 1, 2, 1), num_classes=5),
    "timm_seresnet": lambda: timm("seresnet50", layers=(1, 1, 1, 1), num_classes=5),
    "timm_resnext": lambda: timm("resnext50_32x4d", layers=(1, 2, 1, 1), num_classes=5),
    "timm_convnext": lambda: timm("test_convnext"),
    "timm_convnextv2": lambda: timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5),
    "timm_convnext3": lambda: timm("test_convnext3"),
}
TOUCHED = {  # tensors that some permutation moves, for each model at least
    "open_clip": ["positional_embedding", "visual.proj", "visual.transformer.resblocks.1.attn.in_proj_weight"],
    "open_clip_resnet": ["visual.attnpool.q_proj.weight", "visual.conv2.weight", "visual.layer2.1.bn3.running_var"],
    "open_clip_of_timm": ["visual.trunk.pos_embed", "visual.head.proj.weight", "transformer.resblocks.0.ls_1.gamma"][
        :2
    ],
    "timm_vit": ["patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight"],
    "timm_vit_attention_pool": ["attn_pool.kv.weight"],
    "timm_resnet50d": ["conv1.3.weight", "layer3.1.conv2.weight", "fc.weight", "layer2.0.downsample.1.weight"],
    "timm_seresnet": ["layer1.0.se.fc2.weight"],
    "timm_resnext": ["layer2.1.conv1.weight", "fc.weight"],
    "timm_convnextv2": ["stages.0.blocks.0.mlp.grn.weight"],
}


@torch.no_grad()
def outputs(model, size):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, size, size, generator=generator)
    texts = torch.randint(1, 60, (3, TEXT["context_length"]), generator=generator)
    if hasattr(model, "vision_model"):
        found = model(pixel_values=images, input_ids=texts)
        return [found.image_embeds, found.text_embeds]
    if not hasattr(model, "encode_image"):
        return [model(images)]
    return [model.encode_image(images), model.encode_text(texts)]


@pytest.mark.parametrize("name", MODELS)
def test_every_permutation_is_the_same_network(name):
    model, heads, size = MODELS[name]()
    tensors = arrays(randomised(model))
    before = outputs(model, size)
    found = find(shapes_of(tensors), heads)
    changed = shuffled(tensors, found.groups)
    touched = {p.tensor for g in found.groups for p in g.places}
    assert touched.issuperset(TOUCHED.get(name, ()))
    moved = {key for key in touched if tensors[key].shape != (1, 1) and not np.array_equal(changed[key], tensors[key])}
    assert len(moved) > 0.9 * len(touched)
    for one, other in zip(before, outputs(loaded(model, changed), size)):
        torch.testing.assert_close(other, one, rtol=2e-4, atol=2e-5 * float(one.abs().max()))


def names_of(name, **more):
    model, heads, _ = timm(name, **more)
    return shapes_of(arrays(model))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet50_gn", {}),  # groups of channels share a norm
        ("ecaresnet26t", {}),  # a convolution over channels
        ("hiera_tiny_224", {}),  # heads of another width
        ("vit_base_patch16_rope_ape_224", {"depth": 1}),  # queries and keys turn with their place
        ("vit_pe_core_tiny_patch16_384", {"depth": 1}),  # the same, with the names of a ViT
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_networks_that_only_look_alike_are_refused(name, more):
    with pytest.raises(UserError, match="knows no permutation of this architecture.*known are open_clip's"):
        find(names_of(name, **more))


def test_an_unknown_tensor_stops_the_streams_and_only_them():
    model, heads, _ = clip()
    shapes = shapes_of(arrays(model))
    plain = find(shapes, heads)
    assert not plain.notes
    strange = find(shapes | {"adapter.weight": (24, 24)}, heads)
    assert strange.notes == ("residual streams stay as they are: the unknown adapter.weight may read them",)
    assert find(shapes | {"adapter.weight": (24, 24)}, heads, {"adapter.weight"}).notes == strange.notes  # kept or not
    names = {group.name for group in plain.groups} - {group.name for group in strange.groups}
    assert names == {"visual residual stream", "residual stream"}
    within = find(shapes | {"transformer.resblocks.0.attn.gate": (2,)}, heads)
    assert all("visual" in group.name for group in within.groups)
    assert "the tower of transformer.resblocks" in within.notes[0]


def test_the_number_of_heads_is_told_or_taken_to_be_usual_or_left(tmp_path):
    model, _, _ = clip()
    shapes = shapes_of(arrays(model))
    unknown = find(shapes)
    assert not any("heads" in group.name for group in unknown.groups)
    assert any("no config beside the model tells their number" in note for note in unknown.notes)
    usual = find(names_of("deit_tiny_patch16_224", depth=1))
    assert "visual heads are taken to be 64 wide" in usual.notes[0]
    heads = next(group for group in usual.groups if "heads" in group.name)
    assert heads.parts[0][0].positions.shape == (3, 64, 2)
    told = tmp_path / "open_clip_config.json"
    told.write_text(json.dumps({"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}}))
    assert heads_told(tmp_path) == {"visual": 4, "text": 2}
    told.write_text(json.dumps({"model_cfg": {"vision_cfg": {"timm_model_name": "vit_tiny"}, "text_cfg": {}}}))
    assert heads_told(tmp_path) == {"text": 8}
    told.write_text("[")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {}, "text_config": {}}))
    assert heads_told(tmp_path) == {"visual": 12, "text": 8}
    assert heads_told(None) == {}
