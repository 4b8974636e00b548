"""A task whose images are drawn at random: nothing is to be learnt, and everything can be computed."""

import numpy as np
from PIL import Image

from mergekit_vl.adapters.zero_shot import ZeroShot
from mergekit_vl.datasets.base import Split
from mergekit_vl.models.features import FeatureStore
from mergekit_vl.models.inputs import MergeInputs, TaskData
from mergekit_vl.models.model import Classes, Single

NAMES = ("dog", "car", "apple")


class Noise:
    """Images [side, side]; those with a tint are told apart easily, one colour per class."""

    def __init__(self, n, side=48, seed=0, tint=0):
        draw = np.random.default_rng(seed)
        pictures = draw.integers(0, 255 - tint, (n, side, side, 3), dtype=np.uint8)
        pictures[np.arange(n), ..., np.arange(n) % 3] += np.uint8(tint)
        self.pictures, self.key, self.read = pictures, f"noise:{n}:{side}:{seed}:{tint}", 0

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        self.read += 1
        return Image.fromarray(self.pictures[index])


def split(n, **given):
    return Split(Noise(n, **given), np.arange(n), np.arange(n) % 3)


def inputs(backbone, train, *, val=None, tuned=(), base=None, names=NAMES, seed=3, **more):
    data = (TaskData(Classes(names), train, val),)
    return MergeInputs(base or Single(backbone, ZeroShot()), tuned, data, FeatureStore(None), seed=seed, **more)
