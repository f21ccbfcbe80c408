"""Parts of report.json's schema that tell how sites were lowered and where their operators ran."""

from __future__ import annotations

from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

__all__ = ["SCHEMA_VERSION", "CandidatePart", "ChoicePart", "Interval", "LoweringPart", "PlacementPart", "ShapeRatio"]

SCHEMA_VERSION = 1


class Interval(TypedDict):
    """A value and the 95 % interval around it; null where it is not a finite number."""

    value: float | None
    low: float | None
    high: float | None


class CandidatePart(TypedDict):
    """A form of a site: ms at each shape, how many times faster than the default with its interval, a remark."""

    form: str
    ms: list[float]
    ratio: float | None
    low: float | None
    high: float | None
    note: str


class ChoicePart(TypedDict):
    """The form of all sites of one signature, and why; `source` is measured, remembered, file or table."""

    kind: str
    site: str
    form: str
    default: str
    reason: str
    source: str
    sites: list[str]
    shapes: list[str]
    candidates: list[CandidatePart]


class ShapeRatio(Interval):
    """How many times faster than the unlowered model at one shape."""

    shape: str


class LoweringPart(TypedDict):
    """Whether the lowered or the unlowered model was kept, and why."""

    kept: str
    why: str
    ratios: list[ShapeRatio]


class PlacementPart(TypedDict):
    """Operators by the provider that ran them; `elsewhere` compute, but not on the target's provider."""

    provider: str
    ran: bool
    nodes: dict[str, dict[str, int]]
    elsewhere: list[str]
    detail: str
