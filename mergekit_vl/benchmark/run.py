"""A bench at work: every strategy on every cell, with the same tuned models, images, selection and evaluator.

A cell is a function of its key: it reads and writes the bench's folder alone, so `execute` may run cells in any order, anywhere. Each
row's record is written when the row is done; what is there is not made again, so a killed bench goes on, and a new strategy
costs itself alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vl.benchmark import report
from mergekit_vl.benchmark.cell_rows import CellRun
from mergekit_vl.benchmark.grid import Bench, Key
from mergekit_vl.benchmark.plan import ROOTS, Plan
from mergekit_vl.experiments.experiment import prepare
from mergekit_vl.reporter import ALL_CELLS, Reporter
from mergekit_vl.reports.results import plain
from mergekit_vl.system.atomic_files import write_json

if TYPE_CHECKING:
    from mergekit_vl.benchmark.records import BenchReport
    from mergekit_vl.models.features import FeatureStore

Executor = Callable[[Callable[[Key], None], Sequence[Key]], Iterable[Key]]
"""Runs work(key) for every key and gives each when it is done: the one seam for engines of many machines."""


def serial(work: Callable[[Key], None], keys: Sequence[Key]) -> Iterator[Key]:
    for key in keys:
        work(key)
        yield key


def work(bench: Bench, key: Key) -> None:
    """Make the rows of a cell that are not on record, failed or would come out otherwise now; then its landscape."""
    bench.store.memory.clear()  # what cells share is on disk
    cell = bench.cell(bench.tasks[key], key.seed, bench.folder(key))
    cell.claim(bench.ready.experiment.tuners)
    missing, contest = bench.missing(key, cell), CellRun(bench, key, cell)
    if missing:
        cell.keep_shots(key.dataset, key.seed)
        facts = plain(cell.facts(key.dataset, key.seed))
        write_json(cell.folder / "facts.json", {name: fact for name, fact in facts.items() if name != "rows"})
        contest.make(missing)
    contest.landscape()


def run(
    plan: Plan,
    out: Path,
    *,
    device: str,
    store: FeatureStore,
    reporter: Reporter,
    execute: Executor = serial,
) -> BenchReport:
    """Run every cell that is not done into `out` and return the report (also written there)."""
    began = time.time()
    ready = dataclasses.replace(prepare(plan.experiment, device=device, reporter=reporter), more=ROOTS)
    bench = Bench(plan, ready, out, store, reporter)
    keys = bench.keys()
    reporter.progress(0, len(keys), ALL_CELLS)
    for done, key in enumerate(execute(partial(work, bench), keys), 1):
        reporter.progress(done, len(keys), ALL_CELLS)
        if done == 1 and len(keys) > 1 and (seconds := time.time() - began) > 20:
            reporter.tell(
                f"the first cell ({key.name}) took {seconds:.0f} s: about {seconds * (len(keys) - 1) / 60:.0f} min more"
            )
    for scratch in list(out.rglob("scratch")):
        shutil.rmtree(scratch, ignore_errors=True)
    reporter.progress(0, 0, "writing the report")
    return report.write(bench, keys, seconds=time.time() - began)
