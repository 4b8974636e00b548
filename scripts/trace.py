"""Where a command walks until it reaches the maths: three walks, taken while two commands run.

    python scripts/trace.py            as text
    python scripts/trace.py --json     {walk: {"frames": ["file: function", ...], "files": [...], ...}}

`merge` to TIES' maths, `run` to MergeTune's loss, and `run` to the image that is decoded for its score: the package's frames on the stack
when that function is first entered, from the command's own function inwards. A thread's stack goes on from the one that started the thread.
What is in front of the command (`__main__.py`, `commands/app.py`'s dispatch and the guard of `commands/exits.py`, which turns exceptions
into exit codes) is left out: every command has it, and it decides nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
RUN = ["run", "my_photos", "dataset.path=pictures", "backbone.name=micro", "tuned.0.tuner.epochs=1", "strategy.0.epochs=1", "protocol.shots=2", "--quiet", "--out", "out"]  # fmt: skip
MERGE = ["merge", "A.safetensors", "B.safetensors", "--base", "base.safetensors", "--strategy", "ties", "-o", "merged", "--quiet", "density=0.5"]  # fmt: skip
COMMANDS = {
    "merge": (MERGE, "commands/merge.py: merge", {"merge to TIES' maths": ("strategies/ties.py: merge_chunk", "")}),
    "run": (
        RUN,
        "commands/run.py: run",
        {
            "run to MergeTune's loss": ("strategies/mergetune.py: terms", ""),
            "an image from its folder to its score": (
                "datasets/image_files.py: decode",
                "models/evaluate.py: evaluate",
            ),
        },
    ),
}
"""By command: its words, its function, and by walk the function that it ends in and one that it comes through."""
COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
"""They have frames of their own in Python 3.11, and none in later ones."""
SCORED = "FeatureStore.features.<locals>.load"
"""Who loads an image as it is tested."""


class Walks:
    """Watches all threads of a command that runs."""

    def __init__(self, begins: str, wanted: dict[str, tuple[str, str]]) -> None:
        import mergekit_vl

        self.package, self.begins, self.wanted = str(Path(mergekit_vl.__file__).parent), begins, wanted
        self.found: dict[str, list[str]] = {}
        self.decoded: Counter[tuple[int, int]] = Counter()
        self.before: dict[int, list[str]] = {}
        """By thread: the stack that started it."""
        self.ends = {end.rpartition(" ")[2] for end, _ in wanted.values()}

    def stack(self, frame) -> list[str]:
        """The package's frames down to this one, outermost first, through the starts of threads."""
        inner: list[str] = []
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self.package) and frame.f_code.co_name not in COMPREHENSIONS:
                inner.append(f"{Path(file).relative_to(self.package)}: {frame.f_code.co_name}")
            frame = frame.f_back
        return [*self.before.get(threading.get_ident(), ()), *reversed(inner)]

    def seen(self, frame, event: str, argument) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self.package):
            return
        if code.co_qualname == "FolderImages.load" and frame.f_back.f_code.co_qualname == SCORED:
            self.decoded[id(frame.f_locals["self"]), frame.f_locals["index"]] += 1
        if code.co_name in self.ends and len(self.found) < len(self.wanted):
            stack = self.stack(frame)
            for walk, (end, through) in self.wanted.items():
                if walk not in self.found and stack[-1] == end and (not through or through in stack):
                    self.found[walk] = stack[stack.index(self.begins) :]

    def run(self, words: list[str]) -> None:
        from mergekit_vl.__main__ import main

        start, boot = threading.Thread.start, threading.Thread.run

        def started(thread: threading.Thread) -> None:
            stack, work = self.stack(sys._getframe(1)), thread.run

            def run() -> None:
                self.before[threading.get_ident()] = stack
                work()

            thread.run = run  # type: ignore[method-assign]
            start(thread)

        threading.Thread.start = started  # type: ignore[method-assign]
        threading.setprofile(self.seen)
        sys.setprofile(self.seen)
        sys.argv = ["mergekit-vl", *words]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            threading.Thread.start, threading.Thread.run = start, boot  # type: ignore[method-assign]


def taken(name: str) -> dict[str, dict[str, object]]:
    """The walks of one command, taken in this process."""
    words, begins, wanted = COMMANDS[name]
    walks = Walks(begins, wanted)
    walks.run(words)
    told: dict[str, dict[str, object]] = {}
    for walk in wanted:
        frames = walks.found[walk]
        told[walk] = {"frames": frames, "files": list(dict.fromkeys(frame.split(":")[0] for frame in frames))}
    if walks.decoded:
        told[walk] |= {"images": len(walks.decoded), "decoded": max(walks.decoded.values())}
    return told


def all_walks() -> dict[str, dict[str, object]]:
    """Each command in a process of its own, in a folder that goes again."""
    import pictures

    told: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw, place = np.random.default_rng(0), Path(folder)
        for name in ("base", "A", "B"):
            save_file({"w": draw.standard_normal((4, 4)).astype(np.float32)}, place / f"{name}.safetensors")
        pictures.write(place / "pictures", draw)
        for name in COMMANDS:
            out = place / f"{name}.json"
            environment = {**os.environ, "MERGEKIT_VL_CACHE": str(place / "cache")}
            command = [sys.executable, str(Path(__file__).resolve()), name, str(out)]
            subprocess.run(command, cwd=place, env=environment, check=True)
            told |= json.loads(out.read_text())
    return told


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        Path(sys.argv[2]).write_text(json.dumps(taken(sys.argv[1])))
        return
    told = all_walks()
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(told))
        return
    for walk, found in told.items():
        once = (
            f"; {found['images']} images are decoded for a score, at most {found['decoded']} time(s) each"
            if "images" in found
            else ""
        )
        print(f"{walk}: {len(found['frames'])} frames in {len(found['files'])} files{once}")
        print("\n".join(f"    {frame}" for frame in found["frames"]))


if __name__ == "__main__":
    main()
