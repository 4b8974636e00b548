"""Loss and accuracy between models: along straight lines, and on the plane through three of them.

A point is an affine combination of named models, its coefficients [N] summing to 1. What is combined is told by the space: raw text
features (`classifiers`), context vectors, linear heads, towers. A line or a plane is one batched evaluation over stored image
features: stacked classifiers, stacked contexts, and of heads, whose logits are linear in their weights, the logits themselves.
Towers are the exception: each point is a network of its own that reads every image (a loop; batching it over stacked weights is slower).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mergekit_vl.errors import UserError
from mergekit_vl.reports.landscape_results import Barrier, CellLandscape, MeanLandscape, Plane
from mergekit_vl.reports.results import LinePoint

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_vl.datasets.base import Split
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.model import Classes, Model, Single

    Tests = Sequence[tuple[str, Classes, Split]]
    Logits = Callable[[Tensor, Classes, Split], Tensor]
    """(coefficients [S, N], classes, split) -> [S, B, K]."""

P = TypeVar("P", LinePoint, Barrier)
SEGMENTS = (("zero-shot", "tuned"), ("zero-shot", "merged"), ("merged", "tuned"))
"""The straight line, and the way through the merged model."""
CHUNK_SIZE = 1 << 24
"""Logits that are held at once."""
MARGIN = 0.25
"""How far the plane reaches beyond the three models, in units of their distances."""
FLAT = 1e-3
"""Below this height over the line from zero-shot to tuned (its length being 1) the three models span no plane."""


@dataclass(frozen=True)
class Landscape:
    """What lies between `names` in one space: logits(coefficients [S, N], classes, split) is [S, B, K]."""

    space: str
    names: tuple[str, ...]
    logits: Logits
    products: Callable[[Tests], Tensor]
    """Inner products [N, N] of the models as vectors."""

    def measure(self, coefficients: Tensor, tests: Tests) -> list[dict[str, dict[str, float]]]:
        """Accuracy and mean negative log-likelihood of each point [S, N] on each test."""
        import torch

        out: list[dict[str, dict[str, float]]] = [{} for _ in coefficients]
        for name, classes, split in tests:
            labels = torch.from_numpy(split.labels)
            size = max(1, CHUNK_SIZE // max(1, len(labels) * len(classes.names)))
            for start in range(0, len(coefficients), size):
                with torch.no_grad():
                    z = self.logits(coefficients[start : start + size], classes, split).float().cpu()
                right = (z.argmax(-1) == labels).double().mean(-1)
                losses = (
                    -z.log_softmax(-1).gather(-1, labels[None, :, None].expand(len(z), -1, 1)).double().mean((1, 2))
                )
                for i, (acc1, nll) in enumerate(zip(right.tolist(), losses.tolist()), start):
                    out[i][name] = {"acc1": acc1, "nll": nll}
        return out


def landscapes(base: Single, tuned: Model, merged: Model | None, store: FeatureStore) -> list[Landscape]:
    """Between zero-shot, the merged model (where it lies in the same space) and the tuned one: of classifiers, and of their own tensors."""
    from mergekit_vl.models.model import Single

    assert isinstance(tuned, Single)
    out = []
    if base.makes_texts and tuned.makes_texts:
        members = {"zero-shot": base, "tuned": tuned}
        if isinstance(merged, Single) and merged.makes_texts:
            members["merged"] = merged
        out.append(_classifiers(members, store))
    try:
        start = Single(tuned.backbone, tuned.adapter.untuned(tuned.backbone))
    except UserError:  # a prompt that started at random has no zero-shot context
        return out
    members = {"zero-shot": start, "tuned": tuned}
    if isinstance(merged, Single) and _shapes(merged) == _shapes(tuned):
        members["merged"] = merged
    about = tuned.adapter.about
    if tuned.adapter.tensors:
        between = _of_images if about.reads == "images" else _of_logits if about.linear else _of_tensors
        out.append(Landscape(about.many, tuple(members), between(members, store), _products(members)))
    return out


def _shapes(model: Single) -> dict[str, object]:
    return {"space": model.adapter.space} | {name: t.shape for name, t in model.adapter.tensors.items()}


def _images(model: Single, split: Split, store: FeatureStore, *, normalise: bool) -> Tensor:
    import torch.nn.functional as F

    images = store.features(model.encoders[0], split).to(model.backbone.device)
    return F.normalize(images, dim=-1) if normalise else images


def _cosines(model: Single, images: Tensor, text: Tensor) -> Tensor:
    """images [B, D] normalised, text [S, K, D] raw -> [S, B, K]."""
    import torch.nn.functional as F

    return model.backbone.scale * images @ F.normalize(text, dim=-1).transpose(-1, -2) + model.backbone.bias


def _combined(coefficients: Tensor, vectors: Tensor) -> Tensor:
    """[S, N] and [N, ...] -> [S, ...]; the coefficients 0 and 1 give the models themselves to the bit."""
    import torch

    combined: Tensor = torch.tensordot(coefficients.to(vectors), vectors, 1)
    return combined


def _products(members: Mapping[str, Single]) -> Callable[[Tests], Tensor]:
    import torch

    def products(tests: Tests) -> Tensor:
        flat = [torch.cat([t.flatten().double().cpu() for t in m.adapter.tensors.values()]) for m in members.values()]
        return torch.stack([torch.stack([a @ b for b in flat]) for a in flat])

    return products


def _classifiers(members: Mapping[str, Single], store: FeatureStore) -> Landscape:
    import torch

    first = next(iter(members.values()))

    def texts(classes: Classes) -> Tensor:
        return torch.stack([m.text_features(classes) for m in members.values()])  # [N, K, D]

    def logits(coefficients: Tensor, classes: Classes, split: Split) -> Tensor:
        return _cosines(first, _images(first, split, store, normalise=True), _combined(coefficients, texts(classes)))

    def products(tests: Tests) -> Tensor:
        flat = torch.cat([texts(classes).flatten(1).double().cpu() for _, classes, _ in tests], dim=1)
        return flat @ flat.T

    return Landscape("classifiers", tuple(members), logits, products)


def _of_tensors(members: Mapping[str, Single], store: FeatureStore) -> Logits:
    """All points in one batch: their tensors are combined."""
    import torch

    first, tensors = next(iter(members.values())), [m.adapter.tensors for m in members.values()]

    def logits(coefficients: Tensor, classes: Classes, split: Split) -> Tensor:
        (network,) = first.adapter.networks(first.backbone, [classes], training=False)
        x = network.prepare(_images(first, split, store, normalise=False))
        points = {name: _combined(coefficients, torch.stack([t[name] for t in tensors])) for name in tensors[0]}
        return network(points, x)

    return logits


def _of_logits(members: Mapping[str, Single], store: FeatureStore) -> Logits:
    """Where logits are linear in the tensors: the models' own logits are combined."""
    import torch

    first = next(iter(members.values()))

    def logits(coefficients: Tensor, classes: Classes, split: Split) -> Tensor:
        images = {first.encoders[0].key: _images(first, split, store, normalise=False)}
        return _combined(coefficients, torch.stack([m.bind(classes)(images) for m in members.values()]))

    return logits


def _of_images(members: Mapping[str, Single], store: FeatureStore) -> Logits:
    """Where images are read: each point is a model of its own."""
    import torch

    from mergekit_vl.models.evaluate import logits_of
    from mergekit_vl.models.model import Single

    models = list(members.values())

    def point(c: Tensor) -> tuple[Single, FeatureStore]:
        """A tower of its own is looked at once; those of the three models are stored already."""
        if c.count_nonzero() == 1:
            return models[int(c.argmax())], store
        tensors = {
            name: sum((float(x) * m.adapter.tensors[name] for x, m in zip(c, models)), torch.zeros(()))
            for name in models[0].adapter.tensors
        }
        return Single(models[0].backbone, models[0].adapter.with_tensors(tensors)), store.temporary()

    def logits(coefficients: Tensor, classes: Classes, split: Split) -> Tensor:
        out = []
        for i, c in enumerate(coefficients):
            store.reporter.progress(i, len(coefficients), "points of the landscape, each a tower")
            model, kept_in = point(c)
            out.append(logits_of(model, classes, split, kept_in)[0])
        return torch.stack(out)

    return logits


def lines(landscape: Landscape, tests: Tests, points: int, segments: Sequence[tuple[str, str]]) -> list[LinePoint]:
    """`points` points of each segment that the landscape has, ends included, alpha in 0..1."""
    import torch

    there = [segment for segment in segments if set(segment) <= set(landscape.names)]
    alphas = torch.linspace(0, 1, points, dtype=torch.float64)
    coefficients = torch.zeros(len(there), points, len(landscape.names), dtype=torch.float64)
    for i, (start, end) in enumerate(there):
        coefficients[i, :, landscape.names.index(start)] = 1 - alphas
        coefficients[i, :, landscape.names.index(end)] = alphas
    found = landscape.measure(coefficients.flatten(0, 1), tests)
    places = itertools.product(there, alphas.tolist())
    return [
        LinePoint(f"{start} -> {end}", landscape.space, round(alpha, 6), scores)
        for ((start, end), alpha), scores in zip(places, found)
    ]


def barriers(points: Sequence[LinePoint]) -> list[Barrier]:
    """How high the loss rises on each segment above the straight line between its ends, by test; 0 where it never does.

    max over alpha of L(alpha) - (1 - alpha) L(0) - alpha L(1) (Entezari et al. 2022, arXiv 2110.06296, definition 2.1), in nats; the
    same of 1 - accuracy, in 0..1.
    """
    out = []
    for (space, segment), of_segment in itertools.groupby(points, key=lambda p: (p.space, p.segment)):
        line = list(of_segment)
        heights: dict[str, dict[str, float]] = {}
        for test in line[0].tests:
            for what, sign in (("nll", 1), ("acc1", -1)):
                first, last = (line[i].tests[test][what] for i in (0, -1))
                rises = [sign * (p.tests[test][what] - (1 - p.alpha) * first - p.alpha * last) for p in line[1:-1]]
                heights.setdefault(test, {})[what] = max(0.0, *rises) if rises else 0.0
        out.append(Barrier(space, segment, heights))
    return out


def averaged(row: str, cells: Sequence[CellLandscape], plane: Plane | None, plane_of: str) -> MeanLandscape:
    """The means of the points and of the barrier heights of several cells, which have the same tests; the plane is one cell's."""
    points = tuple(_averaged([cell.points for cell in cells]))
    return MeanLandscape(row, len(cells), points, tuple(_averaged([cell.barriers for cell in cells])), plane, plane_of)


def _averaged(cells: Sequence[Sequence[P]]) -> list[P]:
    return [dataclasses.replace(of[0], tests=_mean([each.tests for each in of])) for of in zip(*cells)]


def _mean(tests: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: sum(each[name][key] for each in tests) / len(tests) for key in scores}
        for name, scores in tests[0].items()
    }


def plane(landscape: Landscape, tests: Tests, points: int) -> Plane | None:
    """`points` x `points` scores of the plane through zero-shot, tuned and merged; None where the three do not span one.

    Places are in an orthonormal basis of the plane (Garipov et al. 2018, arXiv 1802.10026, section 3.2), in units of the distance from
    zero-shot to tuned; `tests` hold the scores at xs[i], ys[j] as lists of lists [i][j].
    """
    import torch

    if set(landscape.names) != {"zero-shot", "tuned", "merged"}:
        return None
    place = {name: i for i, name in enumerate(landscape.names)}
    g = landscape.products(tests)
    zero, u, v = place["zero-shot"], place["tuned"], place["merged"]
    uu = g[u, u] - 2 * g[u, zero] + g[zero, zero]
    vv = g[v, v] - 2 * g[v, zero] + g[zero, zero]
    uv = g[u, v] - g[u, zero] - g[v, zero] + g[zero, zero]
    if uu <= 0:  # nothing was tuned
        return None
    along = float(uv / uu)
    across = float((vv / uu - along**2).clamp_min(0).sqrt())
    if across < FLAT:
        return None
    corners = {"zero-shot": (0.0, 0.0), "tuned": (1.0, 0.0), "merged": (along, across)}
    xs, ys = (_ticks([corner[i] for corner in corners.values()], points) for i in (0, 1))
    x, y = torch.meshgrid(xs, ys, indexing="ij")
    merged = y / across
    tuned = x - along * merged
    by_name = {"zero-shot": 1 - tuned - merged, "tuned": tuned, "merged": merged}
    found = landscape.measure(torch.stack([by_name[n].flatten() for n in landscape.names], dim=1), tests)
    rows = [found[i * points : (i + 1) * points] for i in range(points)]
    scores = {
        test: {what: tuple(tuple(one[test][what] for one in row) for row in rows) for what in ("acc1", "nll")}
        for test, _, _ in tests
    }
    return Plane(landscape.space, tuple(xs.tolist()), tuple(ys.tolist()), corners, scores)


def _ticks(places: Sequence[float], points: int) -> Tensor:
    """From the least to the greatest place, with a margin on both sides."""
    import torch

    low, high = min(places), max(places)
    margin = MARGIN * max(high - low, 1.0 / 2)
    return torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
