"""Whether lowering paid for the whole model: timed against the unlowered one and the source; the better one is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.element_types import narrowest_float
from onnxcomp.benchmarking import benchmark
from onnxcomp.benchmarking.benchmark import Progress
from onnxcomp.benchmarking.results import LEAST, BenchReport, Ratio, Rounds
from onnxcomp.data import open_axes
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import OnnxcompError
from onnxcomp.files import storage
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.reports.outcome import Lowering, Report, Result
from onnxcomp.runtime import sessions, trial
from onnxcomp.target import Target

__all__ = ["confirm", "pick", "timed"]

# Relative difference of outputs that equivalent forms never reach, by the element type that they compute in.
NOISE = {ir.DataType.FLOAT: 1e-3, ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}
# Seconds of a benchmark at least where no time for measuring is given: on two cores without VNNI three rounds each at
# 1 x 128 and 8 x 128 tokens of an encoder of 20 M parameters, whose int8 job then ends within 25 s.
SHORTEST = 7.0
LARGER = 1.05  # a lowered model that is smaller than the unlowered one by this never gives way
CLEAR = 0.95  # speed below which a lowered model gives way after fewer rounds than an interval of 95 % needs


def confirm(
    source: Stored, written: Stored, result: Result, settings: Settings, *, measure: bool, watch: Progress | None = None
) -> Stored:
    """Compare the written result with its unlowered form; write that one instead where it is the better one.

    Returns what is written in the end. Without `measure` only the outputs are compared. What was found goes into the
    report, and the benchmark of source and result too.
    """
    r, other = result.report, result.unlowered
    if other is None:
        return written
    if why := _illegal(other, settings.target):
        r.lowering = Lowering("lowered", f"not compared with the unlowered model: {why}")
        return written
    if why := _differs(source, other, written, r):
        return _keep(result, written.path, f"the lowered model {why}")
    return _time(source, written, result, settings, watch) if measure else written


def _illegal(g: Graph, target: Target) -> str:
    if g.opset > target.newest_opset:
        return f"'{target.name}' takes operators up to opset {target.newest_opset}"
    lacking = sorted({n.op_type for n in g.nodes() if n.domain == "" and n.op_type in target.lacks})
    return f"'{target.name}' has no {lacking[0]}" if lacking else ""


def _differs(source: Stored, other: Graph, written: Stored, r: Report) -> str:
    """How the lowered model's outputs are wrong, empty if they are not; not asked behind quantizers."""
    if any(s.fidelity == "lossy" and s.changed for s in r.steps):
        return ""
    try:
        feeds = open_axes.feeds_for(other, {k: min(n, 16) for k, n in open_axes.default_shapes(other)[0].items()})
    except OnnxcompError:
        return ""  # an open axis of unknown size
    try:
        got = trial.run(written, feeds)
    except OnnxcompError as e:
        got, why = {}, f"does not run: {e}"
    try:
        if not got:  # nor may the source, for which only the worker has a time limit
            trial.run(source, feeds)
        with sessions.Session(other, prepack=False) as session:
            want = session.run(feeds)
    except OnnxcompError:
        return ""  # a model that runs at its own sizes only
    if not got:
        return why
    noise = NOISE[narrowest_float(other)]
    for name, a in want.items():
        if a.dtype.kind == "f" and a.size and np.isfinite(a).all():
            error = float(np.abs(a.astype(np.float64) - got[name]).max() / max(float(np.abs(a).max()), 1e-30))
            if not error <= noise:
                return f"differs from the unlowered one by {error:.1e} in '{name}'"
    return ""


def timed(models: Sequence[Stored], r: Report, s: Settings, watch: Progress | None) -> BenchReport:
    """The benchmark of models in what is left of the time for measuring, by default as long as the work took."""
    left = _length(r) if s.budget is None else max(0.0, s.budget - _choosing(r))
    return benchmark.bench(models, s.target, s.shapes, budget=left, threads=s.threads, watch=watch)


def _choosing(r: Report) -> float:
    return sum(step.choosing for step in r.steps if not step.cached)


def _length(r: Report) -> float:
    """Seconds of a benchmark: as long as the passes took, so that measuring is never most of a job."""
    work = sum(step.seconds - step.choosing for step in r.steps if not step.cached)
    return min(benchmark.BUDGET, max(SHORTEST, work))


def _time(source: Stored, written: Stored, result: Result, settings: Settings, watch: Progress | None) -> Stored:
    """Source, result and unlowered model in turns; the result gives way where it is slower with 95 % confidence."""
    other = result.unlowered
    assert other is not None
    with scratch_folder() as folder:
        path = storage.save(other, folder, name="unlowered.onnx")
        plain = Stored(path, other, tuple(sorted(folder.glob(f"{path.stem}*"))))
        small = plain.nbytes <= LARGER * written.nbytes  # codes of 2 bits stand in 4 before they are lowered
        found = timed([source, written, plain], result.report, settings, watch)
    ratios = {shape: found.ratio(1, shape, base=2) for shape in found.shapes}
    worse = [s for s, x in ratios.items() if x.high < (1 if len(found.rounds[s].used) >= LEAST else CLEAR)]
    better = [shape for shape, x in ratios.items() if x.low > 1]
    total = float(np.exp(np.mean([np.log(x.value) for x in ratios.values()])))
    if worse and total < 1 and small and sessions.integer_check(other).ok:
        result.report.benchmark = pick(found, (0, 2), str(written))
        return _keep(result, written.path, f"the lowered model was slower than it at {'; '.join(worse)}", ratios)
    why = f"faster than the unlowered model at {'; '.join(better)}" if better else "level with the unlowered model"
    why += f", slower at {'; '.join(worse)}" if worse else ""
    result.report.lowering = Lowering("lowered", why, ratios)
    result.report.benchmark = pick(found, (0, 1), str(written))
    return written


def _keep(result: Result, path: Path, why: str, ratios: Mapping[str, Ratio] | None = None) -> Stored:
    """Write the unlowered model in the result's place and say so."""
    assert result.unlowered is not None
    storage.save(result.unlowered, path, metadata=result.report.metadata)
    result.model, result.report.validation = result.unlowered, result.unlowered_validation
    result.report.lowering = Lowering("unlowered", why, ratios or {})
    result.report.warnings.append(f"lowering was undone: {why}")
    return storage.read(path)


def pick(b: BenchReport, kept: Sequence[int], name: str) -> BenchReport:
    """A benchmark with only two of its models, the second called `name`."""
    rounds = {
        shape: Rounds(tuple(tuple(row[i] for i in kept) for row in found.blocks)) for shape, found in b.rounds.items()
    }
    count = len(b.models)
    rows = [b.rows[at + i] for at in range(0, len(b.rows), count) for i in kept]
    rows = [dataclasses.replace(row, model=name) if at % 2 else row for at, row in enumerate(rows)]
    return dataclasses.replace(b, rows=rows, models=[b.models[kept[0]], name], rounds=rounds)
