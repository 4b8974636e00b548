"""Weights of whole models, one number each."""

from __future__ import annotations

from mergekit_vl.errors import Unsuitable, UserError


def one_each(where: str, given: tuple[float, ...], models: int, hint: str) -> tuple[float, ...]:
    """The weights that are given, or 1 for each model; raises Unsuitable for another number of them, and `hint` says which are wanted."""
    if given and len(given) != models:
        raise Unsuitable(f"{len(given)} weights for {models} models", where=where, hint=hint)
    return given or (1.0,) * models


def check_mixture(where: str, weights: tuple[float, ...]) -> None:
    """Raise UserError for a weight below 0, and for weights that are all 0."""
    if min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"weights {weights} are not a mixture", where=where, hint="use weights >= 0 with a positive sum"
        )
