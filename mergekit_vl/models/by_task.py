"""A model with one member per task; class names decide which member is used (EMR, TALL-masks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_vl.errors import Unsuitable

if TYPE_CHECKING:
    from mergekit_vl.models.model import Classes, Head, ImageEncoder, Model


@dataclass(frozen=True)
class ByTask:
    """The member whose task has the class names asked for; it is told which task an image is of, where one merged model is not.

    A test of one task encodes images with that member alone, tests of all tasks with all of them.
    """

    members: tuple[Model, ...]
    tasks: tuple[Classes, ...]
    """The classes of each member's task."""

    def member(self, classes: Classes) -> Model:
        """That of these names and templates, or of these names, or of the one task that holds them all."""
        names = set(classes.names)
        for fits in (
            lambda task: task == classes,
            lambda task: set(task.names) == names,
            lambda task: set(task.names) >= names,
        ):
            found = [member for member, task in zip(self.members, self.tasks) if fits(task)]
            if len(found) == 1:
                return found[0]
            if found:
                raise Unsuitable(
                    f"{_some(classes.names)} are classes of {len(found)} tasks", hint="name all classes of one task"
                )
        raise Unsuitable(
            f"{_some(classes.names)} are the classes of no task that was merged",
            hint="name those of one: " + "; ".join(_some(task.names) for task in self.tasks),
        )

    @property
    def encoders(self) -> tuple[ImageEncoder, ...]:
        return tuple({each.key: each for m in self.members for each in m.encoders}.values())

    def encoders_for(self, classes: Classes) -> tuple[ImageEncoder, ...]:
        return self.member(classes).encoders

    def bind(self, classes: Classes) -> Head:
        return self.member(classes).bind(classes)

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.members)

    forwards = 1


def check_tasks(tasks: Sequence[Classes]) -> None:
    """Raise UserError for two tasks that their class names and templates do not tell apart."""
    for i, task in enumerate(tasks):
        if task in tasks[:i]:
            raise Unsuitable(
                f"the tasks {tasks.index(task)} and {i} have the same classes and templates",
                hint="give one of them other templates, or merge for one task: task=0",
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
