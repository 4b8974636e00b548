"""`mergekit-vl landscape`: loss and accuracy between zero-shot, the merged and the tuned model of a recipe."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_vl.commands import arguments
from mergekit_vl.commands.terminal import TerminalReporter, say, say_table
from mergekit_vl.errors import UserError
from mergekit_vl.experiments.run_folder import alone, claim, tidied
from mergekit_vl.recipes.loading import load_recipe
from mergekit_vl.recipes.recipe import Recipe
from mergekit_vl.registry.plugins import registry
from mergekit_vl.system.devices import device_of
from mergekit_vl.system.interrupts import noted


def landscape(
    recipe: arguments.RecipeArgument,
    overrides: arguments.Overrides = None,
    points: Annotated[int, typer.Option(min=3, help="of a line, ends included")] = 21,
    plane: Annotated[
        int, typer.Option(min=0, help="a side of the plane; 0: none. Each point of towers reads all images")
    ] = 15,
    allow_env: arguments.AllowEnv = None,
    out: arguments.Out = None,
    device: arguments.Device = "auto",
) -> None:
    """Loss, accuracy and barriers on the lines zero-shot -> merged -> tuned, and on the plane through the three; of the recipe's first strategy.

    Uses the models of `run` with the same recipe where they are there, and makes them where not. Writes landscape.json and landscape.html.
    """
    from mergekit_vl.experiments import experiment as experiments
    from mergekit_vl.experiments.run_landscape import measured
    from mergekit_vl.reports.landscape_page import barriers, document
    from mergekit_vl.system.atomic_files import write_json, write_text

    def build(plan: Recipe) -> experiments.Experiment:
        return experiments.build(plan, registry())

    plan = load_recipe(recipe, overrides or [], allow_env=allow_env or (), check=build)
    made = build(plan)
    if made.joint:
        raise UserError(
            "has several tuned models",
            where=f"protocol {plan.protocol.name}",
            hint="a landscape is between three models",
        )
    folder = out or Path("runs") / f"{plan.name}-{plan.hash[:8]}"
    with noted("the same command continues"), tidied(folder), alone(folder):
        claim(folder, plan.hash, lambda folder: None, force=False)
        with TerminalReporter(True) as reporter:
            found = measured(made, folder, device=device_of(device), points=points, plane=plane, reporter=reporter)
        base, tuned_row = made.base_label, made.tuned_labels[0]
        write_text(folder / "landscape.html", document(f"The landscape of {plan.name}", found, base, tuned_row))
        write_json(folder / "landscape.json", found.to_json())
    say_table(barriers(found, base, tuned_row))
    say(f"report: {folder / 'landscape.html'}")


@functools.wraps(landscape)
def path(**given: Any) -> None:
    """Its name in 0.1.0."""
    warnings.warn("the command path is now called landscape", FutureWarning, stacklevel=2)
    landscape(**given)
