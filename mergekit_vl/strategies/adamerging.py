"""AdaMerging (Yang et al. 2024, "AdaMerging: Adaptive model merging for multi-task learning", arXiv 2310.02575, eq. 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mergekit_vl.adapters import stored
from mergekit_vl.checkpoints.torch_io import check_finite
from mergekit_vl.errors import Failed
from mergekit_vl.estimators import fisher_information
from mergekit_vl.models.choices import Choice
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Model, Single
from mergekit_vl.options import check, option
from mergekit_vl.strategies.in_memory import as_model, endpoints, merge_adapters
from mergekit_vl.strategies.task_arithmetic import TaskArithmetic
from mergekit_vl.strategies.ties import Ties
from mergekit_vl.system.memory import out_of_memory
from mergekit_vl.tuners.sgd import check_loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

WHERE = "strategy adamerging"
KEPT_EVERY = 20
"""Steps between checkpoints, from which a killed run resumes."""
ADAM = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdaMerging:
    """base + sum_i lambda_i * (tuned_i - base), with lambdas that minimise the entropy of the merged model's predictions on unlabelled images.

    A step draws `batch` images of every task, sums over the tasks the mean entropy of softmax(logits), each task against its own
    class names, and moves the lambdas by Adam. `by=layer` has one lambda for each model and tensor, as the released code ("layer-wise");
    `by=task` one for each model. AdaMerging++ (`trim=0.2`) takes the task vectors of TIES: trimmed, and zero where a model is not of the
    elected sign.

    Departures: the paper reads the unlabelled test images; here they are the tasks' own training (or validation) images without their
    labels, since nothing reads the test split. Tuned models are confident on the images that they were tuned on, so `images=validation` is
    nearer to the paper where there are enough. The released code takes two batches of 16 for each task and step, which to Adam is
    one of 32, and holds lambdas in 0..1 where they are used, so that one that has left stays outside without a gradient; ours are
    moved back to the edge after each step. Tensors that no logit depends on (a text tower, whose class names are encoded once) have the
    lambda `start`. Images are seen in evaluation mode; running statistics are those of the merge at `start`, and in the end, as of
    any merge, those of the merged model. Entropy also falls where a model becomes confident in wrong answers: look at each task's accuracy.
    """

    by: Literal["layer", "task"] = option("layer", "a coefficient for each model and tensor, or for each model")
    start: float = option(0.3, "of every coefficient; they stay between 0 and 1")
    trim: float | None = option(
        None, "AdaMerging++: share of each task vector that is kept before signs are elected (the paper's is 0.2)"
    )
    steps: int = option(500, "of Adam (the paper's code calls them epochs)")
    batch: int = option(32, "images of each task in a step")
    lr: float = option(1e-3, "of Adam")
    images: Literal["train", "validation"] = option("train", "of the tasks, without their labels")

    trains = True

    def __post_init__(self) -> None:
        check(
            self,
            where=WHERE,
            start=(0 <= self.start <= 1, "between 0 and 1"),
            trim=(self.trim is None or 0 < self.trim <= 1, "above 0, at most 1"),
            steps=(self.steps >= 1, "at least 1"),
            batch=(self.batch >= 1, "at least 1"),
            lr=(0 < self.lr < float("inf"), "above 0"),
        )

    def merge(self, inputs: MergeInputs) -> Model:
        start, vectors = self._task_vectors(inputs)
        hint = "set images=train" if self.images == "validation" else "give a dataset with images to train on"
        tasks = inputs.unlabelled(self.images, WHERE, hint)
        own, predict = fisher_information.predictors(start, tasks, inputs)
        base = endpoints(inputs)[0].adapter.tensors
        base = {name: base[name].to(tensor) for name, tensor in own.items()}
        vectors = [{name: vector[name].to(tensor) for name, tensor in own.items()} for vector in vectors]
        lambdas = self._learn(base, vectors, predict, [len(images) for _, images in tasks], inputs)
        merged = {name: t.to(start.adapter.tensors[name]) for name, t in combine(base, vectors, lambdas).items()}
        check_finite(merged, where=WHERE, hint=f"lower lr (now {self.lr})")
        model = as_model(endpoints(inputs)[0], {**start.adapter.tensors, **merged}, inputs)
        told = {f"coefficient {i + 1}": round(mean, 6) for i, mean in enumerate(lambdas.mean(1).tolist())}
        choice = Choice(told, "train" if self.images == "train" else "val", learnt=True)
        return Single(model.backbone, model.adapter.with_chosen(told), choice)

    def _task_vectors(self, inputs: MergeInputs) -> tuple[Single, list[Tensors]]:
        """The merge at the first coefficients, and each model's task vector."""
        zero_shot, tuned = endpoints(inputs)
        alone = replace(inputs, batch_norm="mean")  # of task vectors no statistics are needed
        if self.trim is None:
            start = merge_adapters(TaskArithmetic(self.start), inputs)
        else:
            ties = Ties(density=self.trim, mean=False)
            start = merge_adapters(replace(ties, scale=self.start), inputs)
            n = len(tuned)
            apart = (replace(ties, weights=tuple(float(i == j) for j in range(n))) for i in range(n))
            tuned = tuple(merge_adapters(each, alone) for each in apart)
        base = zero_shot.adapter.tensors
        return start, [{name: t[name] - base[name] for name in base} for t in (m.adapter.tensors for m in tuned)]

    def _learn(
        self,
        base: Tensors,
        vectors: Sequence[Tensors],
        predict: Sequence[fisher_information.Predict],
        counts: Sequence[int],
        inputs: MergeInputs,
    ) -> Tensor:
        """The coefficients [models, tensors]; by task they are equal over the tensors."""
        import torch

        device = next(iter(base.values())).device
        raw = torch.full((len(vectors), len(base) if self.by == "layer" else 1), self.start, device=device)
        raw.requires_grad_(True)
        optimizer = torch.optim.Adam([raw], lr=self.lr, betas=(0.9, 0.999))
        draw = torch.Generator().manual_seed(inputs.seed)
        file = None if inputs.scratch is None else inputs.scratch / "adamerging.safetensors"
        done = restore(file, raw, optimizer)
        for step in range(self.steps):
            drawn = [torch.randperm(n, generator=draw)[: self.batch].tolist() for n in counts]
            if step < done:  # before a kill
                continue
            merged = combine(base, vectors, raw.expand(-1, len(base)))
            leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in merged.items()}
            for of_task, rows in zip(predict, drawn):  # one task's graph is held at a time
                try:
                    loss = entropy(of_task(leaves, rows)).mean()
                    check_loss(loss, "adamerging", step, self.lr, unit="step")
                    loss.backward()
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    hint = f"set batch={max(1, len(rows) // 2)}"
                    raise Failed(f"out of memory with {len(rows)} images at once", where=WHERE, hint=hint) from None
            moved = [name for name, leaf in leaves.items() if leaf.grad is not None]
            optimizer.zero_grad()
            torch.autograd.backward([merged[name] for name in moved], [leaves[name].grad for name in moved])
            optimizer.step()
            with torch.no_grad():
                raw.clamp_(0, 1)
            if file is not None and (step + 1) % KEPT_EVERY == 0:
                state = {key: optimizer.state[raw][key] for key in ADAM}
                stored.write(file, {"lambdas": raw, **state}, {"adapter": "adamerging", "done": step + 1})
            inputs.reporter.progress(step + 1, self.steps, "adamerging")
        if file is not None:
            file.unlink(missing_ok=True)
        if not raw.isfinite().all():
            raise Failed("the coefficients are not finite", where=WHERE, hint=f"lower lr (now {self.lr})")
        return raw.detach().expand(-1, len(base))


def restore(file: Path | None, raw: Tensor, optimizer: torch.optim.Optimizer) -> int:
    """The steps that were done before a kill, their coefficients and Adam's state put in place; 0 where nothing was kept."""
    import torch

    if file is None or not file.exists():
        return 0
    tensors, facts = stored.read(file, "adamerging", "cpu")
    with torch.no_grad():
        raw.copy_(tensors["lambdas"])
    optimizer.state[raw] = {key: tensors[key] if key == "step" else tensors[key].to(raw.device) for key in ADAM}
    return facts["done"]


def combine(base: Tensors, vectors: Sequence[Tensors], lambdas: Float[Tensor, "models tensors"]) -> Tensors:
    """base + sum_i lambda_i * vector_i, tensor by tensor; lambdas [models, tensors]."""
    return {
        name: tensor + sum(lambdas[i, j] * vector[name] for i, vector in enumerate(vectors))
        for j, (name, tensor) in enumerate(base.items())
    }


def entropy(logits: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """Of softmax(logits [B, K]): [B]."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)
