"""SIGKILL at every fsync and rename in turn: the old result or the new one is whole, the same command gives the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def kills(*arguments):
    script = Path(__file__).parents[1] / "kills.py"
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("renames", [(), ("--plain-renames",)])
def test_a_merge_that_replaces_another(renames, tmp_path):
    told = kills("merge", tmp_path, *renames)
    assert told["killed"] == told["tried"] >= 5 and not told["wrong"]


@pytest.mark.parametrize("name", ["run", "bench"])
def test_a_recipe_and_a_bench(name, tmp_path):
    """At three of their points; `kills.py` goes through all of them by hand."""
    told = kills(name, tmp_path, "--every", 25)
    assert told["killed"] == told["tried"] >= 3 and not told["wrong"]
