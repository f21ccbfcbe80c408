"""What a benchmark measured: blocks of runs in rounds, and the ratios of models with their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcomp.data.open_axes import label
from onnxcomp.errors import OnnxcompError
from onnxcomp.maths import RESAMPLES, Float64

__all__ = ["LEAST", "BenchReport", "Block", "Ratio", "Rounds", "Row"]

# Cores used by other processes above which a round does not count: with one of two cores taken, the runtime is not 1.5
# times slower but 3 times, since its threads wait for each other spinning.
MAX_FOREIGN = 0.15
# When the ratios are known well enough: a sequential interval of fixed width (Chow and Robbins, Annals of Mathematical
# Statistics 36, 1965), that is, the first time that no interval reaches further from its ratio than `NARROW`.
NARROW = 0.02  # relative: a ratio is shown with two decimals
LEAST = 6  # rounds: the range of six values holds their median with 97 %, fewer give no interval of 95 %


@dataclass(frozen=True)
class Block:
    """Seconds of consecutive runs of one model, and how many cores other processes used meanwhile (None: unknown)."""

    samples: tuple[float, ...]
    foreign: float | None


def disturbed(blocks: Sequence[Block]) -> bool:
    """Whether other processes used so much of the machine in these blocks together that their times are not valid."""
    known = [(b.foreign, sum(b.samples)) for b in blocks if b.foreign is not None]
    return sum(f * s for f, s in known) > MAX_FOREIGN * sum(s for _, s in known)


@dataclass(frozen=True)
class Row:
    """One model at one shape: times in ms, `throughput` in samples per second.

    `peak_mib` is the memory of its whole process, of which `base_mib` was there before the model was loaded.
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
    base_mib: float = 0.0


@dataclass(frozen=True)
class Ratio:
    """How many times faster than another model (above 1: faster), with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """All blocks at one shape: `blocks[round][model]`."""

    blocks: tuple[tuple[Block, ...], ...]

    @property
    def clean(self) -> list[int]:
        """Indices of the rounds in which no model was disturbed by other processes."""
        return [i for i, row in enumerate(self.blocks) if not disturbed(row)]

    @property
    def used(self) -> list[int]:
        """The clean rounds, or all where fewer than three are clean."""
        return clean if len(clean := self.clean) >= min(3, len(self.blocks)) else list(range(len(self.blocks)))

    @property
    def busy(self) -> bool:
        """Whether others disturbed so many rounds that disturbed ones are used, or more than half were dropped."""
        dirty = len(self.blocks) - len(self.clean)
        return dirty > 0 and (len(self.clean) < 3 or dirty > len(self.blocks) / 2)

    def samples(self, model: int) -> Float64:
        """Seconds of one model in the used rounds, `[rounds, runs]`."""
        return np.array([self.blocks[i][model].samples for i in self.used], np.float64)

    def dropped(self, model: int) -> int:
        """Number of runs that were measured but not used."""
        return sum(len(row[model].samples) for row in self.blocks) - self.samples(model).size

    @property
    def narrow(self) -> bool:
        """Whether enough rounds are clean and every model's ratio to the first is known to `NARROW`."""
        if len(self.clean) < LEAST:
            return False
        ratios = [self.ratio(i) for i in range(1, len(self.blocks[0]))]
        return all(max(r.high - r.value, r.value - r.low) <= NARROW * r.value for r in ratios)

    def ratio(self, model: int, base: int = 0) -> Ratio:
        """Median over rounds of the ratio of both models' block medians, which cancels drift of the machine's speed."""
        a, b = (np.median(self.samples(i), axis=1) for i in (base, model))
        ratios = a / b
        picks = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
        return Ratio(float(np.median(ratios)), float(low), float(high))


@dataclass
class BenchReport:
    """Rows in the order of shapes, then models; ratios are against the first model."""

    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    rounds: dict[str, Rounds] = field(default_factory=dict)

    @property
    def shapes(self) -> list[str]:
        """The measured shapes, as labels."""
        return list(self.rounds)

    @property
    def busy(self) -> list[str]:
        """The shapes at which other processes disturbed the measurement."""
        return [shape for shape, r in self.rounds.items() if r.busy]

    def ratio(self, index: int, shape: str | Mapping[str, int], base: int = 0) -> Ratio:
        """Speed-up of model `index` over model `base`; raises `OnnxcompError` for what was not measured."""
        key = shape if isinstance(shape, str) else label(shape)
        if key not in self.rounds or not (0 <= index < len(self.models) and 0 <= base < len(self.models)):
            known = "; ".join(self.rounds)
            raise OnnxcompError(
                f"model {index} at '{key}' was not measured; there are {len(self.models)} models at {known}"
            )
        return self.rounds[key].ratio(index, base)

    def slower(self) -> list[str]:
        """Models that are slower than the first at some shape with the entire interval below 1."""
        slower = [i for i in range(1, len(self.models)) if any(r.ratio(i).high < 1 for r in self.rounds.values())]
        return [self.models[i] for i in slower]

    def json(self) -> dict[str, Any]:
        """Plain values: rows, ratios by shape, the machine, how noisy it was, and warnings."""
        ratios = [
            {"model": name, "shape": shape, **dataclasses.asdict(r.ratio(i))}
            for shape, r in self.rounds.items()
            for i, name in enumerate(self.models)
        ]
        return {
            "machine": self.machine,
            "rows": [dataclasses.asdict(r) for r in self.rows],
            "ratios": ratios,
            "slower": self.slower(),
            "noise": [
                {"shape": shape, "rounds": len(r.blocks), "undisturbed": len(r.clean), "busy": r.busy}
                for shape, r in self.rounds.items()
            ],
            "warnings": self.warnings,
        }
