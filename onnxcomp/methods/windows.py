"""Sliding windows on attention: masks that hide distant keys, and how much attention a window keeps.

Shapes: `[b, heads, s, t]` attention of `s` queries over `t` keys; masks are bool and broadcast to it, true where a key
may be read. Queries are the last `s` of the `t` positions, after `t - s` cached ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Size, add
from onnxcomp.blocks import Attention
from onnxcomp.canonical.masks import Masks
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph import Graph

__all__ = ["WIDTHS", "Bands", "kept_by_width", "widest"]

# Widths that are measured, 1 to 4096: half an octave apart, so that a layer's window is at most 41 % wider than needed.
WIDTHS = tuple(sorted({round(2 ** (i / 2)) for i in range(25)}))
SOFTMAXED = 3  # qk_matmul_output_mode of ONNX's Attention


class Bands:
    """Masks of near keys for the attentions of one graph; equal requests give one shared value."""

    def __init__(self, g: Graph) -> None:
        self.g, self.f = g, Facts(g)
        self.masks, self.sizes = Masks(g, self.f), Sizes(g, self.f)
        self._positions: dict[tuple[object, object], tuple[ir.Value, ir.Value]] = {}
        self._bands: dict[tuple[ir.Value, int, int], ir.Value] = {}

    def keys(self, a: Attention) -> int | None:
        """The number of keys of an attention, None where it depends on the input."""
        past, new = self._lengths(a)
        total = add(past, new)
        return total if isinstance(total, int) else None

    def narrow(self, a: Attention, width: int, sinks: int) -> None:
        """Hide the keys `width` or more positions away from their query, besides those that are hidden already."""
        band, mask = self._band(a, width, sinks), a.mask
        if mask is None:
            narrowed = band
        elif mask.dtype is ir.DataType.BOOL:
            narrowed = self.masks.both(mask, band)
        else:
            narrowed = self.masks.bias_where_allowed(band, mask)
        narrowed.type = ir.TensorType(ir.DataType.BOOL) if mask is None else mask.type
        self.g.set_input(a.node, 3, narrowed)

    def _lengths(self, a: Attention) -> tuple[Size, Size]:
        """Cached and new keys."""
        q, past = self.f.shape(a.node.inputs[0]), None if a.past is None else self.f.shape(a.past[0])
        new = q[1] if q is not None else self.f.fresh(a.q.output, 1)
        return 0 if a.past is None else past[2] if past is not None else self.f.fresh(a.past[0], 2), new

    def _band(self, a: Attention, width: int, sinks: int) -> ir.Value:
        """Bool `[s, t]`: near keys; the first `sinks` tokens are keys of all queries, and have all keys as queries."""
        g, (queries, keys) = self.g, self._positions_of(a)
        key = (keys, width, sinks)
        if key not in self._bands:
            band = g.op("Less", g.op("Abs", g.op("Sub", queries, keys)), np.array(width, np.int64))
            for position in (queries, keys) if sinks else ():
                band = g.op("Or", band, g.op("Less", position, np.array(sinks, np.int64)))
            self._bands[key] = band
        return self._bands[key]

    def _positions_of(self, a: Attention) -> tuple[ir.Value, ir.Value]:
        """Positions of the queries, int64 `[s, 1]`, and of the keys, `[1, t]`; queries come after the cached keys."""
        past, new = self._lengths(a)
        key = (past if self.sizes.can_compute([past]) else a.past, new if self.sizes.can_compute([new]) else a.node)
        if key not in self._positions:
            q = a.node.inputs[0]
            assert q is not None
            count = self._count(q, 1, new)
            g, zero, one = self.g, np.array(0, np.int64), np.array(1, np.int64)
            queries = keys = g.op("Range", zero, count, one)
            if a.past is not None:
                cached = self._count(a.past[0], 2, past)
                queries, keys = g.op("Add", queries, cached), g.op("Range", zero, g.op("Add", cached, count), one)
            column, row = (np.array([axis], np.int64) for axis in (1, 0))
            self._positions[key] = g.op("Unsqueeze", queries, column), g.op("Unsqueeze", keys, row)
        return self._positions[key]

    def _count(self, v: ir.Value, axis: int, size: Size) -> ir.Value:
        """The length of an axis as an int64 scalar, computed from the graph inputs where that is possible."""
        if self.sizes.can_compute([size]):
            return self.sizes.scalar(size)
        return self.g.op("Squeeze", self.g.op("Shape", v, start=axis, end=axis + 1), np.array([0], np.int64))


# ---- measuring -------------------------------------------------------------------------------------------------------


def kept_by_width(g: Graph, attentions: Sequence[Attention], sinks: int) -> list[ir.Value]:
    """Values `[b, s, W + 1]`, one an attention: attention kept by each of `W` widths, and the number of keys `t`.

    Kept is the sum of softmax probabilities inside the window, averaged over heads. Edits the graph: pass a copy.
    """
    return [_kept(g, a, sinks) for a in attentions]


def widest(kept: Sequence[float], mass: float, longest: int) -> int | None:
    """The smallest measured width that keeps a share `mass` of attention, None where that takes all `longest` keys."""
    return next((w for w, x in zip(WIDTHS, kept, strict=True) if w < longest and x >= mass), None)


def _kept(g: Graph, a: Attention, sinks: int) -> ir.Value:
    probabilities = g.op("ReduceMean", _softmaxed(g, a), np.array([1], np.int64), keepdims=0)  # [b, s, t]
    queries, keys = (g.op("Shape", probabilities, start=i, end=i + 1) for i in (1, 2))
    zero, one = np.array(0, np.int64), np.array(1, np.int64)
    total = g.op("Squeeze", keys, np.array([0], np.int64))
    of_keys = g.op("Range", zero, total, one)
    of_queries = g.op("Range", g.op("Sub", total, g.op("Squeeze", queries, np.array([0], np.int64))), total, one)
    row, column = (g.op("Unsqueeze", v, np.array(i, np.int64)) for v, i in ((of_keys, [0, 2]), (of_queries, [1, 2])))
    inside = g.op("Less", g.op("Abs", g.op("Sub", column, row)), np.array(WIDTHS, np.int64))  # [s, t, W]
    for position in (column, row) if sinks else ():
        inside = g.op("Or", inside, g.op("Less", position, np.array(sinks, np.int64)))
    number = (a.node.outputs[0].dtype or ir.DataType.FLOAT).value
    by_query = g.op("Transpose", probabilities, perm=[1, 0, 2])  # [s, b, t]
    by_width = g.op("MatMul", by_query, g.op("Cast", inside, to=number))  # [s, b, W]
    kept = g.op("Transpose", by_width, perm=[1, 0, 2])
    sizes = g.op("Concat", g.op("Shape", kept, start=0, end=2), np.array([1], np.int64), axis=0)
    length = g.op("Expand", g.op("Cast", total, to=number), sizes)
    return g.op("Concat", kept, length, axis=2, name="kept")


def _softmaxed(g: Graph, a: Attention) -> ir.Value:
    """The probabilities `[b, heads, s, t]` of an attention, as one more output of its node."""
    node = a.node
    node.resize_outputs(4)
    for v in node.outputs[1:]:
        v.name = v.name or ("" if v is not node.outputs[3] else g.fresh(f"{node.name}_probabilities"))
    node.outputs[3].type = ir.TensorType(node.outputs[0].dtype or ir.DataType.FLOAT)
    g.set_attr(node, qk_matmul_output_mode=SOFTMAXED)
    return node.outputs[3]
