"""Einsum of two values that is a batched matrix product or a linear, decomposed to Transpose, Reshape and MatMul."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.graph import Graph
from onnxcomp.graph.values import sole_use

__all__ = ["decompose_einsum"]


def decompose_einsum(g: Graph, f: Facts) -> None:
    """Rewrite every Einsum `(batch, rows, k), (batch, k, columns) > (batch, rows, columns)`, axes in any order.

    With a constant operand there may be several axes of each kind, as in `btd,dhk->bthk`, but no batch. Equations that
    repeat a letter or sum over an axis of one operand alone stay as they are.
    """
    for node in g.nodes("Einsum"):
        if node.domain == "" and len(node.inputs) == 2:
            _decompose(g, f, node)


def _decompose(g: Graph, f: Facts, node: ir.Node) -> None:
    a, b = node.inputs[0], node.inputs[1]
    terms = _terms(f, node)
    if a is None or b is None or terms is None:
        return
    first, second, out = terms
    if g.is_constant(a) and not g.is_constant(b):
        a, b, first, second = b, a, second, first
    batch = [x for x in out if x in first and x in second]
    rows = [x for x in out if x in first and x not in second]
    columns = [x for x in out if x in second and x not in first]
    summed = [x for x in first if x in second and x not in out]
    complete = len(batch) + len(rows) + len(columns) == len(out)
    unmatched = (set(first) | set(second)) - {*batch, *rows, *columns, *summed}
    if unmatched or not complete or not rows or not columns or not summed:
        return
    if len(summed) == len(columns) == 1 and (len(rows) == 1 or not batch):
        x = _transposed(g, a, first, [*batch, *rows, *summed])
        y = _transposed(g, b, second, [*batch, *summed, *columns])
        product = g.op("MatMul", x, y, name=f"{node.name}_product")
        product.type = node.outputs[0].type
        result = _transposed(g, product, [*batch, *rows, *columns], out)
    elif not batch and g.is_constant(b) and not g.is_constant(a):
        node, result = _linear(g, node, (a, first), (b, second), (rows, summed, columns, out))
    else:
        return
    g.replace(node.outputs[0], result)
    if result.type is None:
        result.type = node.outputs[0].type


def _terms(f: Facts, node: ir.Node) -> tuple[str, str, str] | None:
    """The letters of both operands and the result, an ellipsis as letters of its own; None where one is repeated."""
    operands, arrow, out = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    terms = [*operands.split(","), out]
    if not arrow or len(terms) != 3:
        return None
    if "..." in out:
        ranks = [f.rank(x) for x in node.inputs]
        hidden = {(r or 0) - len(t) + 3 for t, r in zip(terms, ranks, strict=False) if "..." in t}
        if len(hidden) != 1 or None in ranks:
            return None
        letters = "".join(x for x in "ABCDEFGH" if x not in operands)[: hidden.pop()]
        terms = [t.replace("...", letters) for t in terms]
    if any(len(set(t)) < len(t) or "." in t for t in terms):
        return None
    return terms[0], terms[1], terms[2]


Operand = tuple[ir.Value, str]
Roles = tuple[list[str], list[str], list[str], str]


def _linear(g: Graph, node: ir.Node, x: Operand, w: Operand, roles: Roles) -> tuple[ir.Node, ir.Value]:
    """The node whose output a product with a weight `[K, N]` is, that of an addition of a bias where one follows."""
    rows, summed, columns, out = roles
    sizes = dict(zip(w[1], _sizes(g, w[0]), strict=True))
    rest = [0] * len(rows)
    flat = _transposed(g, x[0], x[1], [*rows, *summed])
    if len(summed) > 1:
        flat = g.op("Reshape", flat, np.array([*rest, math.prod(sizes[c] for c in summed)], np.int64))
        flat.type = x[0].type
    weight = _matrix(g, w[0], [w[1].index(c) for c in (*summed, *columns)], len(summed))
    y = g.op("MatMul", flat, weight, name=f"{node.name}_product")
    y.type = node.outputs[0].type
    use = sole_use(node.outputs[0])
    bias = None if use is None else _bias(g, use[0], use[1], out, columns, sizes)
    if bias is not None and use is not None:
        node, y = use[0], g.op("Add", y, bias)
        y.type = node.outputs[0].type
    if len(columns) > 1:
        y = g.op("Reshape", y, np.array([*rest, *(sizes[c] for c in columns)], np.int64))
        y.type = node.outputs[0].type
    return node, _transposed(g, y, [*rows, *columns], out)


def _sizes(g: Graph, v: ir.Value) -> tuple[int, ...]:
    """The sizes of a constant."""
    t = g.tensor(v)
    return () if t is None else tuple(t.shape.numpy())


def _matrix(g: Graph, w: ir.Value, perm: list[int], inputs: int) -> ir.Value:
    """A weight with its axes in another order, the first `inputs` of them and the others merged; read when needed."""
    t = g.tensor(w)
    assert t is not None
    sizes = [_sizes(g, w)[i] for i in perm]
    shape = [math.prod(sizes[:inputs]), math.prod(sizes[inputs:])]

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(t.numpy().transpose(perm)).reshape(shape), dtype=t.dtype)

    return g.constant(ir.LazyTensor(read, dtype=t.dtype, shape=ir.Shape(shape)), str(w.name))


def _bias(g: Graph, node: ir.Node, index: int, out: str, columns: list[str], sizes: dict[str, int]) -> ir.Value | None:
    """The other operand of an addition as a row of the product, where it is a constant and the same for all rows."""
    other = node.inputs[1 - index] if node.op_type == "Add" and len(node.inputs) == 2 else None
    t = g.tensor(other)
    if t is None or other is None or len(t.shape) > len(out) or not t.dtype.is_floating_point():
        return None
    shape = (1,) * (len(out) - len(t.shape)) + _sizes(g, other)
    if any(n != sizes.get(c, 1) for n, c in zip(shape, out, strict=True)):
        return None
    row = t.numpy().reshape([n for n, c in zip(shape, out, strict=True) if c in sizes])
    in_order = [[c for c in out if c in sizes].index(c) for c in columns]
    return g.constant(np.ascontiguousarray(row.transpose(in_order)).reshape(-1), str(other.name))


def _transposed(g: Graph, v: ir.Value, axes: Sequence[str], to: Sequence[str]) -> ir.Value:
    """A value with its named axes in another order."""
    perm = [list(axes).index(x) for x in to]
    if perm == sorted(perm):
        return v
    transposed = g.op("Transpose", v, perm=perm)
    transposed.type = v.type
    return transposed
