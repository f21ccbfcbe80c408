"""Layouts as groups of axes, followed backwards through Transpose, Reshape, Expand and scalar factors; proved stepwise.

A value of shape `[b, s, n * h]` that was reshaped and transposed to `[b, n, s, h]` is `[(b), (s), (n, h)]` in terms of
the axes of the result. An axis of length 1 is an empty group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Shape, Size, product
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OPS

__all__ = ["Axis", "MergedHeads", "Trace", "constant_target", "merge_heads", "reshaped", "start", "target_of", "trace"]

LARGEST = 2**63 - 1  # of an axis in a Reshape target


@dataclass(frozen=True, eq=False)
class Axis:
    """One indivisible axis, compared by identity."""

    size: Size


Axes = tuple[Axis, ...]


@dataclass(frozen=True)
class Trace:
    """An earlier value in terms of a later one: its axes, the later axes that repeat it, and the scalar factor."""

    value: ir.Value
    axes: tuple[Axes, ...]
    origin: tuple[Axes, ...]
    repeated: frozenset[Axis] = frozenset()
    scale: float = 1.0

    def split(self, axis: Axis, parts: Axes) -> Trace:
        """The same trace with one axis divided into several."""

        def cut(groups: tuple[Axes, ...]) -> tuple[Axes, ...]:
            return tuple(tuple(p for a in g for p in (parts if a is axis else (a,))) for g in groups)

        return replace(self, axes=cut(self.axes), origin=cut(self.origin))


def start(f: Facts, v: ir.Value) -> Trace | None:
    """The trace of a value to itself."""
    shape = f.shape(v)
    if shape is None:
        return None
    axes = tuple(() if d == 1 else (Axis(d),) for d in shape)
    return Trace(v, axes, axes)


def trace(f: Facts, v: ir.Value, *, through: Collection[str] = LAYOUT_OPS) -> Iterator[Trace]:
    """Every earlier value with the same elements, nearest first; ends where a step cannot be proved."""
    t = start(f, v)
    while t is not None:
        yield t
        node = t.value.producer()
        if node is None or node.domain or node.op_type not in through or node.inputs[0] is None:
            return
        t = _step_back(f, t, node)


def _step_back(f: Facts, t: Trace, node: ir.Node) -> Trace | None:
    x = node.inputs[0]
    if x is None:
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", list(reversed(range(len(t.axes)))))
        axes = [t.axes[perm.index(i)] for i in range(len(perm))]
        return replace(t, value=x, axes=tuple(axes))
    if node.op_type == "Expand":
        return _unexpand(f, t, x)
    if node.op_type == "Tile":
        return _untile(f, t, node, x)
    if node.op_type in ("Mul", "Div"):
        return _unscale(f, t, node)
    if node.op_type == "Identity":
        return replace(t, value=x)
    shape = f.shape(x)
    return None if shape is None else _regroup(f, t, x, shape)


def _regroup(f: Facts, t: Trace, x: ir.Value, shape: Shape) -> Trace | None:
    """Undo a Reshape: the axes in order, grouped to the given sizes; an axis is divided where the quotient is exact."""
    flat = [a for group in t.axes for a in group]
    groups: list[Axes] = []
    for d in shape:
        group: list[Axis] = []
        remaining: Size | None = d
        while remaining is not None and remaining != 1:
            if not flat:
                return None
            a = flat.pop(0)
            quotient = f.quotient(remaining, a.size)
            if quotient is None:
                inner = f.quotient(a.size, remaining)
                if inner is None:
                    return None
                parts = (Axis(remaining), Axis(inner))
                t = t.split(a, parts)
                groups = [tuple(p for b in g for p in (parts if b is a else (b,))) for g in groups]
                flat.insert(0, parts[1])
                a, quotient = parts[0], 1
            group.append(a)
            remaining = quotient
        groups.append(tuple(group))
    return None if flat else replace(t, value=x, axes=tuple(groups))


def _unexpand(f: Facts, t: Trace, x: ir.Value) -> Trace | None:
    shape = f.shape(x)
    if shape is None or len(shape) > len(t.axes):
        return None
    added = len(t.axes) - len(shape)
    axes = list(t.axes[added:])
    repeated = [a for group in t.axes[:added] for a in group]
    for i, d in enumerate(shape):
        if d == 1:
            repeated += axes[i]
            axes[i] = ()
        elif not f.same(d, product(a.size for a in axes[i])):
            return None
    return replace(t, value=x, axes=tuple(axes), repeated=t.repeated | set(repeated))


def _untile(f: Facts, t: Trace, node: ir.Node, x: ir.Value) -> Trace | None:
    """A Tile that only repeats axes of size 1 is an Expand."""
    shape, repeats = f.shape(x), f.content(node.inputs[1])
    if shape is None or repeats is None or repeats.size != len(shape):
        return None
    return _unexpand(f, t, x) if all(d == 1 or n == 1 for d, n in zip(shape, repeats, strict=True)) else None


def _unscale(f: Facts, t: Trace, node: ir.Node) -> Trace | None:
    a, b = node.inputs[0], node.inputs[1]
    x, number = (a, f.scalar(b)) if f.scalar(b) is not None else (b, f.scalar(a))
    if x is None or number is None or (node.op_type == "Div" and (x is b or number == 0)) or f.rank(x) != len(t.axes):
        return None
    return replace(t, value=x, scale=t.scale * number if node.op_type == "Mul" else t.scale / number)


# ---- adding nodes ----------------------------------------------------------------------------------------------------


def reshaped(g: Graph, f: Facts, x: ir.Value, sizes: Sequence[Size], like: ir.Value | None = None) -> ir.Value | None:
    """`x` in another shape, by a constant target with zeros and one -1; None where two sizes are unknown."""
    target = constant_target(f, x, sizes)
    return None if target is None else g.op("Reshape", x, np.array(target, np.int64), like=like)


def constant_target(f: Facts, x: ir.Value, sizes: Sequence[Size]) -> list[int] | None:
    """A constant Reshape target for a value, or None."""
    return target_of(f, f.shape(x) or (), sizes)


def target_of(f: Facts, shape: Shape, sizes: Sequence[Size]) -> list[int] | None:
    """A constant Reshape target for an input of a shape, or None where two sizes are unknown."""
    target = []
    for i, d in enumerate(sizes):
        if isinstance(d, int):
            target.append(d)
        else:
            target.append(0 if i < len(shape) and f.same(shape[i], d) else -1)
    fits = all(d <= LARGEST for d in target)
    return target if fits and target.count(-1) <= 1 and 0 not in sizes else None


@dataclass(frozen=True)
class MergedHeads:
    """The `[b, s, n * h]` value behind a `[b, n, s, h]` one that holds `repeat` copies of each of its `heads` heads."""

    value: ir.Value
    heads: int
    repeat: int
    scale: float


def merge_heads(g: Graph, f: Facts, v: ir.Value, *, scaled: bool = False, grouped: bool = False) -> MergedHeads | None:
    """Find or add the 3-D value behind a 4-D one; None where head count or width is not static."""
    shape = f.shape(v)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return None
    through = {*LAYOUT_OPS, *(("Mul", "Div") if scaled else ()), *(("Expand",) if grouped else ())}
    nearest: tuple[int, Trace] | None = None
    for t in trace(f, v, through=through):
        cost = _steps_to_merged(f, t)
        if cost is not None and (nearest is None or cost <= nearest[0]):
            nearest = (cost, t)
    if nearest is None:
        return None
    cost, t = nearest
    head_axes = [a for a in t.origin[1] if a not in t.repeated]
    heads, repeat = product(a.size for a in head_axes), product(a.size for a in t.repeated)
    if not isinstance(heads, int) or not isinstance(repeat, int):
        return None
    value = t.value
    if cost == 2:
        value = g.op("Transpose", value, perm=_merging_perm(t))
    if cost:
        flat = reshaped(g, f, value, [shape[0], shape[2], heads * shape[3]])
        if flat is None:
            return None
        value = flat
    return MergedHeads(value, heads, repeat, t.scale)


def _steps_to_merged(f: Facts, t: Trace) -> int | None:
    """Nodes to add for `[b, s, n * h]`: 0, 1 (Reshape), 2 (Transpose and Reshape); None where these do not suffice."""
    b, n, s, h = t.origin
    head_axes = tuple(a for a in n if a not in t.repeated)
    if any(a not in n for a in t.repeated) or n[: len(head_axes)] != head_axes:
        return None
    if t.axes == (b, s, head_axes + h):
        return 0
    merged_sizes = [product(a.size for a in group) for group in (b, s, head_axes + h)]
    in_order = tuple(a for group in t.axes for a in group) == (*b, *s, *head_axes, *h)
    if in_order and target_of(f, f.shape(t.value) or (), merged_sizes) is not None:
        return 1
    return 2 if len(t.axes) == 4 and _merging_perm(t) is not None else None


def _merging_perm(t: Trace) -> list[int] | None:
    """The permutation to batch, sequence, heads, width; None where these are not one axis each."""
    b, n, s, h = t.origin
    head_axes = tuple(a for a in n if a not in t.repeated)
    order: list[int] = []
    for group in (b, s, head_axes, h):
        places = [i for i, axes in enumerate(t.axes) if axes == group and i not in order]
        if not places:
            return None
        order.append(places[0])
    return order
