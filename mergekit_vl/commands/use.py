"""`eval` and `predict`: a finished model on a dataset, and on single images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_vl import options
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.recipe import set_option
from mergekit_vl.system.regular_files import read_text, user_path

if TYPE_CHECKING:
    from mergekit_vl.datasets.base import Progress
    from mergekit_vl.experiments.open_run import Used
    from mergekit_vl.models.model import Classes
    from mergekit_vl.registry.plugins import Registry

ModelArgument = Annotated[
    str, typer.Argument(help="a run folder, micro, clip:ARCH:PRETRAINED, vision:ARCH, or a folder that open_clip wrote")
]
Row = Annotated[str | None, typer.Option(help="row of the run; default its main strategy")]
CheckpointOption = Annotated[Path | None, typer.Option(help="tuned weights, a prompt or a head on the model")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]


def evaluate_model(
    given: str,
    words: Sequence[str],
    registry: Registry,
    *,
    dataset: str | None,
    split: str,
    row: str | None,
    checkpoint: Path | None,
    device: str,
    progress: Progress,
    allow_env: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of a model on a split of a dataset, as CLIP_benchmark writes them, with ours beside."""
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.models.evaluate import evaluate
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.model import Classes
    from mergekit_vl.reports.results import plain

    progress(0, 0, "loading the model")
    used = open_model(given, registry, row=row, device=device, checkpoint=checkpoint, allow_env=allow_env)
    data = _dataset(used, dataset, words, registry).load(progress)
    parts = {"test": data.test, "val": data.val, "train": data.train, **data.shifts}
    if split not in parts:
        raise unknown("split", split, parts, where=data.name)
    part = parts[split]
    shown = tuple(sorted(set(part.labels.tolist()))) if split in data.shifts else tuple(range(len(data.classes)))
    classes = Classes(data.classes, data.templates).subset(shown)
    store = FeatureStore(report=progress)
    scores, seconds, *_ = evaluate(used.model, classes, part.of_classes(shown), store)
    told = plain(scores)
    return {
        "dataset": data.name,
        "split": split,
        "model": used.label,
        "task": "zeroshot_classification",
        "language": "en",
        "classes": len(classes.names),
        "metrics": {key: told.pop(key) for key in ("acc1", "acc5", "mean_per_class_recall")},
        **told,
        "ms_per_sample": 1000 * seconds,
    }


def _dataset(used: Used, name: str | None, words: Sequence[str], registry: Registry) -> Any:
    """The named dataset with `key=value` options, or the run's own first one with those changed."""
    given: dict[str, Any] = {}
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
    return options.build(registry.find("datasets", name).resolve(), given, where=f"dataset {name}")


def predict_images(
    given: str,
    images: Sequence[str],
    registry: Registry,
    *,
    classes: str | None,
    top: int,
    row: str | None,
    checkpoint: Path | None,
    device: str,
    progress: Progress,
    max_megapixels: float | None = None,
    allow_env: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The `top` classes of each image with their probabilities."""
    import torch

    from mergekit_vl.datasets.folder import MOST_MEGAPIXELS, check_megapixels
    from mergekit_vl.experiments.open_run import open_model
    from mergekit_vl.models.model import image_encoders
    from mergekit_vl.models.views import prefetched, test_view

    megapixels = MOST_MEGAPIXELS if max_megapixels is None else max_megapixels
    check_megapixels(megapixels)
    files = _files(images)
    progress(0, 0, "loading the model")
    used = open_model(given, registry, row=row, device=device, checkpoint=checkpoint, allow_env=allow_env)
    known = _classes(used, classes)
    head = used.model.bind(known)
    out: list[dict[str, Any]] = []
    load = _loader(files, megapixels)
    paths = image_encoders(used.model, known)
    size = min(len(files), *(path.backbone.block for path in paths))
    features: dict[str, list[Any]] = {}
    for path in paths:
        features[path.key] = []
        for batch in prefetched(lambda i, path=path: test_view(load(i), path), len(files), size):  # type: ignore[misc]
            features[path.key].append(path.encode(batch, block=size))
            progress(sum(map(len, features[path.key])), len(files), "images")
    with torch.no_grad():
        probabilities = head({key: torch.cat(parts) for key, parts in features.items()}).float().softmax(-1).cpu()
    for file, row_ in zip(files, probabilities):
        best = row_.topk(min(top, len(known.names)))
        logits_of = [{"class": known.names[i], "p": p} for p, i in zip(best.values.tolist(), best.indices.tolist())]
        out.append({"image": str(file), "classes": logits_of})
    return out


def _classes(used: Used, given: str | None) -> Classes:
    from mergekit_vl.models.model import Classes

    if given is None:
        if used.classes is None:
            raise UserError(
                "no class names", where="command line", hint="name them: --classes dog,cat or a file of lines"
            )
        return used.classes
    names = read_text(user_path(given)).splitlines() if os.path.exists(os.path.expanduser(given)) else given.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"class names {given!r}", where="--classes", hint="at least two, each once")
    return Classes(tuple(names), used.classes.templates if used.classes else Classes.templates)


def _files(given: Sequence[str]) -> list[Path]:
    from mergekit_vl.datasets.folder import readable_suffixes

    kinds = readable_suffixes()
    files: list[Path] = []
    for name in given:
        if not name:  # which Path reads as this folder
            raise UserError("'' is no image", where="command line", hint="give image files or folders of them")
        path = user_path(name)
        if path.is_dir():
            files += _below(path, kinds)
        elif path.exists():
            files.append(path)
        else:
            raise UserError("no such image", where=str(path), hint="give image files or folders of them")
    if not files:
        raise UserError("no images", where=", ".join(given), hint="give image files or folders of them")
    return files


def _below(folder: Path, kinds: set[str]) -> list[Path]:
    """The images in a folder and the folders below, none that is hidden or that a link leads to."""
    from mergekit_vl.datasets.folder import entries_of

    found, waiting = [], [folder]
    while waiting:
        here = waiting.pop()
        for name, is_folder in entries_of(here):
            if is_folder and not (here / name).is_symlink():
                waiting.append(here / name)
            elif not is_folder and Path(name).suffix.lower() in kinds:
                found.append(here / name)
    return sorted(found)


def _loader(files: Sequence[Path], megapixels: float) -> Callable[[int], Any]:
    from mergekit_vl.datasets.folder import decode

    def load(i: int) -> Any:
        try:
            return decode(files[i], megapixels=megapixels)
        except UserError:
            raise
        except Exception as error:  # PIL's decoders raise nearly anything
            raise UserError(f"cannot be decoded: {error}", where=str(files[i]), hint="leave it out") from None

    return load
