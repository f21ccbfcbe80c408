"""The comparison with the original: what it answers, and whose fault it is when a comparison cannot be made."""

from __future__ import annotations

from collections.abc import Callable

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.probe import Probe
from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import Graph
from onnxcomp.pipeline import PassFault
from onnxcomp.reports.outcome import Report
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["NO_KERNEL", "NoKernel", "answers", "compared", "possibly_compared"]

NO_KERNEL = "find an implementation"  # what ONNX Runtime says where it has no kernel for an operator in some version


class NoKernel(ModelError):
    """The runtime has no kernel for an operator of the model, in the operator set it is written in."""


def answers(make: Callable[[], Reference], data: Dataset, report: Report) -> Reference | None:
    """The original's answers; None, with a note, where it does not run on random inputs that nobody asked for."""
    try:
        return make()
    except (DataError, ModelError) as e:
        if not isinstance(data, Probe):
            raise
        report.warnings.append(f"the result was not compared with the original, which fails on random inputs: {e}")
        return None


def compared(reference: Reference, g: Graph, after: str) -> Validation:
    """How far a graph is from the original; `after` is the pass that made it.

    Raises `NoKernel`, or `PassFault` where the graph does not run or gives other shapes than the original.
    """
    try:
        return reference.against(g)
    except ModelError as e:
        if NO_KERNEL in str(e):
            raise NoKernel(f"{e}; --opset 21 writes older operators") from e
        raise PassFault(f"pass '{after}' left a model that differs from the original: {e}") from e


def possibly_compared(reference: Reference, g: Graph) -> Validation | None:
    """How far a graph is from the original; None where the runtime has no kernel for one of its operators."""
    try:
        return compared(reference, g, "before lowering")
    except NoKernel:
        return None
