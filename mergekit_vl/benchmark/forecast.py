"""What a recipe will do and cost, before it starts: a bench, or a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_vl.benchmark import plan as plans
from mergekit_vl.benchmark.plan import Plan, lineup
from mergekit_vl.datasets.base import HasPlace
from mergekit_vl.experiments import experiment, forecast

if TYPE_CHECKING:
    from mergekit_vl.experiments.experiment import Experiment
    from mergekit_vl.recipes.recipe import Recipe
    from mergekit_vl.registry.plugins import Registry


def of_recipe(recipe: Recipe, registry: Registry) -> list[str]:
    """A line for each part of the plan; of a bench where the recipe has the strategy `all`. Raises UserError for what is wrong with it."""
    if recipe.every:
        plan = plans.build(recipe, registry)
        _check_there(plan.experiment)
        return described(plan)
    made = experiment.build(recipe, registry)
    _check_there(made)
    return forecast.described(made)


def _check_there(made: Experiment) -> None:
    """Raise UserError for a dataset that is not on this machine."""
    for dataset in made.datasets:
        if isinstance(dataset, HasPlace):
            dataset.check_there()


def described(plan: Plan) -> list[str]:
    """The plan in words: cells, rows, and how long it will take."""
    datasets = [spec.options.get("task") or spec.options.get("dataset") or spec.label for spec in plan.recipe.datasets]
    shots = [str(n) for n in plan.shots if n is not None]
    cells, trainings = plan.cells(), plan.trainings()
    return [
        f"bench     {plan.recipe.name}: {plan.recipe.protocol.name} on {plan.experiment.backbone}",
        f"datasets  {', '.join(map(str, datasets))}; seeds {', '.join(map(str, plan.recipe.seeds))}"
        + (f"; shots {', '.join(shots)}" if shots else ""),
        f"rows      {', '.join(entry.label for entry in lineup(plan, list(map(str, datasets))))}",
        f"cells     {cells}, with {trainings} trainings each at most; options are chosen "
        + {"none": "nowhere: defaults"}.get(plan.search.by, f"by {plan.how()}"),
        f"time      {plan.time()}; what is done already is not done again",
    ]
