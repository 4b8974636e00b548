"""Model merging for vision-language models: everything that a notebook or a plugin needs is imported from here.

    merged = mergekit_vl.merge([a, b], base=zero_shot, strategy="ties", density=0.2)

docs/python.md shows how. A name is imported when it is first used: `import mergekit_vl` itself imports neither torch nor numpy.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "About",
    "Adapter",
    "AffineHead",
    "Array",
    "Augment",
    "Backbone",
    "BackboneOptions",
    "BenchResult",
    "Checked",
    "Choice",
    "Chunk",
    "Classes",
    "ClosedForm",
    "Coefficient",
    "CosineHead",
    "Dataset",
    "DatasetOptions",
    "Drop",
    "Ensemble",
    "Evaluated",
    "EvaluationProtocol",
    "Failed",
    "FeatureStore",
    "Head",
    "ImageEncoder",
    "ImageSource",
    "Line",
    "LoadedModel",
    "MergeInputs",
    "MergedFolder",
    "MethodInfo",
    "Metric",
    "Mixture",
    "Model",
    "Models",
    "Network",
    "Predictions",
    "Recipe",
    "Register",
    "Reporter",
    "Run",
    "RunResult",
    "Scores",
    "Single",
    "Source",
    "Split",
    "Strategies",
    "Strategy",
    "Task",
    "TaskData",
    "TextAdapter",
    "TextNetwork",
    "Training",
    "Tuner",
    "Unsuitable",
    "Usage",
    "UserError",
    "Whole",
    "ZeroShot",
    "absolute_sums",
    "add_to_base",
    "agreeing",
    "endpoints",
    "as_model",
    "bench",
    "check",
    "closed_form",
    "coefficient",
    "cosine_head",
    "cross_entropy",
    "elected",
    "evaluate",
    "few_shot",
    "hookimpl",
    "list_strategies",
    "load_model",
    "merge",
    "merge_adapters",
    "model_ranks",
    "option",
    "per_model",
    "predict",
    "read_adapter",
    "repair",
    "run",
    "soup",
    "sparse",
    "summed",
    "tensor_ranks",
    "train",
    "weighted_sum",
    "write_adapter",
]

MODULES = {
    "adapters.stored": ("read_adapter=read", "write_adapter=write"),
    "adapters.text_network": ("TextNetwork",),
    "adapters.zero_shot": ("ZeroShot",),
    "api.jobs": ("repair", "soup"),
    "api.listing": ("Strategies", "list_strategies"),
    "api.merging": ("MergedFolder", "merge"),
    "api.models": ("Predictions", "evaluate", "load_model", "predict"),
    "api.running": ("BenchResult", "Checked", "RunResult", "bench", "check", "run"),
    "backbones.backbone": ("Backbone",),
    "backbones.base": ("BackboneOptions",),
    "checkpoints.dtypes": ("Array",),
    "datasets.base": ("Augment", "Dataset", "DatasetOptions", "ImageSource", "Split", "few_shot"),
    "errors": ("Failed", "Unsuitable", "UserError"),
    "experiments.open_run": ("LoadedModel",),
    "experiments.use": ("Evaluated",),
    "merging.chunks": ("Chunk", "Models", "Run", "Source"),
    "merging.coefficients": ("Coefficient", "coefficient", "per_model"),
    "merging.method": ("ClosedForm", "MethodInfo"),
    "merging.prepass": ("absolute_sums", "model_ranks", "tensor_ranks"),
    "merging.task_vectors": ("add_to_base", "agreeing", "weighted_sum"),
    "models.adapter": ("About", "Adapter", "Line", "Network", "TextAdapter", "Usage", "Whole"),
    "models.choices": ("Choice",),
    "models.classifier": ("AffineHead", "Classes", "CosineHead", "Head", "ImageEncoder", "cosine_head"),
    "models.evaluate": ("Scores",),
    "models.features": ("FeatureStore",),
    "models.inputs": ("MergeInputs", "TaskData"),
    "models.model": ("Ensemble", "Mixture", "Model", "Single"),
    "options": ("option",),
    "protocols.base": ("EvaluationProtocol", "Metric", "Task"),
    "recipes.recipe": ("Recipe",),
    "registry.hookspecs": ("Register", "hookimpl"),
    "reporter": ("Reporter",),
    "strategies.base": ("Strategy",),
    "strategies.closed_form": ("closed_form",),
    "strategies.in_memory": ("endpoints", "as_model", "merge_adapters"),
    "strategies.sparse": ("Drop", "elected", "sparse", "summed"),
    "tuners.base": ("Tuner",),
    "tuners.sgd": ("cross_entropy",),
    "tuners.training": ("Training", "train"),
}
"""Module of this package -> the public names that are its own; `name=other` is called `other` there."""
PLACES = {
    name: (f"{__name__}.{module}", other or name)
    for module, names in MODULES.items()
    for name, _, other in (each.partition("=") for each in names)
}
"""Public name -> the module that has it, and its name there."""

if TYPE_CHECKING:
    from mergekit_vl.adapters.stored import read as read_adapter
    from mergekit_vl.adapters.stored import write as write_adapter
    from mergekit_vl.adapters.text_network import TextNetwork
    from mergekit_vl.adapters.zero_shot import ZeroShot
    from mergekit_vl.api.jobs import repair, soup
    from mergekit_vl.api.listing import Strategies, list_strategies
    from mergekit_vl.api.merging import MergedFolder, merge
    from mergekit_vl.api.models import Predictions, evaluate, load_model, predict
    from mergekit_vl.api.running import BenchResult, Checked, RunResult, bench, check, run
    from mergekit_vl.backbones.backbone import Backbone
    from mergekit_vl.backbones.base import BackboneOptions
    from mergekit_vl.checkpoints.dtypes import Array
    from mergekit_vl.datasets.base import Augment, Dataset, DatasetOptions, ImageSource, Split, few_shot
    from mergekit_vl.errors import Failed, Unsuitable, UserError
    from mergekit_vl.experiments.open_run import LoadedModel
    from mergekit_vl.experiments.use import Evaluated
    from mergekit_vl.merging.chunks import Chunk, Models, Run, Source
    from mergekit_vl.merging.coefficients import Coefficient, coefficient, per_model
    from mergekit_vl.merging.method import ClosedForm, MethodInfo
    from mergekit_vl.merging.prepass import absolute_sums, model_ranks, tensor_ranks
    from mergekit_vl.merging.task_vectors import add_to_base, agreeing, weighted_sum
    from mergekit_vl.models.adapter import About, Adapter, Line, Network, TextAdapter, Usage, Whole
    from mergekit_vl.models.choices import Choice
    from mergekit_vl.models.classifier import AffineHead, Classes, CosineHead, Head, ImageEncoder, cosine_head
    from mergekit_vl.models.evaluate import Scores
    from mergekit_vl.models.features import FeatureStore
    from mergekit_vl.models.inputs import MergeInputs, TaskData
    from mergekit_vl.models.model import Ensemble, Mixture, Model, Single
    from mergekit_vl.options import option
    from mergekit_vl.protocols.base import EvaluationProtocol, Metric, Task
    from mergekit_vl.recipes.recipe import Recipe
    from mergekit_vl.registry.hookspecs import Register, hookimpl
    from mergekit_vl.reporter import Reporter
    from mergekit_vl.strategies.base import Strategy
    from mergekit_vl.strategies.closed_form import closed_form
    from mergekit_vl.strategies.in_memory import as_model, endpoints, merge_adapters
    from mergekit_vl.strategies.sparse import Drop, elected, sparse, summed
    from mergekit_vl.tuners.base import Tuner
    from mergekit_vl.tuners.sgd import cross_entropy
    from mergekit_vl.tuners.training import Training, train


def __getattr__(name: str) -> object:
    """A public name, imported from its place and kept."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, there = PLACES[name]
    found = vars(importlib.import_module(module))[there]
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
