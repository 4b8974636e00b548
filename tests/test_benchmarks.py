"""The GPU benchmark at a small size on the CPU, so that it works when a card can be had."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_gpu_benchmark_runs_and_writes_its_page(tmp_path):
    words = ["--device", "cpu", "--small", "--json", tmp_path / "gpu.json", "--page", tmp_path / "gpu.md"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["parity"]["loss"] < 1e-5 and told["steps"][0]["ours"] < told["steps"][0]["released, float32"]
    assert all(row["apart"] < 1e-6 for row in told["merges"])
    assert 0 < told["encoders"][0]["float32"]["share of peak"] < 2
    page = (tmp_path / "gpu.md").read_text()
    assert "| small | 3 | 2 |" in page and "| IsoC |" in page and "## A whole bench" in page
