"""`list_strategies`: what is registered, with options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergekit_vl import options
from mergekit_vl.merging.method import info_of
from mergekit_vl.registry.plugins import DEFAULT_PLUGINS, Entry, registry
from mergekit_vl.reports.render import notebook_table


@dataclass(frozen=True)
class StrategyEntry:
    """A registered strategy."""

    entry: Entry

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def summary(self) -> str:
        return self.entry.summary

    @property
    def plugin(self) -> str | None:
        """The plugin that brought it; None for a built-in one."""
        return None if self.entry.owner in DEFAULT_PLUGINS else self.entry.owner

    @property
    def cls(self) -> type:
        """Its class, imported now."""
        return self.entry.resolve()

    @property
    def merges_weights(self) -> bool:
        """Whether `merge` takes it: a closed form, which needs no data."""
        return info_of(self.cls) is not None

    @property
    def options(self) -> dict[str, str]:
        """By key: type, default and meaning."""
        return {key: f"{kind} = {default}: {help}" for key, kind, default, help in options.describe(self.cls)}

    def __repr__(self) -> str:
        return "\n".join([f"{self.name}: {self.summary}", *(f"  {key}: {told}" for key, told in self.options.items())])

    def _repr_html_(self) -> str:
        title = f"{self.name}: {self.summary}"
        return notebook_table(list(self.options.items()), header=("option", ""), title=title)


class Strategies(Mapping[str, StrategyEntry]):
    """The registered strategies by name."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> StrategyEntry:
        return StrategyEntry(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _rows(self) -> list[list[str]]:
        told = [each for each in self.values()]
        return [[each.name, each.summary + (f" [{each.plugin}]" if each.plugin else "")] for each in told]

    def __repr__(self) -> str:
        width = max(len(name) for name in self)
        return "\n".join(f"{name:{width}s}  {summary}" for name, summary in self._rows())

    def _repr_html_(self) -> str:
        return notebook_table(self._rows(), header=("strategy", ""))


def list_strategies() -> Strategies:
    """The strategies that are registered, plugins' included, by name; each tells its options."""
    return Strategies(registry().entries["strategies"])
