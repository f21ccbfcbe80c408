"""Operator set conversion: the only place that calls onnxscript's converter, whose API is young."""

from __future__ import annotations

import logging

from onnx_ir.passes import PassError

from onnxcomp.errors import ModelError
from onnxcomp.files import external
from onnxcomp.graph import Graph

__all__ = ["convert"]


def convert(graph: Graph, version: int) -> Graph:
    """A graph at operator set `version` or above, in a new `Graph` (the one given is not changed).

    Graphs above `version` are returned unchanged: there is no conversion down. Raises `ModelError` where the conversion
    fails or is incomplete (onnxscript only logs that). Handles into the old graph are not valid for the new one.
    """
    new = graph.clone()
    if graph.opset >= version:
        return new
    if graph.opset < 9 and (scan := next(graph.nodes("Scan"), None)) is not None:
        raise ModelError(
            f"{_name(graph)}: node '{scan.name}' is a Scan over a batch, of opset 8; export at opset 9 or above"
        )
    from onnxscript import version_converter

    declared = [(v.type, v.shape) for v in new.model.graph.outputs]
    new.infer_shapes()  # some adapters give wrong results without shapes, such as that of GroupNormalization 18
    quiet = logging.getLogger("onnxscript.version_converter")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        # Without the fallback, graphs below opset 18 only get the new number: their operators are not converted.
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
        v.type, v.shape = kind, shape  # the converter infers shapes too; the interface stays as declared
    if graph.path is not None:
        external.attach(new.model, graph.path.parent)
    converted = Graph(new.model, graph.path)
    converted.interface = graph.interface
    converted.verify()
    return converted


def _name(graph: Graph) -> str:
    return str(graph.path) if graph.path is not None else "the model"
