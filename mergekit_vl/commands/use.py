"""`eval` and `predict`: a finished model on a dataset, and on single images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_vl import options
from mergekit_vl.commands import arguments
from mergekit_vl.commands.terminal import TerminalReporter, say
from mergekit_vl.errors import UserError
from mergekit_vl.recipes.overrides import set_option
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import device_of

if TYPE_CHECKING:
    from mergekit_vl.experiments.open_run import LoadedModel
    from mergekit_vl.models.model import Classes


def evaluate(
    model: arguments.ModelArgument,
    words: Annotated[list[str] | None, typer.Argument(help="options of the dataset: path=~/pets")] = None,
    dataset: Annotated[str | None, typer.Option(help="see mergekit-vl list datasets; default the run's own")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test, val, train, all, or a shift of the dataset; default test, of a folder without split folders all"
        ),
    ] = None,
    row: arguments.Row = None,
    checkpoint: arguments.Checkpoint = None,
    weights: arguments.Weights = None,
    allow_env: arguments.AllowEnv = None,
    device: arguments.Device = "auto",
    as_json: arguments.AsJson = False,
) -> None:
    """Score a finished model, or a backbone as it is, on a dataset, against all of its class names."""
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.experiments.use import evaluate_on, load_for
    from mergekit_vl.models.features import FeatureStore

    with TerminalReporter(not as_json) as reporter:
        reporter.progress(0, 0, "loading the model")
        used = open_model(
            model, registry(), row=row, device=device_of(device), checkpoint=checkpoint, allow_env=allow_env or (),
            weights=weights,
        )  # fmt: skip
        data, part = load_for(_dataset(used, dataset, words or []), split, reporter, of_run=dataset is None)
        found = evaluate_on(used.model, used.label, data, part, FeatureStore(reporter=reporter))
    scores: dict[str, Any] = found.to_json()
    if as_json:
        say(json.dumps(scores))
        return
    metrics = scores["metrics"]
    say(
        f"{scores['model']} on {scores['dataset']} ({scores['split']}, {scores['n']} images, {scores['classes']} classes)"
    )
    say(f"  accuracy        {100 * metrics['acc1']:.1f}  (95% {100 * scores['low']:.1f} to {100 * scores['high']:.1f})")
    say(f"  top-5           {100 * metrics['acc5']:.1f}")
    say(f"  mean per class  {100 * metrics['mean_per_class_recall']:.1f}")
    say(f"  NLL, ECE        {scores['nll']:.3f}, {scores['ece']:.3f}")


def predict(
    model: arguments.ModelArgument,
    images: Annotated[list[str], typer.Argument(help="image files, or folders of them")],
    classes: Annotated[str | None, typer.Option(help="dog,cat,... or a file of lines; default the run's own")] = None,
    top: Annotated[int, typer.Option(min=1, help="answers an image")] = 3,
    max_megapixels: Annotated[
        float | None, typer.Option(help="images with more million pixels are refused; default 64")
    ] = None,
    row: arguments.Row = None,
    checkpoint: arguments.Checkpoint = None,
    weights: arguments.Weights = None,
    allow_env: arguments.AllowEnv = None,
    device: arguments.Device = "auto",
    as_json: arguments.AsJson = False,
) -> None:
    """Name what is on images, with probabilities."""
    from mergekit_vl.datasets.image_files import MOST_MEGAPIXELS, check_megapixels
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.experiments.use import best, from_files, image_files, named_classes, probabilities, readable

    megapixels = MOST_MEGAPIXELS if max_megapixels is None else max_megapixels
    check_megapixels(megapixels)
    with TerminalReporter(not as_json) as reporter:
        files = readable(image_files(images), images, megapixels, reporter)
        reporter.progress(0, 0, "loading the model")
        used = open_model(
            model, registry(), row=row, device=device_of(device), checkpoint=checkpoint, allow_env=allow_env or (),
            weights=weights,
        )  # fmt: skip
        known = _classes(used, None if classes is None else named_classes(classes, reporter))
        found = probabilities(used.model, known, from_files(files, megapixels), len(files), reporter)
    likeliest = best(found, known.names, top)
    if as_json:
        answers = ([{"class": name, "p": p} for name, p in each] for each in likeliest)
        say(json.dumps([{"image": str(file), "classes": each} for file, each in zip(files, answers)]))
        return
    for file, each in zip(files, likeliest):
        say(f"{file}: {', '.join(f'{name} {p:.2f}' for name, p in each)}")


def _dataset(used: LoadedModel, name: str | None, words: Sequence[str]) -> Any:
    """The named dataset with `key=value` options, or the run's own first one with those changed."""
    given: dict[str, object] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not an option", where="command line", hint="write key=value: path=~/pets")
        set_option(given, word, key, value)
    if name is None:
        if used.recipe is None:
            raise UserError("no dataset", where="command line", hint="name one: --dataset folder path=~/pets")
        spec = used.recipe.datasets[0]
        name, given = spec.name, {**spec.options, **given}
    return options.build(registry().find("datasets", name).resolve(), given, where=f"dataset {name}")


def _classes(used: LoadedModel, names: tuple[str, ...] | None) -> Classes:
    from mergekit_vl.models.model import Classes

    if names is not None:
        return Classes(names, used.classes.templates if used.classes else Classes.templates)
    if used.classes is None:
        raise UserError("no class names", where="command line", hint="name them: --classes dog,cat or a file of lines")
    return used.classes
