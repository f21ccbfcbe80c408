"""Coupling rules of operators that only move elements: transposes, concatenations, slices, gathers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.shape_rules import axes_of, axis_of
from onnxcomp.coupling.reshapes import RESHAPE_RULES
from onnxcomp.coupling.trace import UNKNOWN, Axis, Rule, Tracer, input_and_output

__all__ = ["LAYOUT_RULES"]

END_OF_AXIS = 2**31 - 1  # a Slice end at or above it means the end of the axis


def _transpose(t: Tracer, node: ir.Node) -> None:
    x, y = input_and_output(node)
    rank = t.f.rank(x) or 0
    for to, at in enumerate(node.attributes.get_ints("perm", list(reversed(range(rank))))):
        a, b = t.axis(x, at, node), t.axis(y, to)
        t.same(a, b)
        for role in t.roles.get(b, ()):  # a table read through a Transpose is a weight
            t.role(a, role)


def _squeeze(t: Tracer, node: ir.Node) -> None:
    """Squeeze and Unsqueeze: the axes that both values have, in order."""
    (x, y), axes = input_and_output(node), axes_of(t.f, node)
    if axes is None:
        return
    longer, shorter = (x, y) if node.op_type == "Squeeze" else (y, x)
    rank, short = t.f.rank(longer) or 0, t.f.rank(shorter) or 0
    removed = {a % rank for a in axes} if axes or node.op_type != "Squeeze" else {
        i for i in range(rank) if t.size(longer, i) == 1
    }  # fmt: skip
    kept = [i for i in range(rank) if i not in removed]
    for i, j in zip(kept, range(short), strict=False):
        a, b = (i, j) if longer is x else (j, i)
        t.same(t.axis(x, a, node), t.axis(y, b))


# ---- pieces ------------------------------------------------------------------------------------------------------


def _concat(t: Tracer, node: ir.Node) -> None:
    _pieces(t, node, node.outputs[0], node.inputs, axis_of(node, t.f.rank(node.outputs[0]) or 0, 0))


def _split(t: Tracer, node: ir.Node) -> None:
    x, _ = input_and_output(node)
    axis = axis_of(node, t.f.rank(x) or 0, 0)
    _pieces(t, node, x, node.outputs, axis)
    units = t.at(t.axis(x, axis, node))
    if units is None:
        return
    lengths = node.inputs[1] if len(node.inputs) > 1 else None
    if lengths is not None and not t.g.is_constant(lengths):
        return t.stop(t.axis(x, axis, node), f"the lengths that Split '{node.name}' reads are computed")
    offset = 0
    for i, out in enumerate(node.outputs):
        n = t.size(out, axis) or 0
        t.counts(node, 1, i, units[offset : offset + n])
        offset += n
    return None


def _pieces(t: Tracer, node: ir.Node, joined: ir.Value, parts: Sequence[ir.Value | None], axis: int) -> None:
    """`joined` is the concatenation of the parts along the axis."""
    reader = node if joined in node.inputs else None
    at: int | None = 0
    for v in parts:
        if v is None:
            continue
        n = t.size(v, axis)
        for i in range(t.f.rank(joined) or 0):
            part_axis, joined_axis = t.axis(v, i, node if reader is None else None), t.axis(joined, i, reader)
            if i != axis:
                t.same(part_axis, joined_axis)
            elif n is not None and at is not None and t.size(joined, i) is not None:
                t.mapped(joined_axis, part_axis, np.arange(at, at + n))
        at = at + n if at is not None and n is not None else None


def _slice(t: Tracer, node: ir.Node) -> None:
    """Constant bounds with step one are adapted to the units; an axis that is sliced otherwise stays."""
    x, y = input_and_output(node)
    parts = [t.f.content(v) if v is not None else None for v in node.inputs[1:]]
    starts, stops = (p.reshape(-1) if p is not None else None for p in parts[:2])
    count = next((p.size for p in (starts, stops) if p is not None), 0)
    axes = parts[2].reshape(-1) if len(parts) > 2 and parts[2] is not None else np.arange(count)
    steps = parts[3].reshape(-1) if len(parts) > 3 and parts[3] is not None else np.ones(count, int)
    rank = t.f.rank(x) or 0
    sliced = {int(a) % rank: i for i, a in enumerate(axes)} if rank else {}
    for axis in range(rank):
        if axis not in sliced:
            t.same(t.axis(x, axis, node), t.axis(y, axis))
            continue
        i, n = sliced[axis], t.size(x, axis)
        if n is None or starts is None or stops is None or int(steps[i]) != 1:
            continue
        if isinstance(starts[i], int) and isinstance(stops[i], int):
            _slice_range(t, node, axis, i, (n, starts[i], stops[i]))


def _slice_range(t: Tracer, node: ir.Node, axis: int, i: int, what: tuple[int, int, int]) -> None:
    n, start, end = what
    x, _ = input_and_output(node)
    place = t.axis(x, axis, node)
    t.mapped(place, t.axis(node.outputs[0], axis), range(*slice(start, end).indices(n)))
    units = t.at(place)
    if units is None:
        return
    for index, bound in ((1, start), (2, end)):
        v = node.inputs[index]
        if 0 < bound < END_OF_AXIS:
            if bound > n:
                t.counts(node, index, i, np.concatenate([units, np.full(bound - n, UNKNOWN)]))
            else:
                t.counts(node, index, i, units[:bound])
        elif bound < 0 and bound > -n:
            t.counts(node, index, i, units[bound:], -1)
        if not t.g.is_constant(v):
            t.stop(place, f"the bounds that Slice '{node.name}' reads are computed")


def _gather(t: Tracer, node: ir.Node) -> None:
    """An axis that computed indices select from stays; constant indices on a cut axis are renumbered."""
    data, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert data is not None
    assert indices is not None
    rank, more = t.f.rank(data) or 0, t.f.rank(indices)
    if more is None:
        return
    at = axis_of(node, rank, 0)
    for i in range(rank):
        if i != at:
            to = t.axis(y, i if i < at else i + more - 1)
            t.same(t.axis(data, i, node), to)
            if t.g.is_constant(data):
                t.role(t.axis(data, i, node), "writes")
    place, n = t.axis(data, at, node), t.size(data, at)
    if not t.g.is_constant(indices) or n is None:
        for i in range(more):
            t.same(t.axis(indices, i, node), t.axis(y, at + i))
        return
    picked = t.g.array(indices)
    if more == 1:
        t.same(Axis(indices, 0, node), t.axis(y, at))
        t.mapped(place, t.axis(y, at), picked % n)
    else:
        t.keep(place, np.unique(picked % n))  # positions that are selected one by one stay
    if (units := t.at(place)) is not None:
        t.indices[node, 1] = units


def _gather_elements(t: Tracer, node: ir.Node) -> None:
    """Its axis stays, since positions are selected one by one; the other axes pass through."""
    data, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert data is not None
    assert indices is not None
    rank = t.f.rank(data) or 0
    at = axis_of(node, rank, 0)
    for i in range(rank):
        picked = t.axis(indices, i, node)
        t.same(picked, t.axis(y, i))
        if i != at:
            t.broadcast(t.axis(data, i, node), picked)
    if rank and t.axis(data, at, node) in t.units:
        t.stop(t.axis(data, at, node), f"GatherElements '{node.name}' selects along that axis")


def _gather_nd(t: Tracer, node: ir.Node) -> None:
    """Indices address the leading axes, which stay; the others pass through, behind those of the indices."""
    data, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    _addressed(t, node, data, indices, y, None)
    if data is not None and t.g.is_constant(data):
        for i in range(1, t.f.rank(data) or 0):
            t.role(t.axis(data, i, node), "writes")


def _scatter_nd(t: Tracer, node: ir.Node) -> None:
    """Axes behind those that indices address are those of data, updates and output."""
    y = node.outputs[0]
    _addressed(t, node, node.inputs[0], node.inputs[1], node.inputs[2], node)
    _addressed(t, node, y, node.inputs[1], node.inputs[2], node)


def _addressed(
    t: Tracer,
    node: ir.Node,
    data: ir.Value | None,
    indices: ir.Value | None,
    parts: ir.Value | None,
    at: ir.Node | None,
) -> None:
    """`parts` are `data[indices]`, written by the node, or read by it (`at`)."""
    shape, rank, more = t.f.shape(indices), t.f.rank(data), t.f.rank(indices)
    count = shape[-1] if shape else None
    if data is None or indices is None or parts is None or rank is None or more is None or not isinstance(count, int):
        return
    if node.attributes.get_int("batch_dims", 0):
        return
    for i in range(more - 1):
        t.same(t.axis(indices, i, node), t.axis(parts, i, at))
    reader = node if data in node.inputs else None
    for i in range(count, rank):
        t.same(t.axis(data, i, reader), t.axis(parts, more - 1 + i - count, at))


def _scatter_elements(t: Tracer, node: ir.Node) -> None:
    """Its axis stays, since positions are written one by one; the other axes are those of all its values."""
    y = node.outputs[0]
    rank = t.f.rank(y) or 0
    for i in range(rank):
        for v in node.inputs if i != axis_of(node, rank, 0) else ():
            if v is not None:
                t.same(t.axis(v, i, node), t.axis(y, i))


def _tile(t: Tracer, node: ir.Node) -> None:
    (x, y), repeats = input_and_output(node), t.f.content(node.inputs[1])
    for i in range(t.f.rank(x) or 0):
        n, repeated = t.period(x, i), t.period(y, i)
        if repeats is not None and n is not None and repeated is not None and repeated % n == 0:
            t.mapped(t.axis(x, i, node), t.axis(y, i), np.arange(repeated) % n)


def _pad(t: Tracer, node: ir.Node) -> None:
    """Added positions stay; the others pass through where the padding is constant."""
    (x, y), pads = input_and_output(node), t.f.content(node.inputs[1])
    rank = t.f.rank(x) or 0
    axes = t.f.content(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    padded = [int(a) % rank for a in axes.reshape(-1)] if axes is not None else list(range(rank))
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return
    flat, constant = pads.reshape(-1), node.attributes.get_string("mode", "constant") == "constant"
    for i in range(rank):
        n = t.size(x, i)
        k = padded.index(i) if i in padded else None
        before, after = (0, 0) if k is None else (flat[k], flat[k + len(padded)])
        if before == after == 0:
            t.same(t.axis(x, i, node), t.axis(y, i))
        elif n is not None and isinstance(before, int) and before >= 0 and constant:
            t.mapped(t.axis(y, i), t.axis(x, i, node), np.arange(before, before + n))
            t.keep(t.axis(y, i), np.r_[0:before, before + n : t.size(y, i) or 0])


def _resize(t: Tracer, node: ir.Node) -> None:
    """Axes with scale 1 pass through."""
    x, y = input_and_output(node)
    scales = t.f.content(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    for i in range(t.f.rank(x) or 0) if scales is not None and "axes" not in node.attributes else ():
        if scales is not None and i < scales.size and scales.reshape(-1)[i] == 1:
            t.same(t.axis(x, i, node), t.axis(y, i))


LAYOUT_RULES: dict[tuple[str, str], Rule] = RESHAPE_RULES | {
    ("", "Transpose"): _transpose,
    ("", "Squeeze"): _squeeze,
    ("", "Unsqueeze"): _squeeze,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    ("", "Slice"): _slice,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "GatherND"): _gather_nd,
    ("", "ScatterElements"): _scatter_elements,
    ("", "ScatterND"): _scatter_nd,
    ("", "Tile"): _tile,
    ("", "Pad"): _pad,
    ("", "Resize"): _resize,
}
