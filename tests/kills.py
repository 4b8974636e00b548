"""Kill a command with SIGKILL at every fsync and rename in turn, or at random moments, and look at what it leaves.

    python tests/kills.py merge|run|bench FOLDER [--every N] [--random N] [--plain-renames]

Each time: what is there is the old result or the new one, whole; the same command ends well, with the same bytes; and nothing that is
hidden is left over. Commands run in forks of this process, so that nothing is imported twice. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not live through a fork

import numpy as np  # noqa: E402

MERGE = ["merge", "A.safetensors", "B.safetensors", "-o", "out", "--force", "--quiet", "--threads", "1"]
SMALL = ["protocol.shots=1", "tuned.0.tuner.epochs=1", "controls=false", "strategy=[{name: wise_ft},{name: ensemble}]"]
COMMANDS = {
    "merge": [*MERGE, "--strategy", "slerp", "t=0.3"],
    "run": ["run", "mergetune_coop", *SMALL, "--out", "out", "--quiet"],
    "bench": ["bench", "bench_small", *SMALL, "seed=1", "--datasets", "sea_and_sky_emboss", "--out", "out", "--quiet"],
}
SAME = ("merged.safetensors", "recipe.yaml", "scores.json")
"""Of a run."""
POINTS = ("fsync", "replace", "rename")
"""Of `os`; `exchange` of our own comes to them."""


def forked(work: Callable[[], object], after: float | None = None) -> int:
    """The exit code of `work` in a process of its own, negative for a signal; it is killed `after` seconds."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(words: list[str], at: int = 0, count: Path | None = None, plain_renames: bool = False) -> None:
    """Run a command line; kill at this point, or count all points."""
    from mergekit_vl.checkpoints import writer
    from mergekit_vl.commands import app
    from mergekit_vl.system import atomic_files

    passed = [0]

    def watched(call: Callable) -> Callable:
        def wrapped(*arguments, **more):
            passed[0] += 1
            if passed[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **more)

        return wrapped

    for name in POINTS:
        setattr(os, name, watched(getattr(os, name)))
    writer.exchange = watched((lambda one, other: False) if plain_renames else atomic_files.exchange)
    sys.argv = ["mergekit-vl", *words]
    try:
        app.main()
    finally:
        if count is not None:
            count.write_text(str(passed[0]))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def result(name: str) -> dict[str, bytes]:
    """What has to be the same each time, of the finished output."""
    own = contents(Path("out"))
    if name == "bench":  # its tables hold times
        told = {file: json.loads(own[file]) for file in own if "/records/" in file}
        rows = {
            file: json.dumps([row.get("digest"), row.get("score"), row.get("points")]) for file, row in told.items()
        }
        return {file: text.encode() for file, text in rows.items()}
    return own if name == "merge" else {file: own[file] for file in SAME if file in own}


def left_over(*folders: Path) -> list[str]:
    hidden = [f for folder in folders for f in folder.rglob("*") if f.name.startswith(".") or f.name == "scratch"]
    return sorted(str(f) for f in hidden if f.name != ".recipe-hash")


def models() -> None:
    from safetensors.numpy import save_file

    for i, name in enumerate("AB"):
        rng = np.random.default_rng(i)
        save_file({f"w{j}": rng.standard_normal((64, 64), np.float32) for j in range(3)}, f"{name}.safetensors")


def imported(name: str) -> None:
    """What the command needs, before the forks."""
    from mergekit_vl.merge_files import streaming  # noqa: F401

    if name != "merge":
        import matplotlib.figure  # noqa: F401
        import open_clip  # noqa: F401
        import torchvision.transforms.functional  # noqa: F401

        from mergekit_vl.backbones import micro  # noqa: F401
        from mergekit_vl.experiments import experiment  # noqa: F401
        from mergekit_vl.microworld import tasks
        from mergekit_vl.reports import (
            html,  # noqa: F401
            report,  # noqa: F401
        )

        tasks.PER_CLASS = {"train": 2, "val": 1, "test": 2}


def faults(name: str, words: list[str], old: object, new: object, plain_renames: bool) -> Iterator[str]:
    """What is wrong after a kill, and after the same command ran once more."""
    if name == "merge" and not plain_renames and contents(Path("out")) not in (old, new):
        yield "neither the old nor the new result"
    if (Path("out") / "report.json").exists() or (Path("out") / "bench.json").exists():
        if result(name) != new:
            yield "a result that is called done is not whole"
    if (code := forked(lambda: command(words, plain_renames=plain_renames))) != 0:
        yield f"the same command ends with {code}"
    elif result(name) != new:
        yield "other bytes"
    if left := left_over(Path()):
        yield f"left over {left}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=COMMANDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1, help="only each Nth point")
    parser.add_argument("--random", type=int, default=0, help="this many moments instead of the points")
    parser.add_argument("--plain-renames", action="store_true", help="as if two names could not change places")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    os.environ["MERGEKIT_VL_CACHE"] = str(Path("cache").absolute())
    imported(given.name)
    words, old = COMMANDS[given.name], {}

    def fresh() -> None:
        for folder in ("out", "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        if given.name == "merge":
            shutil.copytree("old", "out")

    if given.name == "merge":
        models()
        assert forked(lambda: command([*MERGE[:4], "old", "--strategy", "linear", "--quiet"])) == 0
        old = contents(Path("old"))
    count = Path("count").absolute()
    fresh()
    began = time.monotonic()
    assert forked(lambda: command(words, count=count, plain_renames=given.plain_renames)) == 0
    seconds, points, new = time.monotonic() - began, int(count.read_text()), result(given.name)
    draw, wrong, killed = random.Random(1), [], 0
    tries = range(given.random) if given.random else range(1, points + 1, given.every)
    for number in tries:
        fresh()
        if given.random:
            code = forked(lambda: command(words, plain_renames=given.plain_renames), after=draw.uniform(0, seconds))
        else:
            at = number
            code = forked(lambda: command(words, at=at, plain_renames=given.plain_renames))  # noqa: B023
        killed += code == -signal.SIGKILL
        wrong += [f"{number}: {what}" for what in faults(given.name, words, old, new, given.plain_renames)]
    told = {"points": points, "tried": len(tries), "killed": killed, "seconds": round(seconds, 2), "wrong": wrong}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
