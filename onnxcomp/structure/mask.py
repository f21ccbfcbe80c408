"""Masks: bool with True = attend where the fill is -inf or so low that it means the same, else floats as found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.structure.dims import Size
from onnxcomp.structure.shapes import Facts
from onnxcomp.structure.targets import Sizes

__all__ = ["BLOCKED", "Masks"]

BLOCKED = -9e3  # what exporters add to forbid a key: -1e4, -1e9, the lowest finite number, -inf
MOVES = ("Identity", "Unsqueeze", "Squeeze", "Expand", "Reshape", "Slice", "Transpose")


@dataclass
class Masks:
    """Masks of one graph; equal requests give one shared value."""

    g: Graph
    f: Facts
    exact_rows: bool = False
    _bools: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _made: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def allows_all(self, v: ir.Value) -> bool:
        """Whether a mask provably hides nothing."""
        known = self.f.uniform(v)
        if known is None or known.value is None:
            return False
        return known.value == (1.0 if self.is_bool(v) else 0.0)

    def is_bool(self, v: ir.Value) -> bool:
        """Whether a mask is a bool one, by its type or its producer."""
        if v.dtype is not None:
            return v.dtype == ir.DataType.BOOL
        node = v.producer()
        if node is None:
            return False
        if node.op_type in MOVES and node.inputs[0] is not None:
            return self.is_bool(node.inputs[0])
        return node.op_type in {"And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Xor"}

    def fill(self, v: ir.Value | None) -> float | None:
        """The number every element of `v` is, when that forbids a key."""
        known = self.f.uniform(v)
        return known.value if known is not None and known.value is not None and known.value <= BLOCKED else None

    def as_bool(self, v: ir.Value) -> ir.Value | None:
        """The bool mask that an added float mask means, or None where it is a real bias."""
        if self.is_bool(v):
            return v
        if v not in self._bools:
            self._bools[v] = self._as_bool(v)
        return self._bools[v]

    def _as_bool(self, v: ir.Value) -> ir.Value | None:
        node = v.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "Where":
            return self._of_where(node)
        if node.op_type in MOVES and node.inputs[0] is not None:
            inner = self.as_bool(node.inputs[0])
            if inner is None:
                return None
            attrs = {k: a.value for k, a in node.attributes.items()}
            return self.g.op(node.op_type, inner, *node.inputs[1:], **attrs)
        if node.op_type == "Add" and node.inputs[0] is not None and node.inputs[1] is not None:
            a, b = self.as_bool(node.inputs[0]), self.as_bool(node.inputs[1])
            return self.both(a, b) if a is not None and b is not None else None
        return None

    def _of_where(self, node: ir.Node) -> ir.Value | None:
        condition, x, y = node.inputs[:3]
        for allowed, blocked, positive in ((x, y, True), (y, x, False)):
            known, fill = self.f.uniform(allowed), self.fill(blocked)
            if condition is None or known is None or known.value != 0.0 or fill is None:
                continue
            if self.exact_rows and fill != -np.inf:
                return None
            return condition if positive else self.negated(condition)
        return None

    def both(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Keys that both bool masks allow."""
        if a is b:
            return a
        return self._once(("And", a, b), lambda: self.g.op("And", a, b))

    def negated(self, v: ir.Value) -> ir.Value:
        """The opposite of a bool mask."""
        node = v.producer()
        if node is not None and node.op_type == "Not" and node.inputs[0] is not None:
            return node.inputs[0]
        return self._once(("Not", v), lambda: self.g.op("Not", v))

    def _once(self, key: tuple[object, ...], make: object) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()  # type: ignore[operator]
        return self._made[key]

    def combined(self, masks: list[ir.Value], dtype: ir.DataType) -> ir.Value | None:
        """One mask for several; bool where all of them are."""
        kept = [m for m in masks if not self.allows_all(m)]
        bools = [self.as_bool(m) for m in kept]
        result: ir.Value | None = None
        if all(b is not None for b in bools):
            for b in bools:
                result = b if result is None or b is None else self.both(result, b)
            return result
        for m in kept:
            added = self.as_float(m, dtype)
            a = result
            result = added if a is None else self._once(("Add", a, added), lambda a=a, b=added: self.g.op("Add", a, b))
        return result

    def as_float(self, m: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A mask to add to the scores: 0 where a bool one allows, -inf elsewhere."""
        if not self.is_bool(m):
            return m
        zero, low = np.array(0, dtype.numpy()), np.array(-np.inf, dtype.numpy())
        return self._once(("float", m), lambda: self.g.op("Where", m, zero, low))

    def causal(self, queries: Size, keys: Size, sizes: Sizes) -> ir.Value | None:
        """Lower-triangular bool `[s, s]` for a square product; None where it is not square."""
        if not self.f.same(queries, keys) or not sizes.possible([queries]):
            return None

        def make() -> ir.Value:
            zero, one = np.array(0, np.int64), np.array(1, np.int64)
            place = self.g.op("Range", zero, sizes.scalar(queries), one)
            row = self.g.op("Unsqueeze", place, np.array([0], np.int64))
            return self.g.op("LessOrEqual", row, self.g.op("Unsqueeze", place, np.array([1], np.int64)))

        return self._once(("causal", queries), make)

    def fitted(self, m: ir.Value, queries: Size, keys: Size, sizes: Sizes) -> ir.Value | None:
        """The mask with its last two axes written out, as runtimes want them; None where that cannot be done."""
        shape = self.f.shape(m)
        if shape is None or not 1 <= len(shape) <= 4:
            return None
        padded = (1,) * (2 - len(shape)) + shape
        if self.f.same(padded[-2], queries) and self.f.same(padded[-1], keys) and len(shape) > 1:
            return m
        if not sizes.possible([queries, keys]):
            return None
        target = [*(1 for _ in padded[:-2]), queries, keys]
        return self._once(("fit", m, queries, keys), lambda: self.g.op("Expand", m, sizes.vector(target)))
