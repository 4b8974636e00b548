"""What signatures tell of shapes is checked while the tests run, and what differs is named."""

import numpy as np
import pytest

pytest.importorskip("jaxtyping")

import torch  # noqa: E402

from mergekit_vl.merging.task_vectors import weighted  # noqa: E402
from mergekit_vl.models.evaluate import score  # noqa: E402
from mergekit_vl.models.model import Ensemble  # noqa: E402
from mergekit_vl.tuners.sgd import cross_entropy  # noqa: E402


def test_labels_are_as_many_as_logits():
    assert score(torch.eye(3), torch.arange(3)).acc1 == 1.0
    with pytest.raises(TypeError, match=r"score: labels is torch.int64\[2\], not Int\[Tensor, ' B'\]"):
        score(torch.eye(3), torch.arange(2))


def test_dimensions_of_one_name_are_equal_within_a_call():
    logits, labels = torch.zeros(5, 4, 3), torch.zeros(4, dtype=torch.long)
    assert cross_entropy(logits, labels).item() == pytest.approx(np.log(3))  # [S, B, K]
    with pytest.raises(TypeError, match="labels is"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.long))  # 20 rows would be repeated labels of 2


def test_methods_and_arrays_are_checked_too():
    with pytest.raises(TypeError, match=r"Ensemble.mix: logits is torch.float32\[3, 4\]"):
        Ensemble((), ()).mix(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"weighted: vector is int64\[2\], not Float\[Array, '\*shape'\]"):
        weighted(np.arange(2), 0.5)
