"""Cosine and sine tables of rotary embeddings, halved: RotaryEmbedding takes one entry a pair, exporters write two."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import reshaped, trace
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.analysis.sizes import Shape
from onnxcomp.canonical.rotary_pairs import joined
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import TABLE_REPEATING

__all__ = ["Tables"]

ELEMENTWISE = ("Cos", "Sin", "Cast", "Identity", "Neg")


@dataclass
class Tables:
    """The tables of one graph; each is halved and brought to three axes once."""

    g: Graph
    f: Facts
    _halves: dict[tuple[ir.Value, bool], ir.Value | None] = field(default_factory=dict)
    _cache: dict[tuple[ir.Value, int, bool, bool], ir.Value] = field(default_factory=dict)

    def table(self, v: ir.Value, heads_axis: int, *, interleaved: bool, full: bool) -> ir.Value | None:
        """The table as `[b or 1, s, h / 2]`; None where a full table is not proved to hold every entry twice."""
        key = (v, heads_axis, interleaved, full)
        if key in self._cache:
            return self._cache[key]
        half = self.half(v, interleaved) if full else v
        rank = self.f.rank(half)
        if half is None or rank is None:
            return None
        if rank == 4:
            half = self.g.op("Squeeze", half, np.array([heads_axis], np.int64))
        elif rank == 2:
            half = self.g.op("Unsqueeze", half, np.array([0], np.int64))
        elif heads_axis == 2:  # [s, 1, h / 2]
            half = self.g.op("Transpose", half, perm=[1, 0, 2])
        self._cache[key] = half
        return half

    def half(self, v: ir.Value | None, interleaved: bool) -> ir.Value | None:
        """One of each two equal entries along the last axis of `v`; None where equality is not proved.

        The equal entries are half a width apart, or adjacent with `interleaved`.
        """
        if v is None:
            return None
        key = (v, interleaved)
        if key not in self._halves:
            self._halves[key] = self._half(v, interleaved)
        return self._halves[key]

    def _half(self, v: ir.Value, interleaved: bool) -> ir.Value | None:
        if self.g.is_constant(v):
            return self._of_constant(v, interleaved)
        node = v.producer()
        rank = self.f.rank(v) or 0
        if node is None or node.domain or node.inputs[0] is None:
            return None
        parts = joined(self.f, v)
        if parts is not None and parts[0] is parts[1]:
            return parts[0] if parts[2] == interleaved else None
        if node.op_type == "Reshape" and (moved := self._of_reshape(v, node, interleaved)) is not None:
            return moved
        index = 0
        if node.op_type in ("Mul", "Div", "Add", "Sub"):
            index = next((i for i in (0, 1) if self.f.scalar(node.inputs[1 - i]) is not None), -1)
        elif node.op_type not in ELEMENTWISE and not self._keeps_last_axis(node, rank):
            return self._of_repeat(v, node, interleaved)
        inner = self.half(node.inputs[index], interleaved) if index >= 0 else None
        if inner is None:
            return None
        inputs = [inner if i == index else x for i, x in enumerate(node.inputs)]
        return self.g.op(node.op_type, *inputs, **{k: a.value for k, a in node.attributes.items()})

    def _of_reshape(self, v: ir.Value, node: ir.Node, interleaved: bool) -> ir.Value | None:
        """The half of a Reshape's input, reshaped; None where it changes the last axis."""
        shape, before = self.f.shape(v), self.f.shape(node.inputs[0])
        if not shape or not before or not isinstance(shape[-1], int) or shape[-1] != before[-1]:
            return None
        inner = self.half(node.inputs[0], interleaved)
        return None if inner is None else reshaped(self.g, self.f, inner, [*shape[:-1], shape[-1] // 2])

    def _of_repeat(self, v: ir.Value, node: ir.Node, interleaved: bool) -> ir.Value | None:
        """The value that a Gather with doubled positions, a Tile, or an Expand between Reshapes repeats."""
        x, shape = node.inputs[0], self.f.shape(v)
        if x is None or shape is None or not isinstance(shape[-1], int) or shape[-1] % 2:
            return None
        half = shape[-1] // 2
        if node.op_type == "Gather":
            expected = np.repeat(np.arange(half), 2) if interleaved else np.tile(np.arange(half), 2)
            indices = self.g.tensor(node.inputs[1])
            matches = (
                indices is not None and indices.size == expected.size and np.array_equal(indices.numpy(), expected)
            )
            return x if matches and (self.f.shape(x) or (0,))[-1] == half else None
        if node.op_type == "Tile":
            repeats = self.f.content(node.inputs[1])
            doubles = repeats is not None and list(repeats) == [*(1 for _ in shape[:-1]), 2]
            return x if doubles and not interleaved else None
        return self._of_expand(v, shape, half, interleaved)

    def _of_expand(self, v: ir.Value, shape: Shape, half: int, interleaved: bool) -> ir.Value | None:
        for t in trace(self.f, v, through=TABLE_REPEATING):
            last = t.origin[-1]
            if len(last) != 2 or last[1 if interleaved else 0] not in t.repeated or len(t.repeated) != 1:
                continue
            kept = last[0 if interleaved else 1]
            remaining = tuple(a for group in t.axes for a in group)
            if kept.size != half or remaining != (*(a for group in t.origin[:-1] for a in group), kept):
                return None
            before = self.f.shape(t.value) or ()
            if before == (*shape[:-1], half):
                return t.value
            at = -1 if interleaved else -2
            if len(before) < 2 or before[at] != 1:
                return None
            narrow = self.g.op("Squeeze", t.value, np.array([at], np.int64))
            return narrow if len(before) == len(shape) + 1 else reshaped(self.g, self.f, narrow, [*shape[:-1], half])
        return None

    def _keeps_last_axis(self, node: ir.Node, rank: int) -> bool:
        """Whether an Unsqueeze, Squeeze, Slice, Gather or Transpose leaves the last axis unchanged."""
        width = self.f.rank(node.inputs[0]) if node.op_type != "Unsqueeze" else rank
        if node.op_type == "Gather":
            return width is not None and axis_of(node, width, 0) < width - 1
        if node.op_type == "Transpose":
            return node.attributes.get_ints("perm", [0])[-1] == rank - 1
        position = {"Unsqueeze": 1, "Squeeze": 1, "Slice": 3}.get(node.op_type)
        if position is None or len(node.inputs) <= position:
            return False
        axes = self.f.content(node.inputs[position])
        if axes is None or width is None or not all(isinstance(a, int) for a in axes.reshape(-1)):
            return False
        return all(a % width != width - 1 for a in axes.reshape(-1))

    def _of_constant(self, v: ir.Value, interleaved: bool) -> ir.Value | None:
        a = self.g.array(v)
        half = a.shape[-1] // 2 if a.ndim else 0
        if not half or a.shape[-1] % 2:
            return None
        first, second = (a[..., ::2], a[..., 1::2]) if interleaved else (a[..., :half], a[..., half:])
        return self.g.constant(np.ascontiguousarray(first), str(v.name)) if np.array_equal(first, second) else None
