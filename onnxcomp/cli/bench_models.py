"""What `onnxcomp bench` measures, prints and writes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.benchmarking.benchmark import bench
from onnxcomp.benchmarking.generation import bench_generation
from onnxcomp.cli.console import Output
from onnxcomp.data.open_axes import label
from onnxcomp.engine.report_file import check_report_file, write_report
from onnxcomp.errors import RecipeError
from onnxcomp.reports import json_report, tables
from onnxcomp.reports.outcome import Report
from onnxcomp.target import find

__all__ = ["show"]


def show(
    output: Output,
    models: Sequence[Path],
    target: str,
    shapes: Sequence[Mapping[str, int]],
    generate: Mapping[str, int] | None,
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
    aim = find(target)
    if generate is not None and (generate.keys() - {"prompt", "new"} or shapes or budget):
        raise RecipeError("--generate takes prompt=TOKENS,new=TOKENS, and neither --shape nor --budget")
    with output.progress() as watch:
        if generate is not None:
            found = bench_generation(models, aim, **generate, runs=runs, threads=threads, graph=graph, watch=watch)
        else:
            found = bench(models, aim, shapes, runs=runs, budget=budget, threads=threads, graph=graph, watch=watch)
    words = ["onnxcomp", "bench", *map(str, models), *(x for s in shapes for x in ("--shape", label(s)))]
    given: dict[str, object] = {"--target": None if target == "cpu" else target, "--runs": runs, "--budget": budget}
    given |= {"--generate": None if generate is None else label(generate)}
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
