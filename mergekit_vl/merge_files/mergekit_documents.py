"""mergekit's YAML as people write it, made plain: keys about text are passed over with a word, slices and modules of whole models become models.

All that is wrong is told at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_vl.checkpoints.configs import read_config
from mergekit_vl.checkpoints.foreign import hub_hint
from mergekit_vl.errors import UserError, unknown
from mergekit_vl.system.regular_files import user_path

PLAIN = ("merge_method", "models", "base_model", "dtype", "out_dtype", "parameters")
WHOLE = ("slices", "modules")
OF_TEXT = ("tokenizer", "tokenizer_source", "chat_template", "embed_slerp", "name")
"""What concerns tokenizers, chats and names of results; merged are the weights."""
OF_RUNNING = ("lazy_unpickle", "low_cpu_memory", "allow_crimes", "trust_remote_code", "copy_tokenizer", "clone_tensors", "random_seed", "write_model_card", "out_shard_size", "cuda", "device")  # fmt: skip
"""Options of mergekit's command that stand in files."""
EVERY = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask", "t", "epsilon", "gamma", "filter_wise", "select_topk", "max_iter", "tol", "nuslerp_row_wise", "nuslerp_flatten", "normalize_weights", "consensus_suppression", "nearswap_t", "scale", "rescale_norm", "swapping", "diagonal_offset", "embed_slerp")  # fmt: skip
"""Parameters of any of mergekit's methods."""
LAYERS = (("num_hidden_layers",), ("text_config", "num_hidden_layers"), ("vision_config", "num_hidden_layers"))


@dataclass
class Document:
    """A recipe of one merge, and what is told of it."""

    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    where: str = ""

    def check(self) -> None:
        """Raise UserError with all problems."""
        if len(self.problems) == 1:
            raise UserError(self.problems[0], where=self.where)
        if self.problems:
            raise UserError(f"{len(self.problems)} problems: {'; '.join(self.problems)}", where=self.where)


def plain(content: Mapping[str, object], *, where: str) -> Document:
    """A document with mergekit's plain keys alone; nothing is raised, problems are collected."""
    made = Document({key: value for key, value in content.items() if key in PLAIN}, where=where)
    passed = [key for key in content if key in OF_TEXT or key.startswith(("tokenizer", "chat_template"))]
    if passed:
        made.notes.append(f"{', '.join(passed)}: about text or names, not about weights: passed over")
    if running := [key for key in content if key in OF_RUNNING]:
        made.notes.append(f"{', '.join(running)}: options of mergekit's command: passed over")
    for key in content:
        if key not in (*PLAIN, *WHOLE, *passed, *running):
            made.problems.append(str(unknown("key of mergekit's", key, (*PLAIN, *WHOLE))))
    if "modules" in content:
        _take_modules(content["modules"], made)
    if "slices" in content:
        _take_slices(content["slices"], made)
    if isinstance(models := made.content.get("models"), list):
        made.content["models"] = [_entry(each, made) for each in models]
    if "base_model" in made.content:
        made.content["base_model"] = _reference(made.content["base_model"], made)
    return made


def _take_modules(modules: object, made: Document) -> None:
    """One module, or several that are merged in the same way, are the whole model."""
    parts = list(modules.values()) if isinstance(modules, Mapping) else []
    if not parts or not all(isinstance(each, Mapping) and each == parts[0] for each in parts):
        made.problems.append(
            "modules that are merged in different ways (merge each part by itself, with --keep for the others)"
        )
        return
    made.notes.append(
        f"modules {', '.join(modules) if isinstance(modules, Mapping) else ''}: merged alike, so the whole models are"
    )
    for key, value in parts[0].items():
        if key == "slices":
            _take_slices(value, made)
        elif key in ("models", "parameters"):
            made.content[key] = value
        else:
            made.problems.append(f"{key!r} within modules")


def _take_slices(slices: object, made: Document) -> None:
    """Slices are whole models where each takes the same layers of the same models, and they follow each other from the first layer."""
    hint = "slices that put layers of different models together are not there: name whole models under `models`"
    if not isinstance(slices, list) or not slices or not all(isinstance(each, Mapping) for each in slices):
        made.problems.append(f"slices is no list of slices ({hint})")
        return
    end, first = 0, slices[0].get("sources")
    for i, each in enumerate(slices):
        ranges = _ranges(each.get("sources"))
        if ranges is None or len(set(ranges)) != 1 or ranges[0][0] != end or ranges[0][1] <= end:
            made.problems.append(
                f"slices.{i} does not take the same layers, following those before, of every model ({hint})"
            )
            return
        if _without_ranges(each.get("sources")) != _without_ranges(first) or each.get("parameters") != slices[0].get(
            "parameters"
        ):
            made.problems.append(f"slices.{i} has other models or parameters than slices.0 ({hint})")
            return
        end = ranges[0][1]
    made.content["models"] = _without_ranges(first)
    if isinstance(own := slices[0].get("parameters"), Mapping):
        shared = made.content.get("parameters") or {}
        made.content["parameters"] = {**shared, **own} if isinstance(shared, Mapping) else own
    for each in made.content["models"]:
        layers = _layers(each.get("model"))
        if layers is not None and layers != end:
            made.problems.append(f"slices take layers 0 to {end} of {each['model']}, which has {layers} ({hint})")
            return
    made.notes.append(f"slices cover layers 0 to {end} of every model: read as whole models")


def _ranges(sources: object) -> list[tuple[int, int]] | None:
    found = []
    for each in sources if isinstance(sources, list) and sources else [None]:
        span = each.get("layer_range") if isinstance(each, Mapping) else None
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            return None
        found.append((span[0], span[1]))
    return found


def _without_ranges(sources: object) -> list[dict[str, Any]]:
    listed = sources if isinstance(sources, list) else []
    return [
        {key: value for key, value in each.items() if key != "layer_range"}
        for each in listed
        if isinstance(each, Mapping)
    ]


def _layers(model: object) -> int | None:
    """Of a model in a folder here, as its config.json tells."""
    if not isinstance(model, str) or not os.path.isdir(os.path.expanduser(model)):
        return None
    config = read_config(user_path(model), "config.json")
    for path in LAYERS:
        found: Any = config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if type(found) is int:
            return found
    return None


def _entry(entry: object, made: Document) -> object:
    if isinstance(entry, str):
        return {"model": _reference(entry, made)}
    if isinstance(entry, Mapping) and "model" in entry:
        return {**entry, "model": _reference(entry["model"], made)}
    return entry


def _reference(given: object, made: Document) -> object:
    """mergekit's ways to name a model: a path, a hub's id, a mapping of these; `MODEL+LORA` is told to be folded first."""
    if isinstance(given, Mapping):
        inner = given.get("model", given)
        path = inner.get("path") if isinstance(inner, Mapping) else inner
        revision = inner.get("revision") if isinstance(inner, Mapping) else None
        if given.get("lora"):
            made.problems.append(f"{path} with a LoRA (fold it into the model first)")
        given = f"{path}@{revision}" if revision and path else path
    if not isinstance(given, str) or ":" in given or os.path.exists(os.path.expanduser(given)):
        return given
    if "+" in given:
        model, _, lora = given.partition("+")
        made.problems.append(f"{model} with the LoRA {lora} (fold it into the model first)")
    return f"hf-hub:{given}" if hub_hint(given) else given


def taken_parameters(
    given: Mapping[str, object], known: Sequence[str], place: str, made: Document
) -> dict[str, object]:
    """The parameters that the method has; those that mergekit ignores too are passed over with a word, misspelt ones are a problem."""
    out: dict[str, object] = {}
    for key, value in given.items():
        if key in known:
            out[key] = value
        elif key not in EVERY and difflib.get_close_matches(key, known, n=1, cutoff=0.7):
            made.problems.append(f"{place}: {unknown('parameter', key, known)}")
        elif not any(note.startswith(f"{key}: no parameter") for note in made.notes):
            made.notes.append(f"{key}: no parameter of this method: mergekit ignores it, and so it is here")
    return out
