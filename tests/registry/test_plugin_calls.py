"""What a plugin does wrong: named in one line, nothing written, no other command held up."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mergekit_vl.errors import UserError
from mergekit_vl.merge_files import streaming
from mergekit_vl.registry import plugins
from mergekit_vl.registry.plugins import PATIENCE, load_plugins
from mergekit_vl.strategies.in_memory import merge_adapters  # noqa: F401  # as the plugins do

PLUGIN = """
from dataclasses import dataclass

import numpy as np

from mergekit_vl.registry.hookspecs import hookimpl
from mergekit_vl.strategies.closed_form import closed_form

TOP


@hookimpl
def register_strategies(register):
    register("odd", Odd, "odd")


@closed_form("odd", chunks="FORM", averages=True)
@dataclass(frozen=True)
class Odd:
    def check(self, models):
        CHECK

    def merge_chunk(self, chunk, stats):
        x = chunk.tuned[0]
        BODY
"""
WHERE = "plugin mine: Odd: merge_chunk of w: "
LINE = next(i for i, line in enumerate(PLUGIN.splitlines(), 1) if "BODY" in line)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    yield
    sys.modules.pop("mergekit_vl_plugin_mine", None)


def load(body="return x", *, top="", form="elementwise", check="pass"):
    source = PLUGIN
    for word, text in (("TOP", top), ("FORM", form), ("CHECK", check), ("BODY", body)):
        source = source.replace(word, text)
    Path("plug").mkdir(exist_ok=True)
    Path("plug/mine.py").write_text(source)
    return load_plugins(Path("plug"))


def merge(*, dtype=np.float32, shape=(3, 2), threads=2, **plugin):
    save_file({"w": np.arange(1, 1 + np.prod(shape), dtype=dtype).reshape(shape)}, "A.safetensors")
    method = load(**plugin).find("strategies", "odd").resolve()()
    streaming.merge(streaming.MergePlan("odd", method, ("A.safetensors",)), Path("out"), threads=threads)
    return load_file("out/model.safetensors")["w"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return np.concatenate([x, x])", "gave an array of shape (12,) for 6 elements"),
        ("return x[:-2]", "gave an array of shape (4,) for 6 elements"),
        ("return x.reshape(2, 3)", "gave an array of shape (2, 3) for 6 elements"),
        ("return x.reshape(1, 1, 6)", "gave an array of shape (1, 1, 6) for 6 elements"),
        ("return 1.0", "gave no array but a float"),
        ("return None", "gave no array but a NoneType"),
        ("return list(x)", "gave no array but a list"),
        ("return x.astype(int)", "gave an array of int64, not of float32"),
        ("return x > 0", "gave an array of bool, not of float32"),
        ("return x.astype(complex)", "gave an array of complex128, not of float32"),
        ("return x.astype(np.float16)", "gave an array of float16, not of float32"),
        ("return np.log(x - 1)", "gave values that are not finite"),
        ("raise ValueError('two\\nlines')", f"ValueError: two lines (mine.py:{LINE})"),
        ("raise SystemExit(3)", f"SystemExit: 3 (mine.py:{LINE})"),
        ("open('gone.txt')", f"FileNotFoundError: [Errno 2] No such file or directory: 'gone.txt' (mine.py:{LINE})"),
        ("raise MemoryError", "out of memory (use fewer threads)"),
    ],
)
def test_a_bad_merge_piece_is_named_and_nothing_is_written(body, told, threads):
    with pytest.raises(UserError) as caught:
        merge(body=body, threads=threads)
    assert str(caught.value) == WHERE + told
    assert sorted(path.name for path in Path().iterdir()) == ["A.safetensors", "plug"]


def test_a_keyboard_interrupt_that_nobody_pressed_is_the_plugins():
    with pytest.raises(UserError, match="merge_chunk of w: KeyboardInterrupt"):
        merge(body="raise KeyboardInterrupt", threads=2)
    with pytest.raises(KeyboardInterrupt):  # in the main thread it may have been Ctrl-C
        merge(body="raise KeyboardInterrupt", threads=1)


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("elementwise", "return 2 * x"),
        ("rows", "return 2 * x.reshape(-1, 2)"),
        ("tensor", "return 2 * x.reshape(chunk.tensor.shape).astype(np.float64)"),
    ],
)
def test_pieces_come_back_flat_or_in_the_tensors_shape_in_its_dtype_or_a_wider_one(form, body):
    assert merge(form=form, body=body).tolist() == [[2, 4], [6, 8], [10, 12]]


def test_a_number_of_no_axes():
    assert merge(shape=(), body="return np.asarray(2 * x).reshape(())").tolist() == 2


def test_a_float64_model_is_not_merged_in_float32():
    with pytest.raises(UserError, match="gave an array of float32, not of float64"):
        merge(dtype=np.float64, body="return x.astype(np.float32)")


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        ({"check": "1 / 0"}, "plugin mine: Odd: check: ZeroDivisionError: division by zero"),
        (
            {"body": "pass\n\n    def describe(self, n):\n        return n"},
            "plugin mine: Odd: describe gives 1 (a MethodInfo)",
        ),
        (
            {"body": "pass\n\n    def describe(self, n):\n        1 / 0"},
            "plugin mine: Odd: describe: ZeroDivisionError",
        ),
        (
            {"body": "pass\n\n    def __post_init__(self):\n        del Odd.whole"},
            "plugin mine: Odd: is no closed form",
        ),
    ],
)
def test_a_method_that_is_no_closed_form_is_refused_before_a_tensor_is_read(plugin, told):
    with pytest.raises(UserError) as caught:
        merge(**plugin)
    assert str(caught.value).startswith(told) and not Path("out").exists()


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (
            {"check": "pass\n\n    def check(self, models, more):\n        pass"},
            "Odd: check(self, models, more) cannot be called as check(models) (define check(self, models))",
        ),
        (
            {"body": "pass\n\n    def merge_chunk(self, chunk):\n        pass"},
            "Odd: merge_chunk(self, chunk) cannot be called as merge_chunk(chunk, stats) (define merge_chunk(self, chunk, stats))",
        ),
        ({"body": "pass\n\n    merge_chunk = 3"}, "Odd: merge_chunk is no method but 3 (define merge_chunk("),
        ({"body": "pass\n\n    del merge_chunk"}, "Odd: has no merge_chunk(chunk, stats) (see docs/plugins.md)"),
        ({"body": "pass\n\n    prepass = property()"}, "Odd: prepass is no method but <property object"),
        ({"form": "diagonal"}, "strategy odd: chunks='diagonal' (one of accumulating, elementwise, rows, tensor)"),
        ({"form": 'rows", avreages="'}, "strategy odd: unknown trait 'avreages' (did you mean 'averages'?)"),
    ],
)
def test_a_class_that_is_no_closed_form_is_refused_when_it_is_registered(plugin, told):
    registry = load(**plugin)
    assert registry.failures["mine"].removeprefix("Failed: ").removeprefix("UserError: ").startswith(told)
    assert "odd" not in registry.entries["strategies"] and "linear" in registry.entries["strategies"]


def test_a_survey_that_raises_is_named():
    body = "return x\n\n    def prepass(self, models, run, chunk):\n        raise LookupError('no such fact')"
    with pytest.raises(UserError, match="plugin mine: Odd: prepass: LookupError: no such fact"):
        merge(body=body)


def test_adapters_in_memory_are_checked_alike():
    from test_narrowing import prompts

    from mergekit_vl.models.inputs import MergeInputs

    method = load(body="return x[:-1]").find("strategies", "odd").resolve()()
    models = prompts(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(UserError, match="plugin mine: Odd: merge_chunk of ctx: gave an array of shape"):
        merge_adapters(method, MergeInputs(models[0], tuple(models[1:]), (), None))


@pytest.mark.parametrize(
    ("top", "told"),
    [
        ("raise KeyboardInterrupt", "RuntimeError: it raised KeyboardInterrupt"),
        ("raise SystemExit(4)", "SystemExit: 4"),
        ("import time; time.sleep(600)", "TimeoutError: not done after 0.1 s"),
        ("while True: pass", "TimeoutError: not done after 0.1 s"),
        (
            "import time\ntry:\n    time.sleep(600)\nexcept Exception:\n    time.sleep(600)",
            "TimeoutError: not done after 0.1 s",
        ),
    ],
)
def test_a_plugin_that_does_not_load_holds_nothing_up(top, told, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0.1")
    registry = load(top=top)
    assert registry.failures == {"mine": told}
    assert "linear" in registry.entries["strategies"] and "odd" not in registry.entries["strategies"]
    assert "mergekit_vl_plugin_mine" not in sys.modules


def test_a_keyboard_interrupt_is_the_plugins_where_nobody_can_press(monkeypatch):
    import signal

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job in the background
    try:
        assert load(top="raise KeyboardInterrupt").failures == {"mine": "RuntimeError: it raised KeyboardInterrupt"}
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_plugin_prints_while_it_loads_goes_to_stderr(capsys):
    load(top="print('hello')")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.fixture
def command(monkeypatch, capsys):
    """The console script in this process, with the plugin that was written last: exit code, stdout, stderr."""
    from mergekit_vl.commands import app

    for name, value in (("MERGEKIT_VL_PLUGINS", "plug"), (PATIENCE, "60")):  # the command writes there too
        monkeypatch.setenv(name, value)

    def call(*words):
        sys.modules.pop("mergekit_vl_plugin_mine", None)
        plugins.registry.cache_clear()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["mergekit-vl", "--plugins-dir", "plug", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    yield call
    plugins.registry.cache_clear()


COMMANDS = """
@hookimpl
def register_commands(app):
    @app.command()
    def greet():
        print("hello")
        raise SystemExit(7)

    @app.command()
    def fall():
        1 / 0
"""


def test_what_plugins_print_at_work_is_not_in_our_output(command):
    save_file({"w": np.ones(3, np.float32)}, "A.safetensors")
    load("print('noise'); return x", check="print('more')", top="print('at import')" + COMMANDS)
    code, out, err = command("merge", "A.safetensors", "--strategy", "odd", "-o", "out", "--quiet")
    assert (code, out) == (0, "") and {"noise", "more", "at import"} <= set(err.split("\n"))
    code, out, err = command("check", "A.safetensors", "--strategy", "odd")
    assert code == 0 and out.endswith("ok        the models can be merged\n") and "more" not in out and "more" in err
    assert command("greet")[:2] == (7, "hello\n")  # a plugin's own command has its own output, and its own exit
    assert command("fall")[::2] == (
        2,
        "at import\nerror: plugin mine: ZeroDivisionError: division by zero (mine.py:19)\n",
    )


def test_a_plugin_that_waits_stops_neither_list_nor_help(command, monkeypatch):
    monkeypatch.setenv(PATIENCE, "0.1")
    load(top="import time; time.sleep(600)")
    warning = "warning: plugin mine was not loaded: TimeoutError: not done after 0.1 s\n"
    code, out, err = command("list", "strategies")
    assert code == 0 and "linear" in out and err == warning
    assert command("--help")[::2] == (0, warning)
    assert command("merge", "--help")[::2] == (0, "")  # nothing to wait for


def test_exceptions_in_a_plugins_code_are_its_own(tmp_path):
    from mergekit_vl.registry.calls import blamed, told

    registry = load("raise SystemExit(3)")
    method = registry.find("strategies", "odd").resolve()()

    class Ones:
        tuned = (np.ones(2),)

    modules = registry.modules()
    assert modules == {"mergekit_vl_plugin_mine": "mine"}
    with pytest.raises(SystemExit) as left:
        method.merge_chunk(Ones(), None)
    assert blamed(left.value, modules) is None  # nothing of ours called it: the exit of a plugin's own command
    with pytest.raises(TypeError) as failed:
        method.merge_chunk(None, None, None)
    assert blamed(failed.value, modules) is None  # not in its code
    with pytest.raises(AttributeError) as failed:
        method.merge_chunk(None, None)
    assert blamed(failed.value, modules) == "mine"
    assert told(failed.value) == f"AttributeError: 'NoneType' object has no attribute 'tuned' (mine.py:{LINE - 1})"
