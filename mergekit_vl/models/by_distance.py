"""A model that mixes the probabilities of two members, with a weight per image (VRF)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mergekit_vl.models.choices import Choice
    from mergekit_vl.models.model import Classes, Head, ImageEncoder, Model

ROWS = 256
"""Images whose distances to the whole set are held at once."""


@dataclass(frozen=True, eq=False)
class ByDistance:
    """log(w p_second + (1 - w) p_first), w = sigmoid(-(d - a) / b), d the distance of the image's features to a set of features.

    Features are the second member's, normalised; d is the Euclidean distance to the k-th nearest of the set.
    """

    members: tuple[Model, Model]
    near: Tensor
    """The set, [N, D], normalised."""
    k: int
    a: float
    b: float
    temperatures: tuple[float, float] = (1.0, 1.0)
    choice: Choice | None = None

    @property
    def encoders(self) -> tuple[ImageEncoder, ...]:
        return tuple({each.key: each for m in self.members for each in m.encoders}.values())

    def bind(self, classes: Classes) -> Head:
        heads = [m.bind(classes) for m in self.members]
        key = self.members[1].encoders[0].key

        def head(features: Mapping[str, Tensor]) -> Tensor:
            first, second = (h(features) for h in heads)
            return self.mix(first, second, kth_distance(features[key], self.near, self.k))

        return head

    def mix(
        self, first: Float[Tensor, "B K"], second: Float[Tensor, "B K"], distances: Float[Tensor, " B"]
    ) -> Float[Tensor, "B K"]:
        """Of the members' logits [B, K] and the distances [B]."""
        import torch
        import torch.nn.functional as F

        z = ((self.a - distances) / self.b)[:, None]
        log_p = [(z / t).log_softmax(-1) for z, t in zip((first, second), self.temperatures)]
        return torch.logaddexp(F.logsigmoid(-z) + log_p[0], F.logsigmoid(z) + log_p[1])

    @property
    def parameters(self) -> int:
        return sum(m.parameters for m in self.members) + self.near.numel()

    @property
    def held_bytes(self) -> int:
        return self.near.numel() * self.near.element_size()

    @property
    def forwards(self) -> int:
        return sum(m.forwards for m in self.members)


def kth_distance(features: Float[Tensor, "B D"], near: Float[Tensor, "N D"], k: int) -> Float[Tensor, " B"]:
    """Of raw features [B, D], once normalised, to the k-th nearest row of `near` [N, D]: [B]."""
    import torch
    import torch.nn.functional as F

    blocks, near = F.normalize(features, dim=-1).split(ROWS), near.to(features)
    exact = "donot_use_mm_for_euclid_dist"  # products lose the small distances
    return torch.cat([torch.cdist(x, near, compute_mode=exact).kthvalue(k, -1).values for x in blocks])
