"""SGD's schedule and what it says of a training, with numbers by hand."""

import math

import pytest
import torch
from recording import Recording

from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.tuners.sgd import Schedule, sgd


def trained(loss, n=1, **settings):
    """The leaf after each step of `loss`, from 0, on n images; and the reporter."""
    reporter = Recording()
    inputs = MergeInputs(None, (), (), None, reporter=reporter)
    w, seen = torch.zeros(1, requires_grad=True), []
    schedule = Schedule(**{"batch": 1, "weight_decay": 0.0, **settings})
    steps = sgd({"w": w}, torch.zeros(1, n, 1), torch.zeros(n, dtype=torch.long), schedule, inputs, what="it")
    for step in steps:
        with step:
            step.minimise(loss(step.weights["w"].sum()))
        seen.append(w.item())
    return seen, reporter


def test_the_fields_warm_up_is_one_constant_epoch_then_a_cosine():
    schedule = Schedule(epochs=4, batch=1, lr=2.0)
    assert [schedule.lr_at(e) for e in range(4)] == pytest.approx([1e-5, 2.0, 1 + math.cos(math.pi / 4), 1.0])


def test_a_linear_warm_up_rises_step_by_step():
    schedule = Schedule(epochs=4, batch=1, lr=2.0, warmup="linear")
    assert [schedule.lr_at(0, part) for part in (0.25, 0.5, 1.0)] == [0.5, 1.0, 2.0]
    assert schedule.lr_at(1, 0.25) == 2.0


def test_after_the_fields_warm_up_momentum_takes_its_sum_at_once():
    """A gradient of -1: velocities 1, 1.9, 2.71, ... ; three steps at 1e-5, and the fourth moves by 3.439 at lr 1; a linear one by
    1/3, 2/3 * 1.9, 2.71 in its first epoch."""
    field, _ = trained(lambda w: -w, n=3, epochs=2, lr=1.0)
    assert field[2] == pytest.approx(1e-5 * 5.61) and field[3] - field[2] == pytest.approx(3.439)
    linear, _ = trained(lambda w: -w, n=3, epochs=2, lr=1.0, warmup="linear")
    assert linear[:3] == pytest.approx([1 / 3, 1 / 3 + 2 / 3 * 1.9, 1 / 3 + 2 / 3 * 1.9 + 2.71])


def test_no_step_gets_longer_than_the_longest():
    """A gradient of -100 is cut to 0.5 * 0.1: steps of 0.05, 0.095, ... towards 0.5."""
    seen, _ = trained(lambda w: -100 * w, n=60, epochs=1, lr=1.0, longest=0.5)
    steps = [after - before for before, after in zip([0.0, *seen], seen)]
    assert steps[:2] == pytest.approx([0.05, 0.095]) and max(steps) < 0.5 and steps[-1] == pytest.approx(0.5, abs=2e-3)
    small, _ = trained(lambda w: -0.01 * w, n=60, epochs=1, lr=1.0, longest=0.5)
    assert small == pytest.approx(trained(lambda w: -0.01 * w, n=60, epochs=1, lr=1.0)[0])


def test_images_that_are_left_out_and_a_loss_that_rises_are_told():
    _, reporter = trained(lambda w: -w, n=5, batch=2, epochs=2, lr=0.1)
    assert (
        reporter.told == ["it: a pass has 2 steps of 2 images; 1 of 5 images are left out of it, as in CoOp's code"]
        and not reporter.warned
    )
    _, reporter = trained(lambda w: (w - 1).square(), n=1, epochs=9, lr=3.0)
    assert len(reporter.warned) == 1 and "the loss rose from 1.000 in the first pass to " in reporter.warned[0]
