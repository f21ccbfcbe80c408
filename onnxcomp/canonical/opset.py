"""Operator set conversion; onnxscript's young API stays behind this one function."""

from __future__ import annotations

import logging

from onnx_ir.passes import PassError

from onnxcomp.errors import ModelError
from onnxcomp.files import external
from onnxcomp.graph import Graph

__all__ = ["convert"]


def convert(graph: Graph, version: int) -> Graph:
    """A graph at operator set `version` or above, in a new `Graph` (the one given is not changed).

    Sources above `version` stay where they are: there is no way down. Raises `ModelError` when the conversion
    fails or did not arrive (onnxscript only logs that). Handles into the old graph are not valid for the new one.
    """
    new = graph.clone()
    if graph.opset >= version:
        return new
    from onnxscript import version_converter

    declared = [(v.type, v.shape) for v in new.model.graph.outputs]
    new.infer_shapes()  # some adapters are silently wrong without shapes
    quiet = logging.getLogger("onnxscript.version_converter")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        # Without the fallback, sources below 18 are only stamped with the new number.
        version_converter.convert_version(new.model, version, fallback=True)
    except (PassError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(f"{_name(graph)}: cannot be converted from opset {graph.opset} to {version}: {e}") from e
    finally:
        quiet.setLevel(level)
    if new.model.opset_imports.get("") != version:
        raise ModelError(
            f"{_name(graph)}: cannot be converted from opset {graph.opset} to {version}; "
            "export the model again at opset 18 or above"
        )
    for v, (kind, shape) in zip(new.model.graph.outputs, declared, strict=True):
        v.type, v.shape = kind, shape  # the converter infers too; the interface stays as it was declared
    if graph.path is not None:
        external.attach(new.model, graph.path.parent)
    converted = Graph(new.model, graph.path)
    converted.interface = graph.interface
    converted.verify()
    return converted


def _name(graph: Graph) -> str:
    return str(graph.path) if graph.path is not None else "the model"
