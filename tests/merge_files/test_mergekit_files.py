"""mergekit's YAML in the forms of real files: keys about text, slices and modules of whole models, ignored parameters, several documents, all problems at once."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

NAMES = ("layers.0.mlp.weight", "layers.1.mlp.weight")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, folder in enumerate(("base", "a", "c")):
        Path(folder).mkdir()
        save_file({name: np.full((2, 2), value, np.float32) for name in NAMES}, f"{folder}/model.safetensors")


def merged(folder="out"):
    return load_file(f"{folder}/model.safetensors")[NAMES[0]][0, 0]


LINEAR = (
    "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1.0}}\n- {model: c, parameters: {weight: 3.0}}\n"
)
SOURCES = "[{model: a, layer_range: [%d, %d], parameters: {weight: 1}}, {model: c, layer_range: [%d, %d], parameters: {weight: 3}}]"
TEXT = {
    "name": "name: my-model",
    "tokenizer": "tokenizer: {source: union, tokens: {'<s>': {source: a}}}",
    "tokenizer_source": "tokenizer_source: union",
    "chat_template": "chat_template: auto",
    "several": "name: x\ntokenizer_source: base\nchat_template: chatml",
    "of the command": "lazy_unpickle: true\nallow_crimes: true",
}


@pytest.mark.parametrize("form", TEXT)
def test_keys_about_text_are_passed_over_with_a_word(form, call):
    Path("m.yaml").write_text(LINEAR + TEXT[form])
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 0 and "passed over" in out and merged() == 1.75


WHOLE = {
    "one slice": f"slices:\n- sources: {SOURCES % (0, 2, 0, 2)}\n",
    "two slices": f"slices:\n- sources: {SOURCES % (0, 1, 0, 1)}\n- sources: {SOURCES % (1, 2, 1, 2)}\n",
    "parameters of a slice": "slices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: c, layer_range: [0, 2]}]\n  parameters: {weight: 1}\n",
    "modules": "modules:\n  text_decoder:\n    models: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: 3}}]\n",
    "modules of slices": f"modules:\n  default:\n    slices:\n    - sources: {SOURCES % (0, 2, 0, 2)}\n",
}


@pytest.mark.parametrize("form", WHOLE)
def test_slices_and_modules_of_whole_models(form, call):
    Path("m.yaml").write_text("merge_method: linear\n" + WHOLE[form])
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 0 and merged() == (1.5 if form == "parameters of a slice" else 1.75), out
    assert "read as whole models" in out or "merged alike" in out


PARTS = {
    "frankenmerge": "slices:\n- sources: [{model: a, layer_range: [0, 1]}]\n- sources: [{model: c, layer_range: [1, 2]}]\n",
    "layers left out": f"slices:\n- sources: {SOURCES % (0, 1, 0, 1)}\n- sources: {SOURCES % (2, 3, 2, 3)}\n",
    "other layers": f"slices:\n- sources: {SOURCES % (0, 2, 1, 3)}\n",
    "not from the start": f"slices:\n- sources: {SOURCES % (1, 2, 1, 2)}\n",
    "too few": f"slices:\n- sources: {SOURCES % (0, 1, 0, 1)}\n",
    "modules": "modules:\n  x: {models: [{model: a}]}\n  y: {models: [{model: c}]}\n",
}


@pytest.mark.parametrize("form", PARTS)
def test_parts_of_models_are_refused_with_a_word(form, call):
    Path("a/config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    Path("m.yaml").write_text("merge_method: linear\n" + PARTS[form])
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 2 and ("name whole models under `models`" in out or "merge each part by itself" in out)


@pytest.mark.parametrize("key", ["density: 0.5", "t: 0.3", "int8_mask: true", "foo_bar: 3"])
def test_parameters_that_mergekit_ignores(key, call):
    Path("m.yaml").write_text(LINEAR + f"parameters: {{{key}}}\n")
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 0 and f"{key.split(':')[0]}: no parameter of this method" in out


def test_several_documents_run_in_order(call):
    second = "merge_method: linear\nmodels: [{model: first, parameters: {weight: 1}}, {model: base, parameters: {weight: 1}}]\n"
    Path("m.yaml").write_text(f"name: first\n{LINEAR}---\n{second}")
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 0 and "document 1 of 2, first: out-first" in out
    assert merged("out-first") == 1.75 and merged() == 0.875
    code, out = call("check", "m.yaml")
    assert code == 0 and "checked when that is there" in out


def test_all_problems_are_told_at_once(call):
    Path("m.yaml").write_text(
        "merge_method: ties\nmodls: 1\nmodels: [{model: a, parameters: {weight: 1, densty: 1}}]\nparameters: {lamda: 1}\n"
    )
    code, out = call("merge", "m.yaml", "-o", "out")
    assert code == 2 and out.count("\n") == 1 and "4 problems" in out
    assert all(each in out for each in ("'modls'", "'densty'", "'lamda'", "ties needs a base_model"))


@pytest.mark.parametrize("model", ["{model: {path: a}}", "{path: a}", "a"])
def test_ways_to_name_a_model(model, call):
    Path("m.yaml").write_text(f"merge_method: linear\nmodels: [{{model: {model}, parameters: {{weight: 1}}}}]\n")
    assert call("merge", "m.yaml", "-o", "out")[0] == 0 and merged() == 1


def test_ids_of_the_hub_and_loras_on_the_fly(call):
    Path("m.yaml").write_text("merge_method: linear\nmodels: [{model: a+org/lora, parameters: {weight: 1}}]\n")
    assert "a with the LoRA org/lora (fold it into the model first)" in call("merge", "m.yaml", "-o", "out")[1]
    from mergekit_vl.merge_files.mergekit_yaml import translate

    content = {"merge_method": "linear", "models": [{"model": "org/name", "parameters": {"weight": 1}}]}
    assert translate(content, where="m")[0].models == [{"path": "hf-hub:org/name"}]
