"""Models as files of a run folder."""

import json

import pytest
import torch
from noise import NAMES

from mergekit_vl.adapters.linear_head import LinearHead, zero_shot
from mergekit_vl.adapters.prompt import Prompt
from mergekit_vl.adapters.tower import Tower
from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.backbones.micro import Micro
from mergekit_vl.errors import UserError
from mergekit_vl.models.by_task import ByTask
from mergekit_vl.models.model import Classes, Ensemble, Mixture, Single
from mergekit_vl.registry.plugins import load_plugins
from mergekit_vl.storage import model_files

CLASSES = Classes(NAMES)


@pytest.fixture(scope="module")
def micro():
    return Micro().build("cpu")


def models(micro):
    base = Single(micro, ZeroShot())
    prompt = Single(micro, Prompt(micro.embed("a sketch of a"), "a photo of a"))
    head = Single(micro, LinearHead(torch.randn(3, 128), torch.randn(3), NAMES, True, zero_shot(micro, CLASSES)))
    weights = {name: 1.01 * tensor for name, tensor in micro.image_weights().items()}
    return {
        "zero-shot": base,
        "prompt": prompt,
        "head": head,
        "tower": Single(micro, Tower(weights)),
        "tower with head": Single(micro, Tower(weights, head.adapter)),
        "mixture": Mixture((base, prompt), (0.25, 0.75)),
        "by task": ByTask((Single(micro, Tower(weights)), prompt), (CLASSES, Classes(("a", "b"), ("{}?",)))),
        "ensemble": Ensemble((base, Mixture((prompt, base), (0.5, 0.5)), head), (0.2, 0.3, 0.5)),
    }


def logits(model):
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return model.bind(CLASSES)({path.key: path.encode(images) for path in model.encoders})


def test_what_is_saved_comes_back(micro, tmp_path):
    adapter = load_plugins().adapter
    for name, model in models(micro).items():
        assert model_files.can_save(model)
        model_files.save(model, tmp_path, name)
        found = model_files.load(tmp_path, name, micro, adapter)
        assert type(found) is type(model) and torch.equal(logits(found), logits(model)), name
        assert getattr(found, "tasks", None) == getattr(model, "tasks", None)
        assert (found.parameters, found.forwards) == (model.parameters, model.forwards)
    assert model_files.load(tmp_path, "another", micro, adapter) is None


def test_a_member_that_is_gone_is_told(micro, tmp_path):
    model_files.save(models(micro)["mixture"], tmp_path, "soup")
    assert json.loads((tmp_path / "soup.model.json").read_text()) == {"kind": "mixture", "weights": [0.25, 0.75]}
    (tmp_path / "soup.1.safetensors").unlink()
    with pytest.raises(UserError, match="soup.model.json: a member is missing .run it again with --force"):
        model_files.load(tmp_path, "soup", micro, load_plugins().adapter)


def test_a_plugins_own_model_may_have_no_file(micro):
    """An adapter has one by its contract."""
    assert not model_files.can_save(object())
    assert not model_files.can_save(Ensemble((Single(micro, ZeroShot()), object()), (0.5, 0.5)))
