"""Parts of report.json's schema: how sites were lowered, where their operators ran, and how far outputs moved."""

from __future__ import annotations

from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

__all__ = [
    "CandidatePart",
    "ChoicePart",
    "Interval",
    "LoweringPart",
    "MetricPart",
    "OutputPart",
    "PlacementPart",
    "RemedyPart",
    "RungPart",
    "ShapeRatio",
    "ValidationPart",
]


class SharePart(TypedDict):
    """A site with its share of the errors that all measured ones make, each changed alone."""

    site: str
    share: float


class RemedyPart(TypedDict):
    """What a refused pass should leave alone: the worst sites, patterns that let the gates pass, verdicts, recipe."""

    name: str
    shares: list[SharePart]
    measured: int
    sites: int
    tried: int
    skip: list[str]
    verdicts: list[str]
    recipe: str


class RungPart(TypedDict):
    """What one recipe of a ladder gave: drift by gate name, bytes, seconds, and why it was refused; empty if not."""

    name: str
    spec: str
    values: dict[str, float | None]
    nbytes: int | None
    seconds: float
    refused: str


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


class MetricPart(TypedDict):
    """A task metric of both models; `change` has a 95 % bootstrap interval from `low` to `high`."""

    name: str
    reference: float | None
    candidate: float | None
    change: float | None
    low: float | None
    high: float | None


class OutputPart(TypedDict):
    """An output against the original's; null where undefined. Integers have `exact_match` alone, floats all others."""

    equal: bool
    max_abs: float | None
    rel_l2: float | None
    sqnr: float | None
    cosine: float | None
    agreement: float | None
    kl: float | None
    pooled_sqnr: float | None
    pooled_cosine: float | None
    exact_match: float | None
    finite: bool
    rows: int
    undefined: int


class ValidationPart(TypedDict):
    """Result against original on held-out data: `outputs` has each output, `values` by gate name the worst of them.

    Task metrics read the output that is `scored`; outputs that are maps are `uncompared`.
    """

    samples: int
    data: str
    random: bool
    notes: list[str]
    finite: bool
    equal: bool
    worst: str
    scored: str
    uncompared: list[str]
    values: dict[str, float | None]
    outputs: dict[str, OutputPart]
    metrics: dict[str, MetricPart]
