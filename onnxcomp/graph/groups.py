"""Coupled axes as plain data: all places that shrink together when units are pruned (Torch-Pruning's groups).

`units` always holds the unit that each position of an axis belongs to, `STAYS` for positions that are never cut: a
contiguous head is `0 0 0 0 1 1 1 1`, a packed `q|k|v` is `0 0 1 1 0 0 1 1 0 0 1 1`, two frozen channels before two free
ones are `-1 -1 0 1`.

Along an axis of a computed value that is a multiple of an unknown length, `units` is one period, which repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.maths import Array

__all__ = ["STAYS", "AttrSlot", "Entries", "Group", "IndexSlot", "IoSlot", "NormSlot", "Size", "Slot", "layout"]

STAYS = -1
Units = tuple[int, ...]


def layout(units: int, block: int = 1, offset: int = 0, stride: int = 1, length: int = 0) -> Units:
    """Units of an axis where unit `u` is at `offset + u * stride * block + [0, block)`; `length` pads with `STAYS`."""
    starts = offset + np.arange(units)[:, None] * stride * block
    places = (starts + np.arange(block)).ravel()
    axis = np.full(max(length, int(places.max()) + 1), STAYS)
    axis[places] = np.repeat(np.arange(units), block)
    return tuple(axis.tolist())


def _kept(units: Units, keep: Array) -> Array:
    """Which positions of an axis stay when only the units `keep` do: bool `[len(units)]`."""
    axis = np.asarray(units, np.int64)
    return np.asarray((axis == STAYS) | np.isin(axis, keep))


@dataclass(frozen=True)
class Slot:
    """Units along one axis of a constant, as the named users read it (all of them where none are named).

    `reads`: the constant is contracted along the axis (rows of a weight). `writes`: it produces the axis or is added to
    it (columns of a weight, a bias, an embedding table). A tied table does both.
    """

    value: str
    axis: int
    units: Units
    users: tuple[str, ...] = ()
    reads: bool = False
    writes: bool = False

    def positions(self, units: Array) -> Array:
        """Positions on the axis that the given units occupy, ascending."""
        return np.flatnonzero(np.isin(np.asarray(self.units, np.int64), np.asarray(units, np.int64)))

    def kept(self, keep: Array) -> Array:
        """Which positions stay: bool `[length]`."""
        return _kept(self.units, keep)


@dataclass(frozen=True)
class Size:
    """One number that counts the positions of `units`: it becomes the count of those kept, times `sign`.

    Where the axis repeats its units, the lengths of the graph inputs' axes `times` (name, axis) multiply the count.
    """

    index: int
    units: Units
    sign: int = 1
    times: tuple[tuple[str, int], ...] = ()

    def count(self, keep: Array) -> int:
        """The number after the cut."""
        return self.sign * int(_kept(self.units, keep).sum())


@dataclass(frozen=True)
class Entries:
    """Sizes in an integer input of a node (a Reshape target, Split lengths, Slice bounds) that a cut changes.

    A computed input keeps its other entries (it has `length`); a missing one (a Split into equal parts) is added.
    With `users` only these get the changed sizes, from a copy of the node; the other users keep the node as it is.
    """

    node: str
    input: int
    sizes: tuple[Size, ...]
    length: int = 0
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class IndexSlot:
    """A constant input of positions on a cut axis: they are renumbered, and each must stay or be cut as well."""

    node: str
    input: int
    units: Units


@dataclass(frozen=True)
class AttrSlot:
    """An integer attribute of a node that counts units, such as `q_num_heads`: `units` has one entry for each."""

    node: str
    name: str
    units: Units


@dataclass(frozen=True)
class IoSlot:
    """An axis of a graph input or output, such as the heads of a KV cache."""

    value: str
    axis: int
    units: Units


@dataclass(frozen=True)
class NormSlot:
    """An RMSNormalization over the axis: `d'` of `d` channels stay, so its mean would be taken over fewer squares.

    Its gain times `sqrt(d / d')` and its epsilon times `d / d'` give the result that zeroed channels would give.
    """

    node: str
    units: Units


@dataclass(frozen=True)
class Group:
    """A closed set of places that shrink together when some of `units` are removed.

    `parts` holds the part of each unit where every part must keep the same number of units (query heads that share a
    key-value head), and is empty without such a rule. `computed` are the same axes on computed values.
    """

    units: int
    slots: tuple[Slot, ...]
    entries: tuple[Entries, ...] = ()
    attrs: tuple[AttrSlot, ...] = ()
    io: tuple[IoSlot, ...] = ()
    norms: tuple[NormSlot, ...] = ()
    indices: tuple[IndexSlot, ...] = ()
    parts: tuple[int, ...] = ()
    computed: tuple[Slot, ...] = field(default=(), repr=False)

    @property
    def readers(self) -> tuple[Slot, ...]:
        """Constants that are contracted along the axis."""
        return tuple(s for s in self.slots if s.reads)

    @property
    def writers(self) -> tuple[Slot, ...]:
        """Constants that produce the axis or are added to it."""
        return tuple(s for s in self.slots if s.writes)

    def holds(self, value: str, axis: int) -> bool:
        """Whether the group cuts that axis of a computed value."""
        return any(s.value == value and s.axis == axis for s in self.computed)

    def emptied(self, keep: Array) -> str:
        """Why not only the units `keep` may stay: they leave nothing of an axis that is coupled; empty if they may."""
        axes = {id(s.units): (f"axis {s.axis} of '{s.value}'", s.units) for s in (*self.slots, *self.computed)}
        counts = {id(a.units): (f"'{a.name}' of '{a.node}'", a.units) for a in self.attrs}
        for name, units in (axes | counts).values():
            if units and not _kept(units, keep).any():
                return f"of {name} nothing would be left: all its {len(units)} positions belong to what is cut"
        return ""

    def kept(self, keep: Array) -> Array:
        """The units to keep, checked: ascending, not empty, equally many of each part, something of every axis.

        Raises `ModelError`.
        """
        kept = np.asarray(keep, np.int64)
        if kept.ndim != 1 or kept.size == 0 or kept[0] < 0 or kept[-1] >= self.units or np.any(np.diff(kept) <= 0):
            raise ModelError(
                f"keep must be ascending indices below {self.units}, at least one; got {kept.tolist()[:8]}"
            )
        if self.parts:
            every = np.unique(self.parts)
            counts = [int((np.asarray(self.parts)[kept] == p).sum()) for p in every]
            if len(set(counts)) > 1 or counts[0] == 0:
                raise ModelError(f"keep must hold equally many units of each part, got {counts[:8]}")
        if why := self.emptied(kept):
            raise ModelError(why)
        return kept

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` for a constant whose axis has another length than the group expects."""
        for slot in self.slots:
            shape = shapes[slot.value]
            if slot.axis >= len(shape) or len(slot.units) != shape[slot.axis]:
                what = f"{len(slot.units)} positions on axis {slot.axis}"
                raise ModelError(f"constant '{slot.value}' of shape {shape} does not fit a group with {what}")
