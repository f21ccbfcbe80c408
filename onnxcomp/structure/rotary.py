"""Rotary position embedding: `x * cos + turned(x) * sin` to RotaryEmbedding on `[b, s, n * h]`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.structure.dims import Shape
from onnxcomp.structure.layout import reshaped, sink
from onnxcomp.structure.rules import axis_of
from onnxcomp.structure.shapes import Facts
from onnxcomp.structure.targets import Sizes

__all__ = ["raise_rotary"]

UNARY = ("Cos", "Sin", "Cast", "Identity", "Neg")
FAR = 2**31 - 1


@dataclass
class Rotary:
    """Recognition of one graph's rotations; tables are halved and widened once."""

    g: Graph
    f: Facts
    sizes: Sizes
    _halves: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _tables: dict[tuple[ir.Value, object], ir.Value] = field(default_factory=dict)

    def raise_all(self) -> None:
        """Rewrite the spelled-out rotations, then bring all to three axes."""
        for node in self.g.nodes("Add"):
            for x, turned, cos, sin in _products(node):
                if self._is_turned(turned, x) and self._rewrite(node, x, cos, sin):
                    break
        for node in self.g.nodes("RotaryEmbedding"):
            if node.domain == "":
                self._widen_tables(node)
                self._sink(node)

    # ---- recognition ---------------------------------------------------------------------------------------------

    def _is_turned(self, v: ir.Value, x: ir.Value) -> bool:
        """Whether `v` is `[-x2, x1]` for the halves of `x` along the last axis."""
        node = v.producer()
        if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
            return False
        negative = node.inputs[0].producer() if node.inputs[0] is not None else None
        if negative is None or negative.op_type != "Neg" or self.f.rank(v) is None:
            return False
        last = axis_of(node, self.f.rank(v) or 1) == (self.f.rank(v) or 1) - 1
        return last and self._half_of(negative.inputs[0], x, 1) and self._half_of(node.inputs[1], x, 0)

    def _half_of(self, v: ir.Value | None, x: ir.Value, which: int) -> bool:
        """Whether `v` is the first (0) or second (1) half of `x` along the last axis."""
        node = v.producer() if v is not None else None
        shape = self.f.shape(x)
        if node is None or shape is None or node.inputs[0] is not x or not isinstance(shape[-1], int):
            return False
        half = shape[-1] // 2
        if node.op_type == "Split" and len(node.outputs) == 2 and self.f.shape(v) == (*shape[:-1], half):
            return node.outputs[which] is v
        if node.op_type != "Slice" or len(node.inputs) < 4:
            return False
        numbers = [self.f.content(i) for i in node.inputs[1:]]
        if any(c is None or c.size != 1 for c in numbers):
            return False
        start, end, axis, *step = (c.reshape(-1)[0] for c in numbers if c is not None)
        if axis not in (-1, len(shape) - 1) or step not in ([], [1]):
            return False
        return (start, end) == (0, half) if which == 0 else start == half and end >= 2 * half

    def _rewrite(self, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> bool:
        out, shape = node.outputs[0], self.f.shape(x)
        if shape is None or len(shape) != 4 or not isinstance(shape[3], int):
            return False
        heads_axis = self._heads_axis(shape, cos)
        tables = [self._table(t, heads_axis) if heads_axis else None for t in (cos, sin)]
        if None in tables:
            self.g.decline(node, "rotary: the cosine and sine tables are not two equal halves over the width")
            return False
        if heads_axis == 1:
            new: ir.Value | None = self.g.op("RotaryEmbedding", x, *tables, like=out)
        else:
            new = self._flat(x, shape, tables, out)
        if new is not None:
            self.g.replace(out, new)
        return new is not None

    def _flat(self, x: ir.Value, shape: Shape, tables: list[ir.Value | None], out: ir.Value) -> ir.Value | None:
        """Rotation of `[b, s, n, h]`, through three axes and back."""
        if not isinstance(shape[2], int) or not isinstance(shape[3], int):
            return None
        flat = reshaped(self.g, self.f, x, [*shape[:2], shape[2] * shape[3]])
        if flat is None:
            return None
        turned = self.g.op("RotaryEmbedding", flat, *tables, num_heads=shape[2])
        return reshaped(self.g, self.f, turned, shape, like=out)

    def _heads_axis(self, shape: Shape, table: ir.Value) -> int | None:
        """Which axis of `x` the table is the same for: 1 for `[b, n, s, h]`, 2 for `[b, s, n, h]`."""
        t = self.f.shape(table)
        if t is None or len(t) > 4 or t[-1] != shape[-1]:
            return None
        t = (1,) * (4 - len(t)) + t
        if t[1] == 1 and self.f.same(t[2], shape[2]):
            return 1
        return 2 if t[2] == 1 and self.f.same(t[1], shape[1]) else None

    # ---- tables --------------------------------------------------------------------------------------------------

    def _table(self, v: ir.Value, heads_axis: int) -> ir.Value | None:
        """The first half of a table as `[b or 1, s, h / 2]`."""
        key = (v, heads_axis)
        if key in self._tables:
            return self._tables[key]
        half = self._halved(v)
        rank = self.f.rank(half)
        if half is None or rank is None:
            return None
        if rank == 4:
            half = self.g.op("Squeeze", half, np.array([heads_axis], np.int64))
        elif rank == 2:
            half = self.g.op("Unsqueeze", half, np.array([0], np.int64))
        elif heads_axis == 2:  # [s, 1, h / 2]
            half = self.g.op("Transpose", half, perm=[1, 0, 2])
        self._tables[key] = half
        return half

    def _halved(self, v: ir.Value | None) -> ir.Value | None:
        """A value proved equal to the first half of `v` along the last axis, both halves being equal."""
        if v is None:
            return None
        if v not in self._halves:
            self._halves[v] = self._halve(v)
        return self._halves[v]

    def _halve(self, v: ir.Value) -> ir.Value | None:
        if self.g.is_constant(v):
            return self._halve_constant(v)
        node = v.producer()
        if node is None or node.domain or node.inputs[0] is None:
            return None
        rank = self.f.rank(v) or 0
        if node.op_type == "Concat":
            same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            return node.inputs[0] if same and axis_of(node, rank) == rank - 1 else None
        index = 0
        if node.op_type in ("Mul", "Div", "Add"):
            index = next((i for i in (0, 1) if self.f.scalar(node.inputs[1 - i]) is not None), -1)
        elif node.op_type not in UNARY and not self._spares_last_axis(node, rank):
            return None
        inner = self._halved(node.inputs[index]) if index >= 0 else None
        if inner is None:
            return None
        inputs = [inner if i == index else x for i, x in enumerate(node.inputs)]
        return self.g.op(node.op_type, *inputs, **{k: a.value for k, a in node.attributes.items()})

    def _spares_last_axis(self, node: ir.Node, rank: int) -> bool:
        """Whether an Unsqueeze, Squeeze, Slice or Gather leaves the last axis alone."""
        if node.op_type == "Gather":
            return axis_of(node, self.f.rank(node.inputs[0]) or 1, 0) < (self.f.rank(node.inputs[0]) or 1) - 1
        position = {"Unsqueeze": 1, "Squeeze": 1, "Slice": 3}.get(node.op_type)
        if position is None or len(node.inputs) <= position:
            return False
        axes = self.f.content(node.inputs[position])
        width = self.f.rank(node.inputs[0]) if node.op_type != "Unsqueeze" else rank
        if axes is None or width is None or not all(isinstance(a, int) for a in axes.reshape(-1)):
            return False
        return all(a % width != width - 1 for a in axes.reshape(-1))

    def _halve_constant(self, v: ir.Value) -> ir.Value | None:
        a = self.g.array(v)
        half = a.shape[-1] // 2 if a.ndim else 0
        if not half or a.shape[-1] % 2 or not np.array_equal(a[..., :half], a[..., half:]):
            return None
        return self.g.constant(np.ascontiguousarray(a[..., :half]), str(v.name))

    # ---- layout --------------------------------------------------------------------------------------------------

    def _widen_tables(self, node: ir.Node) -> None:
        """Give cos and sin the batch of `x`: runtimes do not broadcast it, whatever the exporter wrote."""
        shape = self.f.shape(node.inputs[0])
        if shape is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            return
        for i in (1, 2):
            table, t = node.inputs[i], self.f.shape(node.inputs[i])
            if (
                table is None
                or t is None
                or len(t) != 3
                or t[0] != 1
                or shape[0] == 1
                or not self.sizes.possible(shape[:1])
            ):
                continue
            key = (table, shape[0])
            if key not in self._tables:
                self._tables[key] = self.g.op("Expand", table, self.sizes.vector([shape[0], 1, 1]))
            self.g.set_input(node, i, self._tables[key])

    def _sink(self, node: ir.Node) -> None:
        """Turn a rotation of `[b, n, s, h]` into one of `[b, s, n * h]`, read through Reshape and Transpose."""
        x, out = node.inputs[0], node.outputs[0]
        shape = self.f.shape(x)
        if x is None or shape is None or len(shape) != 4:
            return
        sunk = sink(self.g, self.f, x)
        if sunk is None or not isinstance(shape[3], int):
            self.g.decline(node, "rotary: head count or width is not static")
            return
        attrs = {k: a.value for k, a in node.attributes.items() if a.value != 0} | {"num_heads": sunk.heads}
        new = self.g.op("RotaryEmbedding", sunk.value, *node.inputs[1:], **attrs)
        split = reshaped(self.g, self.f, new, [shape[0], shape[2], sunk.heads, shape[3]])
        if split is not None:
            self.g.replace(out, self.g.op("Transpose", split, perm=[0, 2, 1, 3], like=out))


def _products(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value, ir.Value, ir.Value]]:
    """Readings of `Add(Mul, Mul)` as `x * cos + turned * sin`."""
    muls = [v.producer() for v in node.inputs if v is not None]
    pairs = [m.inputs for m in muls if m is not None and m.op_type == "Mul" and m.domain == ""]
    if len(pairs) != 2:
        return
    for first, second in ((pairs[0], pairs[1]), (pairs[1], pairs[0])):
        for i in (0, 1):
            for j in (0, 1):
                x, cos, turned, sin = first[i], first[1 - i], second[j], second[1 - j]
                if x is not None and cos is not None and turned is not None and sin is not None:
                    yield x, turned, cos, sin


def raise_rotary(g: Graph, f: Facts) -> None:
    """Rewrite every rotary embedding that is recognised."""
    Rotary(g, f, Sizes(g, f)).raise_all()
