"""Parts of report.json that are measurements: how far outputs moved, times, the machine, what a decision is made by."""

from __future__ import annotations

from typing import (
    Any,
    NotRequired,  # pydantic cannot read typing's before Python 3.12
)

from typing_extensions import TypedDict

__all__ = [
    "BenchmarkPart",
    "ByLayerPart",
    "DriftPart",
    "FigurePart",
    "Interval",
    "LayerPart",
    "LeftOutPart",
    "MachinePart",
    "MetricPart",
    "MissingPart",
    "MovedPart",
    "NoisePart",
    "OutputPart",
    "RatioPart",
    "RowPart",
    "ShapeRatio",
    "SimilarityPart",
    "StreamPart",
    "ValidationPart",
    "ValuePart",
]


class Interval(TypedDict):
    """A value and the 95 % interval around it; null where it is not a finite number."""

    value: float | None
    low: float | None
    high: float | None


class RatioPart(Interval):
    """How many times faster than the original: above 1 is faster."""

    model: str
    shape: str


class ShapeRatio(Interval):
    """How many times faster than the unlowered model at one shape."""

    shape: str


class RowPart(TypedDict):
    """Times of a model at a shape in ms, over runs that were used; `dropped` runs were disturbed by other processes.

    `throughput` is in samples per second; `peak_mib` is of the whole process, `base_mib` before the model was loaded.
    """

    model: str
    shape: str
    median_ms: float
    p90: float
    p99: float
    min: float
    samples: int
    dropped: int
    throughput: float
    tokens: float | None
    peak_mib: float
    load_s: float
    size_mib: float
    provider: str
    threads: int
    base_mib: float


class NoisePart(TypedDict):
    """How noisy the machine was at a shape: rounds measured, those no other process disturbed, whether it was busy."""

    shape: str
    rounds: int
    undisturbed: int
    busy: bool


class BenchmarkPart(TypedDict):
    """Original against result, interleaved on this machine; `slower`: models slower than it with 95 % confidence."""

    machine: dict[str, Any]
    rows: list[RowPart]
    ratios: list[RatioPart]
    slower: list[str]
    noise: list[NoisePart]
    warnings: list[str]


class MetricPart(TypedDict):
    """A task metric of both models; `change` has a 95 % bootstrap interval from `low` to `high`."""

    name: str
    reference: float | None
    candidate: float | None
    change: float | None
    low: float | None
    high: float | None


class MovedPart(TypedDict):
    """So many samples for which the original says one class and the result another, by label where there is one."""

    label: int | None
    original: int
    result: int
    samples: int


class SimilarityPart(TypedDict):
    """Cosines of all pairs of samples: mean and largest change, and the share whose nearest other sample stays."""

    samples: int
    mean_change: float
    max_change: float
    neighbours: float


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
    kl_p99: float | None
    kl_max: float | None
    kl_error: NotRequired[float | None]
    agreement_error: NotRequired[float | None]
    moved: list[MovedPart]
    similarity: SimilarityPart | None


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


class LeftOutPart(TypedDict):
    """What a fit errs on samples of the calibration data that none has read, beside that on the evaluation data.

    In the gate value `metric`; `other_kind` says that the two differ by more than noise.
    """

    metric: str
    left_out: float
    evaluation: float
    samples: int
    other_kind: bool


class DriftPart(ValidationPart):
    """Result against original behind a pass; `left_out` where the pass fits weights and samples were left out."""

    left_out: NotRequired[LeftOutPart]


class StreamPart(TypedDict):
    """The residual stream behind a part of a layer: its value and relative L2 error, null where not measured."""

    part: str
    value: str
    error: float | None


class LayerPart(TypedDict):
    """A layer with what became of it: pairs are [before, after], zeros where it is gone.

    `heads` and `kv_heads` are of all its attentions, `width` is that of its feed-forward parts, `weights` counts its
    linears in the result by stored element type.
    """

    index: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    width: tuple[int, int]
    weights: dict[str, int]
    stream: list[StreamPart]


class ValuePart(TypedDict):
    """A value of the original and its counterpart: the relative error, and its `own` where all before it is right.

    `outstanding` is how many times the usual error of its kind that is, 0 for noise and null where most of its kind are
    exact; `outputs` are those it reaches.
    """

    layer: int | None
    role: str
    original: str
    result: str
    value: str
    error: float | None
    own: float | None
    outstanding: float | None
    outputs: list[str]


class MissingPart(TypedDict):
    """A value of the original without a counterpart."""

    layer: int | None
    role: str
    node: str


class ByLayerPart(TypedDict):
    """Two models value by value, on a few samples; errors up to `noise` are those of arithmetic in another order.

    Of `unrelated` models nothing stands out: most products make something else of the same inputs.
    """

    samples: int
    noise: float
    unrelated: bool
    first: ValuePart | None
    culprits: list[ValuePart]
    worst: list[ValuePart]
    values: list[ValuePart]
    missing: list[MissingPart]


class FigurePart(TypedDict):
    """What a decision is made by: a quantity before and after, its change with the 95 % interval, and its gates.

    `at` is the shape or output it holds for. `change` is after over before for size and memory, times faster for
    latency, relative for perplexity, else after minus before; null where nothing was measured before. `passed` is null
    where no gate is about it.
    """

    name: str
    at: str
    unit: str
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    gates: list[str]
    passed: bool | None


class MachinePart(TypedDict):
    """What the figures hold for; `kind` says in words what its instruction sets mean for int8."""

    cpu: str
    kind: str
    cores: int
    features: list[str]
    os: str
    python: str
    onnxcomp: str
