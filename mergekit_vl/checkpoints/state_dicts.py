"""Which mapping of names to tensors in a pickled checkpoint is the model: where training scripts, wrappers and whole modules keep it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_vl.checkpoints.checkpoint import LONGEST_NAME, MOST_TENSORS
from mergekit_vl.checkpoints.unpickler import Damaged, Foreign, Object, Pairs, Script, Tensor
from mergekit_vl.errors import UserError

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema")
"""Where training checkpoints keep the weights, best first: open_clip and timm write `state_dict`."""
NO_MODEL = re.compile(r"optim|sched|scaler|momentum|queue|loss|metric|callback|history|rng|grad|hyper", re.I)
"""Keys under which tensors are not a model's."""
AVERAGED = re.compile(r"(?:^|[_.])(?:ema|swa|averaged?|avg|polyak|shadow)(?:[_.]|$)|^ema|ema$", re.I)
WRAPPED = re.compile(r"\A(?:module\.)*")
DEEPEST = 100
"""Modules within modules."""
DEEPEST_MAPPING = 6
MOST_MAPPINGS = 10_000

Tensors = dict[str, Tensor | Foreign]


@dataclass(frozen=True)
class Taken:
    """The tensors of the model by name, and how they were found."""

    tensors: Tensors
    passed_over: str = ""
    """Averaged weights (EMA) in the same file, which were not taken."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Mapping:
    path: tuple[str, ...]
    tensors: Tensors
    whole: str = ""
    """The class of the module that it was read from."""

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def averaged(self) -> bool:
        return any(AVERAGED.search(key) for key in self.path)


def taken(content: object, path: Path, weights: str) -> Taken:
    """The model in what a pickle holds; `weights` is `plain`, `ema`, or the key of one of several mappings.

    `module.` of data-parallel training is taken off. Raises UserError where there is no model, or more than one and `weights` does not say which.
    """
    if isinstance(content, Pairs) and any(
        isinstance(value, Tensor | Foreign) for key, value in content.items if not isinstance(key, str | int)
    ):
        raise Damaged(f"a tensor has no name, or one of more than {LONGEST_NAME} bytes")
    found = _mappings(content)
    if not found:
        raise UserError("no weights in it", where=str(path), hint=_hint(content))
    chosen, passed_over = _chosen(found, weights, path)
    notes = []
    if chosen.whole:
        notes.append(f"a whole module, {chosen.whole}: read for its tensors, none of its code is run")
    if len(chosen.path) > 1 or (chosen.path and chosen.path[0] not in STATE_DICTS):
        notes.append(f"the weights are those under {chosen.key!r}")
    if len(chosen.tensors) > MOST_TENSORS:
        raise Damaged(f"it has {len(chosen.tensors):,} tensors, and {MOST_TENSORS:,} are the most")
    return Taken(_plain(chosen.tensors, notes), passed_over, tuple(notes))


def _plain(tensors: Tensors, notes: list[str]) -> Tensors:
    """Without the wrappers' prefixes, and the count that AveragedModel keeps beside them."""
    beside = {"n_averaged"} & tensors.keys() if len(tensors) > 1 else set()
    if beside and all(name.startswith("module.") for name in tensors if name not in beside):
        tensors = {name: value for name, value in tensors.items() if name not in beside}
        notes.append("averaged weights of torch's AveragedModel: module. and n_averaged are taken off")
    wrapped = min(len(name) - len(WRAPPED.sub("", name)) for name in tensors)
    plain = {name[wrapped:].replace("_orig_mod.", ""): value for name, value in tensors.items()}
    if len(plain) < len(tensors) or "__metadata__" in plain:
        raise Damaged("two tensors have the same name, or one is called __metadata__")
    return plain


def _hint(content: object) -> str:
    if isinstance(content, Tensor):
        return "it is one tensor without a name, as Tip-Adapter saves its cache of features: give a model's state_dict"
    if isinstance(content, Object):
        return f"it is an object of class {content.kind.module}.{content.kind.name}: save a module's state_dict()"
    keys = ", ".join(list(content.named())[:5]) if isinstance(content, Pairs) else ""
    there = f"its keys are {keys}; " if keys else ""
    return (
        f"{there}save a module's state_dict(): it needs plain tensors by name, or those under {', '.join(STATE_DICTS)}"
    )


def _chosen(found: Sequence[_Mapping], weights: str, path: Path) -> tuple[_Mapping, str]:
    averaged = [each for each in found if each.averaged]
    plain = [each for each in found if not each.averaged]
    if weights == "ema":
        if not averaged:
            raise UserError("holds no averaged weights (EMA)", where=str(path), hint="leave out --weights ema")
        return averaged[0], ""
    if weights != "plain":
        named = [each for each in found if weights in (each.key, *each.path)]
        if not named:
            keys = ", ".join(each.key for each in found[:5]) or "no mapping"
            raise UserError(f"no weights {weights!r} in it", where=str(path), hint=f"there are {keys}")
        return named[0], ""
    over = averaged[0].key if averaged and plain else ""
    for key in STATE_DICTS:
        if first := next((each for each in plain or averaged if each.path[:1] == (key,)), None):
            return first, over
    if not plain:
        return averaged[0], ""
    if len(plain) == 1 or not plain[0].path:
        return plain[0], over
    return _together(plain, path), over


def _together(parts: Sequence[_Mapping], path: Path) -> _Mapping:
    """Several mappings as parts of one model; raises UserError where they look like models of their own."""
    names = [each.tensors.keys() for each in parts]
    if any(2 * len(a & b) >= min(len(a), len(b)) for i, a in enumerate(names) for b in names[:i]):
        raise UserError(
            f"several models in it: {', '.join(each.key for each in parts[:4])}",
            where=str(path),
            hint=f"--weights {parts[0].path[-1]} takes that one",
        )
    shared = 0
    while all(len(each.path) > shared + 1 and each.path[shared] == parts[0].path[shared] for each in parts):
        shared += 1
    together = {f"{'.'.join(each.path[shared:])}.{name}": t for each in parts for name, t in each.tensors.items()}
    return _Mapping(parts[0].path[:shared], together)


def _mappings(content: object) -> list[_Mapping]:
    """Every mapping that holds tensors by name, from the outside in; of whole modules their tensors by the names of a state_dict."""
    found: list[_Mapping] = []
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    seen: set[int] = set()
    while waiting:
        path, each = waiting.pop(0)
        if id(each) in seen or len(seen) > MOST_MAPPINGS:
            continue
        seen.add(id(each))
        if isinstance(each, Script) or (isinstance(each, Object) and _is_module(each)):
            tensors = _tensors_of(each)
            if tensors:
                found.append(
                    _Mapping(path, tensors, f"{each.kind.module}.{each.kind.name}" if isinstance(each, Object) else "")
                )
            continue
        pairs = each.state if isinstance(each, Object) else each
        if not isinstance(pairs, Pairs):
            continue
        named = pairs.named()
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor | Foreign)}
        if tensors:
            found.append(_Mapping(path, tensors))
        if len(path) < DEEPEST_MAPPING:
            waiting += [
                ((*path, key), value)
                for key, value in named.items()
                if isinstance(value, Pairs | Object | Script) and not NO_MODEL.search(key)
            ]
    return found


def _is_module(each: Object) -> bool:
    return each.state is not None and isinstance(each.state.named().get("_modules"), Pairs | Object)


def _inner(value: object) -> dict[str, object]:
    """What a mapping of a module holds by name: an OrderedDict, a dict, or one of a class of its own."""
    pairs = value.state if isinstance(value, Object) else value
    return pairs.named() if isinstance(pairs, Pairs) else {}


def _tensors_of(module: Script | Object) -> Tensors:
    """The tensors of a module, named as its state_dict names them; a module that is shared has every name."""
    found: Tensors = {}
    waiting: list[tuple[str, Script | Object, int]] = [("", module, 0)]
    seen = 0
    while waiting:
        prefix, each, depth = waiting.pop()
        if depth > DEEPEST:
            raise Damaged(f"its modules are more than {DEEPEST} deep, or one holds itself")
        inner = []
        for name, value in _attributes(each):
            seen += 1
            if seen > MOST_TENSORS or len(prefix) > LONGEST_NAME:
                raise Damaged(
                    f"its modules have more than {MOST_TENSORS:,} attributes, or names above {LONGEST_NAME} bytes"
                )
            if isinstance(value, Script | Object):
                inner.append((f"{prefix}{name}.", value, depth + 1))
            elif isinstance(value, Tensor | Foreign):
                found[prefix + name] = value
        waiting += reversed(inner)
    return found


def _attributes(module: Script | Object) -> list[tuple[str, object]]:
    """Parameters, buffers that are stored, and modules; of TorchScript all attributes."""
    if isinstance(module, Script):
        return [(name, value) for name, value in (module.state.items if module.state else ()) if isinstance(name, str)]
    state = module.state.named() if module.state else {}
    unsaved = state.get("_non_persistent_buffers_set")
    hidden = set(unsaved) if isinstance(unsaved, tuple) and all(isinstance(each, str) for each in unsaved) else set()
    buffers = {name: value for name, value in _inner(state.get("_buffers")).items() if name not in hidden}
    return [*_inner(state.get("_parameters")).items(), *buffers.items(), *_inner(state.get("_modules")).items()]
