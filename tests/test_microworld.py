"""The pretraining world and the embedded micro CLIP."""

import numpy as np
import torch
import torch.nn.functional as F

from mergekit_vl.backbones import micro
from mergekit_vl.microworld.concepts import GLYPH_NAMES, SHAPES
from mergekit_vl.microworld.pretraining import COLOUR_NAMES, held_out, sample_batch, vocabulary
from mergekit_vl.microworld.sprites import KEYS, load_sprites


def test_every_sprite_is_drawn():
    sprites = load_sprites()
    assert sprites.shape == (len(KEYS), 4, 40, 40)
    assert (sprites[:, 3].reshape(len(KEYS), -1).max(1) > 0.9).all()


def test_batches_repeat_and_their_captions_use_the_vocabulary():
    images, captions = sample_batch(np.random.default_rng(3))
    again, _ = sample_batch(np.random.default_rng(3))
    assert torch.equal(images, again)
    assert 0 <= images.min() and images.max() <= 1
    words = {word for caption in captions for word in caption.rstrip(".").split()}
    assert words <= set(vocabulary())


def test_held_out_pairs_are_never_shown():
    forbidden = {f"{c} {s}" for i, c in enumerate(COLOUR_NAMES) for j, s in enumerate(SHAPES) if held_out(i, j)}
    assert 0.1 < len(forbidden) / (len(COLOUR_NAMES) * len(SHAPES)) < 0.25
    for seed in range(20):
        _, captions = sample_batch(np.random.default_rng(seed))
        assert not [c for c in captions for pair in forbidden if f" {pair} " in f" {c.rstrip('.')} "]


def test_the_micro_clip_knows_its_world():
    model = micro.load()
    images, captions = sample_batch(np.random.default_rng((12345, 0)))
    with torch.no_grad():
        features = F.normalize(model.encode_image(micro.normalise(images)), dim=-1)
        text = F.normalize(
            model.encode_text(micro.tokenizer()([f"a photo of a {name}" for name in GLYPH_NAMES])), dim=-1
        )
    named = [
        next((i for i, name in enumerate(GLYPH_NAMES) if f" {name} " in f" {c.rstrip('.')} "), None)
        for c in captions[:170]
    ]
    hits = [int((features[row] @ text.T).argmax()) == want for row, want in enumerate(named) if want is not None]
    assert len(hits) > 100 and np.mean(hits) > 0.4, np.mean(hits)  # chance is 0.002


def test_short_texts_are_encoded_exactly():
    model = micro.load()
    ids = micro.tokenizer()(["a photo of a dog.", "cat", "a sketch of a red circle on a blue background."])
    with torch.no_grad():
        torch.testing.assert_close(micro.encode_short(model, ids), model.encode_text(ids), atol=1e-5, rtol=0)


def test_unknown_words_are_named():
    assert micro.unknown_words(("dog", "granny smith apple")) == ("granny", "smith")
