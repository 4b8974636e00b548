"""One reporter hears of everything: warnings, lines and progress."""

import numpy as np
from recording import Recording
from safetensors.numpy import save_file

from mergekit_vl.merge_files import streaming
from mergekit_vl.merge_files.plan import MergePlan
from mergekit_vl.reporter import SILENT, Within
from mergekit_vl.strategies.linear import Linear


def test_a_merge_tells_its_reporter(tmp_path):
    for name in "ab":
        save_file({"w": np.ones((4, 5), np.float32), "b": np.ones(6, np.float32)}, tmp_path / f"{name}.safetensors")
    paths = tuple(str(tmp_path / f"{name}.safetensors") for name in "aba")
    heard = Recording()
    streaming.merge(MergePlan("linear", Linear(), paths), tmp_path / "out", threads=1, reporter=heard)
    assert heard.warned == ["the same file is given twice"] and heard.told == []
    assert [what for _, _, what in heard.progressed] == ["merging"] * len(heard.progressed)
    assert heard.progressed[-1] == (26, 26, "merging")  # elements: 4 x 5 and 6, in one pass


def test_progress_within_a_part_names_it_and_the_rest_goes_on_as_it_is():
    heard = Recording()
    part = Within(heard, "pets, seed 1")
    part.progress(1, 2, "coop")
    part.warn("odd")
    part.tell("a line")
    assert (heard.progressed, heard.warned, heard.told) == ([(1, 2, "pets, seed 1: coop")], ["odd"], ["a line"])
    SILENT.warn("nobody hears it")
