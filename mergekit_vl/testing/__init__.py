"""The conformance kit: checks of what a plugin registers, which the built-ins pass too.

    from mergekit_vl import testing

    def test_median():
        testing.check_strategy(Median())

Each function raises `Violation`, an AssertionError, that lists every promise that is not kept. None of them needs pytest. A thing that
cannot keep a promise says so itself, with the reason: `exempt = {"late names": "..."}`; a reason for a promise that is kept is a violation.
"""

from mergekit_vl.testing.parts import check_backbone, check_dataset, check_protocol
from mergekit_vl.testing.promises import Violation
from mergekit_vl.testing.registered import check_registered
from mergekit_vl.testing.trained import check_adapter, check_strategy, check_tuner
from mergekit_vl.testing.weights import check_closed_form, check_memory, held

__all__ = [
    "Violation",
    "check_adapter",
    "check_backbone",
    "check_closed_form",
    "check_dataset",
    "check_memory",
    "check_protocol",
    "check_registered",
    "check_strategy",
    "check_tuner",
    "held",
]
