"""What a decision is made by: size, latency, memory, task metrics and drift, before and after, each with its gates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnxcomp.machine import MIB
from onnxcomp.reports.measured_parts import FigurePart
from onnxcomp.validation.gates import Condition

if TYPE_CHECKING:
    from onnxcomp.benchmarking.benchmark import BenchReport
    from onnxcomp.reports.outcome import Report
    from onnxcomp.validation.drift import Drift
    from onnxcomp.validation.results import Validation

__all__ = ["figures"]

# Drift that is shown for every model that has it; other kinds are shown where a gate is about them.
DRIFT = {"sqnr": "dB", "pooled-sqnr": "dB", "kl": "nats", "exact-match": ""}


def figures(report: Report) -> list[FigurePart]:
    """The figures of a report in the order people ask for them; a benchmark of any number of models has none."""
    if report.kind == "bench":
        return []
    found = []
    if (size := report.size) is not None:
        found.append(_figure("size", "", "bytes", size.original, size.result, size.ratio))
    if report.benchmark is not None:
        found += _speed(report.benchmark)
    if report.validation is not None:
        found += _quality(report.validation, [Condition.parse(v.gate).name for v in report.verdicts])
    judged = [(Condition.parse(v.gate).measured, v) for v in report.verdicts]
    for f in found:
        about = [v for name, v in judged if name in _gates_of(f)]
        f["gates"] = [v.gate for v in about]
        f["passed"] = all(v.passed for v in about) if about else None
    return found


def _figure(
    name: str, at: str, unit: str, before: float | None, after: float, change: float | None = None
) -> FigurePart:
    return {
        "name": name, "at": at, "unit": unit, "before": before, "after": after, "change": change,
        "low": None, "high": None, "gates": [], "passed": None,
    }  # fmt: skip


def _gates_of(f: FigurePart) -> list[str]:
    """Names of the gates that judge a figure, as `Condition.measured` has them."""
    return [f["name"], f"{f['name']}-drop", f"{f['name']}-rise", f"{f['name']}[{f['at']}]"]


def _speed(b: BenchReport) -> Iterator[FigurePart]:
    """Latency and memory of the second model against the first at each shape."""
    for shape in b.shapes:
        rows = [r for r in b.rows if r.shape == shape and r.model in b.models[:2]]
        if len(rows) < 2:
            continue
        (first, second), ratio = rows, b.ratio(1, shape)
        latency = _figure("latency", shape, "ms", first.median_ms, second.median_ms, ratio.value)
        latency["low"], latency["high"] = ratio.low, ratio.high
        yield latency
        used = (first.peak_mib * MIB, second.peak_mib * MIB)
        yield _figure("memory", shape, "bytes", *used, used[1] / max(1.0, used[0]))


def _quality(v: Validation, gated: list[str]) -> Iterator[FigurePart]:
    """Task metrics with the interval of their change, then drift of the worst output."""
    for m in v.metrics.values():
        metric = _figure(m.name, v.read_by(m.name), "", m.reference, m.candidate, m.change)
        metric["low"], metric["high"] = m.low, m.high
        yield metric
    for name, value in v.summary().items():
        if name.rpartition("-")[0] in v.metrics or not (name in DRIFT or name in gated or _words(name, v)):
            continue
        yield _figure(name, _where(v, name, value) if len(v.outputs) > 1 else "", DRIFT.get(name, ""), None, value)


def _where(v: Validation, name: str, value: float) -> str:
    """The output that a value of the summary is of: each number has its own worst one."""
    key = name.replace("-", "_")
    there = [
        k for k, d in v.outputs.items() if getattr(d, key, None) == value and (key != "agreement" or _scored(d, v))
    ]
    return v.worst if v.worst in there or not there else there[0]


def _scored(d: Drift, v: Validation) -> bool:
    """Whether agreement of an output counts: where one has scores of classes, only of such."""
    return d.kl is not None or all(x.kl is None for x in v.outputs.values())


def _words(name: str, v: Validation) -> bool:
    """Whether agreement is that of classes."""
    return name == "agreement" and any(d.kl is not None for d in v.outputs.values())
