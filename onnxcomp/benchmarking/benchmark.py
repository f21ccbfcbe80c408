"""Benchmark of models on this machine: each in its own process, one running at a time, in alternating blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.benchmarking.worker import Child
from onnxcomp.data.datasets import Dataset
from onnxcomp.data.open_axes import default_shapes, feeds_for, label
from onnxcomp.errors import DataError, ModelError, OnnxcompError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.storage import graphs_of, read
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.machine import machine
from onnxcomp.maths import Array, Float64
from onnxcomp.target import CPU, Target, find

__all__ = ["BenchReport", "Block", "Ratio", "Row", "bench"]

# Cores used by other processes above which a block does not count: with one of two cores taken, the runtime is not 1.5
# times slower but 3 times, since its threads wait for each other spinning.
MAX_FOREIGN = 0.15
PAUSE = 0.04  # seconds before a block; without it, spinning threads of the other model halved rates now and then
ROUNDS = 12  # at least, unless fewer runs are asked for
RESAMPLES = 1000  # of the bootstrap: 25 lie beyond each bound of the 95 % interval


# ---- what was measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Seconds of consecutive runs of one model, and how many cores other processes used meanwhile (None: unknown)."""

    samples: tuple[float, ...]
    foreign: float | None

    @property
    def dirty(self) -> bool:
        """Whether other processes used so much of the machine that the times are not valid."""
        return self.foreign is not None and self.foreign > MAX_FOREIGN


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
        return [i for i, row in enumerate(self.blocks) if not any(b.dirty for b in row)]

    @property
    def used(self) -> list[int]:
        """The clean rounds, or all where fewer than three are clean."""
        return clean if len(clean := self.clean) >= min(3, len(self.blocks)) else list(range(len(self.blocks)))

    def samples(self, model: int) -> Float64:
        """Seconds of one model in the used rounds, `[rounds, runs]`."""
        return np.array([self.blocks[i][model].samples for i in self.used], np.float64)

    def dropped(self, model: int) -> int:
        """Number of runs that were measured but not used."""
        return sum(len(row[model].samples) for row in self.blocks) - self.samples(model).size

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
        """Plain values: rows, ratios by shape, the machine and warnings."""
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
            "warnings": self.warnings,
        }


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model of the benchmark: its file, its graph and its bytes on disk."""

    name: str
    path: Path
    graph: Graph
    size: int


def _model(model: str | Path | Stored) -> _Model:
    path = Path(model)
    if isinstance(model, Stored):
        return _Model(str(path), model.path, model.graph, model.nbytes)
    graphs = graphs_of(path)
    if len(graphs) > 1:
        raise ModelError(f"{path} holds {len(graphs)} graphs ({', '.join(graphs)}); name the .onnx file to benchmark")
    stored = read(path)
    return _Model(str(path), stored.path, stored.graph, stored.nbytes)


def bench(
    models: Sequence[str | Path | Stored],
    target: str | Target = CPU,
    shapes: Sequence[Mapping[str, int]] = (),
    *,
    runs: int = 30,
    threads: int = 0,
    data: Dataset | None = None,
    window: float = 0.3,
    watch: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Time models (files or folders) against the first one, at least `runs` undisturbed runs each per shape.

    `shapes` give sizes of the dynamic axes, by default batch 1 and 8 with sequence 128, less where the model takes
    less; `data` provides real inputs, truncated or repeated to the shape; a block lasts `window` seconds. Raises
    `TargetError` where the runtime falls back to another provider.
    """
    if not models:
        raise ModelError("there is no model to benchmark")
    loaded_models = [_model(m) for m in models]
    asked = [dict(s) for s in shapes] or default_shapes(loaded_models[0].graph)
    report = BenchReport(machine=machine(), models=[c.name for c in loaded_models])
    run = _Run(report, loaded_models, find(target), _Plan(runs, threads, window), data)
    for shape in asked:  # a shape that does not fit is an error before minutes are spent on the others
        run.inputs(shape)
    for i, shape in enumerate(asked):
        run.watch = (lambda done, total, i=i: watch(i * total + done, len(asked) * total)) if watch else None
        run.measure(shape) if shapes else run.measure_shorter(shape)
    return report


@dataclass(frozen=True)
class _Plan:
    """How long to measure."""

    runs: int
    threads: int
    window: float

    def count(self, seconds: float) -> int:
        """Runs per block of `window` seconds (the system counts CPU use in steps of 10 ms), at least two."""
        return max(2, min(1000, round(self.window / max(seconds, 1e-6))))

    def rounds(self, counts: Sequence[int]) -> int:
        """Rounds until each model has its runs; at least `ROUNDS`, so that the interval is meaningful."""
        return max(min(ROUNDS, self.runs), math.ceil(self.runs / min(counts)))


@dataclass
class _Run:
    """The state of one benchmark that all shapes share."""

    report: BenchReport
    models: Sequence[_Model]
    target: Target
    plan: _Plan
    data: Dataset | None
    watch: Callable[[int, int], None] | None = None

    def inputs(self, shape: Mapping[str, int]) -> list[dict[str, Array]]:
        """Feeds for each model."""
        return [feeds_for(c.graph, shape, self.data) for c in self.models]

    def measure_shorter(self, shape: Mapping[str, int]) -> None:
        """Measure at a default shape, with a quarter of the tokens as long as the model does not take as many."""
        length = shape.get("sequence", 0)
        while True:
            try:
                return self.measure({**shape, "sequence": length} if length else shape)
            except (DataError, ModelError):
                if length <= 8:
                    raise
                length //= 4

    def measure(self, shape: Mapping[str, int]) -> None:
        """Measure one shape in fresh processes, so that peak memory is that of the shape."""
        feeds, children, loaded = self.inputs(shape), [], []
        with scratch_folder() as folder, contextlib.ExitStack() as stack:
            for i, (c, arrays) in enumerate(zip(self.models, feeds, strict=True)):
                file = folder / f"{i}.npz"
                np.savez(file, allow_pickle=False, **arrays)
                children.append(stack.enter_context(Child(c.name)))
                fields = {"model": str(c.path.resolve()), "feeds": str(file), "threads": self.plan.threads}
                loaded.append(children[-1].ask("load", target=dataclasses.asdict(self.target), **fields))
            rounds, peaks = _interleave(children, self.plan, self.watch)
        self.report.machine["runtime"] = loaded[0]["runtime"]
        self.report.rounds[label(shape)] = rounds
        self.report.warnings += _warnings(rounds, label(shape))
        for i, c in enumerate(self.models):
            facts = {**loaded[i], "peak_mib": peaks[i]}
            self.report.rows.append(_row(c, label(shape), rounds, i, facts, feeds[i]))


def _interleave(
    children: Sequence[Child], plan: _Plan, watch: Callable[[int, int], None] | None
) -> tuple[Rounds, list[float]]:
    """Measure blocks A B, B A, A B ... until enough rounds are clean, at most three times as many; and peak MiB."""
    counts, warmups, peaks = [], [], []
    for child in children:
        time.sleep(PAUSE)
        median = float(np.median(child.ask("run", warmup=2, count=2)["samples"]))
        counts.append(plan.count(median))
        warmups.append(3 if median < 0.1 else 1)
        peaks.append(0.0)
    needed, rounds = plan.rounds(counts), Rounds(())
    while len(rounds.clean) < needed and len(rounds.blocks) < 3 * needed:
        order = list(range(len(children)))
        row: dict[int, Block] = {}
        for i in order if len(rounds.blocks) % 2 == 0 else reversed(order):
            time.sleep(PAUSE)
            reply = children[i].ask("run", warmup=warmups[i], count=counts[i])
            row[i] = Block(tuple(reply["samples"]), reply["foreign"])
            peaks[i] = max(peaks[i], reply["peak_mib"])
        rounds = Rounds((*rounds.blocks, tuple(row[i] for i in order)))
        if watch:
            watch(min(len(rounds.clean), needed), needed)
    return rounds, peaks


def _warnings(rounds: Rounds, shape: str) -> Iterator[str]:
    total, clean = len(rounds.blocks), len(rounds.clean)
    if any(b.foreign is None for row in rounds.blocks for b in row):
        yield f"{shape}: CPU use of other processes is not available here, so disturbed runs could not be dropped"
    elif clean < 3 and clean < total:
        yield f"{shape}: noisy machine: {total - clean} of {total} rounds were disturbed by others, all are shown"
    elif total - clean > total / 2:
        yield f"{shape}: noisy machine: {total - clean} of {total} rounds were disturbed and dropped"


def _row(
    c: _Model,
    shape: str,
    rounds: Rounds,
    index: int,
    facts: Mapping[str, Any],
    feeds: Mapping[str, Array],
) -> Row:
    ms = rounds.samples(index).reshape(-1) * 1000
    median = float(np.median(ms))
    p90, p99 = (float(x) for x in np.quantile(ms, [0.9, 0.99]))
    first = next(iter(feeds.values()), np.zeros(1))
    batch = first.shape[0] if first.ndim else 1
    ids = first.ndim == 2 and np.issubdtype(first.dtype, np.integer)
    return Row(
        model=c.name,
        shape=shape,
        median_ms=median,
        p90=p90,
        p99=p99,
        min=float(ms.min()),
        samples=ms.size,
        dropped=rounds.dropped(index),
        throughput=1000 * batch / median,
        tokens=1000 * first.size / median if ids else None,
        peak_mib=facts["peak_mib"],
        load_s=facts["load_s"],
        size_mib=c.size / (1 << 20),
        provider=facts["provider"],
        threads=facts["threads"],
        base_mib=facts["base_mib"],
    )
