"""Where a command walks until it reaches the maths: three traces, taken while it runs.

    python scripts/trace.py

`run` to MergeTune's loss, `merge` to TIES' sum of what was elected, and an image from its folder to its features: the package's frames
on the stack at that moment, outermost first, and how many files they are in.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

SHORT = ["tuned.0.tuner.epochs=1", "strategy.0.epochs=1", "protocol.shots=2", "--quiet", "--out"]
WALKS = {
    "run to MergeTune's loss": (["run", "mergetune_coop", *SHORT, "first"], "mergetune.py", ("loss", "terms")),
    "merge to TIES' maths": (
        ["merge", "A.safetensors", "B.safetensors", "--base", "base.safetensors", "--strategy", "ties", "-o", "merged", "--quiet", "density=0.5"],
        "ties.py",
        ("merge_piece", "merge_chunk", "elect"),
    ),
    "an image from its folder to its features": (["run", "folder_coop", "dataset.path=pictures", *SHORT, "second"], "folder.py", ("decode",)),
}  # fmt: skip


def walk(words: list[str], file: str, names: tuple[str, ...]) -> list[str]:
    """The package's frames when a function of one of these names in this file is first entered, in any thread."""
    import threading

    from mergekit_vl.__main__ import main

    found: list[list[str]] = []
    package = str(Path(sys.modules["mergekit_vl"].__file__).parent)

    def profile(frame, event, argument):
        if (
            event == "call"
            and not found
            and frame.f_code.co_name in names
            and Path(frame.f_code.co_filename).name == file
        ):
            stack = [each for each in traceback.extract_stack(frame) if each.filename.startswith(package)]
            found.append([f"{Path(each.filename).relative_to(package)}: {each.name}" for each in stack])

    threading.setprofile(profile)
    sys.setprofile(profile)
    sys.argv = ["mergekit-vl", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found[0] if found else []


def main() -> None:
    if len(sys.argv) > 1:  # one walk in a process of its own
        name = sys.argv[1]
        frames = walk(*WALKS[name])
        print(f"{name}: {len(frames)} frames in {len({f.split(':')[0] for f in frames})} files")
        print("\n".join(f"    {frame}" for frame in frames), flush=True)
        return
    script = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MERGEKIT_VL_CACHE"] = str(Path(folder) / "cache")
        draw = np.random.default_rng(0)
        for name in ("base", "A", "B"):
            save_file({"w": draw.standard_normal((4, 4)).astype(np.float32)}, f"{name}.safetensors")
        for name in ("red", "green"):
            Path("pictures", name).mkdir(parents=True)
            for n in range(12):
                Image.fromarray(draw.integers(0, 255, (48, 48, 3), np.uint8)).save(f"pictures/{name}/{n}.png")
        for name in WALKS:
            if os.spawnv(os.P_WAIT, sys.executable, [sys.executable, script, name]):
                raise SystemExit(f"{name}: failed")


if __name__ == "__main__":
    main()
