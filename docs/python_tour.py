"""A tour of the Python API that uses every public name, in seconds: `python docs/python_tour.py`. The tests run it.

Part 1 merges tensors. Part 2 runs a recipe and uses the model. Part 3 writes a plugin of every kind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import mergekit_vl as mk


def merging(folder: Path) -> None:
    """1. State dicts, modules and files go through one function."""
    zero_shot, a, b = ({"w": torch.tensor([x, 0.0]), "steps": torch.tensor(0)} for x in (0.0, 1.0, 3.0))
    merged: dict[str, Tensor] = mk.merge([a, b], base=zero_shot, strategy="ties", density=1.0)
    assert merged["w"].tolist() == [2.0, 0.0]
    labelled = mk.merge({"cars": a, "pets": b}, strategy="linear", weights={"cars": 3, "pets": 1})
    assert labelled["w"].tolist() == [1.5, 0.0]
    module: nn.Module = mk.merge([nn.Linear(2, 2), nn.Linear(2, 2)], strategy="uniform_soup")
    assert isinstance(module, nn.Linear)
    for name, state in (("base", zero_shot), ("a", a), ("b", b)):
        torch.save(state, folder / f"{name}.pt")
    written: mk.MergedFolder = mk.merge([folder / "a.pt", folder / "b.pt"], folder / "base.pt", out=folder / "merged")
    print(written, written.state_dict())
    try:
        mk.merge([a, b], base=zero_shot, densty=0.5)
    except mk.UserError as error:
        print("an error says how to mend it:", error)
    listed: mk.Strategies = mk.list_strategies()
    print(listed["ties"])


RECIPE = {
    "backbone": {"name": "micro"},
    "dataset": {"name": "microworld", "task": "sea_and_sky_emboss"},
    "protocol": {"name": "few_shot", "shots": 1},
    "tuned": [{"tuner": {"name": "coop", "epochs": 1}}],
    "strategy": [{"name": "wise_ft", "alpha": 0.3}],
}


def running(folder: Path) -> None:
    """2. A recipe is checked and run; the model that it made is scored and used."""
    plan: mk.Checked = mk.check(RECIPE)
    print(plan)
    result: mk.RunResult = mk.run(RECIPE, out=folder / "run")
    print(result, result.changed[0].classes[0])
    model: mk.LoadedModel = mk.load_model(folder / "run")
    scored: mk.Evaluated = mk.evaluate(model, split="val", cache=False)
    scores: mk.Scores = scored.scores
    assert 0 <= scores.acc1 <= 1
    picture = Image.new("RGB", (48, 48), "red")
    found: mk.Predictions = mk.predict(model, [picture], classes=mk.Classes(("apple", "fish", "dog")))
    print(found)
    recipe: mk.Recipe = result.recipe
    table: mk.BenchResult = mk.bench({**RECIPE, "controls": False, "search": {"by": "none"}}, out=folder / "bench")
    print(recipe.name, table)
    for name in ("shapes", "colours"):
        for i, colour in enumerate(("red", "blue", "green")):
            (folder / name / f"{colour}").mkdir(parents=True)
            for n in range(4):
                Image.new("RGB", (48, 48), (80 * i, 20 * n, 60)).save(folder / name / colour / f"{n}.png")
    prompts = [next((folder / "run" / "state").glob("*/coop.safetensors")), folder / "again.safetensors"]
    prompts[1].write_bytes(prompts[0].read_bytes())
    repaired = mk.repair("micro", prompts[0], new=folder / "shapes", keep=folder / "colours", out=folder / "repaired")
    soup = mk.soup(prompts, base="micro", val=folder / "shapes", out=folder / "soup")
    print(repaired.chosen, soup.chosen)


# 3. A plugin: everything that it needs comes from the same module


@mk.closed_form("tour_mean", chunks="accumulating", averages=True)
@dataclass(frozen=True)
class Mean:
    """The weighted mean of the tuned models, model by model."""

    weights: tuple[mk.Coefficient, ...] = mk.per_model("one per tuned model; empty: all 1")

    def check(self, models: mk.Models) -> None:
        models.check_sum("strategy tour_mean", self.weights, len(models.tuned), hint="change them")

    def merge_chunk(self, chunk: mk.Chunk, stats: Any) -> mk.Array:
        weights = chunk.weights(self.weights)
        return mk.weighted_sum(chunk.tuned, [w / sum(weights) for w in weights])


@mk.closed_form("tour_scaled", needs_base=True, passes=1, alone="every task vector is scaled to length 1")
@dataclass(frozen=True)
class Scaled:
    """base + scale * the sum of the task vectors, each divided by the sum of its magnitudes in the tensor."""

    scale: mk.Coefficient = mk.coefficient(1.0, "of the sum", low=0)

    def prepass(self, models: mk.Models, run: mk.Run, chunk_size: int) -> Mapping[str, mk.Array]:
        return mk.absolute_sums(models, lambda chunk: list(chunk.task_vectors), run, chunk_size)

    def merge_chunk(self, chunk: mk.Chunk, stats: Mapping[str, mk.Array]) -> mk.Array:
        sums = np.maximum(stats[chunk.tensor.name], 1e-12)
        return mk.add_to_base(chunk, mk.weighted_sum(chunk.task_vectors, list(1 / sums)), chunk.at(self.scale))


def _every_other(method: Any, chunk: mk.Chunk, i: int, stats: Any) -> mk.Array:
    vector = chunk.task_vectors[i]
    vector[1 - chunk.start % 2 :: 2] = 0
    return vector


@mk.sparse("tour_halves", mk.Drop(_every_other), alone="every other element is dropped")
@dataclass(frozen=True)
class Halves:
    """Every other element of each task vector, then the signs and mean of TIES or their sum."""

    density: mk.Coefficient = mk.coefficient(0.5, "for `sparse`; not read")
    densities: tuple[mk.Coefficient, ...] = mk.per_model("one per tuned model", instead_of="density")
    weights: tuple[mk.Coefficient, ...] = mk.per_model("one per tuned model; empty: all 1")
    scale: mk.Coefficient = mk.coefficient(1.0, "of the merged task vector")
    elect: str = mk.option("raw", "elect the sign before or after the weights")
    mean: bool = mk.option(True, "mean over the agreeing models; false: the plain sum")

    def merge_chunk(self, chunk: mk.Chunk, stats: Any) -> mk.Array:
        vectors = mk.Drop(_every_other).vectors(self, chunk, stats)
        return mk.elected(self, chunk, vectors) if self.mean else mk.summed(self, chunk, vectors)


class Files:
    """Images of a dataset: anything with a key, a length and `load`."""

    def __init__(self, n: int, seed: int) -> None:
        self.pictures = np.random.default_rng(seed).integers(0, 255, (n, 48, 48, 3), dtype=np.uint8)
        self.key = f"tour:{n}:{seed}"

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pictures[index])


def split(n: int, seed: int) -> mk.Split:
    source: mk.ImageSource = Files(n, seed)
    return mk.Split(source, np.arange(n), np.arange(n) % 3)


@dataclass(frozen=True)
class Noise:
    """A dataset of noise, in three classes."""

    images: int = mk.option(6, "of each split")

    def load(self, reporter: mk.Reporter) -> mk.Dataset:
        reporter.progress(0, 0, "drawing")
        return mk.Dataset("noise", ("dog", "car", "apple"), ("a {}.",), *(split(self.images, i) for i in range(3)))


@dataclass(frozen=True)
class OneShot:
    """One image of each class to tune on; tested on all classes."""

    def task(self, dataset: mk.Dataset, seed: int) -> mk.Task:
        classes = mk.Classes(dataset.classes, dataset.templates)
        data = mk.TaskData(classes, mk.few_shot(dataset.train, 1, seed, name=dataset.name), dataset.val)
        return mk.Task((data,), (("test", classes, dataset.test),), mk.Metric("accuracy", {"test": ("test",)}))


@dataclass(frozen=True, eq=False)
class Residual:
    """An adapter: text(class) + residual [K, D], for the classes that it was tuned on."""

    residual: Tensor
    names: tuple[str, ...]

    space = "tour_residual"
    about = mk.About("a residual", "residuals", makes_texts=True, lr=1.0, weight_decay=0.0)
    chosen = {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"residual": self.residual}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Residual:
        return replace(self, residual=tensors["residual"])

    def untuned(self, backbone: mk.Backbone) -> Residual:
        return replace(self, residual=torch.zeros_like(self.residual))

    def aligned(self, others: Any) -> Any:
        if any(other.names != self.names for other in others):
            raise mk.Unsuitable("residuals of different classes", hint="tune them on the same classes")
        return others

    def image_encoder(self, backbone: mk.Backbone) -> mk.ImageEncoder:
        return mk.ImageEncoder(backbone)

    def text_features(self, backbone: mk.Backbone, classes: mk.Classes) -> Tensor:
        if classes.names != self.names:
            raise mk.Unsuitable("a residual knows its own classes alone", hint="test it on them")
        return mk.ZeroShot().text_features(backbone, classes) + self.residual

    def bind(self, backbone: mk.Backbone, classes: mk.Classes) -> mk.Head:
        head: mk.CosineHead = mk.cosine_head(backbone, self.text_features(backbone, classes))
        return head

    def networks(self, backbone: mk.Backbone, classes: Any, *, training: bool) -> list[mk.Network]:
        def network(each: mk.Classes) -> mk.Network:
            text = mk.ZeroShot().text_features(backbone, each)
            return mk.TextNetwork(self, backbone, each, lambda tensors: text + tensors["residual"])

        return [network(each) for each in classes]

    def linear_maps(self, features: Tensor) -> Mapping[str, Tensor]:
        return {}

    def with_chosen(self, chosen: Mapping[str, float]) -> Residual:
        return self

    def started_from(self, base: mk.Adapter, backbone: mk.Backbone, classes: mk.Classes) -> Residual:
        return self

    def check(self, backbone: mk.Backbone) -> None:
        if backbone.width not in (None, self.residual.shape[1]):
            raise mk.UserError("a residual of another width", where=backbone.spec, hint="use its own backbone")

    def save(self, path: Path, *, backbone: str) -> None:
        facts = {"adapter": "tour_residual", "backbone": backbone, "names": list(self.names)}
        mk.write_adapter(path, self.tensors, facts)

    @classmethod
    def load(cls, path: Path, *, device: str = "cpu") -> Residual:
        tensors, facts = mk.read_adapter(path, "tour_residual", device)
        return cls(tensors["residual"], tuple(facts["names"]))

    def usage(self, backbone: mk.Backbone) -> mk.Usage | None:
        return mk.Usage("The file holds the residual that {main} made.", ("# text = text + residual",))

    def whole(self, backbone: mk.Backbone) -> mk.Whole | None:
        return None


@dataclass(frozen=True)
class TuneResidual:
    """Cross-entropy over the residual, by SGD."""

    epochs: int = mk.option(2, "passes over the shots")

    def tune(self, inputs: mk.MergeInputs) -> mk.Single:
        backbone, classes = inputs.base.backbone, inputs.data[0].classes
        start = Residual(torch.zeros_like(mk.ZeroShot().text_features(backbone, classes)), classes.names)
        training: mk.Training = mk.train(
            mk.Single(backbone, start), inputs, what="residual", epochs=self.epochs, batch=3, augment=mk.Augment()
        )
        for step in training:
            with step:
                step.minimise(mk.cross_entropy(training.network(step.weights, step.x), step.labels))
        return mk.Single(backbone, training.adapter())


@dataclass(frozen=True)
class Nearer:
    """A strategy that is no closed form: the line from the base to one tuned model, or an ensemble of both, by a choice of its own."""

    together: bool = mk.option(False, "ensemble their outputs")

    def merge(self, inputs: mk.MergeInputs) -> mk.Model:
        if self.together:
            both = (inputs.base, *inputs.tuned)
            return mk.Ensemble(both, (1 / len(both),) * len(both), choice=mk.Choice({"together": True}, "val"))
        base, tuned = mk.endpoints(inputs)
        tensors = {
            name: torch.lerp(start, tuned[0].adapter.tensors[name], 0.3) for name, start in base.adapter.tensors.items()
        }
        return mk.as_model(base, tensors, inputs)


@mk.hookimpl
def register_strategies(register: mk.Register) -> None:
    register("tour_mean", Mean, "the weighted mean")
    register("tour_scaled", Scaled, "task vectors of one length")
    register("tour_halves", Halves, "every other element")
    register("tour_nearer", Nearer, "a line, or an ensemble")


def plugins() -> None:
    """What is written above is checked by the kit that the built-ins pass."""
    from mergekit_vl import testing

    a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}
    assert mk.merge([a, b], strategy=Mean())["w"].tolist() == [2.0, 3.0]
    method: mk.ClosedForm = Scaled()
    info: mk.MethodInfo = method.info
    assert info.needs_base and mk.merge([b], base=a, strategy=method)["w"].tolist() == [1.5, 2.5]
    assert mk.merge([b], base=a, strategy=Halves())["w"].tolist() in ([3.0, 2.0], [1.0, 4.0])
    for strategy in (Mean(), Scaled(), Nearer(), Nearer(together=True)):
        testing.check_strategy(strategy)
    testing.check_dataset(Noise())
    testing.check_protocol(OneShot())
    model = testing.check_tuner(TuneResidual())
    testing.check_adapter(model.adapter)


def kinds() -> None:
    """The other names are types: what a class of each kind has, and what models are made of."""
    contracts = (mk.BackboneOptions, mk.Adapter, mk.TextAdapter, mk.Line, mk.Tuner, mk.Strategy, mk.DatasetOptions)
    assert all(
        isinstance(each, type) for each in (*contracts, mk.EvaluationProtocol, mk.Source, mk.AffineHead, mk.Mixture)
    )
    assert issubclass(mk.Unsuitable, mk.UserError) and issubclass(mk.Failed, mk.UserError)
    assert (
        callable(mk.merge_adapters) and callable(mk.model_ranks) and callable(mk.tensor_ranks) and callable(mk.agreeing)
    )
    assert mk.FeatureStore(None).encoded == 0 and mk.__version__


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        merging(Path(folder))
        running(Path(folder))
    plugins()
    kinds()


if __name__ == "__main__":
    main()
