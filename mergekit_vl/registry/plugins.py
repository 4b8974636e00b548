"""The registry: it loads built-ins, installed entry points and a plugins folder through the same hooks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from mergekit_vl.errors import UserError, unknown
from mergekit_vl.registry import contracts, hookspecs
from mergekit_vl.registry.calls import FILE_MODULE, to_stderr, within

if TYPE_CHECKING:
    import typer
    from typer.models import CommandInfo

DEFAULT_PLUGINS = ("mergekit_vl.registry.builtin_plugins",)
ENTRY_POINT_GROUP = "mergekit_vl"
KINDS = ("backbones", "adapters", "tuners", "strategies", "datasets", "protocols")
PATIENCE = "MERGEKIT_VL_PLUGIN_SECONDS"
"""Environment variable: seconds that a plugin may take to load; default a minute."""


@dataclass(frozen=True)
class Entry:
    kind: str
    name: str
    target: object
    """A class, or where there is one: `"module:Class"`."""
    summary: str
    owner: str

    def resolve(self) -> type[Any]:
        """The registered class, imported and checked now if it was given as `"module:Class"`."""
        if isinstance(self.target, type):
            return self.target
        found: type[Any] = self._imported(str(self.target))
        if faults := contracts.faults(found, self.kind):
            raise UserError(f"{self.told}: {'; '.join(faults)}", where=f"plugin {self.owner}")
        return found

    @property
    def told(self) -> str:
        """As messages name it: strategy 'ties'."""
        return f"{singular(self.kind)} {self.name!r}"

    def check(self) -> None:
        """Raise UserError for a class that does not fit its kind; of one that is not imported yet, where that cannot be tried."""
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"{self.kind}: {self.name!r} is no name", hint="register(name, target, summary)")
        if not isinstance(self.target, str):
            faults = contracts.faults(self.target, self.kind)
        elif (
            not all(part.isidentifier() for part in self.target.replace(":", ".").split("."))
            or self.target.count(":") != 1
        ):
            faults = (f"{self.target!r} is no place of a class: module:Class was expected",)
        else:
            return
        if faults:
            raise UserError(f"{self.told}: {'; '.join(faults)}")

    def _imported(self, target: str) -> Any:
        module, _, attribute = target.partition(":")
        try:
            with to_stderr():
                return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            if self.owner in DEFAULT_PLUGINS and not isinstance(error, (ImportError, AttributeError)):
                raise
            raise UserError(f"{self.name} ({target}) of plugin {self.owner} cannot be imported: {error}") from error


@dataclass
class Registry:
    manager: pluggy.PluginManager
    entries: dict[str, dict[str, Entry]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    failures: dict[str, str] = field(default_factory=dict)
    """Plugins that could not be loaded, with the reason; the others are loaded."""

    def find(self, kind: str, name: str, *, where: str = "") -> Entry:
        if name not in self.entries[kind]:
            raise unknown(singular(kind), name, self.entries[kind], where=where)
        return self.entries[kind][name]

    def adapter(self, name: str) -> type[Any]:
        """The class of a registered adapter."""
        return self.find("adapters", name).resolve()

    def adapters(self) -> Iterator[type[Any]]:
        """The classes of all adapters: those of plugins, then ours, each in the order of registration."""
        for entry in sorted(self.entries["adapters"].values(), key=lambda entry: entry.owner in DEFAULT_PLUGINS):
            yield entry.resolve()

    def add_commands(self, app: typer.Typer) -> None:
        """Let plugins add commands to the Typer application; one that raises is named in `failures`."""
        for owner, plugin in self.manager.list_name_plugin():
            taken = {command_name(c): c for c in app.registered_commands}
            others = [p for p in self.manager.get_plugins() if p is not plugin]
            try:
                with to_stderr():
                    self.manager.subset_hook_caller("register_commands", remove_plugins=others)(app=app)
            except (Exception, SystemExit) as error:
                self.failures[owner] = f"{type(error).__name__}: {error}"
            added = [c for c in app.registered_commands if c not in taken.values()]
            if clash := [name for c in added if (name := command_name(c)) in taken]:
                raise UserError(f"plugin {owner} brings a command {clash[0]!r}, which is taken", hint="rename it")

    def owners(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.manager.list_name_plugin())

    def modules(self) -> dict[str, str]:
        """The plugins that are not ours, by the names of their modules."""
        loaded = [(owner, plugin) for owner, plugin in self.manager.list_name_plugin() if owner not in DEFAULT_PLUGINS]
        return {getattr(plugin, "__name__", type(plugin).__module__): owner for owner, plugin in loaded}


def singular(kind: str) -> str:
    return kind.removesuffix("ies") + "y" if kind.endswith("ies") else kind[:-1]


def command_name(command: CommandInfo) -> str:
    return command.name or getattr(command.callback, "__name__", "").replace("_", "-")


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The plugins, loaded once a process."""
    return load_plugins()


def load_plugins(directory: Path | None = None) -> Registry:
    """Load every plugin: DEFAULT_PLUGINS, entry points of group `mergekit_vl`, and the *.py files of `directory`.

    A third-party plugin that raises while loading is named in `failures`, and a hook that does not
    exist (`check_pending`) counts as a failure of its plugin. A name registered twice and a built-in that fails are fatal.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    registry = Registry(manager)
    for name in DEFAULT_PLUGINS:
        _admit(registry, name, partial(importlib.import_module, name), builtin=True)
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        _admit(registry, point.name, point.load)
    directory = directory or (Path(found) if (found := os.environ.get("MERGEKIT_VL_PLUGINS")) else None)
    if directory is not None:
        if not directory.is_dir():
            raise UserError(
                "no such plugins directory", where=str(directory), hint="give an existing folder to --plugins-dir"
            )
        for path in sorted(directory.glob("*.py")):
            _admit(registry, path.stem, partial(_import_file, path))
    return registry


def _import_file(path: Path) -> ModuleType:
    name = f"{FILE_MODULE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _admit(registry: Registry, owner: str, load: Callable[[], object], *, builtin: bool = False) -> None:
    """Load one plugin and call its hooks; all of its names come in, or none."""
    manager = registry.manager
    staged: list[Entry] = []
    plugin = None
    try:
        with to_stderr(), nullcontext() if builtin else within(float(os.environ.get(PATIENCE, "60"))):
            plugin = load()
            manager.register(plugin, owner)
            manager.check_pending()
            for kind in KINDS:

                def register(name: str, target: object, summary: str = "", kind: str = kind) -> None:
                    staged.append(Entry(kind, name, target, summary, owner))

                others = [p for p in manager.get_plugins() if p is not plugin]
                manager.subset_hook_caller(f"register_{kind}", remove_plugins=others)(register=register)
            for entry in staged:
                entry.check()
    except (Exception, SystemExit) as error:  # a third party's code may raise anything
        if builtin:
            raise
        if plugin is not None and manager.get_plugin(owner) is plugin:
            manager.unregister(name=owner)
        registry.failures[owner] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return
    for entry in staged:
        held = registry.entries[entry.kind].get(entry.name)
        if held is not None:
            raise UserError(
                f"{entry.kind}: {entry.name!r} is registered twice, by {held.owner} and by {owner}",
                hint="rename one, or uninstall a plugin",
            )
        registry.entries[entry.kind][entry.name] = entry
