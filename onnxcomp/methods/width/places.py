"""What a width pass cuts: groups of coupled axes with their sites and readers, and what stays of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcomp.graph import Site
from onnxcomp.graph.groups import Group
from onnxcomp.maths import Array
from onnxcomp.methods.repair.readers import Reader

__all__ = ["UNREACHED", "Cut", "Place"]

LISTED = 16  # heads that are named, counted from 0 as the pass met them
UNREACHED = (
    "no sample of the data reaches it: give more data, or say what measures nothing (score: magnitude, repair: none, "
    "ranking: layer)"
)


@dataclass(frozen=True)
class Place:
    """One group with the sites it belongs to and the linears that read its axis."""

    sites: tuple[Site, ...]
    group: Group
    readers: tuple[Reader, ...]

    @property
    def part(self) -> tuple[Group, tuple[Reader, ...]]:
        """The group and its readers, as a trial cut takes them."""
        return self.group, self.readers


@dataclass(frozen=True)
class Cut:
    """A group, the units of it that stay, what is `said` of its time, and what the model loses by this cut alone."""

    place: Place
    keep: Array
    said: str = ""
    loss: float | None = None

    def describe(self, unit: str) -> str:
        """The note on its sites."""
        units = self.place.group.units
        gone = np.setdiff1d(np.arange(units), self.keep)
        told = f" (without {', '.join(map(str, gone))})" if unit == "heads" and 0 < len(gone) <= LISTED else ""
        return f"{units} > {len(self.keep)} {unit}{told}" + (f", {self.said}" if self.said else "")

    @property
    def values(self) -> dict[str, float]:
        """The numbers of that note."""
        known = {"of": float(self.place.group.units), "kept": float(len(self.keep))}
        return known if self.loss is None else known | {"loss_alone": self.loss}
