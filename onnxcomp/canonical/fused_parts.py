"""Building blocks for decomposing ONNX Runtime's fused attentions: operands, explicit masks, the standard operator.

Where a mask hides a key, the runtime adds `mask_filter_value`. A fill so low that it acts as -inf becomes a bool mask,
so rows without visible keys are undefined (with `exact_rows` these operators are declined).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Shape, Size, multiply
from onnxcomp.canonical.masks import MASKED_BELOW
from onnxcomp.graph import Graph

__all__ = [
    "Mask",
    "NotDecomposed",
    "Parts",
    "attend",
    "dtype_of",
    "index_range",
    "ints",
    "is_read",
    "length",
    "masked",
    "optional_input",
    "present",
    "refuse_inputs",
    "require_unread",
    "shape_of",
    "split_axis",
    "static_size",
]


class NotDecomposed(Exception):
    """The reason why a fused operator stays; caught where the site is declined."""


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """An optional input."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_read(node: ir.Node, index: int) -> bool:
    v = node.outputs[index] if index < len(node.outputs) else None
    return v is not None and (bool(list(v.uses())) or v.is_graph_output())


def require_unread(node: ir.Node, *indices: int) -> None:
    """Raise `NotDecomposed` where one of these outputs is used."""
    for i in indices:
        if is_read(node, i):
            raise NotDecomposed(f"its output {i} is used, which the standard operator does not have")


def refuse_inputs(node: ir.Node, **inputs: int) -> None:
    """Raise `NotDecomposed` where one of these inputs, given by name and index, is present."""
    for name, i in inputs.items():
        if optional_input(node, i) is not None:
            raise NotDecomposed(f"it has {name.replace('_', ' ')}")


@dataclass(frozen=True)
class Parts:
    """Queries, keys and values `[b, s, n * h]` of one attention, past ones `[b, n, p, h]`, and head counts."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    heads: int
    groups: int
    width: int
    past: tuple[ir.Value, ir.Value] | None = None


def ints(*xs: int) -> np.ndarray:
    return np.array(xs, np.int64)


def length(g: Graph, x: ir.Value, axis: int) -> ir.Value:
    """The size of an axis as an int64 scalar."""
    return g.op("Squeeze", g.op("Shape", x, start=axis, end=axis + 1), ints(0))


def index_range(g: Graph, length: ir.Value) -> ir.Value:
    return g.op("Range", np.array(0, np.int64), length, np.array(1, np.int64))


def split_axis(g: Graph, x: ir.Value, axis: int, sizes: list[int]) -> tuple[ir.Value, ...]:
    """Consecutive parts of one axis."""
    first = g.op("Split", x, np.array(sizes, np.int64), axis=axis, outputs=len(sizes))
    producer = first.producer()
    assert producer is not None
    for part in producer.outputs:
        part.type = x.type
    return tuple(producer.outputs)


def shape_of(f: Facts, v: ir.Value | None, rank: int, what: str) -> Shape:
    shape = f.shape(v)
    if shape is None or len(shape) != rank:
        raise NotDecomposed(f"the shape of {what} is not known to have {rank} axes")
    return shape


def static_size(size: Size, what: str) -> int:
    if not isinstance(size, int) or size <= 0:
        raise NotDecomposed(f"{what} is not static")
    return size


# ---- masks ---------------------------------------------------------------------------------------------------------


@dataclass
class Mask:
    """The mask of a fused attention: its mask input, a causal or sliding window, and a float bias."""

    g: Graph
    f: Facts
    node: ir.Node
    dtype: ir.DataType

    def kind(self, mask: ir.Value | None, batch: Size) -> str:
        """Form of the mask input: lengths, spans (ends, then starts), keys, rows; raises `NotDecomposed` if unknown."""
        shape = self.f.shape(mask)
        if mask is None:
            return ""
        if shape is None or len(shape) not in (1, 2, 3):
            raise NotDecomposed("the rank of its mask is unknown" if shape is None else "its mask has 4 axes")
        if len(shape) > 1:
            return "keys" if len(shape) == 2 else "rows"
        if self.f.same(shape[0], batch):
            return "lengths"
        if self.node.op_type == "Attention" and self.f.same(shape[0], multiply(2, batch)):
            return "spans"
        raise NotDecomposed("its mask may or may not hold lengths")

    def padding(self, mask: ir.Value, kind: str, total: ir.Value) -> ir.Value:
        """True where a key may be seen: `[b, 1, 1 or s, t]`."""
        g = self.g
        if kind in ("keys", "rows"):
            visible = g.op("Greater", mask, np.array(0, (mask.dtype or ir.DataType.INT32).numpy()))
            return g.op("Unsqueeze", visible, ints(1, 2) if kind == "keys" else ints(1))
        positions = index_range(g, total)
        if kind == "lengths":
            return g.op("Less", positions, self._column(mask))
        ends, starts = (g.op("Gather", g.op("Reshape", mask, ints(2, -1)), np.array(i, np.int64)) for i in (0, 1))
        inside = g.op("GreaterOrEqual", positions, self._column(starts))
        return g.op("And", g.op("Less", positions, self._column(ends)), inside)

    def _column(self, row: ir.Value) -> ir.Value:
        """A number per sample as `[b, 1, 1, 1]`."""
        return self.g.op("Unsqueeze", self.g.op("Cast", row, to=ir.DataType.INT64), ints(1, 2, 3))

    def causal(self, q: ir.Value, total: ir.Value, past: ir.Value | None, window: int = 0) -> ir.Value:
        """True where key `t` is at or before query `s`, which is at position `past + s`: `[s, t]`."""
        g = self.g
        queries = index_range(g, length(g, q, 1))
        keys = index_range(g, total)
        rows = g.op("Unsqueeze", queries if past is None else g.op("Add", queries, past), ints(1))
        columns = g.op("Unsqueeze", keys, ints(0))
        visible = g.op("LessOrEqual", columns, rows)
        if window <= 0:
            return visible
        return g.op("And", visible, g.op("Greater", columns, g.op("Sub", rows, np.array(window, np.int64))))

    def rows(self, visible: ir.Value, parts: Parts, total: ir.Value) -> ir.Value:
        """The mask `[b, 1, 1, t]`, expanded to a row per query."""
        g = self.g
        end = g.op("Unsqueeze", total, ints(0))
        return g.op("Expand", visible, g.op("Concat", ints(1, 1), g.op("Shape", parts.q, start=1, end=2), end, axis=0))

    def joined(self, bools: list[ir.Value], bias: ir.Value | None, fill: float) -> ir.Value | None:
        """One mask of all: bool, or float where there is a bias."""
        visible: ir.Value | None = None
        for b in bools:
            visible = b if visible is None else self.g.op("And", visible, b)
        if visible is None or bias is None:
            return bias if visible is None else visible
        number = self.dtype.numpy()
        return self.g.op("Where", visible, bias, np.array(fill, number))


def _soft(g: Graph, mask: Mask, visible: ir.Value, bias: ir.Value | None, fill: float) -> ir.Value:
    """A mask whose fill is too high to hide keys, as a float bias."""
    number = mask.dtype.numpy()
    added = g.op("Where", visible, np.array(0, number), np.array(fill, number))
    return added if bias is None else g.op("Add", added, bias)


def dtype_of(node: ir.Node) -> ir.DataType:
    x = node.inputs[0]
    return node.outputs[0].dtype or (x.dtype if x is not None else None) or ir.DataType.FLOAT


def attend(g: Graph, f: Facts, node: ir.Node, parts: Parts, mask: ir.Value | None, **attrs: Any) -> list[ir.Value]:
    """The standard operator, and the present keys and values where they are read."""
    scale = node.attributes.get_float("scale", 0.0) or parts.width**-0.5
    past = parts.past or ()
    y = g.op(
        "Attention",
        *(parts.q, parts.k, parts.v, mask, *past),
        outputs=3 if past else 1,
        like=node.outputs[0],
        q_num_heads=parts.heads,
        kv_num_heads=parts.groups,
        scale=scale,
        **attrs,
    )
    producer = y.producer()
    assert producer is not None
    for present in producer.outputs[1:]:
        present.type = ir.TensorType(dtype_of(node))
    return list(producer.outputs)


def present(g: Graph, parts: Parts, outputs: list[ir.Value]) -> list[ir.Value]:
    """Keys and values `[b, n, t, h]`, with the past ones before them."""
    if len(outputs) == 3:
        return outputs[1:]
    split = (g.op("Reshape", x, ints(0, 0, parts.groups, -1)) for x in (parts.k, parts.v))
    return [g.op("Transpose", x, perm=[0, 2, 1, 3]) for x in split]


def masked(mask: Mask, parts: Parts, given_mask: ir.Value | None, kind: str, bias: ir.Value | None) -> ir.Value | None:
    """The complete mask of an Attention or MultiHeadAttention."""
    g, node = mask.g, mask.node
    fill = node.attributes.get_float("mask_filter_value", -10000.0)
    past = length(g, parts.past[0], 2) if parts.past else None
    new = length(g, parts.k, 1)
    total = new if past is None else g.op("Add", new, past)
    bools = [mask.causal(parts.q, total, past)] if node.attributes.get_int("unidirectional", 0) else []
    if given_mask is not None:
        visible = mask.padding(given_mask, kind, total)
        if fill > MASKED_BELOW:
            bias = _soft(g, mask, visible, bias, fill)
        else:
            bools.append(visible if past is None or bools else mask.rows(visible, parts, total))
    return mask.joined(bools, bias, -np.inf)
