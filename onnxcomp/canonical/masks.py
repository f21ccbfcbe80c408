"""Attention masks: bool (True = attend) where the fill is -inf or acts like it; other float masks stay float."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.bounds import MAX_FLOATS
from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.shape_rules import axes_of
from onnxcomp.analysis.sizes import Size, add
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import MASK_LAYOUT_OPS
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Array

__all__ = ["MASKED_BELOW", "Masks"]

MASKED_BELOW = -9e3  # exporters hide keys by adding -1e4, -1e9, the lowest finite number or -inf; all lie below this
HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FLOAT_TYPES = (*HALF_TYPES, ir.DataType.FLOAT, ir.DataType.DOUBLE)
MAX_TABLE = 1 << 22  # elements of a constant of zeros and ones that is read as a mask: 2048 x 2048 positions


@dataclass
class Masks:
    """Masks of one graph; equal requests return one shared value."""

    g: Graph
    f: Facts
    _bools: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _uncast: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _cache: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def state(self) -> Masks:
        """A snapshot of the caches."""
        return Masks(self.g, self.f, dict(self._bools), dict(self._uncast), dict(self._cache))

    def restore(self, state: Masks) -> None:
        """Return to a snapshot, after the nodes added since were removed."""
        self._bools, self._uncast, self._cache = state._bools, state._uncast, state._cache

    def allows_all(self, v: ir.Value) -> bool:
        """Whether a mask provably hides no key."""
        bounds = self.f.uniform(v)
        if bounds is None or bounds.value is None:
            return False
        return bounds.value == (1.0 if self.is_bool(v) else 0.0)

    def trimmed(self, v: ir.Value) -> ir.Value:
        """A float mask without addends that are equal for all keys: softmax is invariant to them."""
        node = v.producer()
        if node is None or node.op_type != "Add" or node.domain or self.g.is_constant(v):
            return v
        for x, added in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            bounds = self.f.uniform(added)
            if x is not None and bounds is not None and bounds.value is not None and bounds.value > MASKED_BELOW:
                return self.trimmed(x)
        return v

    def is_bool(self, v: ir.Value) -> bool:
        """Whether a mask is bool, by its type or its producer."""
        if v.dtype is not None:
            return v.dtype == ir.DataType.BOOL
        node = v.producer()
        if node is None:
            return False
        if node.op_type in MASK_LAYOUT_OPS and node.inputs[0] is not None:
            return self.is_bool(node.inputs[0])
        return node.op_type in {"And", "Or", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Xor"}

    def fill(self, v: ir.Value | None) -> float | None:
        """The number that every element of `v` equals, where adding it hides a key."""
        bounds = self.f.uniform(v)
        return (
            bounds.value if bounds is not None and bounds.value is not None and bounds.value <= MASKED_BELOW else None
        )

    def as_bool(self, v: ir.Value) -> ir.Value | None:
        """The bool mask that a float mask is equivalent to, or None where it is a bias."""
        if self.is_bool(v):
            return v
        if v not in self._bools:
            self._bools[v] = self._as_bool(v)
        return self._bools[v]

    def _as_bool(self, v: ir.Value) -> ir.Value | None:
        node, values = v.producer(), self._small_float_constant(v)
        if values is not None:
            return (
                self.g.constant(values == 0, str(v.name)) if np.all((values == 0) | (values <= MASKED_BELOW)) else None
            )
        if node is None or node.domain:
            return None
        if node.op_type == "Where":
            return self._of_where(node)
        if node.op_type == "Mul":
            return self._of_product(node)
        if node.op_type == "Cast" and (narrow := node.inputs[0]) is not None and narrow.dtype in FLOAT_TYPES:
            return self.as_bool(narrow)  # 0 stays 0, and a number that hides keys does so in every type
        if node.op_type in MASK_LAYOUT_OPS and node.inputs[0] is not None:
            inner = self.as_bool(node.inputs[0])
            if inner is None:
                return None
            attrs = {k: a.value for k, a in node.attributes.items()}
            return self.g.op(node.op_type, inner, *node.inputs[1:], **attrs)
        if node.op_type == "Add" and node.inputs[0] is not None and node.inputs[1] is not None:
            x, y = sorted((node.inputs[0], node.inputs[1]), key=lambda v: not self.g.is_constant(v))
            a = self.as_bool(x)
            b = self.as_bool(y) if a is not None else None
            return self.both(a, b) if a is not None and b is not None else None
        return None

    def _of_where(self, node: ir.Node) -> ir.Value | None:
        condition, x, y = node.inputs[:3]
        for allowed, blocked, positive in ((x, y, True), (y, x, False)):
            bounds, fill = self.f.uniform(allowed), self.fill(blocked)
            if condition is not None and bounds is not None and bounds.value == 0.0 and fill is not None:
                return condition if positive else self.negated(condition)
        return None

    def subtracted(self, v: ir.Value | None) -> ir.Value | None:
        """The bool mask that subtracting a float mask `10000 * (1 - allowed)` is equivalent to, or None."""
        node = v.producer() if v is not None else None
        return self._of_product(node, -1) if node is not None and node.op_type == "Mul" and not node.domain else None

    def _of_product(self, node: ir.Node, sign: int = 1) -> ir.Value | None:
        """The bool mask of `blocked * fill` or `(1 - allowed) * fill`, where bools were cast to numbers."""
        for x, fill in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            bounds, inner = self.f.uniform(fill), x.producer() if x is not None else None
            fill_value = bounds.value if bounds is not None else None
            if fill_value is None or sign * fill_value > MASKED_BELOW or inner is None or not np.isfinite(fill_value):
                continue
            if inner.op_type == "Sub" and self.f.scalar(inner.inputs[0]) == 1.0:
                return self.uncast(inner.inputs[1])
            blocked = self.uncast(x)
            if blocked is not None:
                return self.negated(blocked)
        return None

    def uncast(self, v: ir.Value | None) -> ir.Value | None:
        """The bool value behind Casts to numbers, or a constant of zeros and ones as bool.

        0 and 1 are exact in every type.
        """
        if v is not None and v not in self._uncast:
            self._uncast[v] = self._of_numbers(v)
        return None if v is None else self._uncast[v]

    def _of_numbers(self, v: ir.Value) -> ir.Value | None:
        node, t = v.producer(), self.g.tensor(v)
        if t is not None:
            if len(t.shape) < 2 or t.size > MAX_TABLE or t.dtype == ir.DataType.STRING:
                return None
            table = t.numpy()
            fits = bool(np.all((table == 0) | (table == 1)))
            return self.g.constant(np.asarray(table != 0), str(v.name)) if fits else None
        x = node.inputs[0] if node is not None and node.inputs and not node.domain else None
        if node is None or x is None or node.op_type not in ("Cast", *MASK_LAYOUT_OPS):
            return None
        if node.op_type == "Cast":
            return x if self.is_bool(x) else self.uncast(x)
        inner = self.uncast(x)
        attrs = {k: a.value for k, a in node.attributes.items()}
        return None if inner is None else self.g.op(node.op_type, inner, *node.inputs[1:], **attrs)

    def empty_rows(self, v: ir.Value | None) -> ir.Value | None:
        """The bool mask whose rows without any key are the True elements of `v`, or None."""
        node = v.producer() if v is not None else None
        if node is None or len(node.inputs) != 2:
            return None
        limit = self.f.uniform(node.inputs[1])
        bound = limit.value if limit is not None else None
        fits = {
            "Less": bound is not None and 0 < bound <= 1,
            "LessOrEqual": bound is not None and 0 <= bound < 1,
            "Equal": bound == 0,
        }
        count = node.inputs[0].producer() if fits.get(node.op_type) and node.inputs[0] is not None else None
        while count is not None and count.op_type == "Cast" and count.inputs[0] is not None:
            count = count.inputs[0].producer()  # no type rounds a count of 1 or more to 0
        rank = self.f.rank(count.inputs[0]) if count is not None else None
        if count is None or rank is None or count.op_type not in ("ReduceSum", "ReduceMax"):
            return None
        axes = axes_of(self.f, count)
        last = axes is not None and [a % rank for a in axes] == [rank - 1]
        return self.uncast(count.inputs[0]) if last and count.attributes.get_int("keepdims", 1) == 1 else None

    def guarded(self, out: ir.Value, mask: ir.Value | None) -> ir.Value | None:
        """`Where(no key, 0, out)` when it repeats what `mask` does to queries whose mask hides every key."""
        users = users_of(out)
        where = users[0] if len(users) == 1 and not out.is_graph_output() else None
        if where is None or where.op_type != "Where" or where.inputs[2] is not out:
            return None
        zero, rows = self.f.uniform(where.inputs[1]), self.empty_rows(where.inputs[0])
        if rows is None or zero is None or zero.value != 0.0:
            return None
        repeats = mask is not None and (rows is mask or self._is_above_fill(rows, mask))
        return where.outputs[0] if repeats or self.allows_all(rows) else None

    def _is_above_fill(self, rows: ir.Value, mask: ir.Value) -> bool:
        """Whether `rows` is `mask > fill`, the keys that a float mask allows."""
        node = rows.producer()
        operand_order = {"Greater": (0, 1), "Less": (1, 0)}
        if node is None or node.domain or node.op_type not in operand_order:
            return False
        high, low = (node.inputs[i] for i in operand_order[node.op_type])
        if high is None or self.fill(low) is None:
            return False
        high = widened(high)
        return self.trimmed(high) is self.trimmed(widened(mask)) or (self.is_bool(mask) and self.as_bool(high) is mask)

    def _small_float_constant(self, v: ir.Value) -> Array | None:
        """The array of a small float constant, or None."""
        t = self.g.tensor(v)
        return None if t is None or t.size > MAX_FLOATS or not t.dtype.is_floating_point() else t.numpy()

    def is_finite(self, v: ir.Value) -> bool:
        """Whether a mask hides keys by a finite number (rows without visible keys are then a mean, not NaN or 0)."""
        values = self._small_float_constant(v)
        if self.is_bool(v) or (values is not None and np.all((values > MASKED_BELOW) | (values == -np.inf))):
            return False
        node = v.producer()
        if node is None or node.op_type != "Where":
            bounds = self.f.uniform(v)
            return bounds is None or bounds.value != 0.0
        fills = [self.f.uniform(x) for x in node.inputs[1:]]
        return not any(u is not None and u.value == -np.inf for u in fills)

    def both(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The intersection of two bool masks."""
        if a is b:
            return a
        return self._cached(("And", a, b), lambda: self.g.op("And", a, b))

    def simplified(self, v: ir.Value) -> ir.Value:
        """A bool mask without operands of its And that provably allow everything."""
        node = v.producer()
        if node is None or node.domain or node.op_type != "And" or node.inputs[0] is None or node.inputs[1] is None:
            return v
        a, b = (self.simplified(x) for x in node.inputs if x is not None)
        if self.allows_all(a) or self.allows_all(b):
            return b if self.allows_all(a) else a
        return v if (a, b) == tuple(node.inputs) else self.both(a, b)

    def negated(self, v: ir.Value) -> ir.Value:
        """The negation of a bool mask."""
        node = v.producer()
        if node is not None and node.op_type == "Not" and node.inputs[0] is not None:
            return node.inputs[0]
        return self._cached(("Not", v), lambda: self.g.op("Not", v))

    def _cached(self, key: tuple[object, ...], make: object) -> ir.Value:
        if key not in self._cache:
            self._cache[key] = make()  # type: ignore[operator]
        return self._cache[key]

    def scaled(self, m: ir.Value, factor: float) -> ir.Value:
        """A float bias times a number; a bool mask is unchanged."""
        if factor == 1.0 or self.is_bool(m):
            return m
        number = np.array(factor, (m.dtype or ir.DataType.FLOAT).numpy())
        scaled_mask = self._cached(("scaled", m, factor), lambda: self.g.op("Mul", m, number))
        scaled_mask.type = m.type
        return scaled_mask

    def combined(self, masks: list[ir.Value], dtype: ir.DataType) -> ir.Value | None:
        """One mask for several: bool where all of them are equivalent to bool masks."""
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
            result = (
                added if a is None else self._cached(("Add", a, added), lambda a=a, b=added: self.g.op("Add", a, b))
            )
        return result

    def as_where(self, v: ir.Value) -> ir.Value:
        """A float mask as `Where(allowed, bias, lowest)`; unchanged where it hides no keys."""
        biases, bools = self._parts(v)
        if not biases or not bools:
            return v
        allowed, bias = bools[0], biases[0]
        for b in bools[1:]:
            allowed = self.both(allowed, b)
        for x in biases[1:]:
            bias = self._cached(("Add", bias, x), lambda a=bias, b=x: self.g.op("Add", a, b))
            bias.type = bias.type or x.type
        node = v.producer()
        done = node is not None and node.op_type == "Where" and list(node.inputs[:2]) == [allowed, bias]
        return v if done else self.bias_where_allowed(allowed, bias)

    def bias_where_allowed(self, allowed: ir.Value, bias: ir.Value) -> ir.Value:
        """`Where(allowed, bias, lowest)`: with a finite number even a decomposed attention gives no NaN."""
        dtype = (bias.dtype or ir.DataType.FLOAT).numpy()
        low = np.array(ml_dtypes.finfo(dtype).min, dtype)
        return self._cached(("chosen", allowed, bias), lambda: self.g.op("Where", allowed, bias, low))

    def _parts(self, v: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """The float biases and the bool masks that a float mask consists of."""
        if self.allows_all(v):
            return [], []
        meaning = self.as_bool(v)
        if meaning is not None:
            return [], [meaning]
        node = v.producer()
        if node is None or node.domain:
            return [v], []
        if node.op_type == "Where":
            condition, x, y = node.inputs[:3]
            for bias, fill, positive in ((x, y, True), (y, x, False)):
                if condition is not None and bias is not None and self.fill(fill) is not None:
                    biases, bools = self._parts(bias)
                    return biases, [condition if positive else self.negated(condition), *bools]
        if node.op_type == "Add" and node.inputs[0] is not None and node.inputs[1] is not None:
            (a, b), (c, d) = self._parts(node.inputs[0]), self._parts(node.inputs[1])
            return (a + c, b + d) if b or d else ([v], [])
        return [v], []

    def as_float(self, m: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A mask as a float addend: 0 where a bool one allows, -inf elsewhere."""
        if not self.is_bool(m):
            return m
        zero, low = np.array(0, dtype.numpy()), np.array(-np.inf, dtype.numpy())
        return self._cached(("float", m), lambda: self.g.op("Where", m, zero, low))

    def causal(self, queries: Size, keys: Size, sizes: Sizes, past: Size = 0) -> ir.Value | None:
        """A causal bool mask: `[s, past + s]`, or `[s, t]` without past keys, aligned at the upper left."""
        square = self.f.same(add(past, queries), keys)
        if not sizes.can_compute([queries, past]) or (not square and (past != 0 or not sizes.can_compute([keys]))):
            return None

        def make() -> ir.Value:
            zero, one = np.array(0, np.int64), np.array(1, np.int64)
            positions = self.g.op("Range", zero, sizes.scalar(queries), one)
            count = add(past, queries) if square else keys
            key_positions = positions if past == 0 and square else self.g.op("Range", zero, sizes.scalar(count), one)
            query_positions = positions if past == 0 else self.g.op("Add", positions, sizes.scalar(past))
            row = self.g.op("Unsqueeze", key_positions, np.array([0], np.int64))
            return self.g.op("LessOrEqual", row, self.g.op("Unsqueeze", query_positions, np.array([1], np.int64)))

        return self._cached(("causal", queries, None if square else keys, past), make)

    def with_full_axes(self, m: ir.Value, queries: Size, keys: Size, sizes: Sizes) -> ir.Value | None:
        """The mask with its last two axes expanded, as runtimes require; None where that is not possible."""
        shape, queries, keys = self.f.shape(m), self.f.equal.plain(queries), self.f.equal.plain(keys)
        if shape is None or not 1 <= len(shape) <= 4:
            return None
        padded = (1,) * (2 - len(shape)) + shape
        if self.f.same(padded[-2], queries) and self.f.same(padded[-1], keys) and len(shape) > 1:
            return m
        if not sizes.can_compute([queries, keys]):
            return None
        target = [*(1 for _ in padded[:-2]), queries, keys]
        return self._cached(("fit", m, queries, keys), lambda: self.g.op("Expand", m, sizes.vector(target)))


def widened(v: ir.Value) -> ir.Value:
    """The value before a Cast to a wider float type, which is exact; else `v` itself."""
    node = v.producer()
    if node is None or node.op_type != "Cast" or node.inputs[0] is None or node.inputs[0].dtype is None:
        return v
    narrow, wide = node.inputs[0].dtype, v.dtype or ir.DataType(node.attributes.get_int("to", 0))
    exact = narrow in HALF_TYPES and wide in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return widened(node.inputs[0]) if exact else v
