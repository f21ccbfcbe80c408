"""Conversion of the coupling analysis to a `Group`: plain data, by names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from onnxcomp.coupling.trace import FROZEN, UNKNOWN, Axis, Tracer
from onnxcomp.errors import ModelError
from onnxcomp.graph.groups import STAYS, AttrSlot, Entries, Group, IndexSlot, IoSlot, NormSlot, Size, Slot
from onnxcomp.maths import Array

__all__ = ["Blocked", "collect"]

MAX_PATH = 8  # nodes of a path that a message shows; of a longer one only both ends
Plain = Callable[[Array], tuple[int, ...]]


class Blocked(ModelError):
    """An axis cannot be cut; `reached` are the axes (value name, axis) that are coupled to it."""

    def __init__(self, message: str, reached: frozenset[tuple[str, int]]) -> None:
        super().__init__(message)
        self.reached = reached


def collect(t: Tracer, start: Axis) -> Group:
    """The group of an analysis, its units numbered along the starting axis; raises `Blocked` for fewer than two."""
    units = t.at(start)
    free = np.zeros(0, np.int64) if units is None else units[units > FROZEN]
    order = {int(u): i for i, u in enumerate(dict.fromkeys(free.tolist()))}
    if len(order) < 2:
        raise Blocked(_reason(t, start, len(order)), frozenset((str(a.value.name), a.axis) for a in t.units))
    plain = _numbering(t, order)
    slots, computed, io = _slots(t, plain)
    return Group(
        len(order),
        slots,
        io=io,
        parts=_parts(t, order),
        computed=computed,
        entries=_entries(t, plain),
        attrs=tuple(AttrSlot(str(n.name), a, plain(u)) for (n, a), u in t.attrs.items() if _has_units(plain(u))),
        norms=tuple(NormSlot(str(n.name), plain(u)) for n, u in t.norms.items() if _has_units(plain(u))),
        indices=tuple(IndexSlot(str(n.name), i, plain(u)) for (n, i), u in t.indices.items() if _has_units(plain(u))),
    )


def _has_units(units: tuple[int, ...]) -> bool:
    return any(u != STAYS for u in units)


def _numbering(t: Tracer, order: dict[int, int]) -> Plain:
    """The function from unit numbers of the analysis to those of the group; equal axes share one tuple."""
    renumbered: dict[bytes, tuple[int, ...]] = {}
    table = np.full(len(t.parent), STAYS)
    table[list(order)] = list(order.values())

    def to_group(units: Array) -> tuple[int, ...]:
        roots = t.find(units)
        key = roots.tobytes()
        if key not in renumbered:
            renumbered[key] = tuple(np.where(roots == UNKNOWN, STAYS, table[np.maximum(roots, 0)]).tolist())
        return renumbered[key]

    return to_group


def _slots(t: Tracer, plain: Plain) -> tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[IoSlot, ...]]:
    """Slots of constants (users with equal units together), of computed values, and of graph inputs and outputs."""
    constants: dict[tuple[str, int, tuple[int, ...]], tuple[list[str], set[str]]] = {}
    computed, io = [], []
    for axis, units in t.units.items():
        v, numbers = axis.value, plain(units)
        if not _has_units(numbers):
            continue
        if t.g.is_constant(v):
            users, roles = constants.setdefault((str(v.name), axis.axis, numbers), ([], set()))
            users += [str(axis.reader.name)] if axis.reader is not None else []
            roles |= t.roles.get(axis, set())
            continue
        if axis.reader is None:  # else only the user's copy is cut
            computed.append(Slot(str(v.name), axis.axis, numbers))
        if v.is_graph_input() or v.is_graph_output():
            io.append(IoSlot(str(v.name), axis.axis, numbers))
    slots = [
        Slot(name, axis, numbers, tuple(users), "reads" in roles, "writes" in roles)
        for (name, axis, numbers), (users, roles) in constants.items()
    ]
    return tuple(slots), tuple(computed), tuple(io)


def _entries(t: Tracer, plain: Plain) -> tuple[Entries, ...]:
    """Sizes that count units: those for all users, then those for copies, with one copy for users of equal sizes."""
    users_by_entries: dict[tuple[Entries, bool], list[str]] = {}
    for (node, index, reader), entries in sorted(t.sizes.items(), key=lambda item: item[0][2] is not None):
        sizes = tuple(Size(i, plain(u), sign, times) for i, (u, sign, times) in sorted(entries.items()))
        if any(_has_units(size.units) for size in sizes):
            entry = Entries(str(node.name), index, sizes, t.lengths.get((node, index), 0))
            users = users_by_entries.setdefault((entry, reader is None), [])
            users += [str(reader.name)] if reader is not None else []
    return tuple(replace(entry, users=tuple(users)) for (entry, _), users in users_by_entries.items())


def _parts(t: Tracer, order: dict[int, int]) -> tuple[int, ...]:
    """The part of each unit, where a node needs parts of equal size."""
    parts = np.full(len(order), -1)
    for node, rows in t.parts.items():
        roots = t.find(rows)
        counts = {int((np.isin(row, list(order))).sum()) for row in roots}
        if len(counts) > 1:
            raise ModelError(f"'{node.name}' needs equally many units of each part, but some of them must stay")
        for i, row in enumerate(roots):
            for u in row.tolist():
                part = parts[order[u]] if u in order else i
                if part not in (-1, i):
                    raise ModelError(f"'{node.name}' groups the units differently from another node")
                if u in order:
                    parts[order[u]] = i
    return tuple(parts.tolist()) if (parts >= 0).all() else ()


def _reason(t: Tracer, start: Axis, unit_count: int) -> str:
    """Why the axis cannot be cut, with the path to the cause."""
    subject = f"axis {start.axis} of '{start.value.name}' cannot be cut"
    if not t.blocked:
        return f"{subject}: all its positions belong together" if unit_count else f"{subject}: it has one unit"
    axis, why = t.blocked[0]
    path = t.path(axis)
    shown = path if len(path) <= MAX_PATH else [*path[:3], "...", *path[-4:]]
    return f"{subject}: {why}" + (f" (by way of {' > '.join(shown)})" if shown else "")
