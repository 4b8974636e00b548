"""Two commands on one folder: the second ends at once and names the process that holds it; nothing of the first is touched."""

import os
import shlex
import socket
import subprocess
import sys

import pytest

from mergekit_vl.commands import app
from mergekit_vl.experiments.run_folder import LOCK

HOLD = """
import sys
from pathlib import Path
from mergekit_vl.experiments.run_folder import alone
with alone(Path("out")):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("words", ["run mergetune_coop", "bench bench_small", "landscape mergetune_coop"])
def test_the_second_of_two_on_one_folder_names_the_first(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mergekit-vl", *shlex.split(words), "--out", "out"])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        before = sorted(os.listdir("out"))
        with pytest.raises(SystemExit, match="2"):
            app.main()
        told = capsys.readouterr().err
        assert f"out: is being written by process {first.pid} on {socket.gethostname()}" in told
        assert sorted(os.listdir("out")) == before == [LOCK]
        first.stdin.close()
    assert os.listdir(".") == []  # who made the folder and left nothing in it removes it
