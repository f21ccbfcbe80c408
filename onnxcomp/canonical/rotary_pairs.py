"""Matching rotations of channel pairs: two parts of the last axis are rotated and concatenated again.

Pairs are half a width apart (`x[i], x[i + h / 2]`) or adjacent (`x[2 i], x[2 i + 1]`, called interleaved).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.selections import Selection, selections
from onnxcomp.analysis.shape_rules import axis_of
from onnxcomp.analysis.sizes import Shape

__all__ = ["RotationMatch", "channel_selection", "joined", "rotations"]


@dataclass(frozen=True)
class RotationMatch:
    """`out` is `x` rotated by tables `cos` and `sin` as wide as `x` (`full`) or half as wide."""

    node: ir.Node
    x: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    full: bool

    @property
    def out(self) -> ir.Value:
        """The rotated value."""
        return self.node.outputs[0]


@dataclass(frozen=True)
class ChannelSelection:
    """Positions `keep` of the last axis of `x`."""

    x: ir.Value
    keep: tuple[int, ...]


def channel_selection(f: Facts, v: ir.Value | None) -> ChannelSelection | None:
    """`v` as a static selection of the last axis of a value, also where a Reshape divided that axis in two."""
    selection = _selection(f, v)
    if selection is None:
        return None
    z = selection.node.inputs[0]
    shape, out = f.shape(z), f.shape(v)
    if z is None or shape is None or out is None or not isinstance(shape[-1], int):
        return None
    unsplit = _joined_axes(f, z, shape)
    kept, axis = selection.keep, selection.axis
    one = (*shape[:axis], 1, *shape[axis + 1 :])  # a part of an axis that was divided in two, its axis kept or dropped
    if (
        unsplit is not None
        and len(kept) == 1
        and axis >= len(shape) - 2
        and out in (one, shape[:axis] + shape[axis + 1 :])
    ):
        rows, columns = int(shape[-2]), int(shape[-1])  # type: ignore[arg-type]
        if axis == len(shape) - 1:
            return ChannelSelection(unsplit, tuple(range(kept[0], rows * columns, columns)))
        return ChannelSelection(unsplit, tuple(range(kept[0] * columns, (kept[0] + 1) * columns)))
    if axis == len(shape) - 1 and len(kept) == out[-1] and out[:-1] == shape[:-1]:
        return ChannelSelection(z, kept)
    return None


def _selection(f: Facts, v: ir.Value | None) -> Selection | None:
    """The static selection that produces a value, possibly with the axis squeezed."""
    node = v.producer() if v is not None else None
    if node is None or node.domain or v is None:
        return None
    if node.op_type in ("Squeeze", "Reshape"):
        inner, a, b = node.inputs[0], f.shape(node.inputs[0]), f.shape(v)
        inner_producer = inner.producer() if inner is not None else None
        if a is None or b is None or inner_producer is None or inner_producer.op_type in ("Squeeze", "Reshape"):
            return None
        inner_selection = _selection(f, inner)
        return (
            inner_selection
            if inner_selection is not None and (*a[: inner_selection.axis], *a[inner_selection.axis + 1 :]) == b
            else None
        )
    return next((s for s in selections(f, node) or () if s.out is v), None)


def _joined_axes(f: Facts, z: ir.Value, shape: Shape) -> ir.Value | None:
    """The value whose last axis a Reshape divided into the last two of `z`."""
    node = z.producer()
    if node is None or node.op_type != "Reshape" or node.domain or not all(isinstance(d, int) for d in shape[-2:]):
        return None
    before = f.shape(node.inputs[0])
    product = int(shape[-2]) * int(shape[-1])  # type: ignore[arg-type]
    same = before is not None and f.equal.match(before, (*shape[:-2], product))
    return node.inputs[0] if same else None


def joined(f: Facts, v: ir.Value | None) -> tuple[ir.Value, ir.Value, bool] | None:
    """`a`, `b` and whether they are interleaved, where `v` consists of two equally wide parts along its last axis."""
    node = v.producer() if v is not None else None
    rank = f.rank(v)
    if node is None or rank is None or node.domain or node.inputs[0] is None:
        return None
    if node.op_type == "Concat":
        a, b = node.inputs[0], node.inputs[-1]
        if len(node.inputs) != 2 or axis_of(node, rank) != rank - 1 or a is None or b is None:
            return None
        return (a, b, False) if f.shape(a) == f.shape(b) else None
    return _joined_by_stack(f, node) if node.op_type == "Reshape" else None


def _joined_by_stack(f: Facts, node: ir.Node) -> tuple[ir.Value, ir.Value, bool] | None:
    """Two values stacked along a new axis next to the last one, then merged with it."""
    stack, out = node.inputs[0], f.shape(node.outputs[0])
    concat, shape = stack.producer() if stack is not None else None, f.shape(stack)
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2 or shape is None or out is None:
        return None
    axis = axis_of(concat, len(shape))
    if axis < len(shape) - 2 or shape[axis] != 2 or len(out) != len(shape) - 1 or shape[:-2] != out[:-1]:
        return None
    parts = [_before_unsqueeze(f, x, axis) for x in concat.inputs]
    if parts[0] is None or parts[1] is None:
        return None
    return parts[0], parts[1], axis == len(shape) - 1


def _before_unsqueeze(f: Facts, v: ir.Value | None, axis: int) -> ir.Value | None:
    """The value before an axis of size 1 was added, or a part that kept it."""
    node, shape = v.producer() if v is not None else None, f.shape(v)
    if node is None or shape is None or shape[axis] != 1:
        return None
    if node.op_type not in ("Unsqueeze", "Reshape"):
        return v if channel_selection(f, v) is not None else None
    return node.inputs[0] if f.shape(node.inputs[0]) == (*shape[:axis], *shape[axis + 1 :]) else None


# ---- rotations ---------------------------------------------------------------------------------------------------


def rotations(f: Facts, node: ir.Node) -> Iterator[RotationMatch]:
    """Possible matches of a rotation that ends at a node."""
    if node.domain:
        return
    if node.op_type == "Add":
        for x, rotated, cos, sin in _products(node):
            interleaved = _is_rotated_half(f, rotated, x)
            if interleaved is not None:
                yield RotationMatch(node, x, cos, sin, interleaved, True)
    elif node.op_type in ("Concat", "Reshape"):
        parts = joined(f, node.outputs[0])
        match = _cross_products(f, *parts[:2]) if parts is not None else None
        if parts is not None and match is not None and parts[2] in match[3]:
            yield RotationMatch(node, match[0], match[1], match[2], parts[2], False)


def _products(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value, ir.Value, ir.Value]]:
    """Possible matches of `Add(Mul, Mul)` as `x * cos + rotated * sin`: `x, rotated, cos, sin`."""
    muls = [v.producer() for v in node.inputs if v is not None]
    pairs = [m.inputs for m in muls if m is not None and m.op_type == "Mul" and m.domain == ""]
    if len(pairs) != 2:
        return
    for first, second in ((pairs[0], pairs[1]), (pairs[1], pairs[0])):
        for i in (0, 1):
            for j in (0, 1):
                x, cos, rotated, sin = first[i], first[1 - i], second[j], second[1 - j]
                if x is not None and cos is not None and rotated is not None and sin is not None:
                    yield x, rotated, cos, sin


def _is_rotated_half(f: Facts, v: ir.Value, x: ir.Value) -> bool | None:
    """Whether pairs are interleaved, where `v` concatenates `-x2` and `x1`; None where it does not."""
    parts = joined(f, v)
    if parts is None:
        return None
    a, b, interleaved = parts
    pair = _parts(f, _negated(f, a), b)
    return interleaved if pair is not None and pair[0] is x and interleaved in pair[1] else None


def _negated(f: Facts, v: ir.Value | None) -> ir.Value | None:
    """`x` where `v` is `-x`."""
    node = v.producer() if v is not None else None
    if node is None or node.domain:
        return None
    if node.op_type == "Neg":
        return node.inputs[0]
    if node.op_type == "Mul":
        return next((node.inputs[1 - i] for i in (0, 1) if f.scalar(node.inputs[i]) == -1), None)
    return None


def _parts(f: Facts, second: ir.Value | None, first: ir.Value | None) -> tuple[ir.Value, list[bool]] | None:
    """The value whose first and second part two values are, and in which styles (interleaved or not) they can be."""
    a, b = channel_selection(f, first), channel_selection(f, second)
    if a is None or b is None or a.x is not b.x:
        return None
    width = (f.shape(a.x) or (0,))[-1]
    if not isinstance(width, int) or width % 2:
        return None
    half, styles = width // 2, []
    if (a.keep, b.keep) == (tuple(range(half)), tuple(range(half, width))):
        styles.append(False)
    if (a.keep, b.keep) == (tuple(range(0, width, 2)), tuple(range(1, width, 2))):
        styles.append(True)
    return (a.x, styles) if styles else None


def _cross_products(f: Facts, a: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, list[bool]] | None:
    """`x`, `cos`, `sin` and the styles where `a` is `x1 cos - x2 sin` and `b` is `x2 cos + x1 sin`."""
    minus, plus = a.producer(), b.producer()
    if minus is None or plus is None or minus.op_type != "Sub" or plus.op_type != "Add":
        return None
    for x1, x2, cos, sin in _products(minus):
        for y2, y1, c, s in _products(plus):
            if (y1, y2, c, s) == (x1, x2, cos, sin):
                pair = _parts(f, x2, x1)
                if pair is not None:
                    return pair[0], cos, sin, pair[1]
    return None
