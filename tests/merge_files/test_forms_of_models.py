"""What people bring to `merge`: prefixes, factors, classes in another order, buffers, shards, configs; taken as they are with a word, or refused with one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mergekit_vl.checkpoints.factors import factors
from mergekit_vl.checkpoints.reader import distinct

NET = {"blocks.0.w": (3, 4), "blocks.1.w": (3, 4), "norm.weight": (4,), "norm.bias": (4,)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(value, shapes=NET, prefix="", **more):
    made = {prefix + name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
    return made | {name: np.asarray(each, np.float32) for name, each in more.items()}


def classifier(folder, rows, config):
    Path(folder).mkdir()
    tensors = {"vit.w": np.ones((2, 2), np.float32), "classifier.weight": np.array([[r, r] for r in rows], np.float32)}
    save_file(tensors | {"classifier.bias": np.array(rows, np.float32)}, f"{folder}/model.safetensors")
    Path(folder, "config.json").write_text(json.dumps(config))


def hf(names):
    return {"id2label": {str(i): name for i, name in enumerate(names)}}


@pytest.mark.parametrize(
    "of",
    [hf, lambda names: {"label_names": names}, lambda names: {"pretrained_cfg": {"label_names": names}}],
    ids=["transformers", "timm", "timm's pretrained_cfg"],
)
def test_classes_in_another_order_are_merged_by_name(of, call):
    classifier("a", [1, 2, 3], of(["ant", "bee", "cat"]))
    classifier("b", [2, 3, 1], of(["bee", "cat", "ant"]))
    code, out = call("merge", "a", "b", "--strategy", "linear", "-o", "out")
    assert code == 0 and "b names the classes of a in another order" in out and "classifier.weight" in out
    merged = load_file("out/model.safetensors")
    assert merged["classifier.bias"].tolist() == [1, 2, 3] and merged["classifier.weight"][:, 0].tolist() == [1, 2, 3]
    assert json.loads(Path("out/config.json").read_text()) == of(["ant", "bee", "cat"])
    assert call("verify", "out")[0] == 0


def test_classes_that_differ_are_refused_until_the_classifier_is_kept(call):
    classifier("a", [1, 2, 3], hf(["ant", "bee", "cat"]))
    classifier("b", [2, 3, 1], hf(["bee", "dog", "ant"]))
    code, out = call("merge", "a", "b", "--strategy", "linear", "-o", "out")
    assert code == 2 and "b has 'dog'" in out and "--keep classifier takes a's" in out
    code, out = call("merge", "a", "b", "--strategy", "linear", "-o", "out", "--keep", "classifier")
    assert code == 0 and "--keep classifier: 2 of 3 tensors" in out and "1 are merged" in out


def test_numbered_labels_tell_nothing(call):
    classifier("a", [1, 2], hf(["LABEL_0", "LABEL_1"]))
    classifier("b", [1, 2], hf(["LABEL_1", "LABEL_0"]))
    code, out = call("merge", "a", "b", "--strategy", "linear", "-o", "out")
    assert code == 0 and "another order" not in out


FACTORS = {
    "PEFT": {"base_model.model.layer.0.q_proj.lora_A.weight": (2, 8), "base_model.model.layer.0.q_proj.lora_B.weight": (8, 2)},
    "kohya": {"lora_unet_0_q.lora_down.weight": (2, 8), "lora_unet_0_q.lora_up.weight": (8, 2), "lora_unet_0_q.alpha": ()},
    "diffusers": {"q.to_q_lora.down.weight": (2, 8), "q.to_q_lora.up.weight": (8, 2)},
    "CLIP-LoRA": {"layer_0.q_proj.w_lora_A": (2, 8), "layer_0.q_proj.w_lora_B": (8, 2)},
    "no name": {"layer.0.q.down": (2, 8), "layer.0.q.up": (8, 2)},
    "letters": {"q_proj.A": (2, 8), "q_proj.B": (6, 2)},
    "transposed": {"q_proj.u": (8, 2), "q_proj.v": (2, 6)},
    "LoHa": {"q.hada_w1_a": (8, 2), "q.hada_w1_b": (2, 8)},
    "in a whole model": {"q.weight": (8, 8), "q.lora_a": (2, 8), "q.lora_b": (8, 2)},
    "kernels": {"conv.down.weight": (2, 8, 3, 3), "conv.up.weight": (8, 2, 1, 1)},
}  # fmt: skip


@pytest.mark.parametrize("form", FACTORS)
def test_factors_are_never_merged_apart(form, call):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file(model(value, FACTORS[form]), f"{name}.safetensors")
    code, out = call("merge", "a.safetensors", "b.safetensors", "--strategy", "linear", "-o", "out")
    assert code == 2 and "factors of low-rank updates (LoRA)" in out and "fold each" in out and not Path("out").exists()


@pytest.mark.parametrize(
    "shapes",
    [
        {"mlp.up_proj.weight": (16, 4), "mlp.down_proj.weight": (4, 16)},
        {"mlp.up.weight": (16, 4), "mlp.down.weight": (4, 16)},
        {"adapter.down.weight": (2, 8), "adapter.down.bias": (2,), "adapter.up.weight": (8, 2), "adapter.up.bias": (8,)},
        {"exploration.weight": (4, 4), "flora.weight": (4, 4)},
    ],
)  # fmt: skip
def test_what_is_no_pair_of_factors(shapes):
    assert not factors(shapes)


PREFIXES = {"Lightning": "model.", "a wrapper": "clipmodel.", "deep": "net.backbone.model."}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_one_prefix_over_all_names(prefix, call):
    save_file(model(0.0), "base.safetensors")
    save_file(model(2.0, prefix=prefix), "a.safetensors")
    words = ("--strategy", "wise_ft", "-o", "out", "alpha=0.5")
    code, out = call("merge", "a.safetensors", "--base", "base.safetensors", *words)
    assert code == 0 and f"its names begin with {prefix!r}, which is taken off" in out
    merged = load_file("out/model.safetensors")
    assert merged.keys() == NET.keys() and merged["norm.bias"].tolist() == [1] * 4
    assert call("verify", "out")[0] == 0
    code, out = call("merge", "base.safetensors", "--base", "a.safetensors", *words, "--force")
    assert code == 0 and load_file("out/model.safetensors").keys() == {prefix + name for name in NET}


def test_a_head_beside_a_prefix_is_left_out(call):
    save_file(model(0.0), "base.safetensors")
    save_file(model(2.0, prefix="clip.", **{"head.weight": [[1.0]]}), "a.safetensors")
    code, out = call("merge", "a.safetensors", "--base", "base.safetensors", "--strategy", "wise_ft", "-o", "out")
    assert code == 0 and "a: head.weight beside that prefix: left out" in out


def test_names_that_no_prefix_explains(call):
    save_file(model(0.0), "base.safetensors")
    save_file({"x.y": np.zeros(3, np.float32)}, "a.safetensors")
    code, out = call("merge", "a.safetensors", "--base", "base.safetensors", "--strategy", "wise_ft", "-o", "out")
    assert code == 2 and "base begins with blocks.0.w, blocks.1.w; a with x.y; no prefix makes them the same" in out
    both = model(1.0, prefix="student.") | model(2.0, prefix="teacher.")
    save_file(both, "a.safetensors")
    code, out = call("merge", "a.safetensors", "--base", "base.safetensors", "--strategy", "wise_ft", "-o", "out")
    assert code == 2 and "prefixes 'student.' and 'teacher.' fit equally well" in out


MASK = np.triu(np.full((3, 3), -np.inf, np.float32), 1)


@pytest.mark.parametrize("name", ["attn_mask", "text.attn_mask", "text_model.causal_attention_mask"])
def test_a_causal_mask_is_copied(name, call):
    for file, value in (("zs", 1.0), ("a", 3.0)):
        save_file(model(value) | {name: MASK}, f"{file}.safetensors")
    code, out = call("merge", "a.safetensors", "--base", "zs.safetensors", "--strategy", "wise_ft", "-o", "out")
    assert code == 0 and f"{name}: no weights that training changes" in out
    assert np.array_equal(load_file("out/model.safetensors")[name], MASK)


@pytest.mark.parametrize("more", [{"embeddings.position_ids": np.arange(4)[None]}, {"logit_bias": np.zeros(1, np.float32)}, {"n_averaged": np.array(3)}])  # fmt: skip
def test_a_buffer_that_only_one_has(more, call):
    save_file(model(1.0), "zs.safetensors")
    save_file(model(3.0) | more, "a.safetensors")
    for base, tuned in (("zs", "a"), ("a", "zs")):
        words = (f"{tuned}.safetensors", "--base", f"{base}.safetensors", "--strategy", "wise_ft")
        code, out = call("merge", *words, "-o", base + "-out")
        assert code == 0 and f"{next(iter(more))}: no weights that training changes; taken as {base} has them" in out
        assert (next(iter(more)) in load_file(f"{base}-out/model.safetensors")) == (base == "a")
        assert call("check", *words)[0] == 0


def test_one_number_is_one_number(call):
    save_file(model(1.0, logit_scale=2.0), "zs.safetensors")
    save_file(model(3.0, logit_scale=[4.0]), "a.safetensors")
    words = ("merge", "a.safetensors", "--base", "zs.safetensors", "--strategy", "wise_ft", "-o", "out", "alpha=0.5")
    code, out = call(*words)
    assert code == 0 and "a: logit_scale of shape [1] read as [], the same numbers" in out
    assert load_file("out/model.safetensors")["logit_scale"].tolist() == 3


def test_tensors_that_only_some_have(call):
    save_file(model(1.0, **{"head.weight": [[5.0]]}), "a.safetensors")
    save_file(model(3.0, **{"probe.weight": [[7.0]]}), "b.safetensors")
    words = ("merge", "a.safetensors", "b.safetensors", "--strategy", "linear", "-o", "out", "--force")
    code, out = call(*words)
    assert code == 2 and "--tensors intersection merges what both have, union copies the rest" in out
    code, out = call(*words, "--tensors", "intersection")
    assert code == 0 and load_file("out/model.safetensors").keys() == NET.keys()
    code, out = call(*words, "--tensors", "union")
    merged = load_file("out/model.safetensors")
    assert code == 0 and merged.keys() == {*NET, "head.weight", "probe.weight"} and "not in all models" in out
    assert merged["head.weight"].tolist() == [[5]] and merged["probe.weight"].tolist() == [[7]]
    assert merged["norm.bias"].tolist() == [2] * 4 and call("verify", "out")[0] == 0
    assert "unknown --tensors 'all'" in call(*words, "--tensors", "all")[1]


def test_check_takes_what_its_messages_advise(call):
    save_file(model(1.0, head=[1.0]), "a.safetensors")
    save_file(model(3.0, head=[1.0, 2.0]), "b.safetensors")
    assert call("check", "a.safetensors", "b.safetensors")[0] == 2
    code, out = call("check", "a.safetensors", "b.safetensors", "--keep", "head", "--dtype", "bfloat16")
    assert code == 0 and "note      --keep head: 1 of 5 tensors" in out
    assert call("check", "a.safetensors", "b.safetensors", "--keep", "haed")[0] == 2


def test_keep_tells_how_much_it_covers(call):
    shapes = {**NET, "mlp.fc1.weight": (4, 4), "mlp.fc2.weight": (4, 4), "fc.weight": (2, 4)}
    for name in "ab":
        save_file(model(1.0, shapes), f"{name}.safetensors")
    out = call("check", "a.safetensors", "b.safetensors", "--keep", "fc")[1]
    assert "--keep fc: 3 of 7 tensors (55.6% of the elements)" in out and "are a's; 4 are merged" in out


def shard(name, folder="m"):
    Path(folder).mkdir(exist_ok=True)
    save_file({f"{name}.w": np.ones(2, np.float32)}, f"{folder}/{name}.safetensors")


@pytest.mark.parametrize("name", ["model-00001-of-00002", "open_clip_model-1-of-3", "clip.00002-of-00004"])
def test_a_shard_is_no_model(name, call):
    shard(name)
    code, out = call("check", f"m/{name}.safetensors")
    assert code == 2 and "of a model, and not the model" in out and "give the folder" in out
    code, out = call("check", "m")
    assert code == 2 and "and no index" in out


def test_a_pickled_shard_is_no_model(call):
    torch.save({"w": torch.ones(2)}, "pytorch_model-00001-of-00002.bin")
    assert "shard 1 of 2 of a model" in call("check", "pytorch_model-00001-of-00002.bin")[1]


def test_all_shards_without_their_index(call):
    shard("model-00001-of-00002")
    shard("model-00002-of-00002")
    code, out = call("check", "m")
    assert code == 0 and "m: 2 tensors" in out and "2 shards without an index, read together" in out


def test_labels_of_models_of_one_name():
    given = ["checkpoint-500", "checkpoint-500", "m", "m", "m", "m-2"]
    assert distinct(given) == ["checkpoint-500", "checkpoint-500-2", "m", "m-2", "m-3", "m-2-2"]


CONFIGS = {
    "quick_gelu": ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, {"model_cfg": {"quick_gelu": False}}),
    "hidden_act": ("config.json", {"vision_config": {"hidden_act": "quick_gelu"}}, {"vision_config": {"hidden_act": "gelu"}}),
    "mean": ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.5]}}, {"preprocess_cfg": {"mean": [0.48]}}),
    "pool_type": ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"pool_type": "tok"}}}, {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}),
    "context_length": ("open_clip_config.json", {"model_cfg": {"text_cfg": {"context_length": 77}}}, {"model_cfg": {"text_cfg": {"context_length": 64}}}),
    "image_mean": ("preprocessor_config.json", {"image_mean": [0.5]}, {"image_mean": [0.48]}),
}  # fmt: skip


@pytest.mark.parametrize("key", CONFIGS)
def test_configs_that_differ_are_told(key, call):
    file, *contents = CONFIGS[key]
    for name, content in zip("ab", contents):
        Path(name).mkdir()
        save_file(model(1.0), f"{name}/model.safetensors")
        Path(name, file).write_text(json.dumps(content))
    for words in (("check", "a", "b"), ("merge", "a", "b", "--strategy", "linear", "-o", "out")):
        code, out = call(*words)
        assert code == 0 and f"{key} is " in out and "the merged model gets the config of a" in out
    assert json.loads(Path("out", file).read_text()) == contents[0]


POSITIONS = {
    "open_clip": ("visual.positional_embedding", (5, 4), (17, 4), "another image size: 2 x 2 patches against 4 x 4"),
    "timm": ("pos_embed", (1, 5, 4), (1, 17, 4), "another image size: 2 x 2 patches against 4 x 4"),
    "transformers": ("vision_model.embeddings.position_embedding.weight", (5, 4), (17, 4), "another image size"),
    "texts": ("positional_embedding", (8, 4), (12, 4), "another context length: 8 positions against 12"),
}


@pytest.mark.parametrize("form", POSITIONS)
def test_another_image_size_is_told_and_interpolated(form, call):
    name, small, large, told = POSITIONS[form]
    save_file(model(1.0) | {name: np.ones(small, np.float32)}, "zs.safetensors")
    save_file(model(3.0) | {name: np.full(large, 3, np.float32)}, "a.safetensors")
    words = ("a.safetensors", "--base", "zs.safetensors", "--strategy", "wise_ft", "alpha=0.5")
    code, out = call("merge", *words, "-o", "out")
    assert code == 2 and told in out and "--resize-pos-embed" in out
    assert call("check", *words, "--resize-pos-embed")[0] == 0
    code, out = call("merge", *words, "-o", "out", "--resize-pos-embed")
    assert code == 0 and f"a: {name} is of {told}" in out
    merged = load_file("out/model.safetensors")[name]
    assert merged.shape == small and np.allclose(merged, 2) and call("verify", "out")[0] == 0


def test_positions_are_interpolated_as_open_clip_does():
    from types import SimpleNamespace

    from open_clip.model import resize_pos_embed

    from mergekit_vl.merge_files.positions import _resized

    table = torch.randn(17, 4, generator=torch.Generator().manual_seed(0))
    state = {"visual.positional_embedding": table}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(2, 2))))
    found = _resized("visual.positional_embedding", table, (5, 4))
    assert torch.allclose(found, state["visual.positional_embedding"], atol=1e-6)


def test_transformers_names_are_merged_with_open_clips(call):
    import open_clip
    from safetensors.torch import save_file as save

    cfg = {"image_size": 16, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    ours = {n: t.contiguous() for n, t in open_clip.CLIP(12, cfg, text).state_dict().items() if n != "attn_mask"}
    theirs = dict(ours)
    for tower, to, width in (("visual.transformer", "vision_model", 32), ("transformer", "text_model", 16)):
        for part in ("weight", "bias"):
            three = theirs.pop(f"{tower}.resblocks.0.attn.in_proj_{part}").split(width)
            theirs |= {f"{to}.encoder.layers.0.self_attn.{q}_proj.{part}": t.clone() for q, t in zip("qkv", three)}
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                theirs[f"{to}.encoder.layers.0.{b}.{part}"] = theirs.pop(f"{tower}.resblocks.0.{a}.{part}")
    for part in ("weight", "bias"):
        theirs[f"text_model.final_layer_norm.{part}"] = theirs.pop(f"ln_final.{part}")
        theirs[f"vision_model.pre_layrnorm.{part}"] = theirs.pop(f"visual.ln_pre.{part}")
        theirs[f"vision_model.post_layernorm.{part}"] = theirs.pop(f"visual.ln_post.{part}")
    theirs["text_model.embeddings.token_embedding.weight"] = theirs.pop("token_embedding.weight")
    theirs["text_model.embeddings.position_embedding.weight"] = theirs.pop("positional_embedding")
    theirs["vision_model.embeddings.class_embedding"] = theirs.pop("visual.class_embedding")
    theirs["vision_model.embeddings.patch_embedding.weight"] = theirs.pop("visual.conv1.weight")
    theirs["vision_model.embeddings.position_embedding.weight"] = theirs.pop("visual.positional_embedding")
    theirs["text_projection.weight"] = theirs.pop("text_projection").T.contiguous()
    theirs["visual_projection.weight"] = theirs.pop("visual.proj").T.contiguous()
    save(ours, "zs.safetensors")
    save({n: t + 2 for n, t in theirs.items()}, "hf.safetensors")
    words = ("--strategy", "wise_ft", "alpha=0.5", "-o", "out")
    code, out = call("merge", "hf.safetensors", "--base", "zs.safetensors", *words)
    assert code == 0 and "hf: transformers' names of a CLIPModel are read as open_clip's" in out
    merged = load_file("out/model.safetensors")
    assert merged.keys() == ours.keys() and all(np.allclose(merged[n], ours[n].numpy() + 1, atol=1e-5) for n in ours)
    assert call("verify", "out")[0] == 0
    code, out = call("merge", "zs.safetensors", "--base", "hf.safetensors", *words, "--force")
    assert code == 2 and "name zs first, or as --base" in out
