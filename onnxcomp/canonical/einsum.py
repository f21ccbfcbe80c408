"""Einsum of two values that is a batched matrix product, decomposed to Transpose and MatMul."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.graph import Graph

__all__ = ["decompose_einsum"]


def decompose_einsum(g: Graph) -> None:
    """Rewrite every Einsum `(batch, rows, k), (batch, k, columns) > (batch, rows, columns)`, axes in any order.

    Equations that repeat a letter, sum over an axis of one operand alone or have an ellipsis stay as they are.
    """
    for node in g.nodes("Einsum"):
        if node.domain == "" and len(node.inputs) == 2:
            _decompose(g, node)


def _decompose(g: Graph, node: ir.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    operands, arrow, out = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    if (
        a is None
        or b is None
        or not arrow
        or "." in operands
        or any(len(set(x)) < len(x) for x in (first, second, out))
    ):
        return
    batch = [x for x in out if x in first and x in second]
    rows = [x for x in out if x in first and x not in second]
    columns = [x for x in out if x in second and x not in first]
    summed = [x for x in first if x in second and x not in out]
    complete = len(batch) + len(rows) + len(columns) == len(out)
    unmatched = (set(first) | set(second)) - {*batch, *rows, *columns, *summed}
    if unmatched or not complete or len(summed) != 1 or len(columns) != 1 or (len(rows) != 1 and batch) or not rows:
        return
    x = _transposed(g, a, first, [*batch, *rows, *summed])
    y = _transposed(g, b, second, [*batch, *summed, *columns])
    product = g.op("MatMul", x, y, name=f"{node.name}_product")
    product.type = node.outputs[0].type
    result = _transposed(g, product, [*batch, *rows, *columns], out)
    g.replace(node.outputs[0], result)
    if result.type is None:
        result.type = node.outputs[0].type


def _transposed(g: Graph, v: ir.Value, axes: Sequence[str], to: Sequence[str]) -> ir.Value:
    """A value with its named axes in another order."""
    perm = [list(axes).index(x) for x in to]
    if perm == sorted(perm):
        return v
    transposed = g.op("Transpose", v, perm=perm)
    transposed.type = v.type
    return transposed
