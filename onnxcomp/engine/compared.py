"""The comparison of a graph with the original after a pass: whose fault it is when it cannot be made."""

from __future__ import annotations

from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.pipeline import PassFault
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["NO_KERNEL", "NoKernel", "compared"]

NO_KERNEL = "find an implementation"  # what ONNX Runtime says where it has no kernel for an operator in some version


class NoKernel(ModelError):
    """The runtime has no kernel for an operator of the model, in the operator set it is written in."""


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
