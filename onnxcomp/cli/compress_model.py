"""What `onnxcomp compress` and `onnxcomp optimize` say of their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp.cli.console import Output, Watch
from onnxcomp.cli.pipelines import ForPipelines
from onnxcomp.machine import size_text
from onnxcomp.reports import json_report as report
from onnxcomp.reports import tables
from onnxcomp.reports.outcome import Result

__all__ = ["show"]


def show(
    output: Output, out: Path | None, files: ForPipelines, run: Callable[[Watch | None], dict[str, Result]]
) -> None:
    """Run a compression with a progress bar and say what came of it, to pipelines as well."""
    with files.recording() as tell, output.progress() as watch:
        results = run(watch)
        whole = next((r.whole for r in results.values() if r.whole is not None), None)
        tell({"": whole} if whole is not None else {name: r.report for name, r in results.items()})
    graphs = {name: report.to_json(r.report) for name, r in results.items()}
    lines, shown = [], []
    if whole is not None:
        lines.append(report.headline(whole))
        shown += tables.report_tables(whole, verbose=output.verbose)
    for name, result in results.items():
        line = report.headline(result.report) if out else _planned(result)
        lines.append(line if len(results) == 1 else f"{name}: {line}")
        if whole is None or output.verbose:
            shown += tables.report_tables(result.report, verbose=output.verbose)
    paths = {name: str(r.path) for name, r in results.items() if r.path is not None}
    shown.append(f"written to {', '.join(paths.values())}" if paths else "nothing was written (--plan)")
    facts: dict[str, Any] = {"out": str(out) if out else None, "files": paths, "graphs": graphs}
    facts |= {"model": report.to_json(whole)} if whole is not None else {}
    output.show(facts, "\n".join(lines), *shown)


def _planned(result: Result) -> str:
    """What a dry run says first: sites, parameters, multiplications, bytes, and passes that need data."""
    steps, plan = result.report.steps, result.report.plan
    assert plan is not None, "only a dry run has a plan"
    before, after = plan.nbytes
    changed, eligible = sum(s.changed for s in steps), sum(s.eligible for s in steps)
    counts = [
        f"{k} {a / 1e6:.2f} > {b / 1e6:.2f} M" for k, (a, b) in (("parameters", plan.parameters), ("macs", plan.macs))
    ]
    line = f"would change {changed} of {eligible} sites; {'; '.join(counts)}; {size_text(before)} > {size_text(after)}"
    return line + (f"; not planned without data: {', '.join(plan.needs_data)}" if plan.needs_data else "")
