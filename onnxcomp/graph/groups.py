"""What must move together when units are cut from a model, as plain data (the idea of Torch-Pruning's groups).

Everywhere `units` says which unit each position of an axis belongs to, `STAYS` for positions that are never cut. So a
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

    `reads`: the constant multiplies what arrives on that axis and sums it up (rows of a weight). `writes`: it makes, or
    adds to, what leaves on that axis (columns of a weight, a bias, an embedding table). A tied table does both.
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
    """Numbers in an integer input of a node (a Reshape target, Split lengths, Slice bounds).

    Where the input is computed, the numbers take the place of some of its `length` entries; where it is missing (a
    Split into equal parts), it is made. Where `users` are named, the numbers are theirs: others keep the node as it is.
    """

    node: str
    input: int
    sizes: tuple[Size, ...]
    length: int = 0
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class IndexSlot:
    """A constant input of a node that holds positions on an axis: they are renumbered, each must stay or go along."""

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
    """An RMSNormalization over the axis: of `d` channels `d'` stay, so its mean would be of fewer squares.

    Its gain times `sqrt(d / d')` and its epsilon times `d / d'` give what zeroed channels would have given.
    """

    node: str
    units: Units


@dataclass(frozen=True)
class Group:
    """A closed set of places that shrink together when some of `units` go.

    `parts` names for each unit the part it is of, where every part must keep the same number (query heads that share a
    key-value head); empty where any may go. `computed` are the same axes on values that are computed, `path` the nodes.
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
        """Constants whose products with the axis are summed up."""
        return tuple(s for s in self.slots if s.reads)

    @property
    def writers(self) -> tuple[Slot, ...]:
        """Constants that make the axis."""
        return tuple(s for s in self.slots if s.writes)

    def holds(self, value: str, axis: int) -> bool:
        """Whether the group cuts that axis of a computed value."""
        return any(s.value == value and s.axis == axis for s in self.computed)

    def kept(self, keep: Array) -> Array:
        """The units to keep, checked: ascending, at least one, the same number of each part; raises `ModelError`."""
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
        return kept

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` for a constant whose axis is not as long as the group says."""
        for slot in self.slots:
            shape = shapes[slot.value]
            if slot.axis >= len(shape) or len(slot.units) != shape[slot.axis]:
                what = f"{len(slot.units)} positions on axis {slot.axis}"
                raise ModelError(f"constant '{slot.value}' of shape {shape} does not fit a group with {what}")
