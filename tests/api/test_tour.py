"""The tour of docs/ runs, and uses every public name."""

import re
import subprocess
import sys
from pathlib import Path

import mergekit_vl

TOUR = Path(__file__).parent.parent.parent / "docs" / "python_tour.py"


def test_the_tour_uses_every_public_name_and_runs(tmp_path):
    assert set(re.findall(r"\bmk\.(\w+)", TOUR.read_text())) == set(mergekit_vl.__all__)
    done = subprocess.run([sys.executable, TOUR], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "an error says how to mend it: strategy ties: unknown key 'densty' (did you mean 'density'?)" in done.stdout
    assert not list(tmp_path.iterdir())
