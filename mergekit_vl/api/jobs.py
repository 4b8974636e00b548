"""`repair` and `soup`: a fine-tuned model that forgot, and several that are to be one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_vl.api.notebook import PYTHON_WARNINGS
from mergekit_vl.api.running import RunResult, run
from mergekit_vl.experiments import jobs
from mergekit_vl.registry.plugins import registry
from mergekit_vl.reporter import Reporter


def repair(
    base: str | Path,
    tuned: str | Path,
    *,
    new: str | Path,
    keep: str | Path | Sequence[str | Path],
    budget: str | float | None = None,
    train: bool = False,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    reporter: Reporter = PYTHON_WARNINGS,
) -> RunResult:
    """The best that can be made of a model and what it was tuned into, on images of what is new and of what must be kept.

    `base` is a model as `load_model` takes it, `tuned` a file or folder of weights after tuning. `new` is a folder of class folders,
    `keep` are other such folders, or names of classes of `new`. The best has the highest harmonic mean on validation images of both
    sides; with `budget`, in points, it gains the most on `new` and loses no more than that on `keep`. `train` also tries MergeTune.
    `overrides` change the recipe: `["dataset.0.template=a photo of a {}, a pet."]`. The folder of the result has a model that open_clip or
    timm loads in `merged/`. Raises UserError as `run` does. Without images, use `merge([tuned], base, "monosoup")`.
    """
    kept = [keep] if isinstance(keep, (str, Path)) else list(keep)
    recipe = jobs.repair(
        str(base),
        str(tuned),
        new=str(new),
        keep=[str(each) for each in kept],
        budget=budget,
        train=train,
        overrides=overrides,
        registry=registry(),
    )
    return run(recipe, out=out, device=device, force=force, reporter=reporter)


def soup(
    models: Sequence[str | Path],
    *,
    val: str | Path,
    base: str | Path | None = None,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    reporter: Reporter = PYTHON_WARNINGS,
) -> RunResult:
    """The greedy and the uniform soup of models that were tuned from one base; `result.chosen["ingredients"]` names those of the greedy one.

    `val` is a folder of class folders: ingredients are chosen on its validation images, and scores are of its test images. `base` is the
    model before tuning as `load_model` takes it, by default the first model. Raises UserError as `run` does.
    """
    recipe = jobs.soup(
        [str(model) for model in models],
        val=str(val),
        base=None if base is None else str(base),
        overrides=overrides,
        registry=registry(),
    )
    return run(recipe, out=out, device=device, force=force, reporter=reporter)
