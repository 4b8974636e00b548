"""What does not fit the models is left out of a bench; everything else that goes wrong is a failure of its row."""

import pytest
import torch
from test_fisher_regmean import head, heads
from test_merge_methods import models
from test_narrowing import prompts

from mergekit_vl.benchmark.cell_rows import CellRun
from mergekit_vl.benchmark.plan import Entry
from mergekit_vl.errors import Failed, Unsuitable, UserError
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.strategies.adamerging import AdaMerging
from mergekit_vl.strategies.ema import Ema
from mergekit_vl.strategies.ensemble import OutputEnsemble
from mergekit_vl.strategies.fisher import Fisher
from mergekit_vl.strategies.greedy_soup import GreedySoup
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.regmean import RegMean
from mergekit_vl.strategies.slerp import Slerp
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.vrf import Vrf
from mergekit_vl.strategies.wise_ft import WiseFT


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unsuitable("2 tuned models, not 1"), "inapplicable", "2 tuned models, not 1"),
        (Failed("out of memory"), "failed", "out of memory"),
        (UserError("density=7"), "failed", "density=7"),
        (MemoryError("no room"), "failed", "MemoryError: no room"),
        (RuntimeError("CUDA out of memory"), "failed", "RuntimeError: CUDA out of memory"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_only_what_is_unsuitable_is_left_out(error, status, reason, monkeypatch):
    def fails(self, entry):
        raise error

    monkeypatch.setattr(CellRun, "_strategy", fails)
    made = CellRun(None, None, None)._made(Entry("row", "merged", cls=Linear))
    assert made.status == status and made.reason.startswith(reason)


def test_a_choice_that_fails_fails_the_row_and_one_that_cannot_be_made_leaves_the_defaults(monkeypatch):
    class Bench:
        def __init__(self, error):
            self.error, self.asked = error, 0
            self.plan = type("Plan", (), {"search": type("Search", (), {"by": "auto"})})

        def select(self, *given):
            self.asked += 1
            raise self.error

    monkeypatch.setattr(CellRun, "endpoints", ([], None))
    cannot = CellRun(Bench(Unsuitable("2 classes are too few to hold some out")), None, None)
    assert cannot.selection == "2 classes are too few to hold some out"
    bench = Bench(RuntimeError("CUDA out of memory"))
    failed = CellRun(bench, None, None)
    for _ in range(2):
        with pytest.raises(Failed, match="nothing to choose on: RuntimeError: CUDA out of memory"):
            failed.selection  # noqa: B018
    assert bench.asked == 1  # its models are not tuned again for every row


@pytest.mark.parametrize(
    "method",
    [Ema(), Slerp(0.5), WiseFT(), Ties(weights=(1.0,)), TaskArithmetic(scales=(1.0,)), TaskArithmetic({"attn": 1.0})],
)
def test_methods_of_files_that_do_not_fit(method):
    given = models(*([[1.0, 2.0]] * (3 if isinstance(method, Slerp) else 1)), base=[0.0, 0.0])
    if isinstance(method, WiseFT | Ties) or (isinstance(method, TaskArithmetic) and method.scales):
        given = models([1.0, 2.0], [1.0, 2.0], base=[0.0, 0.0])
    with pytest.raises(Unsuitable):
        method.check(given)


@pytest.mark.parametrize("strategy", [Fisher(), RegMean(), GreedySoup(), AdaMerging(images="validation"), Vrf(1)])
def test_strategies_of_images_that_do_not_fit(strategy):
    given = heads([head([[1.0], [0.0]])], [[[1.0]]])
    if isinstance(strategy, Vrf):
        given = heads([head([[1.0], [0.0]]), head([[1.0], [0.0]])], [[[1.0]], [[1.0]]])
    with pytest.raises(Unsuitable):
        strategy.merge(given)


@pytest.mark.parametrize("strategy", [OutputEnsemble((1.0,)), MergeTune(views=2), Linear((1.0,), space="classifiers")])
def test_strategies_of_prompts_that_do_not_fit(strategy):
    base, tuned = prompts(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(Unsuitable):
        strategy.merge(MergeInputs(base, (tuned,), (), None))


@pytest.mark.parametrize("wrong", [Ties(7.0), Linear((1.0, -2.0, 1.0)), Ema(2.0)])
def test_options_that_fit_no_models_are_not_unsuitable(wrong):
    with pytest.raises(UserError) as caught:
        wrong.check(models([1.0], [2.0], base=[0.0]))
    assert not isinstance(caught.value, Unsuitable)


def test_information_that_is_not_finite_is_a_failure_and_none_is_unsuitable():
    thetas = [{"w": torch.ones(1)}, {"w": torch.ones(1)}]
    for value, kind in ((float("nan"), Failed), (float("inf"), Failed), (0.0, Unsuitable)):
        with pytest.raises(kind, match="the Fisher information is zero or not finite"):
            Fisher().average(thetas, [{"w": torch.full((1,), value)}] * 2, (1.0, 1.0))
