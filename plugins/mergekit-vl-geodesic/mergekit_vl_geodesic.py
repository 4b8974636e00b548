"""The strategy `geodesic`: spherical linear interpolation (Shoemake 1985, "Animating rotation with quaternion curves")."""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_vl import MergeInputs, Model, Register, Unsuitable, hookimpl, option

NEARLY_PARALLEL = 0.9995  # |cosine| from which the arc is too flat, or undetermined, to be followed


@dataclass(frozen=True)
class Geodesic:
    """The arc from zero-shot to one tuned model, row by row (for a prompt: per context token); nearly parallel rows take the line."""

    t: float = option(0.5, "0 is zero-shot, 1 is fine-tuned")

    def merge(self, inputs: MergeInputs) -> Model:
        import torch

        from mergekit_vl import as_model, endpoints  # here, as torch: `--help` then loads no numpy

        base, tuned = endpoints(inputs)
        if len(tuned) != 1:
            raise Unsuitable(
                f"one tuned model, not {len(tuned)}", where="strategy geodesic", hint="use linear for several"
            )
        merged = {}
        for name, start in base.adapter.tensors.items():
            end = tuned[0].adapter.tensors[name]
            cosine = torch.cosine_similarity(start, end, dim=-1)[..., None]  # [..., rows, 1]
            angle = cosine.clamp(-1, 1).acos()
            arc = (((1 - self.t) * angle).sin() * start + (self.t * angle).sin() * end) / angle.sin()
            merged[name] = torch.where(cosine.abs() < NEARLY_PARALLEL, arc, torch.lerp(start, end, self.t))
        return as_model(base, merged, inputs)


@hookimpl
def register_strategies(register: Register) -> None:
    register("geodesic", Geodesic, "arc from zero-shot to fine-tuned, per row (Shoemake 1985)")
