"""Models of the Hugging Face hub as folders on this machine: files are downloaded, and only the readers of this package open them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mergekit_vl.errors import UserError, first_line


def fetched_folder(
    name: str,
    indexes: Sequence[str],
    weights: Sequence[str],
    configs: Sequence[str],
    shards: Callable[[Path], list[str]],
) -> Path:
    """The folder of a model `ORG/NAME` or `ORG/NAME@REVISION` in the hub's cache, with one file of weights (or an index and its
    shards) and its configs.

    `indexes` and `weights` are the names that are looked for, best first; `shards` reads the names in an index. What is in the cache serves when the hub cannot be reached.
    Raises UserError where there is nothing to fetch, or no way to it.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    where = f"hf-hub:{name}"
    repository, _, revision = name.partition("@")
    version = revision or None
    try:
        there = set(HfApi().list_repo_files(repository, revision=version))
    except Exception as error:  # the hub's client, its transport and a name that is none raise many kinds
        try:
            names = (*indexes, *weights, *configs)
            there = {n for n in names if isinstance(try_to_load_from_cache(repository, n, revision=version), str)}
        except ValueError:
            there = set()
        if there.isdisjoint((*indexes, *weights)):
            raise _unreachable(error, where) from None
    chosen = next((n for n in (*indexes, *weights) if n in there), None)
    if chosen is None:
        raise UserError(
            "the repository has no weights that are known here", where=where, hint=f"known are {', '.join(weights)}"
        )
    try:
        file = Path(hf_hub_download(repository, chosen, revision=version))
        wanted = [n for n in configs if n in there]
        if chosen in indexes:
            wanted += shards(file)
        for each in wanted:
            hf_hub_download(repository, each, revision=version)
    except UserError:
        raise
    except Exception as error:
        raise _unreachable(error, where) from None
    return file.parent


def _unreachable(error: Exception, where: str) -> UserError:
    first = first_line(error)
    return UserError(
        f"it is not on this machine and cannot be fetched: {first[:200]}",
        where=where,
        hint="check the name and the connection, or copy the model's folder here and name that",
    )
