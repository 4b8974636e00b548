"""YAML of strangers as plain data: mappings with text keys, lists, text, numbers, booleans and null, of bounded size and depth.

1e-3 is a number and a date is text, as in YAML 1.2; no tag makes anything else. Aliases count as often as
they stand there, so that ten lines cannot be a billion values.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mergekit_vl.errors import UserError

if TYPE_CHECKING:
    import yaml

MOST_BYTES = 128 * 2**10
MOST_VALUES = 5_000
MOST_DEPTH = 50
FLOAT = re.compile(
    r"""[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
      |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
      |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
      |[-+]?\.(?:inf|Inf|INF)
      |\.(?:nan|NaN|NAN)""",
    re.X,
)
TAG = "tag:yaml.org,2002:"


def parse(text: str, *, where: str) -> Any:
    """The data; raises UserError for what is not YAML, and for what a recipe cannot hold."""
    import yaml

    try:
        return _plain(yaml.load(text, Loader=_loader()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"broken YAML{place}: {error.problem or error.context}", where=where, hint="mend the line"
        ) from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:  # a tag on what it is not for
        raise UserError(f"broken YAML: {error}", where=where, hint="mend the line") from None


def _plain(value: object) -> object:
    """A copy in which nothing is shared; raises ValueError for what JSON, paths and random generators cannot hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text: put it between quotes")
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ValueError("a whole number of more than 64 bits")
    if isinstance(value, str) and (found := _UNSTORABLE.search(value)):
        raise ValueError(f"text holds the character U+{ord(found[0]):04X}")
    return value


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@lru_cache(maxsize=1)
def _loader() -> type[yaml.SafeLoader]:
    import yaml
    from yaml.composer import ComposerError

    def too_much(mark: yaml.Mark) -> Exception:
        return ComposerError(None, None, f"more than {MOST_VALUES} values, or {MOST_DEPTH} levels", mark)

    class Loader(yaml.SafeLoader):
        """A node is counted with all that is in it as soon as it is complete."""

        depth = values = 0

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.measured: dict[yaml.Node, tuple[int, int]] = {}
            """Of each complete node: how many values it holds, itself included, and how deep they lie."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node:
            mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # of PyYAML
            is_alias = self.check_event(yaml.AliasEvent)
            self.depth += 1
            self.values += 1
            if self.depth > MOST_DEPTH or self.values > MOST_VALUES:
                raise too_much(mark)
            node: yaml.Node | None = super().compose_node(parent, index)
            if node is None:
                raise ComposerError(None, None, "no value", mark)
            self.depth -= 1
            if is_alias and node not in self.measured:
                raise ComposerError(None, None, "an alias within what it stands for", mark)
            if not is_alias:
                held: list[yaml.Node] = [] if isinstance(node, yaml.ScalarNode) else node.value
                if isinstance(node, yaml.MappingNode):
                    held = [each for pair in node.value for each in pair]
                sizes = [self.measured[each] for each in held]
                self.measured[node] = 1 + sum(n for n, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
            size, deep = self.measured[node]
            if size > MOST_VALUES or self.depth + deep > MOST_DEPTH:
                raise too_much(mark)
            return node

        def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge":
                    if key.value in seen:
                        raise ComposerError(None, None, f"the key {key.value!r} twice", key.start_mark)
                    seen.add(key.value)
            return node

    kept = ("null", "bool", "int", "float", "str", "seq", "map")
    Loader.yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(TAG) in kept
    }
    Loader.yaml_implicit_resolvers = {
        first: [(tag, found) for tag, found in resolvers if tag not in (f"{TAG}timestamp", f"{TAG}float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(f"{TAG}float", re.compile(f"^(?:{FLOAT.pattern})$", re.X), list("-+0123456789."))
    return Loader
