"""`${...}` in recipes: another value of the recipe, or an environment variable that the user allows by name.

    dataset: {name: folder, path: "${oc.env:PHOTOGRAPHS}/pets"}      with --allow-env PHOTOGRAPHS
    strategy: [{name: ties, density: "${strategy.1.density}"}, ...]

A recipe may come from anywhere, and what a run writes may go anywhere: so an environment variable's value stands only in paths
(`PLACES`), which no report holds, and what is stored is the reference. Names are OmegaConf's; nothing else of its language is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_vl.errors import UserError

REFERENCE = re.compile(r"\$\{([^${}]*)\}")
ENVIRONMENT = re.compile(r"\s*oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:,(.*))?", re.S)
KEYS = re.compile(r"[^.\[\]]+")
MOST_LETTERS, MOST_VALUES, MOST_STEPS = 2**20, 5_000, 50
PLACES = ("path", "root", "classes_file", "shifts", "checkpoint")
"""Options that are paths, of data sets and of tuned models, and that nothing written holds."""
NAMED_BY = ("path", "checkpoint")
"""Those of them whose last part names a row or a data set where no label does."""

Place = tuple[str | int, ...]


def expand(tree: object, *, where: str) -> Any:
    """A copy with the recipe's own values in place of `${key}`; `${oc.env:NAME}` stays. Raises UserError for any other `${`."""
    check_form(tree, where=where)
    return _Expansion(tree, where).of(tree, (), ())


def fill(tree: object, environment: Mapping[str, str | None], *, where: str) -> Any:
    """A copy with values in place of `${oc.env:NAME}`, for the names in `environment`, None where a variable is not set.

    Raises UserError for others, and where the value would stand in what is stored.
    """
    return _filled(tree, environment, (), where)


def names(tree: object) -> tuple[str, ...]:
    """The environment variables that are referred to, by the alphabet."""
    referred = [ENVIRONMENT.fullmatch(inner) for _, text in _texts(tree) for inner in REFERENCE.findall(text)]
    return tuple(sorted({match[1] for match in referred if match}))


def hide(record: object, environment: Mapping[str, str | None]) -> object:
    """A record whose reasons, errors that may tell of a path, hold references in place of the environment's values."""
    if isinstance(record, list):
        return [hide(each, environment) for each in record]
    if not isinstance(record, dict):
        return record
    out = {key: hide(value, environment) for key, value in record.items()}
    if isinstance(reason := record.get("reason"), str):
        for name, value in sorted(environment.items(), key=lambda item: -len(item[1] or "")):
            reason = reason.replace(value, f"${{oc.env:{name}}}") if value else reason
        out["reason"] = reason
    return out


def check_form(tree: object, *, where: str) -> None:
    """Raise UserError for a `${` without its `}`, for one within another, and for one of nothing."""
    for at, text in _texts(tree):
        here = f"{where}: {_told(at)}" if at else where
        if "${" in REFERENCE.sub("", text):
            raise UserError(f"`${{` without its `}}` in {text!r}", where=here, hint="write ${key} or ${oc.env:NAME}")
        if not all(inner.strip() for inner in REFERENCE.findall(text)):
            raise UserError(f"{text!r} refers to nothing", where=here, hint="write ${key} or ${oc.env:NAME}")


def check_none(tree: object, *, where: str) -> None:
    """Raise UserError for a `${`: it is read in recipes alone."""
    for _, text in _texts(tree):
        raise UserError(f"{text} is read in recipes alone", where=where, hint="write the value")


def _texts(tree: object) -> Iterator[tuple[Place, str]]:
    """The texts with a `${`, and their places, in order."""
    waiting: list[tuple[Place, object]] = [((), tree)]
    while waiting:
        at, value = waiting.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += reversed([((*at, key), each) for key, each in inner])
        elif isinstance(value, str) and "${" in value:
            yield at, value


class _Expansion:
    def __init__(self, tree: object, where: str) -> None:
        self.tree, self.where = tree, where
        self.letters = self.values = 0

    def of(self, value: object, at: Place, through: tuple[Place, ...]) -> object:
        """The value that stands at a place, reached through references that stand elsewhere."""
        self.values += 1
        self._bound(at)
        if isinstance(value, dict):
            return {key: self.of(each, (*at, key), through) for key, each in value.items()}
        if isinstance(value, list):
            return [self.of(each, (*at, i), through) for i, each in enumerate(value)]
        if not isinstance(value, str):
            return value
        parts: list[object] = []
        end = 0
        for found in REFERENCE.finditer(value):
            parts += [value[end : found.start()], self._referred(found, at, through)]
            end = found.end()
        parts = [part for part in [*parts, value[end:]] if part != ""]
        if len(parts) == 1:
            new = parts[0]
        elif any(isinstance(part, dict | list) for part in parts):
            raise self._refused(at, f"a mapping or list within the text {value!r}", "refer to one value of it")
        else:
            new = "".join(map(str, parts))
        self.letters += len(new) if isinstance(new, str) else 0
        self._bound(at)
        return new

    def _referred(self, found: re.Match[str], at: Place, through: tuple[Place, ...]) -> object:
        if ENVIRONMENT.fullmatch(found[1]):
            return found[0]
        if ":" in found[1]:
            raise self._refused(at, f"{found[0]} is not read", "write ${key} or ${oc.env:NAME}")
        if at in through or len(through) > MOST_STEPS:
            raise self._refused(at, f"{found[0]} leads back to itself", "write the value")
        there, value = self._find(found[1], at)
        if there is None:
            raise self._refused(at, f"{found[0]} is no value of the recipe", "write its whole key: ${dataset.path}")
        if at[: len(there)] == there:
            raise self._refused(at, f"{found[0]} holds this very text", "write the value")
        return self.of(value, there, (*through, at))

    def _find(self, key: str, at: Place) -> tuple[Place | None, object]:
        """Where a key leads, and what is there; dots before it count the levels from here, the first being this one."""
        up = len(key) - len(key.lstrip("."))
        place: list[str | int] = list(at[: max(0, len(at) - up)]) if up else []
        value: Any = self.tree
        for step in place:
            value = value[step]
        for word in KEYS.findall(key):
            if isinstance(value, dict) and word in value:
                place.append(word)
            elif isinstance(value, list) and word.isdecimal() and len(word) < 9 and int(word) < len(value):
                place.append(int(word))
            else:
                return None, None
            value = value[place[-1]]
        return tuple(place), value

    def _bound(self, at: Place) -> None:
        if self.values > MOST_VALUES or self.letters > MOST_LETTERS:
            raise self._refused(at, "references multiply it beyond all bounds", "write the values")

    def _refused(self, at: Place, what: str, hint: str) -> UserError:
        return UserError(what, where=f"{self.where}: {_told(at)}", hint=hint)


def _told(place: Place) -> str:
    return ".".join(map(str, place))


def _filled(value: object, environment: Mapping[str, str | None], at: Place, where: str) -> object:
    if isinstance(value, dict):
        new = {key: _filled(each, environment, (*at, key), where) for key, each in value.items()}
        label = next((found for key in NAMED_BY if (found := _label(value.get(key)))), None)
        return new if label is None or "label" in new else {**new, "label": label}
    if isinstance(value, list):
        return [_filled(each, environment, (*at, i), where) for i, each in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    here = f"{where}: {_told(at)}"
    key = next((step for step in reversed(at) if isinstance(step, str)), "")
    if at[:1] not in (("dataset",), ("tuned",)) and at[:2] != ("search", "development") or key not in PLACES:
        raise UserError(
            f"{value} would be stored with what is made of it",
            where=here,
            hint=f"environment variables are for paths: {', '.join(PLACES)} of a data set or tuned model",
        )
    if key == "shifts" and _label(value):
        raise UserError(f"{value} names a shift", where=here, hint="end the path in a folder's name")
    return REFERENCE.sub(lambda found: _of_environment(found, environment, here), value)


def _label(path: object) -> str | None:
    """What a path is called whose last part is the environment's: by the variable's name instead of its value."""
    if not isinstance(path, str) or "${" not in path:
        return None
    last = REFERENCE.sub(lambda found: "\0" + _variable(found[1]), path).rstrip("/").rpartition("/")[2]
    return last.replace("\0", "") if "\0" in last else None


def _variable(reference: str) -> str:
    """The name of an environment variable in what refers to it."""
    match = ENVIRONMENT.fullmatch(reference)
    assert match is not None  # `expand` refuses others
    return match[1]


def _of_environment(found: re.Match[str], environment: Mapping[str, str | None], where: str) -> str:
    match = ENVIRONMENT.fullmatch(found[1])
    assert match is not None  # `expand` refuses others
    name, default = match[1], match[2]
    if name not in environment:
        raise UserError(
            f"{found[0]} reads the environment variable {name}",
            where=where,
            hint=f"if you trust the recipe with it, add --allow-env {name}",
        )
    value = environment[name]
    if value is None and default is None:
        raise UserError(f"the environment variable {name} is not set", where=where, hint=f"set {name}")
    return value if value is not None else str(default).strip().strip("\"'")
