"""`load_model`, `evaluate` and `predict`: finished runs and plain backbones at work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl import options
from mergekit_vl.api.notebook import PYTHON_WARNINGS
from mergekit_vl.datasets.base import Dataset
from mergekit_vl.datasets.image_files import MOST_MEGAPIXELS, check_megapixels
from mergekit_vl.errors import UserError
from mergekit_vl.experiments.open_run import LoadedModel, open_model
from mergekit_vl.experiments.use import (
    Evaluated,
    View,
    best,
    evaluate_on,
    from_files,
    image_files,
    load_for,
    probabilities,
)
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.model import Classes
from mergekit_vl.registry.plugins import registry
from mergekit_vl.reporter import Reporter
from mergekit_vl.reports.render import notebook_table
from mergekit_vl.system.devices import device_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mergekit_vl.datasets.base import DatasetOptions
    from mergekit_vl.models.model import Model


def load_model(
    model: str | Path,
    *,
    row: str | None = None,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    allow_env: Sequence[str] = (),
    weights: str | None = None,
) -> LoadedModel:
    """A model to be used: a row of a finished run (default its main strategy's), or a backbone as it is.

    `model` is a run folder, or what the commands take: `micro`, `clip:ViT-B-32:openai`, `vision:resnet18`, a folder that open_clip
    wrote. `checkpoint` is tuned weights, a prompt or a head on it; `weights` says which are taken of a file with several: plain, ema, or the key of one. Its `.model` is the Model; its `.classes` are those of the run.
    """
    file = None if checkpoint is None else Path(checkpoint)
    return open_model(
        str(model),
        registry(),
        row=row,
        device=device_of(device),
        checkpoint=file,
        allow_env=tuple(allow_env),
        weights=weights,
    )


def evaluate(
    model: LoadedModel | Model | str | Path,
    data: Dataset | DatasetOptions | str | None = None,
    *,
    split: str | None = None,
    device: str = "auto",
    cache: bool = True,
    reporter: Reporter = PYTHON_WARNINGS,
    **dataset_options: object,
) -> Evaluated:
    """Score a model on a split of a dataset, against all of its class names, by the evaluator of every report.

    `data` is a Dataset, a dataset with its options (`Microworld(task="...")`), or a registered name with its options:
    `evaluate(model, "folder", path="~/pets")`. Without it, it is the first dataset of the model's run. `split` is test, val, train,
    all, or a shift of the dataset; by default test, and all images of a folder that has no split folders. Features are kept on disk unless `cache` is False.
    """
    used = _used(model, device)
    dataset, part = _dataset(used, data, dataset_options, split, reporter)
    store = FeatureStore(reporter=reporter) if cache else FeatureStore(None, reporter=reporter)
    return evaluate_on(used.model, used.label, dataset, part, store)


@dataclass(frozen=True)
class Predictions(Sequence["tuple[str, float]"]):
    """Probabilities of class names for images: as a sequence, the likeliest (name, probability) of each image."""

    images: tuple[str, ...]
    names: tuple[str, ...]
    probabilities: Tensor
    """[B, K], float32, on the CPU."""

    def top(self, n: int = 3) -> list[list[tuple[str, float]]]:
        """For each image the `n` likeliest names with their probabilities."""
        return best(self.probabilities, self.names, n)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: Any) -> Any:
        found = [first for (first,) in self.top(1)]
        return found[i]

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter([first for (first,) in self.top(1)])

    def _rows(self) -> list[list[str]]:
        return [
            [image, ", ".join(f"{name} {p:.2f}" for name, p in likeliest)]
            for image, likeliest in zip(self.images, self.top())
        ]

    def __repr__(self) -> str:
        return "\n".join(f"{image}: {told}" for image, told in self._rows())

    def _repr_html_(self) -> str:
        return notebook_table(self._rows(), header=("image", "likeliest"))


def predict(
    model: LoadedModel | Model | str | Path,
    images: Any,
    classes: Classes | Sequence[str] | None = None,
    *,
    device: str = "auto",
    max_megapixels: float = MOST_MEGAPIXELS,
    reporter: Reporter = PYTHON_WARNINGS,
) -> Predictions:
    """What is on images, with probabilities.

    `images` are paths of files or folders, PIL images, or one batch [B, 3, H, W]: of uint8 it is prepared as files are, of floats it
    is taken as prepared by the model's own transform. `classes` are names, or Classes with templates; of a run, its own by default.
    """
    check_megapixels(max_megapixels)
    used = _used(model, device)
    known = _classes(used, classes)
    labels, view = _views(images, max_megapixels)
    return Predictions(labels, known.names, probabilities(used.model, known, view, len(labels), reporter))


def _used(model: LoadedModel | Model | str | Path, device: str) -> LoadedModel:
    if isinstance(model, (str, Path)):
        return load_model(model, device=device)
    return model if isinstance(model, LoadedModel) else LoadedModel(model, type(model).__name__)


def _dataset(
    used: LoadedModel,
    data: Dataset | DatasetOptions | str | None,
    given: Mapping[str, object],
    split: str | None,
    reporter: Reporter,
) -> tuple[Dataset, str]:
    """The dataset, and the split that is scored."""
    if given and not isinstance(data, str | None):
        raise UserError(f"{next(iter(given))}= beside a dataset that is made", where="evaluate", hint="leave it out")
    if isinstance(data, Dataset):
        return data, split or "test"
    of_run = data is None
    if data is None:
        if used.recipe is None:
            raise UserError("no dataset", where="evaluate", hint='name one: evaluate(model, "folder", path="~/pets")')
        spec = used.recipe.datasets[0]
        data, given = spec.name, {**spec.options, **given}
    if isinstance(data, str):
        cls: type[DatasetOptions] = registry().find("datasets", data, where="evaluate").resolve()
        data = options.build(cls, given, where=f"dataset {data}")
    return load_for(data, split, reporter, of_run=of_run)


def _classes(used: LoadedModel, given: Classes | Sequence[str] | None) -> Classes:
    if isinstance(given, Classes):
        return given
    if given is None:
        if used.classes is None:
            raise UserError("no class names", where="predict", hint='name them: classes=["dog", "cat"]')
        return used.classes
    names = tuple(given.split(",")) if isinstance(given, str) else tuple(given)
    names = tuple(name.strip() for name in names)
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        raise UserError(f"class names {names}", where="predict", hint="at least two, each once")
    return dataclasses.replace(used.classes, names=names) if used.classes else Classes(names)


def _views(images: Any, megapixels: float) -> tuple[tuple[str, ...], View]:
    """What each image is called, and its test view."""
    import torch
    from PIL.Image import Image

    from mergekit_vl.models.views import eval_view

    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"a tensor of shape {tuple(images.shape)}", where="predict", hint="one batch [B, 3, H, W]")
        labels = tuple(f"image {i}" for i in range(len(images)))
        if images.is_floating_point():
            batch = images.float()
            return labels, lambda encoder, i: batch[i]
        images = [_pil(image) for image in images]
    one = isinstance(images, (str, Path, Image))
    given = [images] if one else list(images)
    if not given:
        raise UserError("no images", where="predict", hint="give paths, PIL images, or a batch [B, 3, H, W]")
    if all(isinstance(image, (str, Path)) for image in given):
        files = image_files([str(image) for image in given])
        return tuple(map(str, files)), from_files(files, megapixels)
    for image in given:
        if not isinstance(image, Image):
            raise UserError(
                f"a {type(image).__name__} is no image", where="predict", hint="give paths, PIL images, or one batch"
            )
    pictures = [image.convert("RGB") for image in given]
    return tuple(f"image {i}" for i in range(len(pictures))), lambda encoder, i: eval_view(pictures[i], encoder)


def _pil(image: Tensor) -> Image:
    from torchvision.transforms.functional import to_pil_image

    made: Image = to_pil_image(image.cpu())
    return made
