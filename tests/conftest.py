"""No test reaches for the network: the hub's clients read this when they are imported. Tests marked `gpu` need one.

Shapes in signatures are checked (`shapes.py`) where jaxtyping is installed, as the extra `dev` has it.
"""

import os
from importlib.util import find_spec

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

if find_spec("jaxtyping"):
    import shapes

    shapes.install()


def pytest_collection_modifyitems(items):
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
