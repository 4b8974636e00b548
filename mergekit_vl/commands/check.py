"""`mergekit-vl check`: the plan of a recipe, or of a merge of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_vl.commands import arguments
from mergekit_vl.commands.merge import Base, DType, Keep, Rebasin, ResizePosEmbed, StrategyName, TensorsOf
from mergekit_vl.commands.merge import check as check_models
from mergekit_vl.commands.merge_request import is_merge
from mergekit_vl.commands.terminal import say
from mergekit_vl.errors import UserError
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.registry.plugins import registry

if TYPE_CHECKING:
    from mergekit_vl.recipes.recipe import Recipe


def check(
    recipe: Annotated[list[str], typer.Argument(help="a recipe with key=value overrides, or models to merge")],
    base: Base = None,
    strategy: StrategyName = None,
    rebasin: Rebasin = False,
    keep: Keep = None,
    tensors: TensorsOf = None,
    dtype: DType = None,
    weights: arguments.Weights = None,
    resize_pos_embed: ResizePosEmbed = False,
    allow_env: arguments.AllowEnv = None,
) -> None:
    """Validate a recipe, or models to be merged, and print the plan; reads no weights and no images."""
    if is_merge(recipe, base=base, strategy=strategy):
        if allow_env:
            raise UserError("a merge reads no environment", where="--allow-env", hint="leave it out")
        return check_models(
            recipe,
            base=base,
            strategy=strategy,
            rebasin=rebasin,
            keep=keep,
            dtype=dtype,
            tensors=tensors,
            weights=weights,
            resize_pos_embed=resize_pos_embed,
        )
    return _check_recipe(recipe[0], recipe[1:], allow_env or [])


def _check_recipe(recipe: str, overrides: list[str], allow_env: list[str]) -> None:
    from mergekit_vl.benchmark import forecast

    def check(plan: Recipe) -> list[str]:
        return forecast.of_recipe(plan, registry())

    say(*check(load_recipe(recipe, overrides, allow_env=allow_env, check=check)))
