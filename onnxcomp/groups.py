"""What must move together when units are cut from a model, as plain data (the idea of Torch-Pruning's groups)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.maths import Array

__all__ = ["AttrSlot", "Group", "IoSlot", "Size", "Slot"]


@dataclass(frozen=True)
class Slot:
    """Units along one axis of a constant: unit `u` is `offset + u * stride * block + [0, block)`.

    A head of width 64 in a projection `[K, heads * 64]` is `Slot(w, 1, block=64)`; the value part of a packed
    `q|k|v` has `offset = 2 * heads * 64`; per-head interleaved `q, k, v` has `stride = 3`.
    """

    value: str
    axis: int
    block: int = 1
    offset: int = 0
    stride: int = 1

    def indices(self, units: np.ndarray) -> Array:
        """Positions on the axis that the given units occupy, shape `[len(units) * block]`."""
        starts = self.offset + np.asarray(units, np.int64)[:, None] * self.stride * self.block
        return (starts + np.arange(self.block)).ravel()


@dataclass(frozen=True)
class Size:
    """One entry of an integer constant (a Reshape target, a Split length) that equals `units * per`."""

    value: str
    index: int
    per: int = 1


@dataclass(frozen=True)
class AttrSlot:
    """An integer attribute of a node that equals `units * per`, such as `q_num_heads`."""

    node: str
    name: str
    per: int = 1


@dataclass(frozen=True)
class IoSlot:
    """An axis of a graph input or output that equals `units * per`, such as the heads of a KV cache."""

    value: str
    axis: int
    per: int = 1


@dataclass(frozen=True)
class Group:
    """A closed set of places that shrink together when some of `units` go."""

    units: int
    slots: tuple[Slot, ...]
    sizes: tuple[Size, ...] = ()
    attrs: tuple[AttrSlot, ...] = ()
    io: tuple[IoSlot, ...] = ()

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Raise `ModelError` for a constant that does not hold all units where the group says."""
        everyone = np.arange(self.units)
        for slot in self.slots:
            shape = arrays[slot.value].shape
            if slot.axis >= len(shape) or int(slot.indices(everyone).max()) >= shape[slot.axis]:
                what = f"a group of {self.units} units on axis {slot.axis}"
                raise ModelError(f"constant '{slot.value}' of shape {shape} does not fit {what}")
        for size in self.sizes:
            now, then = int(arrays[size.value].reshape(-1)[size.index]), self.units * size.per
            if now != then:
                raise ModelError(f"entry {size.index} of '{size.value}' is {now}, the group expects {then}")
