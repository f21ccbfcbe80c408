"""What `onnxcomp bench` measures, prints and writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.benchmarking.benchmark import bench
from onnxcomp.cli.console import Output
from onnxcomp.data.open_axes import label
from onnxcomp.engine.report_file import check_report_file, write_report
from onnxcomp.reports import json_report, tables
from onnxcomp.reports.outcome import Report
from onnxcomp.target import find

__all__ = ["show"]


def show(
    output: Output,
    models: Sequence[Path],
    target: str,
    shapes: Sequence[Mapping[str, int]],
    *,
    runs: int | None,
    budget: float | None,
    threads: int,
    graph: str | None,
    report: Path | None,
    html: bool,
) -> None:
    """Time models against the first, say what came of it, and write a report where one is asked for."""
    check_report_file(report, html=html)
    with output.progress() as watch:
        found = bench(models, find(target), shapes, runs=runs, budget=budget, threads=threads, graph=graph, watch=watch)
    words = ["onnxcomp", "bench", *map(str, models), *(x for s in shapes for x in ("--shape", label(s)))]
    given: dict[str, object] = {"--target": None if target == "cpu" else target, "--runs": runs, "--budget": budget}
    given |= {"--threads": threads or None, "--graph": graph}
    words += [w for k, v in given.items() if v is not None for w in (k, str(v))]
    written = []
    if report is not None:
        named = Report(kind="bench", benchmark=found, models=tuple(found.models), command=shlex.join(words))
        write_report(named, report, html=html)
        written = [f"report written to {report}"]
    notes = [f"note: {w}" for w in found.warnings]
    headline = json_report.speed_headline(found)
    output.show(json_report.finite(found.json()), headline, tables.benchmark(found), *notes, *written)
