"""The loader of YAML's nodes and scalars: counts what a text holds, and makes nothing but plain values.

It imports PyYAML, so `yaml_text.py` imports it only when there is a text to read.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

MOST_VALUES = 5_000
MOST_DEPTH = 50
TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"""[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
      |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
      |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
      |[-+]?\.(?:inf|Inf|INF)
      |\.(?:nan|NaN|NAN)""",
    re.X,
)
KEPT = ("null", "bool", "int", "float", "str", "seq", "map")


class Loader(yaml.SafeLoader):
    """A node is counted with all that is in it as soon as it is complete."""

    depth = values = 0
    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(TAG) in KEPT
    }
    yaml_implicit_resolvers = {
        first: [(tag, found) for tag, found in resolvers if tag not in (f"{TAG}timestamp", f"{TAG}float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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
            raise _too_much(mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        if node is None:
            raise ComposerError(None, None, "no value", mark)
        self.depth -= 1
        if is_alias and node not in self.measured:
            raise ComposerError(None, None, "an alias within what it stands for", mark)
        if not is_alias:
            sizes = [self.measured[each] for each in _children(node)]
            self.measured[node] = 1 + sum(n for n, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
        size, deep = self.measured[node]
        if size > MOST_VALUES or self.depth + deep > MOST_DEPTH:
            raise _too_much(mark)
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


Loader.add_implicit_resolver(f"{TAG}float", re.compile(f"^(?:{FLOAT.pattern})$", re.X), list("-+0123456789."))


def _too_much(mark: yaml.Mark) -> Exception:
    return ComposerError(None, None, f"more than {MOST_VALUES} values, or {MOST_DEPTH} levels", mark)


def _children(node: yaml.Node) -> list[yaml.Node]:
    """The keys, values and items that a node holds."""
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
