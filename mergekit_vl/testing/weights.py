"""Closed forms on tensors alone: what they give back, and what they hold."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import numpy as np

from mergekit_vl.errors import UserError
from mergekit_vl.merging.chunks import BLOCK, Arrays, Models, Tensor
from mergekit_vl.merging.coefficients import depths
from mergekit_vl.merging.engine import SERIAL, apply
from mergekit_vl.merging.memory_bounds import flat_memory, prepass_memory, whole_arrays
from mergekit_vl.options import build
from mergekit_vl.testing.promises import Promises, check_documented, require

if TYPE_CHECKING:
    from mergekit_vl.checkpoints.dtypes import Array
    from mergekit_vl.merging.chunks import Chunk
    from mergekit_vl.merging.method import ClosedForm, MethodInfo

SHAPES = {
    "visual.conv1.weight": (8, 3, 2, 2),
    "blocks.0.attn.weight": (12, 8),
    "blocks.1.attn.weight": (12, 8),
    "blocks.1.attn.bias": (12,),
    "logit_scale": (),
}
CLOSE = 2e-6
"""Of values near 1: some roundings of float32."""
MOST = 1 << 15
"""Elements of a chunk whose memory is measured: four blocks."""


def check_closed_form(method: ClosedForm) -> None:
    """Identity, repeatability, inputs that stay as they are, and the memory bound, on tensors alone; raises Violation."""
    promises = Promises(type(method))
    check_documented(promises, type(method))
    promise_weights(promises, method)
    promises.settle()


def promise_weights(promises: Promises, method: ClosedForm) -> None:
    info = method.describe(2)
    a, b, zero = drawn(1), drawn(2), drawn(0)
    with promises("inputs unchanged"):
        n = count(method, info)
        given = [drawn(i) for i in range(1, n + 1)]
        merged = weights_of(method, given, zero)
        require(
            same(given, [drawn(i) for i in range(1, n + 1)]) and same([zero], [drawn(0)]), "a model's tensors changed"
        )
    with promises("same seed, same bytes"):
        require(same([merged], [weights_of(method, given, zero)]), "a second merge has other bytes")
        require(same([merged], [weights_of(method, given, zero, 5)]), "chunks of another size give other bytes")
    with promises("the base gives the base"):
        require(
            close(weights_of(method, [b] * count(method, info), b), b),
            "models that are all the base give another model",
        )
    if isinstance(info.alone, str):
        promises.exempt.setdefault("one model gives itself", info.alone)
    with promises("one model gives itself"):
        alone = build(type(method), {} if isinstance(info.alone, str) else info.alone, where=info.where)
        n = count(alone, info, least=info.at_least, base=info.needs_base)
        found = weights_of(alone, [a] * n, zero if info.needs_base else None)
        told = f" with {dict(info.alone)}" if info.alone and not isinstance(info.alone, str) else ""
        require(
            close(found, a),
            f"one model alone ({n} times) does not come back{told}: say `alone=` of the options, or why not",
        )
    with promises("memory bound"):
        check_memory(method)


def check_memory(method: ClosedForm, *, chunk_size: int = MOST) -> None:
    """Raise AssertionError where a merge holds more than the bounds that --max-ram counts with."""
    for n in [n for n in (1, 2, 8) if fits(method, n)]:
        info, matrix = method.describe(n), Tensor("w", (256, 256))
        if info.chunks == "tensor" and method.whole(matrix, n):
            bound, most = whole_arrays(info, matrix) * 4 * matrix.size, held(method, n, matrix.shape)
            assert most <= bound, f"{most:,} bytes for a matrix of {n} models, {bound:,} are allowed"
            continue
        for size, row, wide in ((chunk_size, 256, np.float32), (BLOCK, 256, np.float64), (BLOCK, 1, np.float32)):
            tensor = Tensor("w", (2 * size // row + 1, row), wide=np.dtype(wide))
            bound = flat_memory(info, tensor, n, size) + prepass_memory(info, [tensor], n)
            most = held(method, n, tensor.shape, size, wide)
            assert most <= bound, f"{most:,} bytes for chunks of {size} elements of {n} models, {bound:,} are allowed"


class Drawn:
    """A model that holds nothing: what is read is drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def read(self, name: str, start: int, stop: int, wide: np.dtype) -> Array:
        return np.random.default_rng((self.seed, start)).standard_normal(stop - start, dtype=wide)


def held(
    method: ClosedForm, n: int, shape: tuple[int, ...], chunk_size: int = MOST, wide: type[np.generic] = np.float32
) -> int:
    """The most bytes that a merge of n models of one tensor held, what stays beside the chunks (histograms, Gram matrices) included."""
    tensor = Tensor("w", shape, wide=np.dtype(wide))
    given = Models(Drawn(0), tuple(map(Drawn, range(1, n + 1))), (tensor,), _labels(n))
    tracemalloc.start()
    try:
        apply(method, given, lambda chunk, merged: None, SERIAL, chunk_size)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fits(method: ClosedForm, n: int) -> bool:
    """Whether the method takes n tuned models and a base."""
    try:
        method.check(Models(Drawn(0), (Drawn(1),) * n, (), _labels(n)))
    except UserError:
        return False
    return True


def count(method: ClosedForm, info: MethodInfo, *, least: int = 2, base: bool = True) -> int:
    """Tuned models that the method takes, the nearest number to `least` from there up, or else down."""
    source = Drawn(0) if base else None
    for n in (*range(least, 9), *range(least, 0, -1)):
        try:
            method.check(Models(source, (Drawn(1),) * n, (), _labels(n)))
        except UserError:
            continue
        return int(n)
    require(False, f"{info.where} takes no number of models from 1 to 8")
    raise AssertionError


def _labels(n: int) -> tuple[str, ...]:
    return tuple(f"m{i}" for i in range(n))


def drawn(seed: int) -> dict[str, Array]:
    """A model near the one of seed 0, as fine-tuned ones are."""
    first, draw = np.random.default_rng(0), np.random.default_rng(seed)
    base = {name: first.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    if not seed:
        return base
    return {k: (v + 0.1 * draw.standard_normal(v.shape)).astype(np.float32).reshape(v.shape) for k, v in base.items()}


def weights_of(
    method: ClosedForm, tuned: list[dict[str, Array]], base: dict[str, Array] | None, chunk_size: int = BLOCK
) -> dict[str, Array]:
    """What the engine makes of models in memory."""
    deep = depths(SHAPES)
    tensors = tuple(Tensor(name, shape, deep[name]) for name, shape in SHAPES.items())
    models = Models(
        None if base is None else _source(base), tuple(map(_source, tuned)), tensors, _labels(len(tuned)), seed=3
    )
    out = {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}

    def write(chunk: Chunk, merged: Array) -> None:
        out[chunk.tensor.name].reshape(-1)[chunk.start : chunk.stop] = merged.reshape(-1)

    apply(method, models, write, SERIAL, chunk_size)
    return out


def _source(model: dict[str, Array]) -> Arrays:
    return Arrays({name: (array, "F32") for name, array in model.items()})


def same(some: list[dict[str, Array]], others: list[dict[str, Array]]) -> bool:
    return all(one[k].tobytes() == other[k].tobytes() for one, other in zip(some, others) for k in SHAPES)


def close(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(np.allclose(one[k], other[k], rtol=CLOSE, atol=CLOSE) for k in SHAPES)
