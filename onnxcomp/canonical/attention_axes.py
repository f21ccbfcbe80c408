"""Layouts of heads in attention products: `[b * n, s, h]` and `[b, kv, n / kv, s, h]` are brought to `[b, n, s, h]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import trace
from onnxcomp.analysis.sizes import Shape, Size, divide, multiply
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.graph.values import users_of

__all__ = ["Heads", "NotAttention", "Operands", "heads_of", "regroups"]


class NotAttention(Exception):
    """The reason why a Softmax is no attention; caught where the site is declined."""


@dataclass(frozen=True)
class Operands:
    """Queries, keys, values and masks of one attention, with four axes each."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    masks: list[ir.Value]


@dataclass(frozen=True)
class Heads:
    """How products of `rank` axes hold heads: the number of heads and the batch size of a merged axis.

    `windows` is the axis of five that belongs to the batch, as that of windows of an image or blocks of a text, each
    attended to by itself; `lead` are the batch and that axis where it is the first one.
    """

    rank: int = 4
    heads: int = 0
    batch: Size = 1
    windows: int = 0
    lead: Shape = ()

    def four(self, sizes: Sizes, q: ir.Value, k: ir.Value, v: ir.Value, masks: Sequence[ir.Value]) -> Operands:
        """All operands in four axes; raises `NotAttention` before any node is added where one does not fit."""
        if self.windows == 2:
            if masks:
                raise NotAttention("masks of windows that stand behind the heads")
            q, k, v = (sizes.g.op("Transpose", x, perm=[0, 2, 1, 3, 4]) for x in (q, k, v))
        masks = [self._unfolded(sizes, self._of_windows(sizes, m, q)) for m in masks]
        planned = [(x, self._lead(sizes.f, x)) for x in (q, k, v)]
        planned += [(m, self._mask_lead(sizes.f, m)) for m in masks]
        for x, s in planned:
            if s is not None and not sizes.can_reshape(sizes.f.shape(x) or (), s):
                raise NotAttention("batch, heads and lengths cannot be separated")
        reshaped = [x if s is None else sizes.reshaped(x, s) for x, s in planned]
        return Operands(reshaped[0], reshaped[1], reshaped[2], reshaped[3:])

    def _of_windows(self, sizes: Sizes, m: ir.Value, q: ir.Value) -> ir.Value:
        """A mask `[1, windows, 1, s, t]` repeated for each image, where queries are `[b * windows, heads, s, h]`."""
        f = sizes.f
        s, queries = f.shape(m), f.shape(q)
        if self.rank != 4 or s is None or queries is None or len(s) != 5 or s[0] != 1 or s[2] != 1 or s[1] == 1:
            return m
        images = divide(f.equal.plain(queries[0]), s[1]) if isinstance(s[1], int) else None
        if images is None or not sizes.can_compute((images,)):
            raise NotAttention("the number of windows is not known to divide the batch")
        repeated = sizes.g.op("Expand", m, sizes.vector([images, *s[1:]]))
        return sizes.reshaped(repeated, (queries[0], 1, *s[3:]))

    def _unfolded(self, sizes: Sizes, m: ir.Value) -> ir.Value:
        """A mask `[b * n, s, t]` before its axes of batch and heads were merged, where its operands have both."""
        f, node = sizes.f, m.producer()
        if self.rank != 3 or f.rank(m) != 3 or node is None or node.domain or (f.shape(m) or (1,))[0] == 1:
            return m
        x = node.inputs[0]
        shape = f.shape(x)
        if node.op_type == "Reshape" and x is not None and shape is not None and len(shape) == 4:
            fits = f.same(shape[0], self.batch) and shape[1] == self.heads and regroups(f, x, m)
            return x if fits else m
        if node.op_type not in ("Add", "Mul"):
            return m
        parts = [v if v is None or f.rank(v) != 3 else self._unfolded(sizes, v) for v in node.inputs]
        if any(f.rank(v) == 3 for v in parts):
            return m
        unfolded = sizes.g.op(node.op_type, *parts)
        unfolded.type = m.type
        return unfolded

    def back(self, sizes: Sizes, new: ir.Value, out: ir.Value) -> ir.Value:
        """The result in the layout of `out`, the product that it replaces."""
        shape = sizes.f.shape(out)
        if shape is None or len(shape) == 4:
            new.type, new.shape = out.type, out.shape
            return new
        if self.windows == 2:
            swapped = sizes.reshaped(new, (shape[0], shape[2], shape[1], *shape[3:]))
            return sizes.g.op("Transpose", swapped, perm=[0, 2, 1, 3, 4], like=out)
        if len(shape) == 3 and not sizes.can_reshape(sizes.f.shape(new) or (), shape):
            lengths_first = sizes.g.op("Transpose", new, perm=[2, 0, 1, 3])
            folded = sizes.reshaped(lengths_first, (shape[1], shape[0], shape[2]))
            return sizes.g.op("Transpose", folded, perm=[1, 0, 2], like=out)
        return sizes.reshaped(new, shape, like=out)

    def _lead(self, f: Facts, x: ir.Value) -> Shape | None:
        """The four sizes of a query, key or value; None where it has four axes already."""
        s = f.shape(x) or ()
        if len(s) == 4:
            return None
        if len(s) == 3:
            return (self.batch, self.heads, *s[1:])
        if self.windows:
            return (multiply(s[0], s[1]), *s[2:])
        return (s[0], multiply(s[1], s[2]), *s[3:])

    def _mask_lead(self, f: Facts, m: ir.Value) -> Shape | None:
        s = f.shape(m)
        if s is None or len(s) > 5:
            raise NotAttention("the mask's axes are unknown")
        if len(s) < 2:
            return (1,) * (2 - len(s)) + s
        if len(s) == 5 and self.windows:
            if s[:2] == (1, 1) or (self.lead and all(f.same(d, e) for d, e in zip(s[:2], self.lead, strict=True))):
                return (multiply(s[0], s[1]), *s[2:])
            raise NotAttention("a mask differs between windows")
        if len(s) == 5:
            if 1 in s[1:3] and s[1:3] != (1, 1):
                raise NotAttention("a mask differs between the heads of a group or between groups")
            return (s[0], multiply(s[1], s[2]), *s[3:])
        if len(s) == 3 and self.rank == 3 and s[0] != 1:
            return (self.batch, self.heads, *s[1:])
        return None


def heads_of(f: Facts, q: ir.Value, k: ir.Value, v: ir.Value, scores: ir.Value) -> Heads:
    """How the operands of an attention's two products hold their heads; raises `NotAttention` where they do not fit."""
    shapes = [f.shape(x) for x in (q, k, v)]
    a, b, c = shapes
    if a is None or b is None or c is None or not len(a) == len(b) == len(c) or len(a) not in (3, 4, 5):
        raise NotAttention("queries, keys and values do not all have 3, 4 or 5 axes")
    if not (f.same(a[0], b[0]) and f.same(a[0], c[0])):
        raise NotAttention("queries, keys and values differ in batch size")
    if not isinstance(a[-1], int) or not isinstance(c[-1], int):
        raise NotAttention("head width is not static")
    if len(a) == 3:
        return _heads_from_folded_axis(f, a, (q, k, v, scores))
    n, kv = a[1:-2], b[1:-2]
    blocks = len(n) == 2 and not isinstance(n[0], int) and f.same(n[0], kv[0]) and f.same(n[0], c[1])
    if blocks and isinstance(n[1], int) and n[1] == kv[1] == c[2]:  # blocks of a sequence, as many as it takes
        return Heads(len(a), windows=1, lead=a[:2])
    if not all(isinstance(d, int) for d in (*n, *kv)):
        raise NotAttention("head count is not static")
    are_windows = len(n) == 2 and n == kv == c[1:-2] and kv[1] != 1
    if are_windows and (windows := _windows(f, v)):
        return Heads(len(a), windows=windows, lead=a[:2] if windows == 1 else ())
    if kv != c[1:-2] or (kv[0] not in (1, n[0]) or (len(n) == 2 and kv[1] != 1)):
        raise NotAttention(f"{'x'.join(map(str, n))} query heads meet {'x'.join(map(str, kv))} key heads")
    return Heads(len(a))


def _windows(f: Facts, values: ir.Value) -> int:
    """Which of the axes 1 and 2 of five is no part of the width that a projection made; 0 if unknown."""
    shape = f.shape(values) or ()
    if 1 in shape[1:3]:  # one head
        return 2 if shape[1] == 1 else 1
    for t in trace(f, values):
        last = t.axes[-1]
        inside = [i for i in (1, 2) if t.origin[i] and set(t.origin[i]) <= set(last)]
        if set(t.origin[-1]) <= set(last) and len(inside) == 1:
            return 3 - inside[0]
    return 0


def _heads_from_folded_axis(f: Facts, shape: Shape, values: Sequence[ir.Value]) -> Heads:
    """Batch and heads of an axis that merges both, from the Reshape that merged or separates them."""
    for v in values:
        for t in trace(f, v):
            lead = t.origin[0]
            if len(lead) == 2 and isinstance(lead[1].size, int):
                return Heads(3, lead[1].size, lead[0].size)
    for v in values[-1:]:
        for user in users_of(v):
            out = f.shape(user.outputs[0])
            if user.op_type == "Reshape" and out is not None and len(out) == 4 and isinstance(out[1], int):
                batch = divide(f.equal.plain(shape[0]), out[1])
                if batch is not None and f.same(batch, out[0]):
                    return Heads(3, out[1], batch)
    if isinstance(shape[0], int):
        return Heads(3, shape[0], 1)
    raise NotAttention("batch and heads of the first axis cannot be separated")


def regroups(f: Facts, x: ir.Value, y: ir.Value) -> bool:
    """Whether a Reshape of scores only splits or joins the axes before the last two."""
    a, b = f.shape(x), f.shape(y)
    if a is None or b is None or len(a) < 3 or len(b) < 3:
        return False
    return f.same(a[-1], b[-1]) and f.same(a[-2], b[-2])
