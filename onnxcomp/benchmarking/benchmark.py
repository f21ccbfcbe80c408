"""Benchmark of models on this machine: each in its own process, one running at a time, in alternating blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.benchmarking.results import LEAST, BenchReport, Block, Ratio, Rounds, Row
from onnxcomp.benchmarking.worker import Child
from onnxcomp.data.arguments import MOST_THREADS, shapes_of, whole
from onnxcomp.data.datasets import Dataset
from onnxcomp.data.open_axes import default_shapes, feeds_for, label
from onnxcomp.errors import DataError, ModelError, TargetError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.storage import one_graph, read
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.machine import machine
from onnxcomp.maths import Array
from onnxcomp.target import CPU, Target, find

__all__ = ["BUDGET", "BenchReport", "Block", "Progress", "Ratio", "Row", "bench"]

Progress = Callable[[str, int, int], None]  # what is under way, how much of it is done, and how much there is

PAUSE = 0.04  # seconds before a block; without it, spinning threads of the other model halved rates now and then
WINDOW = 0.15  # seconds of a block; the system counts CPU use in steps of 10 ms, so a round of them is judged, not each
ROUNDS = 12  # at most where no number of runs is asked for, else at least: more do not narrow the interval by much
BUDGET = 60.0  # seconds, where no number of runs is asked for
COLD = 2.0  # times that a first run takes of a later one, at most, for what is said of the length of a block
FEWEST = 3  # rounds that are measured whatever the budget: the first number that has a middle one


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model of the benchmark: its file, its graph and its bytes on disk."""

    name: str
    path: Path
    graph: Graph
    size: int


def model_of(model: str | Path | Stored, graph: str | None) -> _Model:
    """A model of a benchmark; raises `ModelError`."""
    path = Path(model)
    if isinstance(model, Stored):
        return _Model(str(path), model.path, model.graph, model.nbytes)
    stored = read(one_graph(path, graph))
    return _Model(str(path), stored.path, stored.graph, stored.nbytes)


def bench(
    models: Sequence[str | Path | Stored],
    target: str | Target = CPU,
    shapes: Sequence[Mapping[str, int]] = (),
    *,
    runs: int | None = None,
    budget: float | None = None,
    threads: int = 0,
    data: Dataset | None = None,
    graph: str | None = None,
    window: float = WINDOW,
    watch: Progress | None = None,
) -> BenchReport:
    """Time models (files or folders) against the first one, in turns, at each shape.

    Without `runs`, until the ratios are known to 2 % or for twelve rounds; else at least so many undisturbed runs of
    each. No round begins after `budget` seconds (60 where `runs` is not given). `shapes` give sizes of the dynamic
    axes, by default batch 1 and 8 with sequence 128, less where the model takes less; `data` provides real inputs,
    truncated or repeated to the shape; a block lasts `window` seconds; `graph` names one in folders that hold several.
    Raises `TargetError` where the runtime falls back to another provider.
    """
    if isinstance(models, (str, bytes, Path, Stored)) or not models:
        raise ModelError("there is no model to benchmark" if not models else "models is a list, also of one model")
    runs, threads, shapes = whole("runs", runs, 1), whole("threads", threads, 0, MOST_THREADS), shapes_of(shapes)
    if not (aim := find(target)).here:
        raise TargetError(
            f"'{aim.name}' is another kind of machine, whose speed cannot be measured here: run onnxcomp bench there, "
            "or leave --target out to time this machine"
        )
    loaded_models = [model_of(m, graph) for m in models]
    asked = list(shapes) or default_shapes(loaded_models[0].graph)
    limit = BUDGET if budget is None and runs is None else budget
    end = math.inf if limit is None else time.perf_counter() + limit
    report = BenchReport(machine=machine(), models=[c.name for c in loaded_models])
    run = _Run(report, loaded_models, find(target), _Plan(runs, threads, window), data, end, watch)
    for shape in asked:  # a shape that does not fit is an error before minutes are spent on the others
        run.inputs(shape)
    for i, shape in enumerate(asked):
        run.left = len(asked) - i
        run.measure(shape) if shapes else run.measure_shorter(shape)
    return report


@dataclass(frozen=True)
class _Plan:
    """How long to measure."""

    runs: int | None
    threads: int
    window: float

    def count(self, seconds: float) -> int:
        """Runs per block: one where it alone fills it (more rounds tell more than longer ones), else at least two."""
        return 1 if seconds >= self.window else max(2, min(1000, round(self.window / max(seconds, 1e-6))))

    def rounds(self, counts: Sequence[int]) -> int:
        """Rounds at most, or until each model has the asked runs; then `ROUNDS` as well, for a meaningful interval."""
        if self.runs is None:
            return ROUNDS
        return max(min(ROUNDS, self.runs), math.ceil(self.runs / min(counts)))

    def done(self, rounds: Rounds, needed: int, deadline: float) -> bool:
        """Whether to stop: enough, narrow enough, too many disturbed ones, or out of time."""
        if len(rounds.clean) >= needed or len(rounds.blocks) >= 3 * needed:
            return True
        late = time.perf_counter() > deadline and len(rounds.blocks) >= min(FEWEST, needed)
        return late or (self.runs is None and rounds.narrow)


@dataclass
class _Run:
    """The state of one benchmark that all shapes share: `end` is its deadline, `left` how many shapes are to come."""

    report: BenchReport
    models: Sequence[_Model]
    target: Target
    plan: _Plan
    data: Dataset | None
    end: float = math.inf
    watch: Progress | None = None
    left: int = 1

    def inputs(self, shape: Mapping[str, int]) -> list[dict[str, Array]]:
        """Feeds for each model."""
        return [feeds_for(c.graph, shape, self.data) for c in self.models]

    def measure_shorter(self, shape: Mapping[str, int]) -> None:
        """Measure at a default shape, with a quarter of the tokens as long as the model does not take as many."""
        lengths = {k: shape[k] for k in ("sequence", "past") if shape.get(k, 0) > 1}
        while True:
            try:
                return self.measure({**shape, **lengths})
            except (DataError, ModelError):
                if max(lengths.values(), default=0) <= 8:
                    raise
                lengths = {k: n // 4 for k, n in lengths.items()}

    def measure(self, shape: Mapping[str, int]) -> None:
        """Measure one shape in fresh processes, so that peak memory is that of the shape."""
        feeds, named = self.inputs(shape), label(shape)
        begun = time.perf_counter()
        deadline = begun + max(0.0, self.end - begun) / self.left
        with scratch_folder() as folder, contextlib.ExitStack() as stack:
            children = [stack.enter_context(Child(c.name)) for c in self.models]  # all of them import at once
            for child in children:
                child.ask("ready", target=dataclasses.asdict(self.target))
            loaded = []
            for i, (c, arrays) in enumerate(zip(self.models, feeds, strict=True)):
                file = folder / f"{i}.npz"
                np.savez(file, allow_pickle=False, **arrays)
                fields = {"model": str(c.path.resolve()), "feeds": str(file), "threads": self.plan.threads}
                loaded.append(children[i].ask("load", target=dataclasses.asdict(self.target), **fields))
            firsts = [float(x["first_s"]) for x in loaded]
            rounds, peaks = _interleave(children, firsts, self.plan, deadline, self._watcher(named))
        self.report.machine["runtime"] = loaded[0]["runtime"]
        self.report.rounds[named] = rounds
        late = time.perf_counter() > deadline and len(rounds.used) < LEAST
        self.report.warnings += warnings(rounds, named, late)
        for i, c in enumerate(self.models):
            facts = {**loaded[i], "peak_mib": peaks[i]}
            self.report.rows.append(row(c, named, rounds, i, facts, *_amounts(feeds[i])))

    def _watcher(self, shape: str) -> Callable[[Rounds, int], None] | None:
        watch = self.watch
        if watch is None:
            return None

        def told(rounds: Rounds, needed: int) -> None:
            clean = min(len(rounds.clean), needed)
            lost = len(rounds.blocks) - clean
            watch(f"measuring {shape}, rounds" + (f" ({lost} disturbed by others)" if lost else ""), clean, needed)

        return told


def _interleave(
    children: Sequence[Child],
    firsts: Sequence[float],
    plan: _Plan,
    deadline: float,
    watch: Callable[[Rounds, int], None] | None,
) -> tuple[Rounds, list[float]]:
    """Measure blocks A B, B A, A B ... until the plan has enough; and peak MiB."""
    counts, warmups, peaks = [], [], []
    for child, seconds in zip(children, firsts, strict=True):
        if seconds < COLD * plan.window:  # else a block is one run anyhow
            time.sleep(PAUSE)
            seconds = float(child.ask("run", warmup=0, count=1)["samples"][0])
        counts.append(plan.count(seconds))
        warmups.append(_warmup(seconds))
        peaks.append(0.0)
    needed, rounds = plan.rounds(counts), Rounds(())
    while not plan.done(rounds, needed, deadline):
        if watch:
            watch(rounds, needed)
        order = list(range(len(children)))
        row: dict[int, Block] = {}
        for i in order if len(rounds.blocks) % 2 == 0 else reversed(order):
            time.sleep(PAUSE)
            reply = children[i].ask("run", warmup=warmups[i], count=counts[i])
            row[i] = Block(tuple(reply["samples"]), reply["foreign"])
            peaks[i] = max(peaks[i], reply["peak_mib"])
        rounds = Rounds((*rounds.blocks, tuple(row[i] for i in order)))
    return rounds, peaks


def _warmup(seconds: float) -> int:
    """Runs before a block: what the other models evicted from caches is back after about 10 ms."""
    return 3 if seconds < 0.01 else 1 if seconds < 0.1 else 0


def warnings(rounds: Rounds, shape: str, late: bool = False) -> Iterator[str]:
    """What a user should know of rounds that others disturbed."""
    total, clean = len(rounds.blocks), len(rounds.clean)
    if any(b.foreign is None for row in rounds.blocks for b in row):
        yield f"{shape}: CPU use of other processes is not available here, so disturbed runs could not be dropped"
    elif rounds.busy and clean < 3:
        yield f"{shape}: noisy machine: {total - clean} of {total} rounds were disturbed by others, all are shown"
    elif rounds.busy:
        yield f"{shape}: noisy machine: {total - clean} of {total} rounds were disturbed and dropped"
    if late:
        yield f"{shape}: time was up after {total} rounds, so the interval is wide; --budget gives more"


def _amounts(feeds: Mapping[str, Array]) -> tuple[int, int | None]:
    """Samples and tokens of the first input; None where it is no text."""
    first = next(iter(feeds.values()), np.zeros(1))
    ids = first.ndim == 2 and np.issubdtype(first.dtype, np.integer)
    return (first.shape[0] if first.ndim else 1), first.size if ids else None


def row(
    c: _Model, shape: str, rounds: Rounds, index: int, facts: Mapping[str, Any], batch: int, tokens: int | None
) -> Row:
    """What was measured of one model, whose runs read so many samples and tokens (None: no text)."""
    ms = rounds.samples(index).reshape(-1) * 1000
    median = float(np.median(ms))
    p90, p99 = (float(x) for x in np.quantile(ms, [0.9, 0.99]))
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
        tokens=None if tokens is None else 1000 * tokens / median,
        peak_mib=facts["peak_mib"],
        load_s=facts["load_s"],
        size_mib=c.size / (1 << 20),
        provider=facts["provider"],
        threads=facts["threads"],
        base_mib=facts["base_mib"],
    )
