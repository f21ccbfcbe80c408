"""report.json as types, which pydantic turns into a JSON schema and checks files against."""

from __future__ import annotations

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from onnxcomp.reports.measured_parts import (
    BenchmarkPart,
    ByLayerPart,
    DriftPart,
    FigurePart,
    LayerPart,
    MachinePart,
    ShapeRatio,
    ValidationPart,
)

__all__ = [
    "CandidatePart",
    "ChoicePart",
    "ConstantsPart",
    "CoveredPart",
    "CulpritPart",
    "DataPart",
    "DataParts",
    "DeclinedPart",
    "IntegerPart",
    "LoweringPart",
    "NotedPart",
    "PlacementPart",
    "RecipePart",
    "RemedyPart",
    "ReportPart",
    "RungPart",
    "SharePart",
    "SizePart",
    "SourcePart",
    "StepPart",
    "SuspectPart",
    "VerdictPart",
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


class SuspectPart(TypedDict):
    """A site whose result differs though its inputs do not; errors are relative, `outstanding` times the usual one.

    `outstanding` is null where most sites of its kind are exact, so that there is no usual error.
    """

    site: str
    place: str
    error: float | None
    outstanding: float | None
    outputs: list[str]


class CulpritPart(TypedDict):
    """The pass behind which gates began to fail, what they said then, and its sites, the worst first."""

    name: str
    spec: str
    verdicts: list[str]
    suspects: list[SuspectPart]
    why: str


class RungPart(TypedDict):
    """What one recipe of a ladder gave: drift by gate name, bytes, seconds, and why it was refused; empty if not."""

    name: str
    spec: str
    values: dict[str, float | None]
    nbytes: int | None
    seconds: float
    refused: str


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


class DataPart(TypedDict):
    """A dataset: its source and how many samples were used."""

    name: str
    samples: int


class DeclinedPart(TypedDict):
    """A site left as it was, with the reason."""

    site: str
    why: str


class NotedPart(TypedDict):
    """What became of a site, in words, and what was measured there, by name."""

    site: str
    what: str
    values: dict[str, float]


class CoveredPart(TypedDict):
    """The numbers at a site, from `low` to `high`, and the range that codes of so many bits cover of them.

    `outside` is the share of the numbers more than half a step beyond that, null where it was not counted; `error` is
    the relative L2 error that clipping and rounding make of them.
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


class StepPart(TypedDict):
    """What one pass did; sizes are [before, after]; `drift` is the comparison with the original after this pass.

    `choosing` is the part of `seconds` that choosing among forms took.
    """

    name: str
    spec: str
    fidelity: str
    eligible: int
    changed: int
    edits: int
    declined: list[DeclinedPart]
    nodes: tuple[int, int]
    nbytes: tuple[int, int]
    seconds: float
    choosing: float
    peak_mib: float
    drift: DriftPart | None
    rolled_back: str
    cached: bool
    choices: list[ChoicePart]
    noted: list[NotedPart]
    covered: list[CoveredPart]


class VerdictPart(TypedDict):
    """A gate with what was measured; null when nothing could be."""

    gate: str
    value: float | None
    passed: bool


class IntegerPart(TypedDict):
    """The check without a clock: integer products of the runtime-optimized graph, weights dequantized on every run."""

    quantized_linears: int
    integer_products: int
    dequantized_weights: int
    ok: bool
    detail: str


class SourcePart(TypedDict):
    """The model that was compressed; `sha256` over its files, external data included."""

    path: str
    sha256: str


class RecipePart(TypedDict):
    """What was done, as a recipe file's text; `sha256` over what changes the result."""

    name: str
    text: str
    sha256: str
    advice: str


class ConstantsPart(TypedDict):
    """Bytes of the constants of one part, such as embeddings, in one element type."""

    part: str
    dtype: str
    nbytes: int


class SizePart(TypedDict):
    """Bytes on disk, external data included; `parts` are those of the result's constants, the largest first.

    `before` are the same of the original.
    """

    original: int
    result: int
    parts: list[ConstantsPart]
    before: list[ConstantsPart]


class DataParts(TypedDict):
    """The data used; null where none was."""

    calibration: DataPart | None
    evaluation: DataPart | None


@with_config(ConfigDict(extra="forbid"))
class ReportPart(TypedDict):
    """report.json of onnxcomp; a number that is infinite or undefined is null.

    `kind` is compress, validate or bench; `command` does it again; `models` are those compared, the original first.
    `refused` says what refused the result, gates and checks; empty where nothing did. `stream_note` says why `layers`
    have no error of the residual stream, empty where they have.
    """

    schema_version: int
    kind: str
    summary: str
    command: str
    models: list[str]
    refused: list[str]
    figures: list[FigurePart]
    job: str
    source: SourcePart
    recipe: RecipePart
    target: str
    seed: int
    data: DataParts
    size: SizePart | None
    steps: list[StepPart]
    verdicts: list[VerdictPart]
    layers: list[LayerPart]
    stream_note: str
    by_layer: ByLayerPart | None
    rungs: list[RungPart]
    remedy: RemedyPart | None
    culprit: CulpritPart | None
    validation: ValidationPart | None
    benchmark: BenchmarkPart | None
    lowering: LoweringPart | None
    placement: PlacementPart | None
    integer_check: IntegerPart | None
    warnings: list[str]
    machine: MachinePart
    versions: dict[str, str]
