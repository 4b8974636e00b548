"""`key=value` on the command line: applied to a recipe, or to the options of one thing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mergekit_vl.errors import UserError, first_line
from mergekit_vl.recipes import references, yaml_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

TYPED = "command line"
OWN_WEIGHTS = ("local-dir:", "hf-hub:")
"""What a `backbone.arch` starts with that brings its weights: an override with it takes the recipe's `pretrained` away."""


def set_option(chosen: dict[str, object], word: str, key: str, value: str) -> None:
    """Apply `word`, that is key=value, to plain options as `run` applies it to a recipe, but for mappings: they replace the old ones."""
    config = held(chosen, where=TYPED)
    _apply(config, word, key, value, merge=False, hint="")
    applied = _plain(config)
    references.check_none(applied, where=TYPED)
    chosen.clear()
    chosen.update(applied)


def held(plain: dict[str, object], *, where: str) -> DictConfig:
    """Plain data as OmegaConf holds them, references unresolved (`references.py` resolves them); raises UserError for broken ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    references.check_form(plain, where=where)
    try:
        return OmegaConf.create(plain)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0], where=where, hint="write ${key} or ${oc.env:NAME}") from None


def overridden(config: DictConfig, words: Sequence[str]) -> dict[str, Any]:
    """A recipe as plain data, after the words key=value were applied to it in order; `config` stays as it is."""
    changed = copy.deepcopy(config)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not an override", where=TYPED, hint="write key=value, for instance seed=2")
        _apply(changed, word, key, value, merge=True, hint="list items are written tuned.0.tuner.epochs=5")
        if key == "backbone.arch" and value.startswith(OWN_WEIGHTS):  # the recipe's tag is another architecture's
            if not any(other.startswith("backbone.pretrained=") for other in words):
                changed["backbone"].pop("pretrained", None)
    return _plain(changed)


def _plain(config: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def _apply(config: DictConfig, word: str, key: str, value: str, *, merge: bool, hint: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        new = yaml_text.parse(f"v: {value}", where="")["v"]
        references.check_form(new, where="")
        whole = isinstance(new, dict) and "name" in new  # another thing by name brings all of its options
        OmegaConf.update(config, key, new, merge=merge and not whole, force_add=True)
    except UserError as error:
        raise UserError(f"{word!r} cannot be applied: {error.what}", where=TYPED, hint=hint) from None
    except (OmegaConfBaseException, IndexError, TypeError, ValueError, RecursionError) as error:
        what = first_line(error)
        raise UserError(f"{word!r} cannot be applied: {what}", where=TYPED, hint=hint) from None
