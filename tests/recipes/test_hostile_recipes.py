"""Recipes from strangers: YAML that costs or is none, `${...}`, the environment's secrets, and whose fault an error is."""

import os
from pathlib import Path

import pytest
import yaml
from PIL import Image
from test_use import call

from mergekit_vl.commands.merge_request import ask, is_merge
from mergekit_vl.errors import UserError
from mergekit_vl.recipes import references, yaml_text
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import parse, with_datasets

SECRET = "hunter2-is-no-password"
PLAIN = {"dataset": {"name": "folder", "path": "pets"}, "strategy": [{"name": "linear"}]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGEKIT_VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SECRET", SECRET)


def recipe(**more) -> str:
    Path("pets").mkdir(exist_ok=True)
    Path("r.yaml").write_text(yaml.safe_dump({**PLAIN, **more}))
    return "r.yaml"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{here}: &{here} [{', '.join([f'*{last}'] * 9)}]" for last, here in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, what",
    [
        ("[" * 20_000, "more than 5000 values, or 50 levels"),
        ("{a: " * 20_000, "more than 5000 values, or 50 levels"),
        ("[" + "a, " * 20_000 + "]", "more than 5000 values, or 50 levels"),
        (LAUGHS, "more than 5000 values, or 50 levels"),
        (LAUGHS.replace("[*", "{<<: [*").replace("]", "]}"), "broken YAML"),
        ("a: &a [*a]", "an alias within what it stands for"),
        ("x" * 200_000, "200000 bytes are more than the 131072"),
        ("null: 1", "the key None is no text"),
        ("1: 1", "the key 1 is no text"),
        ("seed: 1\nseed: 2", "line 2, column 1: the key 'seed' twice"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!python/object/apply:pathlib.PosixPath [x]", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!int x", "broken YAML: invalid literal"),
        ('a: "\\0"', "U+0000"),
        ('a: "\\ud800"', "U+D800"),
        ("a: 0x" + "f" * 99, "more than 64 bits"),
        ("a: " + "9" * 5000, "broken YAML"),
    ],
)
def test_yaml_that_no_recipe_is(text, what):
    Path("r.yaml").write_text(text)
    for read in (lambda: load_recipe("r.yaml"), lambda: ask(["r.yaml"])):
        with pytest.raises(UserError) as caught:
            read()
        assert what in str(caught.value) and str(caught.value).startswith("r.yaml: ")
    assert not is_merge(["r.yaml"], base=None, strategy=None)


def test_a_recipe_is_one_document():
    Path("r.yaml").write_text("a\n---\nb")
    with pytest.raises(UserError, match="^r.yaml: 2 documents in one file"):
        load_recipe("r.yaml")


def test_yaml_is_read_as_ever():
    text = "a: &a {x: 1e-3, y: .5, z: 1_000}\nb: {<<: *a, x: 2}\nc: [2020-01-01, 1:30, yes, ~, 010, '1']\n"
    told = {"a": {"x": 0.001, "y": 0.5, "z": 1000}, "b": {"x": 2, "y": 0.5, "z": 1000}}
    assert yaml_text.parse(text, where="") == told | {"c": ["2020-01-01", 90, True, None, 8, "1"]}


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda f: os.symlink("/dev/zero", f), lambda f: os.symlink("/proc/self/mem", f)]
)
def test_recipes_are_regular_files(make):
    make("r.yaml")
    for read in (lambda: load_recipe("r.yaml"), lambda: ask(["r.yaml"])):
        with pytest.raises(UserError):
            read()


def test_references_within_a_recipe():
    tree = {"a": {"x": 1, "y": "${a.x}", "z": "${.x}-${b[0]}"}, "b": ["${c}", "${..a.x}"], "c": "q", "d": "${a}"}
    told = {"a": {"x": 1, "y": 1, "z": "1-q"}, "b": ["q", 1], "c": "q", "d": {"x": 1, "y": 1, "z": "q"}}
    told["d"]["z"] = "1-q"
    assert references.expand(tree, where="") == told


@pytest.mark.parametrize(
    "value, what",
    [
        ("${", "without its `}`"),
        ("${a", "without its `}`"),
        ("${a${b}}", "without its `}`"),
        ("${" * 20_000, "without its `}`"),
        ("${}", "refers to nothing"),
        ("${nowhere}", "is no value of the recipe"),
        ("${dataset.path.0}", "is no value of the recipe"),
        ("${strategy.7.name}", "is no value of the recipe"),
        ("${strategy.0}", "holds this very text"),
        ("${strategy.0.label}", "holds this very text"),
        ("x${dataset}", "a mapping or list within the text"),
        ("${oc.decode:x}", "is not read"),
        ("${oc.create:[1]}", "is not read"),
        ("${oc.env:A B}", "is not read"),
        ("${oc.env:}", "is not read"),
        ("${oc.env:SECRET:x}", "is not read"),
        ("${env:SECRET}", "is not read"),
        ("${now:%Y}", "is not read"),
    ],
)
def test_references_that_are_none(value, what):
    with pytest.raises(UserError, match="^r.yaml: strategy.0.label: ") as caught:
        load_recipe(recipe(strategy=[{"name": "linear", "label": value}]))
    assert what in str(caught.value)


def test_references_do_not_multiply():
    steps = [{"name": "linear", "label": "x" * 1000}]
    steps += [{"name": "linear", "label": f"${{strategy.{i}.label}}" * 10} for i in range(20)]
    with pytest.raises(UserError, match="multiply it beyond all bounds"):
        load_recipe(recipe(strategy=steps))
    steps = [{"name": "linear", "grid": {"t": [1] * 9}}]
    steps += [{"name": "linear", "grid": {"t": [f"${{strategy.{i}.grid.t}}"] * 9}} for i in range(20)]
    with pytest.raises(UserError, match="multiply it beyond all bounds|leads back to itself"):
        load_recipe(recipe(strategy=steps))
    with pytest.raises(UserError, match="leads back to itself"):
        load_recipe(recipe(dataset={"name": "folder", "path": "${dataset.template}", "template": "${dataset.path}"}))


ENVIRONMENT = {"name": "folder", "path": "${oc.env:SECRET}/pets"}


def test_the_environment_is_read_where_it_is_allowed(monkeypatch):
    file = recipe(dataset=ENVIRONMENT)
    with pytest.raises(UserError) as caught:
        load_recipe(file, allow_env=["OTHER"])
    assert str(caught.value) == (
        "r.yaml: dataset.path: ${oc.env:SECRET} reads the environment variable SECRET "
        "(if you trust the recipe with it, add --allow-env SECRET)"
    )
    allowed = load_recipe(file, allow_env=["SECRET"])
    assert allowed.datasets[0].options["path"] == f"{SECRET}/pets" and allowed.plain["dataset"] == ENVIRONMENT
    assert allowed.allowing == ["--allow-env", "SECRET"] and SECRET not in str(allowed.plain)
    written = parse({**PLAIN, "dataset": {"name": "folder", "path": f"{SECRET}/pets"}}, name="r", where="")
    assert allowed.hash == written.hash  # the value enters it
    monkeypatch.setenv("SECRET", "elsewhere")
    assert load_recipe(file, allow_env=["SECRET"]).hash != written.hash
    monkeypatch.delenv("SECRET")
    with pytest.raises(UserError, match="the environment variable SECRET is not set"):
        load_recipe(file, allow_env=["SECRET"])
    file = recipe(dataset={"name": "folder", "path": "${oc.env:SECRET, data}/pets"})
    assert load_recipe(file, allow_env=["SECRET"]).datasets[0].options["path"] == "data/pets"


@pytest.mark.parametrize(
    "more",
    [
        {"dataset": {"name": "folder", "path": "pets", "template": "a {} ${oc.env:SECRET}"}},
        {"dataset": {"name": "folder", "path": "pets", "label": "${oc.env:SECRET}"}},
        {"dataset": {"name": "folder", "path": "pets", "shifts": ["${oc.env:SECRET}"]}},
        {"dataset": {"name": "${oc.env:SECRET}"}},
        {"dataset": {"name": "folder", "path": "${oc.env:SECRET}", "template": "{} ${dataset.path}"}},
        {"strategy": [{"name": "linear", "label": "${oc.env:SECRET}"}]},
        {"strategy": [{"name": "linear", "path": "${oc.env:SECRET}"}]},
        {"strategy": {"name": "linear", "grid": {"path": ["${oc.env:SECRET}"]}}},
        {"backbone": {"name": "clip", "arch": "${oc.env:SECRET}"}},
        {"seed": "${oc.env:SECRET}"},
        {"tuned": [{"checkpoint": "x", "init": "${oc.env:SECRET}"}]},
    ],
)
def test_no_value_of_the_environment_stands_where_it_would_be_stored(more):
    with pytest.raises(UserError, match="environment variables are for paths|names a shift") as caught:
        load_recipe(recipe(**more), allow_env=["SECRET"])
    assert SECRET not in str(caught.value)


def test_what_the_environment_names_goes_by_the_variables_name():
    made = load_recipe(
        recipe(
            dataset={"name": "folder", "path": "${oc.env:SECRET}"},
            tuned=[{"checkpoint": "a/${oc.env:SECRET}-2"}, {"checkpoint": "${oc.env:SECRET}/b.pt"}],
        ),
        allow_env=["SECRET"],
    )
    assert made.datasets[0].label == "SECRET" and [t.label for t in made.tuned] == ["SECRET-2", None]
    assert made.tuned[0].checkpoint == f"a/{SECRET}-2"
    with_more = with_datasets(made, ["SECRET"], registry=_registry())
    assert with_more.plain["dataset"] == [{"name": "folder", "path": "${oc.env:SECRET}"}]


def test_reasons_hold_references():
    record = {"reason": f"/x/{SECRET}/a.png: damaged", "right": SECRET, "trials": [{"reason": SECRET}]}
    hidden = {
        "reason": "/x/${oc.env:SECRET}/a.png: damaged",
        "right": SECRET,
        "trials": [{"reason": "${oc.env:SECRET}"}],
    }
    assert references.hide(record, {"SECRET": SECRET, "UNSET": None, "EMPTY": ""}) == hidden


def _registry():
    from mergekit_vl.registry.plugins import load_plugins

    return load_plugins()


def test_a_run_stores_the_reference_and_is_used_with_it(monkeypatch, capsys, tmp_path):
    for name in ("red", "green"):
        (tmp_path / SECRET / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (name == "red", i, 0)).save(tmp_path / SECRET / name / f"{i}.png")
    monkeypatch.setenv("SECRET", str(tmp_path / SECRET))
    file = recipe(
        dataset={"name": "folder", "path": "${oc.env:SECRET}"},
        protocol={"name": "few_shot", "shots": 1},
        tuned=[{"tuner": {"name": "linear_probe", "l2": 0.1}}],
        strategy=[{"name": "wise_ft"}],
        controls=False,
    )
    code, _, err = call(monkeypatch, capsys, "run", file)
    assert code == 2 and "add --allow-env SECRET" in err and SECRET not in err
    code, out, err = call(monkeypatch, capsys, "run", file, "--allow-env", "SECRET", "--out", "out")
    assert code == 0 and "--allow-env SECRET" in out, err
    written = [path for path in Path("out").rglob("*") if path.is_file()]
    assert len(written) > 8 and not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert "${oc.env:SECRET}" in Path("out/recipe.yaml").read_text()
    for words in (("eval", "out"), ("predict", "out", tmp_path / SECRET / "red" / "0.png")):
        code, _, err = call(monkeypatch, capsys, *words)
        assert code == 2 and "add --allow-env SECRET" in err
        code, out, err = call(monkeypatch, capsys, *words, "--allow-env", "SECRET")
        assert code == 0 and out, err
    for words in (["check", file], ["bench", file, "--dry-run"], ["landscape", file, "--plane", "0", "--out", "out"]):
        assert call(monkeypatch, capsys, *words)[0] == 2
        assert call(monkeypatch, capsys, *words, "--allow-env", "SECRET")[0] == 0
    assert SECRET.encode() not in Path("out/landscape.json").read_bytes() + Path("out/landscape.html").read_bytes()


@pytest.mark.parametrize(
    "override, told",
    [
        ("seed=x", "command line, seed=x: seed='x' (a whole"),
        ("strategy.0.weights=x", "command line, strategy.0.weights=x: strategy.0 linear: weights='x'"),
        ("strategy.0.name=linea", "command line, strategy.0.name=linea: strategy.0 linea: unknown strategy 'linea'"),
        ("tuned=", "command line, tuned=: tuned is a list"),
        ("controls=3", "command line, controls=3: controls=3 (true or false)"),
        ("tuned.0.tuner.epochs=0", "command line, tuned.0.tuner.epochs=0: CoOp: epochs=0 (it must be positive)"),
        ("strategy.0.label=${x}", "command line, strategy.0.label=${x}: strategy.0.label: ${x} is no value"),
        (
            "dataset.path=${oc.env:HOME}",
            "command line, dataset.path=${oc.env:HOME}: dataset.path: ${oc.env:HOME} reads",
        ),
    ],
)
def test_an_override_is_to_blame_for_what_it_brought(override, told, monkeypatch, capsys):
    file = recipe()
    for words in ([override], ["protocol.shots=4", override, "seed=1" if "seed" not in override else "controls=true"]):
        code, out, err = call(monkeypatch, capsys, "check", file, *words)
        assert code == 2 and not out and err.startswith(f"error: {told}"), err


def test_the_recipe_is_to_blame_for_its_own(monkeypatch, capsys):
    file = recipe(seed="x", controls=3)
    assert call(monkeypatch, capsys, "check", file, "protocol.shots=4")[2].startswith("error: r.yaml: seed='x'")
    assert call(monkeypatch, capsys, "check", file, "seed=2")[2].startswith("error: r.yaml: controls=3")
    both = ("controls=true", "seed=3", "tuned.0.tuner.epochs=0")
    assert call(monkeypatch, capsys, "check", file, *both)[2].startswith(
        "error: command line, tuned.0.tuner.epochs=0: "
    )


@pytest.mark.parametrize(
    "text",
    ["weights: {models: [a, b], strategy: linear, dtype: 5}", "merge_method: linear\ndtype: 5\nmodels: [{model: a}]"]
    + ["merge_method: [linear]\nmodels: [{model: a}]", "merge_method: linear\nmodels: [{model: a}]\nbase_model: {}"]
    + [
        f"merge_method: karcher\nmodels: [{{model: a}}]\nparameters: {{max_iter: {x}}}"
        for x in (".inf", "[1]", "~", "x")
    ]
    + [
        f"merge_method: della\nbase_model: c\nmodels: [{{model: a, parameters: {{weight: 1, density: 0.5}}}}]\nparameters: {{epsilon: {x}}}"
        for x in ("{}", "~", "[1, 2]", "[{value: 1}]")
    ],
)
def test_recipes_of_merges_have_types(text):
    Path("r.yaml").write_text(text)
    with pytest.raises(UserError, match="^r.yaml: "):
        ask(["r.yaml"])


def test_options_of_eval_hold_no_references(monkeypatch, capsys):
    words = ("eval", "micro", "--dataset", "folder", "path=${oc.env:SECRET}")
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "is read in recipes alone" in err and SECRET not in err
