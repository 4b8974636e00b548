"""Models as files of a run folder: one safetensors per adapter, and a JSON beside them for what is made of several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_vl.adapters import stored
from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.errors import UserError
from mergekit_vl.models.by_distance import ByDistance
from mergekit_vl.models.by_task import ByTask
from mergekit_vl.models.model import Classes, Ensemble, Mixture, Single
from mergekit_vl.system.atomic_files import write_json
from mergekit_vl.system.regular_files import read_json

if TYPE_CHECKING:
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.models.adapter import Adapter
    from mergekit_vl.models.model import Model

    AdapterClass = Callable[[str], type[Adapter]]
    """A registered adapter's class by its name."""

NEAR = "features of images"
"""What tells the file of a set of features from an adapter's."""


def can_save(model: Model) -> bool:
    """A plugin's own kind of model may have no file."""
    return (
        isinstance(model, Single)
        or isinstance(model, (Mixture, Ensemble, ByDistance, ByTask))
        and all(can_save(member) for member in model.members)
    )


def save(model: Model, folder: Path, name: str) -> None:
    """Write `name.safetensors`, or `name.model.json` and the members as `name.0.safetensors` and so on."""
    forget(folder, name)  # a model of another kind
    if isinstance(model, Single):
        if model.adapter.about.without_file:
            write_json(folder / f"{name}.model.json", {"kind": model.adapter.about.without_file})
        else:
            model.adapter.save(folder / f"{name}.safetensors", backbone=model.backbone.spec)
        return
    assert isinstance(model, (Mixture, Ensemble, ByDistance, ByTask))
    for i, member in enumerate(model.members):
        save(member, folder, f"{name}.{i}")
    if isinstance(model, Mixture):
        facts: dict[str, object] = {"kind": "mixture", "weights": model.weights}
    elif isinstance(model, Ensemble):
        facts = {
            "kind": "ensemble",
            "weights": model.weights,
            "of": model.average_of,
            "temperatures": model.temperatures,
        }
    elif isinstance(model, ByTask):
        tasks = [[task.names, [t for t in task.templates if isinstance(t, str)]] for task in model.tasks]
        facts = {"kind": "by_task", "tasks": tasks}
    else:
        stored.write(folder / f"{name}.near.safetensors", {"near": model.near}, {"adapter": NEAR})
        facts = {"kind": "by_distance", "k": model.k, "a": model.a, "b": model.b, "temperatures": model.temperatures}
    write_json(folder / f"{name}.model.json", facts)


def load(folder: Path, name: str, backbone: Backbone, adapter: AdapterClass) -> Model | None:
    """What `save` wrote under this name, or None where nothing is."""
    file = folder / f"{name}.safetensors"
    if file.exists():
        return Single(backbone, load_adapter(file, backbone, adapter))
    told = folder / f"{name}.model.json"
    if not told.exists():
        return None
    facts = read_json(told, _checked)
    if facts["kind"] not in FACTS:
        return Single(backbone, adapter(facts["kind"]).load(told, device=backbone.device))
    n = 2 if facts["kind"] == "by_distance" else len(facts["tasks" if facts["kind"] == "by_task" else "weights"])
    found = [load(folder, f"{name}.{i}", backbone, adapter) for i in range(n)]
    members = tuple(member for member in found if member is not None)
    if len(members) < n:
        raise UserError("a member is missing", where=str(told), hint="run it again with --force")
    if facts["kind"] == "mixture":
        singles = tuple(member for member in members if isinstance(member, Single))
        return Mixture(singles, tuple(facts["weights"]))
    if facts["kind"] == "ensemble":
        return Ensemble(members, tuple(facts["weights"]), facts["of"], tuple(facts["temperatures"]))
    if facts["kind"] == "by_task":
        return ByTask(members, tuple(Classes(tuple(names), tuple(templates)) for names, templates in facts["tasks"]))
    near = stored.read(folder / f"{name}.near.safetensors", NEAR, backbone.device)[0]["near"]
    first, second = members
    return ByDistance((first, second), near, facts["k"], facts["a"], facts["b"], tuple(facts["temperatures"]))


FACTS = {
    "mixture": ("weights",),
    "ensemble": ("weights", "temperatures"),
    "by_task": (),
    "by_distance": ("temperatures",),
}
"""Of each kind of models made of several, what is a list of numbers, one a member; other kinds are adapters by their registered names."""


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as `save` writes them; raises ValueError, KeyError or TypeError for others."""
    kind = facts["kind"]
    for key in FACTS.get(kind, ()):
        if not all(isinstance(number, int | float) for number in facts[key]):
            raise ValueError(f"{key} are numbers")
    if kind in ("mixture", "ensemble") and not facts["weights"]:
        raise ValueError("no weights")
    if kind == "ensemble" and len(facts["temperatures"]) not in (0, len(facts["weights"])):
        raise ValueError("not a temperature for each weight")
    if kind == "ensemble" and not isinstance(facts["of"], str):
        raise ValueError("of is text")
    if kind == "by_distance" and not (isinstance(facts["k"], int) and len(facts["temperatures"]) == 2):
        raise ValueError("k is a number, and there are two temperatures")
    if kind == "by_distance" and not all(isinstance(facts[key], int | float) for key in "ab"):
        raise ValueError("a and b are numbers")
    for names, templates in facts["tasks"] if kind == "by_task" else ():
        if not all(isinstance(text, str) for text in (*names, *templates)):
            raise ValueError("classes and templates are texts")
    return facts


def forget(folder: Path, name: str) -> None:
    """Remove the files of a model, and first the row that says what they are."""
    for ending in (".json", ".model.json", ".safetensors"):
        (folder / f"{name}{ending}").unlink(missing_ok=True)


def load_adapter(file: Path, backbone: Backbone, adapter: AdapterClass) -> Adapter:
    """One of our adapters, by what its metadata says it is."""
    checkpoint = open_checkpoint(str(file))
    name = stored.facts(checkpoint).get("adapter")
    checkpoint.close()
    if name is None:
        raise UserError(
            "this file does not tell what adapter it holds", where=str(file), hint="give one that a run wrote"
        )
    return adapter(name).load(file, device=backbone.device)
