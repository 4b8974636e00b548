"""Repair: of all that can be made of a base and one tuned model, what is best on what is new and on what must be kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mergekit_vl.errors import Unsuitable, UserError
from mergekit_vl.merging.coefficients import in_block
from mergekit_vl.models.choices import Choice, Tried
from mergekit_vl.models.inputs import MergeInputs
from mergekit_vl.models.model import Mixture, Model, Single
from mergekit_vl.options import check, option
from mergekit_vl.protocols.base import Metric
from mergekit_vl.strategies.in_memory import endpoints, merge_adapters
from mergekit_vl.strategies.lines import Lines
from mergekit_vl.strategies.mergetune import MergeTune
from mergekit_vl.strategies.monosoup import MonoSoup
from mergekit_vl.strategies.wise_ft import ALPHAS, WiseFT

WHERE = "strategy repair"
Candidate = tuple[str, float | None, Model]
"""(method, coefficient, model)."""
Key = tuple[float, ...]
COARSE = (0.2, 0.4, 0.6, 0.8)
"""Coefficients of towers that are tried at first; then those beside the best of them."""
LINES = (0.2, 0.5)
"""Factors of LiNeS' first block; the last one's is 1."""
HARMONIC = Metric("HM", {}, harmonic=True)


@dataclass(frozen=True)
class Repair:
    """The best, on validation images, of the base, the tuned model, and what closed forms make of both.

    The candidates: WiSE-FT at 0.1, 0.2, ... 0.9 (of towers at 0.2, 0.4, 0.6, 0.8 and on both sides of the best of these), LiNeS at 0.2 and
    0.5 (of towers), MonoSoup, for prompts the line between classifiers, and with `train` MergeTune. The best has the highest harmonic mean of the accuracy on what is new and of the mean
    accuracy on what is kept (the data sets of the protocol `new_and_kept`; elsewhere the harmonic mean over the tasks), then the
    least negative log-likelihood, then the earliest. With a budget it is the most accurate on what is new among those that lose no more than
    the budget on what is kept. The test split is never read. Running statistics of BatchNorm are merged as the weights are where the
    recipe says `batch_norm: mean`, as that of the command does; otherwise each candidate's are estimated on training images.
    """

    budget: float | None = option(None, "points that may be lost on what is kept; empty: the best harmonic mean")
    train: bool = option(False, "also try MergeTune, which trains")

    def __post_init__(self) -> None:
        check(self, where=WHERE, budget=(self.budget is None or 0 <= self.budget <= 100, "points, from 0 to 100"))

    def merge(self, inputs: MergeInputs) -> Model:
        inputs.only(WHERE, "make a soup of several first")
        if self.budget is not None and not inputs.kept:
            raise Unsuitable("a budget, and nothing that is kept", where=WHERE, hint="use the protocol new_and_kept")
        found: list[Tried] = []
        keys: list[Key] = []
        best: Model | None = None

        def consider(candidates: Iterable[Candidate]) -> None:
            nonlocal best
            for method, alpha, model in candidates:
                what = method if alpha is None else f"{method} {alpha:g}"
                inputs.reporter.progress(len(found), 0, f"trying {what}")
                tried, likelihood = _scored(model, method, alpha, inputs)
                key = self.key(tried, found[0] if found else tried, likelihood)
                if best is None or key > max(keys):
                    best = model
                found.append(tried)
                keys.append(key)

        ends = self.ends(inputs)
        consider(ends[:1])
        consider(self.line(inputs, COARSE if _reads_images(inputs) else ALPHAS[1:-1]))
        if (
            _reads_images(inputs) and len(found) > 1
        ):  # a tower encodes every image: the rest of the line only where it may be best
            middle = found[max(range(1, len(found)), key=lambda i: keys[i])].alpha or 0.0
            consider(self.line(inputs, (round(middle - 0.1, 1), round(middle + 0.1, 1))))
        consider(self.others(inputs))
        consider(ends[1:])
        assert isinstance(best, (Single, Mixture))
        score = found[keys.index(max(keys))]
        values = {"method": score.method} | ({} if score.alpha is None else {"alpha": score.alpha})
        return replace(best, choice=Choice(values, tried=tuple(sorted(found, key=_order))))

    def key(self, score: Tried, base: Tried, likelihood: float) -> tuple[float, ...]:
        """The greater, the better; `base` is what the base scored."""
        if self.budget is None:
            return HARMONIC.score(list(score.accuracy.values())), likelihood
        lost = base.accuracy["kept"] - score.accuracy["kept"]
        if 100 * lost > self.budget + 1e-9:
            return -1.0, -lost, likelihood
        return score.accuracy["new"], score.accuracy["kept"], likelihood

    def ends(self, inputs: MergeInputs) -> list[Candidate]:
        """The base, of a tower as one that can be exported, and the tuned model."""
        (tuned,) = inputs.tuned
        base = endpoints(inputs)[0] if _reads_images(inputs) else inputs.base
        return [("base", None, base), ("tuned", None, tuned)]

    def line(self, inputs: MergeInputs, alphas: Iterable[float]) -> Iterator[Candidate]:
        """WiSE-FT at these coefficients; nothing where tensors cannot be averaged, such as those of a prompt that started at random."""
        if _start(inputs) is not None:
            for alpha in alphas:
                yield "wise_ft", alpha, merge_adapters(WiseFT(alpha), inputs)

    def others(self, inputs: MergeInputs) -> Iterator[Candidate]:
        """What is on no line between the tensors. One at a time, since a tower takes as much memory as the model."""
        start, (tuned,) = _start(inputs), inputs.tuned
        if start is not None and any(map(in_block, start.adapter.tensors)):
            for alpha in LINES:
                yield "lines", alpha, merge_adapters(Lines(alpha), inputs)
        if start is not None and any(tensor.ndim > 1 for tensor in start.adapter.tensors.values()):
            yield "monosoup", None, merge_adapters(MonoSoup(), inputs)
        if isinstance(tuned, Single) and tuned.makes_texts and inputs.base.makes_texts:
            for alpha in ALPHAS[1:-1]:
                yield "wise_ft of classifiers", alpha, WiseFT(alpha, space="classifiers").merge(inputs)
        if self.train:
            yield "mergetune", None, MergeTune().merge(inputs)


def _reads_images(inputs: MergeInputs) -> bool:
    """Whether the tuned model is a tower, whose candidates encode the images anew."""
    (tuned,) = inputs.tuned
    return isinstance(tuned, Single) and tuned.adapter.about.reads == "images"


def _start(inputs: MergeInputs) -> Single | None:
    """The model before tuning, with tensors like the tuned one's; None where there is none."""
    try:
        return endpoints(inputs)[0]
    except UserError:
        return None


def _order(tried: Tried) -> tuple[int, float]:
    """As reports show the candidates."""
    methods = ("base", "wise_ft", "lines", "monosoup", "wise_ft of classifiers", "mergetune", "tuned")
    return methods.index(tried.method), tried.alpha or 0.0


def _scored(model: Model, method: str, alpha: float | None, inputs: MergeInputs) -> tuple[Tried, float]:
    """A candidate's accuracy by side with its images, and its mean log-likelihood over the tasks."""
    from mergekit_vl.models.evaluate import evaluate

    tasks = inputs.to_choose_on(WHERE, "give every folder images to choose on: val/, or class folders alone")
    new = len(tasks) - len(inputs.kept)
    sides = {"new": tasks[:new], "kept": tasks[new:]} if inputs.kept else {str(i): (t,) for i, t in enumerate(tasks)}
    accuracy, images, likelihoods = {}, {}, []
    for side, of in sides.items():
        found = [evaluate(model, task.classes, task.val, inputs.features).scores for task in of]
        accuracy[side] = sum(scores.acc1 for scores in found) / len(found)
        images[side] = sum(scores.n for scores in found)
        likelihoods += [-scores.nll for scores in found]
    return Tried(method, alpha, accuracy, images), sum(likelihoods) / len(likelihoods)
