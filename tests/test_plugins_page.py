"""The plugins of docs/plugins.md are whole files that keep the promises of their kinds."""

import csv
import re
from pathlib import Path

import pytest
from PIL import Image

from mergekit_vl import testing

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.S)
PLUGINS = {found[1]: block for block in BLOCKS if (found := re.search(r'register\("(\w+)"', block))}


def load(name):
    scope = {"__name__": name}
    exec(PLUGINS[name], scope)
    return scope


def test_the_plugins_are_found():
    assert list(PLUGINS) == ["median", "sum_of_tasks", "same_norm", "csv_images", "text_residual"]


@pytest.mark.parametrize(("name", "cls"), [("sum_of_tasks", "SumOfTasks"), ("same_norm", "SameNorm")])
def test_a_strategy(name, cls):
    testing.check_strategy(load(name)[cls]())


def test_the_dataset(tmp_path):
    rows = [
        (f"{name}{i}.png", name, split) for name in ("cat", "dog") for i, split in enumerate(("train", "val", "test"))
    ]
    for i, (file, _, _) in enumerate(rows):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / file)
    with (tmp_path / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "class", "split"), *rows])
    dataset = load("csv_images")["CsvImages"](str(tmp_path / "images.csv"))
    testing.check_dataset(dataset)


def test_the_adapter_is_the_file_under_test():
    assert PLUGINS["text_residual"] == (ROOT / "tests" / "adapters" / "plug" / "text_residual.py").read_text()
