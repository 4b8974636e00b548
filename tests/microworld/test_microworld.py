"""The pretraining world and the embedded micro CLIP."""

import inspect

import numpy as np
import torch
import torch.nn.functional as F

from mergekit_vl.backbones import micro
from mergekit_vl.microworld import pretraining
from mergekit_vl.microworld.concepts import GLYPH_NAMES, SHAPES, TASK_FACES
from mergekit_vl.microworld.pretraining import COLOUR_NAMES, held_out, sample_batch, vocabulary
from mergekit_vl.microworld.shifts import SHIFTS
from mergekit_vl.microworld.sprites import KEYS, load_sprites
from mergekit_vl.microworld.tasks import ADMITTED, CANDIDATES, DEVELOPMENT, PER_CLASS, SEED, TASKS


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
    for seed in range(6):
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


def test_the_suite_is_large_enough_and_apart_from_what_settings_were_chosen_on():
    assert len(ADMITTED) >= 8 and set(ADMITTED) <= set(CANDIDATES) and len(DEVELOPMENT) >= 3
    assert not {task.group for task in DEVELOPMENT.values()} & {task.group for task in CANDIDATES.values()}
    for task in TASKS.values():
        names = [name for name, _, _ in task.members]
        assert len(names) == len(set(names)) >= 16
        assert not micro.unknown_words(tuple(names))  # novel to the tuner, not to the pretrained model


def test_shifts_seeds_and_pairs_of_the_tasks_stay_out_of_pretraining():
    source = inspect.getsource(pretraining)
    assert "shifts" not in source and not any(f"{name}(" in source for name in SHIFTS)
    assert all(task.shifts or task.swap for task in TASKS.values())
    assert not any(f"{face}:" in source for face in TASK_FACES)
    shown = {f"{COLOUR_NAMES[c]} {SHAPES[s]}" for c, s in pretraining.PAIRS}
    assert not shown & {name for name, _, _ in TASKS["pairs_hue"].members}
    # pretraining draws from (0, step), tasks from (SEED, name, split): no stream is shared
    first = np.random.default_rng((0, 0)).random(4)
    assert SEED > 10**6 and not np.array_equal(first, np.random.default_rng((SEED, 0, 0)).random(4))


def test_splits_of_a_task_share_no_image_and_repeat():
    splits = {name: TASKS["animals_emboss"].images(name) for name in PER_CLASS}
    seen = [image.tobytes() for images, _ in splits.values() for image in images]
    assert len(set(seen)) == len(seen) == 20 * sum(PER_CLASS.values())
    assert np.array_equal(TASKS["animals_emboss"].images("val")[0], splits["val"][0])
    assert np.bincount(splits["test"][1]).tolist() == [PER_CLASS["test"]] * 20
