"""Guards of rows without visible keys (`Where(no key, 0, x)`), moved directly behind the product with the values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import trace
from onnxcomp.graph import Graph

__all__ = ["lift_guards"]


def lift_guards(g: Graph, f: Facts) -> None:
    """Move a `Where(c, 0, x)` of transposed operands before their Transpose: optimizers exchange the two."""
    for node in g.nodes("Where"):
        condition, zero, x = node.inputs[:3]
        transpose = condition.producer() if condition is not None else None
        fill = f.uniform(zero)
        if (
            node.domain
            or transpose is None
            or transpose.op_type != "Transpose"
            or transpose.domain
            or x is None
            or zero is None
        ):
            continue
        if fill is None or fill.value != 0.0 or zero.dtype is None or f.shape(node.outputs[0]) != f.shape(x):
            continue
        order = list(transpose.attributes.get_ints("perm", []))
        source = _source_of_transpose(f, x, order) if order else None
        if source is not None:
            guarded = g.op("Where", transpose.inputs[0], np.array(0, zero.dtype.numpy()), source, like=source)
            g.replace(node.outputs[0], g.op("Transpose", guarded, perm=order, like=node.outputs[0]))


def _source_of_transpose(f: Facts, x: ir.Value, order: list[int]) -> ir.Value | None:
    """The value that `x` is the Transpose of by `order`, through layout operators without other users."""
    for t in trace(f, x):
        groups = t.axes
        is_transpose = len(groups) == len(order) == len(t.origin) and sum(1 for group in groups if not group) <= 1
        if (
            is_transpose
            and t.value is not x
            and [groups.index(group) for group in t.origin if group in groups] == order
        ):
            return t.value
        if t.value.is_graph_output() or len(set(t.value.uses())) > 1:
            return None
    return None
