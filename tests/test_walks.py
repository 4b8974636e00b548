"""The walks from a command to the maths are short, and are those that docs/architecture.md shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text().partition("## Three walks")[2].partition("\n## ")[0]
MERGE, RUN, IMAGE = "merge to TIES' maths", "run to MergeTune's loss", "an image from its folder to its score"


def test_the_three_walks():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "trace.py", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {MERGE, RUN, IMAGE}
    assert len(told[MERGE]["files"]) <= 4 and told[MERGE]["files"][-1] == "strategies/ties.py"
    assert len(told[RUN]["files"]) <= 4 and told[RUN]["files"][-1] == "strategies/mergetune.py"
    assert len(told[IMAGE]["files"]) <= 7 and (told[IMAGE]["images"], told[IMAGE]["decoded"]) == (14, 1)
    shown = [block.splitlines() for block in re.findall(r"```text\n(.*?)\n```", PAGE, re.S)]
    assert [told[walk]["frames"] for walk in (MERGE, RUN, IMAGE)] == shown
