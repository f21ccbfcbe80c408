"""Coupling rules of Reshape and Expand, and of the sizes that these read.

An axis may be merged with an outer one of unknown length: the merged axis repeats the units (see `Tracer.period`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.known import Content
from onnxcomp.analysis.sizes import Dim, Size, multiply, product
from onnxcomp.coupling.trace import FROZEN, UNKNOWN, Axis, Repeats, Rule, Tracer, input_and_output
from onnxcomp.graph.values import users_of
from onnxcomp.maths import Array

__all__ = ["RESHAPE_RULES"]

SIZE_PRESERVING = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Where")
SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def _reshape(t: Tracer, node: ir.Node) -> None:
    """Reshape and Flatten: axes are divided into runs of equal product; units pass within each run."""
    x, y = input_and_output(node)
    s, r = t.f.shape(x), t.f.shape(y)
    if s is None or r is None:
        return
    for left_axes, right_axes in _regrouped(t, s, r):
        ins, outs = [t.axis(x, i, node) for i in left_axes], [t.axis(y, i) for i in right_axes]
        _block(t, node, [a for a in ins if _length(t, a) != 1], [a for a in outs if _length(t, a) != 1])
        t.followed(*(a for a in ins + outs if _length(t, a) == 1))
    if node.op_type == "Reshape":
        _targets(t, node, node.inputs[1], 1)


def _regrouped(t: Tracer, s: Sequence[Size], r: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes with equal products, from the front, or from the back where that proves nothing."""
    runs = list(_runs(t, s, r))
    if all(
        t.f.same(product(s[i] for i in left_axes), product(r[j] for j in right_axes)) for left_axes, right_axes in runs
    ):
        return runs
    back = _runs(t, s[::-1], r[::-1])
    return [([len(s) - 1 - i for i in a[::-1]], [len(r) - 1 - j for j in b[::-1]]) for a, b in back]


def _runs(t: Tracer, s: Sequence[Size], r: Sequence[Size]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs with equal products from the front; the last one holds the remaining axes."""
    i = j = 0
    while i < len(s) and j < len(r):
        ins, outs, a, b = [i], [j], s[i], r[j]
        i, j = i + 1, j + 1
        while not t.f.same(a, b):
            grows_right = t.f.quotient(a, b) is not None or not (t.f.quotient(b, a) is not None or i < len(s))
            if (grows_right and j < len(r)) or i >= len(s):
                if j >= len(r):
                    break
                outs.append(j)
                b, j = multiply(b, r[j]), j + 1
            else:
                ins.append(i)
                a, i = multiply(a, s[i]), i + 1
        yield ins, outs
    yield list(range(i, len(s))), list(range(j, len(r)))


def _length(t: Tracer, a: Axis) -> Size:
    return (t.f.shape(a.value) or ())[a.axis]


def _block(t: Tracer, node: ir.Node, ins: list[Axis], outs: list[Axis]) -> None:
    """Pass units between the axes `ins` and `outs` of one run of elements, both in row-major order."""
    if len(ins) == len(outs) == 1:
        t.same(ins[0], outs[0])
        return
    t.followed(*ins, *outs)
    equal = t.f.same(*(product(_length(t, a) for a in axes) for axes in (ins, outs)))
    for source, to in ((ins, outs), (outs, ins)):
        reached = [k for k, a in enumerate(source) if a in t.units]
        if not reached:
            continue
        flat = _flat(t, source, reached[0]) if len(reached) == 1 and equal else None
        if flat is None or not _project(t, flat, source[reached[0]], to):
            for a in ins + outs:
                t.stop(a, f"{node.op_type} '{node.name}' merges it with another axis")
            return


def _flat(t: Tracer, axes: list[Axis], k: int) -> Array | None:
    """One period of the units of axis `k` along the flat run of all axes; None where an inner axis is unknown.

    The flat position of position `p` is `(... + p) * inner + ...`, so units of period `n` repeat every `n * inner`.
    """
    inner = product(_length(t, a) for a in axes[k + 1 :])
    return np.repeat(t.find(t.units[axes[k]]), inner) if isinstance(inner, int) else None


def _project(t: Tracer, flat: Array, source: Axis, to: list[Axis]) -> bool:
    """Assign the units of a flat run to the axis along which they vary; False where there is no such axis.

    Only axes inside of all unknown ones are candidates; together they must span whole periods of the run.
    """
    first = max((k for k, a in enumerate(to) if not isinstance(_length(t, a), int)), default=0)
    sizes = [t.period(a.value, a.axis) or 1 for a in to[first:]]
    if int(np.prod(sizes)) % flat.size or any(a in t.units for a in to[:first]):
        return False
    cube = np.tile(flat, int(np.prod(sizes)) // flat.size).reshape(sizes)
    addressable = [k for k, a in enumerate(to[first:]) if t.period(a.value, a.axis) is not None]
    reached = [k for k in addressable if to[first + k] in t.units]
    candidates = (
        reached or [k for k in addressable if _varies_only(cube, k)] or (addressable[:1] if t.may_split else [])
    )
    if candidates:
        k = candidates[0]
        rows = np.moveaxis(cube, k, 0).reshape(sizes[k], -1)
        t.join(rows.max(axis=1)[:, None], rows)
        t.put(to[first + k], rows.max(axis=1), source)
    return bool(addressable)


def _varies_only(cube: Array, k: int) -> bool:
    """Whether the entries vary along axis `k` only."""
    rows = np.moveaxis(cube, k, 0).reshape(cube.shape[k], -1)
    return bool((rows == rows[:, :1]).all())


def _targets(t: Tracer, node: ir.Node, target: ir.Value | None, index: int) -> None:
    """Entries of a target that count units, for all users of the output and for each user with a copy of its own.

    A computed target gets all known sizes as constants, since they may be computed from a cut axis.
    """
    y = node.outputs[0]
    for reader in (None, *users_of(y)):
        axes = [t.axis(y, i, reader) for i in range(t.f.rank(y) or 0)]
        if not any(a in t.units and a.reader is reader for a in axes):
            continue
        content = t.f.content(target)
        if content is None or target is None:
            for a in axes:
                t.stop(a, f"the sizes that {node.op_type} '{node.name}' reads are computed")
            return
        for i, (entry, a) in enumerate(zip(content.reshape(-1), axes, strict=True)):
            if a in t.units or _overwritten(t, node, index, entry):
                _count_entry(t, a, t.sizes.setdefault((node, index, reader), {}), i, entry)
        t.lengths[node, index] = content.size


def _overwritten(t: Tracer, node: ir.Node, index: int, entry: object) -> bool:
    """Whether a size in a target becomes a constant though its axis is not cut: it may be computed from one that is."""
    if isinstance(entry, Dim):
        return entry.factor > 1 and (node, index) in t.measured
    return isinstance(entry, int) and not t.g.is_constant(node.inputs[index])


def _count_entry(t: Tracer, a: Axis, entries: dict[int, tuple[Array, int, Repeats]], i: int, entry: object) -> None:
    """One size of a target: a count of units, possibly times unknowns that can be read from the graph inputs."""
    units = t.at(a)
    if isinstance(entry, int):
        if entry > 0 and (units is None or entry == len(units)):
            entries[i] = (np.full(entry, UNKNOWN) if units is None else units, 1, ())
    elif isinstance(entry, Dim) and t.f.rooted(entry) and (units is None or t.f.same(entry, _length(t, a))):
        times = tuple((str(v.name), axis) for v, axis in (t.f.roots[n] for n in entry.names))
        entries[i] = (np.full(entry.factor, UNKNOWN) if units is None else units, 1, times)
    else:
        t.stop(a, f"entry {i} of the sizes that make '{a.value.name}' is computed")


def _expand(t: Tracer, node: ir.Node) -> None:
    """Axes that are not repeated pass through; lengths of repeated ones are entries of the target."""
    x, y = input_and_output(node)
    offset = (t.f.rank(y) or 0) - (t.f.rank(x) or 0)
    for i in range(t.f.rank(y) or 0):
        t.followed(t.axis(y, i))
        if i >= offset:
            t.broadcast(t.axis(x, i - offset, node), t.axis(y, i))
    _targets(t, node, node.inputs[1], 1)


def _of_shape(t: Tracer, node: ir.Node) -> None:
    for i in range(t.f.rank(node.outputs[0]) or 0):
        t.followed(t.axis(node.outputs[0], i))
    _targets(t, node, node.inputs[0], 0)


def _shape(t: Tracer, node: ir.Node) -> None:
    """The size of a cut axis may be read where it becomes an entry of a target, which gets its sizes as constants."""
    x, _ = input_and_output(node)
    rank = t.f.rank(x) or 0
    first = node.attributes.get_int("start", 0) % (rank + 1) if rank else 0
    end = node.attributes.get_int("end", rank)
    end = end + rank if end < 0 else min(end, rank)
    for i in range(rank):
        axis = t.axis(x, i, node)
        t.followed(axis)
        units = t.at(axis)
        if units is None or not first <= i < end or not (units > FROZEN).any():
            continue
        if why := _why_size_fixed(t, node.outputs[0], i - first):
            t.stop(axis, why)


def _why_size_fixed(t: Tracer, v: ir.Value, entry: int) -> str:
    """Why the size in one entry of a vector must not change, empty where it may."""
    if v.is_graph_output():
        return f"its size is the model's output '{v.name}'"
    for user, index in v.uses():
        if index == 0 and not _may_pick(t, user, entry):
            continue
        if user.op_type == "Equal" and _negative(t.f.content(user.inputs[1 - index])):
            continue
        if (user.op_type in SIZE_PRESERVING and (index == 0) != (user.op_type == "Where")) or user.op_type == "Concat":
            keeps_positions = user.op_type not in ("Gather", "Concat", "Slice", "Where")
            if why := _why_size_fixed(t, user.outputs[0], entry if keeps_positions else -1):
                return why
        elif SHAPE_INPUT.get(user.op_type) != index:
            return f"{user.op_type} '{user.name}' computes with its size"
        elif why := _why_unmatched(t, user, index):
            return why
    return ""


def _why_unmatched(t: Tracer, node: ir.Node, index: int) -> str:
    """Why a target must not read the size of a cut axis: its result is not cut, so the target gets no new size."""
    t.measured.add((node, index))
    y = node.outputs[0]
    readers = [*(r for r, _ in y.uses()), *([None] if y.is_graph_output() else [])]
    axis_units = ([t.at(t.axis(y, i, r)) for i in range(t.f.rank(y) or 0)] for r in readers)
    is_cut = (any(u is not None and (u > FROZEN).any() for u in units) for units in axis_units)
    return (
        ""
        if all(is_cut) or not t.settled
        else f"{node.op_type} '{node.name}' produces another value of that size, which is not cut"
    )


def _negative(c: Content | None) -> bool:
    """Whether all elements are negative numbers, which no size equals."""
    return c is not None and all(isinstance(x, int) and x < 0 for x in c.reshape(-1))


def _may_pick(t: Tracer, node: ir.Node, entry: int) -> bool:
    """Whether a Gather or Slice of a vector may select an entry (-1: an unknown one)."""
    parts = [t.f.content(v) for v in node.inputs[1:]]
    numbers = [x for p in parts if p is not None for x in p.reshape(-1)]
    if entry < 0 or node.op_type not in ("Gather", "Slice") or not all(isinstance(x, int) for x in numbers):
        return True
    if node.op_type == "Gather":
        return not numbers or any(i == entry or i < 0 for i in numbers)
    n = t.size(node.inputs[0], 0)
    known = n is not None and len(numbers) == len(parts) in (2, 3)
    return not known or entry in range(n or 0)[numbers[0] : numbers[1]]


RESHAPE_RULES: dict[tuple[str, str], Rule] = {
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Expand"): _expand,
    ("", "ConstantOfShape"): _of_shape,
    ("", "Shape"): _shape,
}
