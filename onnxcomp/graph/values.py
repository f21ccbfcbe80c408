"""Who reads a value: questions that every recognizer and pass asks."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["has_one_use", "sole_use", "unquantized", "untransposed", "users_of"]


def users_of(v: ir.Value) -> list[ir.Node]:
    """Nodes that read a value, each once, in the order of their uses; a graph output has no node."""
    return list(dict.fromkeys(user for user, _ in v.uses()))


def untransposed(v: ir.Value | None) -> ir.Value | None:
    """The value that `v` is the Transpose of, or `v` itself: weights that an embedding table stores are read so."""
    node = v.producer() if v is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Transpose" and not node.domain else v


def unquantized(v: ir.Value | None) -> ir.Value | None:
    """The value before a pair of QuantizeLinear and DequantizeLinear, or the value itself."""
    back = v.producer() if v is not None else None
    if back is None or back.op_type != "DequantizeLinear" or back.inputs[0] is None:
        return v
    quantize = back.inputs[0].producer()
    return quantize.inputs[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else v


def sole_use(v: ir.Value) -> tuple[ir.Node, int] | None:
    """The only node that reads a value with the index of the input; None for several uses and for graph outputs."""
    uses = tuple(v.uses())
    return (uses[0][0], uses[0][1]) if len(uses) == 1 and not v.is_graph_output() else None


def has_one_use(v: ir.Value) -> bool:
    """Whether one input of one node is all that reads a value."""
    return sole_use(v) is not None
