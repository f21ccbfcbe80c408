"""Norms of one head each, sliced and concatenated again, become one norm of all heads with a gain per head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.selections import Selection, selections
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import NORMS
from onnxcomp.graph.values import has_one_use
from onnxcomp.maths import Array

__all__ = ["join_head_norms"]


def join_head_norms(g: Graph, f: Facts) -> None:
    """Rewrite `Concat(norm_0(x[0]), norm_1(x[1]), ..)` over all positions of an axis as `norm(x) * gains + biases`."""
    for node in g.nodes("Concat"):
        norms = [v.producer() for v in node.inputs if v is not None]
        rank = f.rank(node.outputs[0])
        if node.domain or rank is None or len(norms) < 2 or not _are_alike(g, norms):
            continue
        heads = [n for n in norms if n is not None]
        axis = axis_of(node, rank, 0)
        parts = [_selection(f, n.inputs[0]) for n in heads]
        x = _joined(f, parts, axis) if axis < rank - 1 else None
        if x is not None:
            g.replace(node.outputs[0], _norm(g, heads, [len(p.keep) for p in parts if p], x, (axis, rank)))


def _are_alike(g: Graph, norms: Sequence[ir.Node | None]) -> bool:
    """Whether all are norms over the last axis that differ in constant gain and bias at most, each read once."""
    first = norms[0]
    if first is None or first.op_type not in NORMS or first.domain:
        return False
    return all(n is not None and _is_like(g, n, first) for n in norms)


def _is_like(g: Graph, n: ir.Node, first: ir.Node) -> bool:
    same = n.op_type == first.op_type and len(n.inputs) == len(first.inputs) and n.attributes.get_int("axis", -1) == -1
    epsilons = {x.attributes.get_float("epsilon", 1e-5) for x in (n, first)}
    constant = all(v is not None and g.is_constant(v) for v in n.inputs[1:])
    return same and constant and len(epsilons) == 1 and has_one_use(n.outputs[0])


def _selection(f: Facts, v: ir.Value | None) -> Selection | None:
    node = v.producer() if v is not None else None
    return None if node is None else next((s for s in selections(f, node) or () if s.out is v), None)


def _joined(f: Facts, parts: Sequence[Selection | None], axis: int) -> ir.Value | None:
    """The value of which the parts are all positions along an axis, in order."""
    found = [p for p in parts if p is not None and p.axis == axis and not p.squeezed]
    sources = {p.node.inputs[0] for p in found}
    x = sources.pop() if len(sources) == 1 and len(found) == len(parts) else None
    shape = f.shape(x)
    length = shape[axis] if shape is not None else None
    return x if isinstance(length, int) and [i for p in found for i in p.keep] == list(range(length)) else None


def _norm(g: Graph, norms: Sequence[ir.Node], counts: Sequence[int], x: ir.Value, place: tuple[int, int]) -> ir.Value:
    """One norm without gain, then the gain and bias of each head `[.., heads, 1.., width]`."""
    first = norms[0]
    axis, rank = place
    gains = _stacked([g.array(n.inputs[1]) for n in norms], counts, rank - axis)
    attrs = {k: a.value for k, a in first.attributes.items()} | {"axis": -1}
    like = first.outputs[0]
    y = g.op(first.op_type, x, np.ones(gains.shape[-1], gains.dtype), **attrs)
    y.type = like.type
    y = g.op("Mul", y, gains)
    if len(first.inputs) > 2 and first.inputs[2] is not None:
        y = g.op("Add", y, _stacked([g.array(n.inputs[2]) for n in norms], counts, rank - axis))
    y.type = like.type
    return y


def _stacked(rows: Sequence[Array], counts: Sequence[int], rank: int) -> Array:
    """The rows of all heads, `[heads, 1.., width]` with `rank` axes."""
    table = np.concatenate([np.repeat(r[None], n, axis=0) for r, n in zip(rows, counts, strict=True)])
    return table.reshape(len(table), *(1 for _ in range(rank - 2)), table.shape[-1])
