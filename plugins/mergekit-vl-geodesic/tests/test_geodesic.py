"""The arc on numbers worked out by hand, and the plugin as the registry sees it."""

from importlib.metadata import entry_points

import pytest
import torch

from mergekit_vl import MergeInputs, Single, UserError, testing
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.options import build
from mergekit_vl.registry.plugins import load_plugins

NOT_INSTALLED = "mergekit-vl-geodesic is not installed: pip install -e plugins/mergekit-vl-geodesic"
Geodesic = pytest.importorskip("mergekit_vl_geodesic", reason=NOT_INSTALLED).Geodesic


class FakeBackbone:
    """Its words' embeddings are what the test says, so that they are the zero-shot point."""

    key = spec = "fake"
    device = "cpu"

    def __init__(self, zero_shot: list[list[float]]) -> None:
        self.words = torch.tensor(zero_shot)
        self.token_width = self.words.shape[-1]

    def embed(self, text: str) -> torch.Tensor:
        return self.words


def merge(zero_shot, *tuned, t=0.5) -> torch.Tensor:
    backbone = FakeBackbone(zero_shot)
    base = Single(backbone, Prompt(torch.tensor(zero_shot)))
    models = tuple(Single(backbone, Prompt(torch.tensor(ctx), init="a photo")) for ctx in tuned)
    merged = Geodesic(t).merge(MergeInputs(base, models, data=(), features=None))
    assert merged.backbone is backbone
    return merged.adapter.ctx


@pytest.mark.parametrize(
    "t, want",
    [(0.0, [1.0, 0.0]), (1 / 3, [0.8660, 0.5]), (0.5, [0.7071, 0.7071]), (1.0, [0.0, 1.0])],
)
def test_a_quarter_of_the_circle(t, want):
    torch.testing.assert_close(merge([[1.0, 0.0]], [[0.0, 1.0]], t=t), torch.tensor([want]), atol=5e-5, rtol=0)


def test_each_context_token_turns_by_its_own_angle():
    # a right angle between rows of lengths 2 and 4, and 60 degrees: (start + end) * sin 30 / sin 60
    merged = merge([[2.0, 0.0], [1.0, 0.0]], [[0.0, 4.0], [0.5, 0.8660254]])
    torch.testing.assert_close(merged, torch.tensor([[1.4142, 2.8284], [0.8660, 0.5]]), atol=5e-5, rtol=0)


def test_class_specific_prompts():
    merged = merge([[1.0, 0.0]], [[[0.0, 1.0]], [[0.0, -1.0]]])
    torch.testing.assert_close(merged, torch.tensor([[[0.7071, 0.7071]], [[0.7071, -0.7071]]]), atol=5e-5, rtol=0)


def test_parallel_and_opposite_rows_take_the_line():
    merged = merge([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [-3.0, 0.0], [1.0, 0.01]], t=0.25)
    torch.testing.assert_close(merged, torch.tensor([[1.25, 0.0], [0.0, 0.0], [1.0, 0.0025]]))


def test_several_tuned_models_are_refused():
    with pytest.raises(UserError, match="strategy geodesic: one tuned model, not 2"):
        merge([[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]])


def test_it_keeps_the_promises_of_a_strategy():
    testing.check_strategy(Geodesic(t=0.3))


def test_the_installed_plugin_is_listed_and_built_from_a_recipe(monkeypatch):
    if "geodesic" not in entry_points(group="mergekit_vl").names:
        pytest.skip(NOT_INSTALLED)
    monkeypatch.delenv("MERGEKIT_VL_PLUGINS", raising=False)
    registry = load_plugins()
    entry = registry.find("strategies", "geodesic")
    assert entry.owner == "geodesic" and "geodesic" in registry.owners() and "geodesic" not in registry.failures
    assert build(entry.resolve(), {"t": 0.25}, where="strategy") == Geodesic(0.25)
