"""The Karcher mean: the point of the sphere with the least sum of squared angles to the models (Karcher 1977; as a way to merge
models: mergekit's `karcher`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.checkpoints.dtypes import Array
from mergekit_vl.merging.chunks import Chunk, Models, Run
from mergekit_vl.merging.coefficients import Coefficient, per_model
from mergekit_vl.merging.prepass import products
from mergekit_vl.merging.task_vectors import weighted_sum
from mergekit_vl.options import option
from mergekit_vl.strategies.closed_form import closed_form
from mergekit_vl.strategies.weights import check_mixture

if TYPE_CHECKING:
    from jaxtyping import Float

WHERE = "strategy karcher"


@closed_form("karcher", chunks="accumulating", at_least=2, passes=1, ignores_base=True)
@dataclass(frozen=True)
class Karcher:
    """(sum_i w_i |x_i|) * mu, with mu the weighted Karcher mean of the directions x_i / |x_i| of flattened tensors.

    Fixed-point iteration: mu <- exp_mu(sum_i w_i log_mu(u_i)), from the normalised weighted mean of the directions. It stays in the
    span of the models, so it runs on their products, in float64, and the tensors are read twice however many steps it takes.
    Two models in opposite directions have no mean on the sphere (numbers of different sign are such): the weighted mean is taken.
    mergekit's variant: at most 10 steps, until a step is shorter than 1e-5, in float32.
    """

    weights: tuple[Coefficient, ...] = per_model("one per tuned model; empty: equal")
    steps: int = option(100, "at most")
    tolerance: float = option(1e-10, "stop when a step is shorter than this angle")

    def check(self, models: Models) -> None:
        for tensor in models.tensors:
            check_mixture(WHERE, models.weight_at(self.weights, tensor, len(models.tuned)))

    def prepass(self, models: Models, run: Run, chunk_size: int) -> dict[str, list[float]]:
        grams = products(models, lambda chunk: chunk.tuned, run, chunk_size)
        weights = {t.name: np.array(models.weight_at(self.weights, t, len(models.tuned))) for t in models.tensors}
        return {name: karcher_coefficients(g, weights[name], self.steps, self.tolerance) for name, g in grams.items()}

    def merge_chunk(self, chunk: Chunk, stats: dict[str, list[float]]) -> Array:
        return weighted_sum(chunk.tuned, stats[chunk.tensor.name])


def karcher_coefficients(
    gram: Float[Array, "N N"], weights: Float[Array, " N"], steps: int, tolerance: float
) -> list[float]:
    """The factor of each vector in the scaled Karcher mean; vectors of length zero take no part in the direction."""
    norms = np.sqrt(np.diag(gram))
    weights = weights / weights.sum()
    length = float(weights @ norms)
    taking = norms > 0
    if not taking.any():
        return [float(w) for w in weights]
    unit = np.where(taking, 1 / np.where(taking, norms, 1), 0)
    cosines = gram * unit[:, None] * unit  # between the directions
    if cosines[np.ix_(taking, taking)].min() < -1 + 1e-9:
        return [float(w) for w in weights]
    pull = np.where(taking, weights, 0)
    pull = pull / pull.sum()

    def normalised(c: Array) -> Array:
        size = float(c @ cosines @ c) ** 0.5
        return c / size if size > 1e-12 else np.where(np.arange(len(c)) == np.argmax(taking), 1.0, 0.0)

    mean = normalised(pull)
    for _ in range(steps):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        sines = np.sin(angles)
        ratio = pull * np.where(sines > 1e-12, angles / np.where(sines > 1e-12, sines, 1), 1.0)
        step = ratio - (ratio @ dots) * mean  # sum_i w_i theta_i / sin theta_i (u_i - cos theta_i mu)
        size = max(0.0, float(step @ cosines @ step)) ** 0.5
        if size < tolerance:
            break
        mean = normalised(np.cos(size) * mean + np.sin(size) / size * step)
    return [float(c) for c in length * mean * unit]
