"""No option is dropped without a word: what nothing reads here is refused, or told."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_fisher_regmean import head, heads
from test_merge_methods import models
from test_narrowing import prompts

from mergekit_vl.commands import app
from mergekit_vl.errors import UserError
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.strategies.breadcrumbs import Breadcrumbs
from mergekit_vl.strategies.consensus import Consensus
from mergekit_vl.strategies.dare_ties import DareTies
from mergekit_vl.strategies.della import Della
from mergekit_vl.strategies.emr import Emr
from mergekit_vl.strategies.fisher import Fisher
from mergekit_vl.strategies.linear import Linear
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.regmean import RegMean
from mergekit_vl.strategies.tall_mask import TallMask
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.strategies.wise_ft import WiseFT


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Ties(0.3, densities=(0.1, 0.2)), "strategy ties: density=0.3 has no effect beside densities (leave it out)"),
        (DareTies(0.3, densities=(0.1, 0.2)), "strategy dare_ties: density=0.3 has no effect beside densities"),
        (Della(0.4, densities=(0.5, 0.6)), "strategy della: density=0.4 has no effect beside densities"),
        (Breadcrumbs(0.3, densities=(0.1, 0.2)), "strategy breadcrumbs: density=0.3 has no effect beside densities"),
        (TaskArithmetic(0.3, scales=(0.1, 0.2)), "strategy task_arithmetic: scale=0.3 has no effect beside scales"),
        (Consensus(0.3, lambdas=(0.1, 0.2)), "strategy consensus: lambda=0.3 has no effect beside lambdas"),
        (Consensus(density=0.5), "strategy consensus: density=0.5 has no effect with vector=sum"),
        (TallMask(0, lambda_=0.3, lambdas=(0.1, 0.2)), "strategy tall_mask: lambda=0.3 has no effect beside lambdas"),
        (TallMask(lambda_=0.3), "strategy tall_mask: lambda=0.3 has no effect without a task: there is no mask"),
        (Emr(norm="tensors"), "strategy emr: norm=tensors has no effect without a task: there is no rescaling"),
        (Linear(space="classifiers"), "strategy linear: space=classifiers merges classifiers, not tensors"),
        (WiseFT(space="classifiers"), "strategy wise_ft: space=classifiers merges classifiers, not tensors"),
    ],
)
def test_what_a_merge_of_tensors_does_not_read(method, message):
    n = 1 if isinstance(method, WiseFT) else 2
    with pytest.raises(UserError) as refused:
        method.check(models(*([[1.0, 2.0]] * n), base=[0.0, 0.0]))
    assert str(refused.value).startswith(message)


def test_classifiers_are_weighed_by_numbers_alone():
    models = prompts(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    given = MergeInputs(models[0], tuple(models[1:]), (), None)
    assert Linear((1.0, 2.0, 1.0), space="classifiers").merge(given).weights == (0.25, 0.5, 0.25)
    for weights in ((1.0, (0.0, 1.0), 2.0), (1.0, {"attn": 0.0, "*": 1.0}, 2.0), ((0.0, 1.0),) * 3):
        with pytest.raises(
            UserError, match="strategy linear: a weight by depth or by name in the space of classifiers"
        ):
            Linear(weights, space="classifiers").merge(given)
    with pytest.raises(UserError, match="strategy linear: 2 weights for 3 models"):
        Linear((1.0, 2.0), space="classifiers").merge(given)
    with pytest.raises(UserError, match="the weights sum to zero"):
        Linear((0.1, 0.2, -0.3), space="classifiers").merge(given)  # 5.6e-17 to a computer
    one = MergeInputs(models[0], tuple(models[1:2]), (), None)
    assert WiseFT(0.25, space="classifiers").merge(one).weights == (0.75, 0.25)
    with pytest.raises(UserError, match="strategy wise_ft: alpha by depth or by name in the space of classifiers"):
        WiseFT((0.0, 1.0), space="classifiers").merge(one)


@pytest.mark.parametrize(
    ("strategy", "option"),
    [
        (Fisher(images=5), "images=5 has no effect on heads: all images count"),
        (RegMean(images=5), "images=5 has no effect on heads: all images count"),
        (MergeTune(space="weights"), "space=weights has no effect on a head"),
        (MergeTune(zero_shot="context"), "zero_shot=context has no effect on a head"),
        (MergeTune(accumulate=2), "accumulate=2 has no effect on a head"),
        (MergeTune(n_alpha=2), "n_alpha=2 has no effect beside alphas"),
        (MergeTune(crop=0.5), "crop=0.5 has no effect without views"),
        (MergeTune(flip=False), "flip=False has no effect without views"),
        (MergeTune(fisher_images=5), "fisher_images=5 has no effect on a head: all images count"),
    ],
)
def test_what_nothing_reads_of_a_head(strategy, option):
    given = heads([head([[1.0], [0.0]]), head([[0.0], [1.0]])], [[[1.0]], [[1.0]]])
    if isinstance(strategy, MergeTune):
        given = heads([head([[1.0], [0.0]])], [[[1.0]]])
    with pytest.raises(UserError) as refused:
        strategy.merge(given)
    assert option in str(refused.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"views": 2}, "views=2 has no effect on a prompt"),
        ({"accumulate": 2}, "accumulate=2 has no effect on a prompt"),
        ({"space": "weights", "zero_shot": "context"}, "zero_shot=context has no effect with space=weights"),
        ({"fisher_images": 5}, "fisher_images=5 has no effect on a prompt with space=classifiers: all images count"),
        ({"space": "weights", "fisher_images": 5}, "fisher_images=5 has no effect with surrogate=None"),
    ],
)
def test_what_nothing_reads_of_a_prompt(options, told):
    base, tuned = prompts(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(UserError) as refused:
        MergeTune(**options).merge(MergeInputs(base, (tuned,), (), None))
    assert told in str(refused.value)


def merge(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", "merge", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_a_recipes_options_and_weights_are_used_or_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in (("Z", 0.0), ("A", 1.0), ("B", 5.0)):
        save_file({"w": np.array([value], np.float32)}, f"{name}.safetensors")
    recipe = "weights: {models: [%s, B.safetensors], strategy: {name: linear, weights: [1, 3]}}\n"
    Path("both.yaml").write_text(recipe % "{path: A.safetensors, weight: 2}")
    code, _, err = merge(monkeypatch, capsys, "both.yaml", "-o", "out", "B=1")
    assert code == 2 and "both.yaml: weights= and weights by label (A, B) (give one of them)" in err
    Path("one.yaml").write_text(recipe % "A.safetensors")
    assert merge(monkeypatch, capsys, "one.yaml", "-o", "out")[0] == 0
    assert load_file("out/model.safetensors")["w"].tolist() == [4.0]
    code, out, _ = merge(monkeypatch, capsys, "one.yaml", "-o", "other", "--strategy", "uniform_soup")
    assert code == 0 and "one.yaml: the options of linear (weights) are not those of uniform_soup: left out" in out
    Path("based.yaml").write_text(
        "weights: {base: {path: Z.safetensors, weight: 1}, models: [{path: A.safetensors, weight: 1}], strategy: ties}\n"
    )
    code, _, err = merge(monkeypatch, capsys, "based.yaml", "-o", "third")
    assert code == 2 and "based.yaml: the base Z takes no weight (leave it out)" in err
