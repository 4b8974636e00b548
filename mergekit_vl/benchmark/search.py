"""What `bench` tries of each strategy, and where it chooses: never on a test split.

Every strategy has the same budget of configurations, its defaults always among them. They are compared on selection tasks, made of
training and validation images alone:

    validation    the cell's own tuned models on the cell's validation images
    held_out      half of the tuned classes is held out: models are tuned on the other half, and validated on both. Validation images
                  of what was tuned always vote for forgetting, so this is the rule where tests ask for novel classes
    development   other data sets, named in the recipe and reported nowhere

The best headline of the protocol wins, then the least mean negative log-likelihood, then the first, the defaults being first of all.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mergekit_vl import options
from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.models.inputs import TaskData
from mergekit_vl.options import option
from mergekit_vl.protocols.base import Metric, Task
from mergekit_vl.strategies.base import grid_of, trains

if TYPE_CHECKING:
    from mergekit_vl.recipes.recipe import Spec
    from mergekit_vl.reports.results import Row
    from mergekit_vl.strategies.base import Strategy


@dataclass(frozen=True)
class Search:
    """The recipe's `search:`."""

    budget: int = option(8, "configurations of each strategy, its defaults among them")
    training_budget: int = option(4, "of a strategy that trains")
    by: Literal["auto", "validation", "held_out", "development", "none"] = option(
        "auto", "where it is chosen; auto: held_out where tests have novel classes, otherwise validation"
    )
    development: tuple[dict[str, Any], ...] = option(
        (), "datasets to choose on, as under `dataset`, for by: development"
    )

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("training_budget", self.training_budget)):
            if value < 1:
                raise UserError(f"{name}={value}", where="search", hint="at least 1: the defaults")
        if (self.by == "development") != bool(self.development):
            raise UserError(
                f"by={self.by} with {len(self.development)} development datasets",
                where="search",
                hint="by: development takes a list of datasets, and nothing else does",
            )

    def budget_of(self, strategy: object) -> int:
        if self.by == "none":
            return 1
        return min(self.budget, self.training_budget) if trains(strategy) else self.budget


def configurations(
    cls: type[Strategy], spec: Spec, models: int, search: Search
) -> list[tuple[dict[str, object], Strategy]]:
    """(options, strategy) of each configuration to try: the recipe's own first, then its grid's, thinned evenly to the budget.

    The grid is the recipe's (`grid:` of the strategy), or the class's. Combinations that the class refuses are left out.
    """
    first = options.build(cls, spec.options, where=spec.where)
    grid = grid_of(cls, models) if spec.grid is None else spec.grid
    rest: list[tuple[dict[str, object], Strategy]] = []
    for values in itertools.product(*grid.values()):
        given = {**spec.options, **dict(zip(grid, values))}
        try:
            made = options.build(cls, given, where=spec.where)
        except UserError:
            if spec.grid is not None:
                raise
            continue
        if made not in (first, *(other for _, other in rest)):
            rest.append((given, made))
    n = search.budget_of(first) - 1
    if len(rest) > n:
        rest = [rest[round((i + 0.5) * len(rest) / n - 0.5)] for i in range(n)]
    return [(dict(spec.options), first), *rest]


def by_validation(task: Task) -> Task:
    """The same tuned models, asked for the validation images of their own tasks; raises UserError where one has none."""
    tests = []
    for i, data in enumerate(task.data):
        if data.val is None or not len(data.val):
            raise Unsuitable("there are no validation images", hint="give the dataset a val split")
        tests.append((f"validation {i}", data.classes, data.val))
    return Task(task.data, tuple(tests), Metric("accuracy", {name: (name,) for name, _, _ in tests}))


def by_held_out(task: Task, seed: int) -> Task:
    """Half of the classes of a base-to-novel task, tuned on; both halves, validated: the tuned one on its validation images, the
    held-out one on all of its shots. Raises UserError where there are too few classes or no validation images.
    """
    data = task.data[0]
    n = len(data.classes.names)
    if len(task.data) > 1 or list(task.metric.columns) != ["base", "novel"]:
        raise Unsuitable("classes can be held out of base_to_novel alone", where="search.by", hint="use validation")
    if n < 4:
        raise Unsuitable(f"{n} classes are too few to hold some out", hint="use by: development")
    if data.val is None or not len(data.val):
        raise Unsuitable("there are no validation images", hint="give the dataset a val split")
    order = list(range(n))
    random.Random(f"held-out:{seed}").shuffle(order)
    half = (n + 1) // 2
    tune, held = sorted(order[:half]), sorted(order[half:])
    tuned = TaskData(data.classes.subset(tune), data.train.of_classes(tune), data.val.of_classes(tune))
    assert tuned.val is not None
    tests = (
        ("base", tuned.classes, tuned.val),
        ("novel", data.classes.subset(held), data.train.of_classes(held)),
    )
    return dataclasses.replace(task, data=(tuned,), tests=tests, parts={})


def quality(rows: Sequence[Row]) -> tuple[float, float]:
    """What configurations are compared by: the mean headline over the selection tasks, then the mean likelihood."""
    nll = [scores.nll for row in rows for scores in row.tests.values()]
    return sum(row.score for row in rows) / len(rows), -sum(nll) / len(nll)
