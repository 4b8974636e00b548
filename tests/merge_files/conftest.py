"""What the tests of merges share."""

import sys

import pytest

from mergekit_vl.commands import app


@pytest.fixture
def call(monkeypatch, capsys):
    """A command line of `merge`, `check` or `verify`: its exit code, and what it said on both streams."""

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["mergekit-vl", *words])
        with pytest.raises(SystemExit) as stop:
            app.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out + captured.err

    return called
