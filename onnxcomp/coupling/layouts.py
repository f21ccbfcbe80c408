"""How units pass through operators that only move elements: reshapes, concatenations, slices, gathers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.coupling.trace import UNKNOWN, Axis, Rule, Tracer, ends
from onnxcomp.maths import Array
from onnxcomp.structure.contents import Content
from onnxcomp.structure.dims import Size, multiply, product
from onnxcomp.structure.rules import axes_of, axis_of

__all__ = ["LAYOUT_RULES"]

OPEN = 2**31 - 1  # a Slice end at or above it means the end of the axis
CARRIES = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")
SIZED = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}


def _transpose(t: Tracer, node: ir.Node) -> None:
    x, y = ends(node)
    rank = t.f.rank(x) or 0
    for to, at in enumerate(node.attributes.get_ints("perm", list(reversed(range(rank))))):
        a, b = t.axis(x, at, node), t.axis(y, to)
        t.same(a, b)
        for role in t.roles.get(b, ()):  # a table read through a Transpose is a weight
            t.role(a, role)


def _squeeze(t: Tracer, node: ir.Node) -> None:
    """Squeeze and Unsqueeze: the axes longer than one, in order."""
    (x, y), axes = ends(node), axes_of(t.f, node)
    if axes is None:
        return
    longer, shorter = (x, y) if node.op_type == "Squeeze" else (y, x)
    rank, short = t.f.rank(longer) or 0, t.f.rank(shorter) or 0
    gone = {a % rank for a in axes} if axes or node.op_type != "Squeeze" else {
        i for i in range(rank) if t.size(longer, i) == 1
    }  # fmt: skip
    kept = [i for i in range(rank) if i not in gone]
    for i, j in zip(kept, range(short), strict=False):
        a, b = (i, j) if longer is x else (j, i)
        t.same(t.axis(x, a, node), t.axis(y, b))


# ---- reshapes ----------------------------------------------------------------------------------------------------


def _reshape(t: Tracer, node: ir.Node) -> None:
    """Reshape and Flatten: axes in blocks of equal size; within a block units move where their axis goes."""
    x, y = ends(node)
    s, r = t.f.shape(x), t.f.shape(y)
    if s is None or r is None:
        return
    for left, right in _regrouped(t, s, r):
        ins = [(t.axis(x, i, node), t.size(x, i)) for i in left]
        outs = [(t.axis(y, i), t.size(y, i)) for i in right]
        _block(t, node, [p for p in ins if p[1] != 1], [p for p in outs if p[1] != 1])
        t.followed(*(p for p, n in ins + outs if n == 1))
    if node.op_type == "Reshape":
        _targets(t, node, node.inputs[1], 1)


def _regrouped(t: Tracer, s: Sequence[Size], r: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of both shapes with equal products, from the front, or from the back where the front is unknown."""
    runs = list(_runs(t, s, r))
    if all(t.f.same(product(s[i] for i in left), product(r[j] for j in right)) for left, right in runs):
        return runs
    back = _runs(t, s[::-1], r[::-1])
    return [([len(s) - 1 - i for i in a[::-1]], [len(r) - 1 - j for j in b[::-1]]) for a, b in back]


def _runs(t: Tracer, s: Sequence[Size], r: Sequence[Size]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs with equal products from the front; the last one is what is left over."""
    i = j = 0
    while i < len(s) and j < len(r):
        left, right, a, b = [i], [j], s[i], r[j]
        i, j = i + 1, j + 1
        while not t.f.same(a, b):
            grows_right = t.f.quotient(a, b) is not None or not (t.f.quotient(b, a) is not None or i < len(s))
            if (grows_right and j < len(r)) or i >= len(s):
                if j >= len(r):
                    break
                right.append(j)
                b, j = multiply(b, r[j]), j + 1
            else:
                left.append(i)
                a, i = multiply(a, s[i]), i + 1
        yield left, right
    yield list(range(i, len(s))), list(range(j, len(r)))


def _block(t: Tracer, node: ir.Node, ins: list[tuple[Axis, int | None]], outs: list[tuple[Axis, int | None]]) -> None:
    """Axes `ins` are laid out anew as `outs`, both row by row."""
    if len(ins) == len(outs) == 1:
        t.same(ins[0][0], outs[0][0])
        return
    for source, to in ((ins, outs), (outs, ins)):
        reached = [k for k, (a, _) in enumerate(source) if a in t.units]
        if not reached:
            continue
        if len(reached) > 1 or None in (n for _, n in ins + outs):
            for a, _ in ins + outs:
                t.stop(a, f"{node.op_type} '{node.name}' merges it with another axis")
            return
        sizes = [n or 1 for _, n in source]
        shape = [-1 if k == reached[0] else 1 for k in range(len(source))]
        flat = np.broadcast_to(t.find(t.units[source[reached[0]][0]]).reshape(shape), sizes).reshape(-1)
        _project(t, flat, source[reached[0]][0], to)
    t.followed(*(a for a, _ in ins + outs))


def _project(t: Tracer, flat: Array, source: Axis, to: list[tuple[Axis, int | None]]) -> None:
    """Units of a flat run of elements onto the one of several axes along which they change."""
    if not to:
        return
    sizes = [n or 1 for _, n in to]
    if int(np.prod(sizes)) != flat.size:
        return t.stop(source, f"the sizes behind '{to[0][0].value.name}' do not fit")
    cube = flat.reshape(sizes)
    known = [k for k, (a, _) in enumerate(to) if a in t.units]
    exact = [k for k in range(len(to)) if (np.take(cube, [0], axis=k) is not None) and _varies_only(cube, k)]
    chosen = known or exact or ([0] if t.patient else [])
    if not chosen:
        return t.followed(source)
    k = chosen[0]
    rows = np.moveaxis(cube, k, 0).reshape(sizes[k], -1)
    first = rows.max(axis=1)
    t.join(first[:, None], rows)
    t.put(to[k][0], first, source)
    return None


def _varies_only(cube: Array, k: int) -> bool:
    """Whether the entries are the same along every other axis than `k`."""
    rows = np.moveaxis(cube, k, 0).reshape(cube.shape[k], -1)
    return bool((rows == rows[:, :1]).all())


def _targets(t: Tracer, node: ir.Node, target: ir.Value | None, index: int) -> None:
    """Numbers in a target that count units. A computed target gets all known numbers, lest they be computed from a cut
    axis."""
    y = node.outputs[0]
    content = t.f.content(target)
    if content is None or target is None:
        for i in range(t.f.rank(y) or 0):
            t.stop(t.axis(y, i), f"the sizes that {node.op_type} '{node.name}' reads are computed")
        return
    reached = [t.at(t.axis(y, i)) for i in range(content.size)]
    constant = t.g.is_constant(target)
    if not any(u is not None for u in reached):
        return
    for i, (entry, units) in enumerate(zip(content.reshape(-1), reached, strict=True)):
        if not isinstance(entry, int) or entry <= 0 or (units is None and constant):
            continue
        if units is not None and entry == len(units):
            t.counts(node, index, i, units)
        elif units is None:
            t.counts(node, index, i, np.full(entry, UNKNOWN))
    t.lengths[node, index] = content.size


def _expand(t: Tracer, node: ir.Node) -> None:
    x, y = ends(node)
    rank = t.f.rank(y) or 0
    offset = rank - (t.f.rank(x) or 0)
    for i in range(rank):
        n, out = t.size(y, i), t.axis(y, i)
        if i >= offset and t.size(x, i - offset) == n and n is not None:
            t.same(t.axis(x, i - offset, node), out)
        else:
            t.followed(out)  # made by repeating: its length is a number in the target
            if i >= offset:
                t.followed(t.axis(x, i - offset, node))
    _targets(t, node, node.inputs[1], 1)


def _of_shape(t: Tracer, node: ir.Node) -> None:
    for i in range(t.f.rank(node.outputs[0]) or 0):
        t.followed(t.axis(node.outputs[0], i))
    _targets(t, node, node.inputs[0], 0)


def _shape(t: Tracer, node: ir.Node) -> None:
    """The size of a cut axis may be read where it becomes a target, which then gets its numbers one by one."""
    x, _ = ends(node)
    rank = t.f.rank(x) or 0
    first = node.attributes.get_int("start", 0) % (rank + 1) if rank else 0
    end = node.attributes.get_int("end", rank)
    end = end + rank if end < 0 else min(end, rank)
    for i in range(rank):
        axis = t.axis(x, i, node)
        t.followed(axis)
        if first <= i < end and axis in t.units and (why := _misused(t, node.outputs[0], i - first)):
            t.stop(axis, why)


def _misused(t: Tracer, v: ir.Value, entry: int) -> str:
    """Why the size in one entry of a vector may not change, empty where it may."""
    if v.is_graph_output():
        return f"its size is the model's output '{v.name}'"
    for user, index in v.uses():
        if user.op_type == "Gather" and index == 0 and not _picks(t.f.content(user.inputs[1]), entry):
            continue
        if user.op_type in CARRIES and (index == 0 or user.op_type == "Concat"):
            whole = user.op_type not in ("Gather", "Concat", "Slice")
            if why := _misused(t, user.outputs[0], entry if whole else -1):
                return why
        elif SIZED.get(user.op_type) != index:
            return f"{user.op_type} '{user.name}' computes with its size"
    return ""


def _picks(indices: Content | None, entry: int) -> bool:
    """Whether constant indices may pick an entry (-1: one that is not known)."""
    if indices is None or entry < 0:
        return True
    return any(not isinstance(i, int) or i == entry or i < 0 for i in indices.reshape(-1))


# ---- pieces ------------------------------------------------------------------------------------------------------


def _concat(t: Tracer, node: ir.Node) -> None:
    _pieces(t, node, node.outputs[0], node.inputs, axis_of(node, t.f.rank(node.outputs[0]) or 0, 0))


def _split(t: Tracer, node: ir.Node) -> None:
    x, _ = ends(node)
    axis = axis_of(node, t.f.rank(x) or 0, 0)
    _pieces(t, node, x, node.outputs, axis)
    units = t.at(t.axis(x, axis, node))
    if units is None:
        return
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None and not t.g.is_constant(given):
        return t.stop(t.axis(x, axis, node), f"the lengths that Split '{node.name}' reads are computed")
    at = 0
    for i, out in enumerate(node.outputs):
        n = t.size(out, axis) or 0
        t.counts(node, 1, i, units[at : at + n])
        at += n
    return None


def _pieces(t: Tracer, node: ir.Node, whole: ir.Value, parts: Sequence[ir.Value | None], axis: int) -> None:
    """`whole` is its parts one after the other along the axis."""
    reader = node if whole in node.inputs else None
    at: int | None = 0
    for v in parts:
        if v is None:
            continue
        n = t.size(v, axis)
        for i in range(t.f.rank(whole) or 0):
            mine, all_of = t.axis(v, i, node if reader is None else None), t.axis(whole, i, reader)
            if i != axis:
                t.same(mine, all_of)
            elif n is not None and at is not None and t.size(whole, i) is not None:
                t.mapped(all_of, mine, np.arange(at, at + n))
        at = at + n if at is not None and n is not None else None


def _slice(t: Tracer, node: ir.Node) -> None:
    """Constant bounds with step one follow the units; an axis that is cut in any other way stays."""
    x, y = ends(node)
    parts = [t.f.content(v) if v is not None else None for v in node.inputs[1:]]
    starts, stops = (p.reshape(-1) if p is not None else None for p in parts[:2])
    count = next((p.size for p in (starts, stops) if p is not None), 0)
    given = parts[2].reshape(-1) if len(parts) > 2 and parts[2] is not None else np.arange(count)
    steps = parts[3].reshape(-1) if len(parts) > 3 and parts[3] is not None else np.ones(count, int)
    rank = t.f.rank(x) or 0
    cut = {int(a) % rank: i for i, a in enumerate(given)} if rank else {}
    for axis in range(rank):
        if axis not in cut:
            t.same(t.axis(x, axis, node), t.axis(y, axis))
            continue
        i, n = cut[axis], t.size(x, axis)
        if n is None or starts is None or stops is None or int(steps[i]) != 1:
            continue
        if isinstance(starts[i], int) and isinstance(stops[i], int):
            _bounds(t, node, axis, i, (n, starts[i], stops[i]))


def _bounds(t: Tracer, node: ir.Node, axis: int, i: int, what: tuple[int, int, int]) -> None:
    n, start, end = what
    x, _ = ends(node)
    place = t.axis(x, axis, node)
    t.mapped(place, t.axis(node.outputs[0], axis), range(*slice(start, end).indices(n)))
    units = t.at(place)
    if units is None:
        return
    for index, bound in ((1, start), (2, end)):
        v = node.inputs[index]
        if 0 < bound < OPEN:
            if bound > n:
                t.counts(node, index, i, np.concatenate([units, np.full(bound - n, UNKNOWN)]))
            else:
                t.counts(node, index, i, units[:bound])
        elif bound < 0 and bound > -n:
            t.counts(node, index, i, units[bound:], -1)
        if not t.g.is_constant(v):
            t.stop(place, f"the bounds that Slice '{node.name}' reads are computed")


def _gather(t: Tracer, node: ir.Node) -> None:
    """Rows of a table by computed indices stay; constant indices on a cut axis are renumbered."""
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
    wanted = t.g.array(indices)
    if more == 1:
        t.same(Axis(indices, 0, node), t.axis(y, at))
        t.mapped(place, t.axis(y, at), wanted % n)
    else:
        t.keep(place, np.unique(wanted % n))  # what is picked one by one stays
    if (units := t.at(place)) is not None:
        t.indices[node, 1] = units


def _tile(t: Tracer, node: ir.Node) -> None:
    (x, y), repeats = ends(node), t.f.content(node.inputs[1])
    for i in range(t.f.rank(x) or 0):
        n = t.size(x, i)
        times = repeats.reshape(-1)[i] if repeats is not None else None
        if n is not None and isinstance(times, int):
            t.mapped(t.axis(x, i, node), t.axis(y, i), np.arange(n * times) % n)


def _pad(t: Tracer, node: ir.Node) -> None:
    """Positions that are added stay; only a constant border keeps the others apart."""
    (x, y), pads = ends(node), t.f.content(node.inputs[1])
    rank = t.f.rank(x) or 0
    axes = t.f.content(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    given = [int(a) % rank for a in axes.reshape(-1)] if axes is not None else list(range(rank))
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return
    flat, constant = pads.reshape(-1), node.attributes.get_string("mode", "constant") == "constant"
    for i in range(rank):
        n = t.size(x, i)
        k = given.index(i) if i in given else None
        before, after = (0, 0) if k is None else (flat[k], flat[k + len(given)])
        if before == after == 0:
            t.same(t.axis(x, i, node), t.axis(y, i))
        elif n is not None and isinstance(before, int) and before >= 0 and constant:
            t.mapped(t.axis(y, i), t.axis(x, i, node), np.arange(before, before + n))
            t.keep(t.axis(y, i), np.r_[0:before, before + n : t.size(y, i) or 0])


def _resize(t: Tracer, node: ir.Node) -> None:
    """Axes whose length does not change, where the sizes are given as factors."""
    x, y = ends(node)
    scales = t.f.content(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    for i in range(t.f.rank(x) or 0) if scales is not None and "axes" not in node.attributes else ():
        if scales is not None and i < scales.size and scales.reshape(-1)[i] == 1:
            t.same(t.axis(x, i, node), t.axis(y, i))


LAYOUT_RULES: dict[tuple[str, str], Rule] = {
    ("", "Transpose"): _transpose,
    ("", "Squeeze"): _squeeze,
    ("", "Unsqueeze"): _squeeze,
    ("", "Reshape"): _reshape,
    ("", "Flatten"): _reshape,
    ("", "Expand"): _expand,
    ("", "ConstantOfShape"): _of_shape,
    ("", "Shape"): _shape,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    ("", "Slice"): _slice,
    ("", "Gather"): _gather,
    ("", "Tile"): _tile,
    ("", "Pad"): _pad,
    ("", "Resize"): _resize,
}
