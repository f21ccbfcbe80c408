"""What passes say of their work: where they may edit, what they left alone, what they did, which ranges they chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Covered", "Declined", "Noted", "Site"]


@dataclass(frozen=True)
class Site:
    """A place in the graph that a pass may edit: a name to report, and the names of its nodes."""

    name: str
    nodes: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Declined:
    """A site that a pass left unchanged, with the reason."""

    site: str
    why: str


@dataclass(frozen=True)
class Noted:
    """What a pass did to a site, as text such as `12 > 9 heads`, and what it measured there, by name, for programs."""

    site: str
    what: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Covered:
    """The numbers at a site, from `low` to `high`, and the range that codes of so many bits cover of them.

    `of` is what they are, such as `input` or `weight`, `value` its name; of weights with several scales the covered
    range is that of all together. `outside` is the share of the numbers more than half a step beyond it, None where
    that was not counted; `error` is the relative L2 error that clipping and rounding make of them.
    """

    site: str
    of: str
    value: str
    bits: int
    low: float
    high: float
    covered_low: float
    covered_high: float
    outside: float | None
    error: float
