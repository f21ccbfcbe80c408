"""A report as JSON of a versioned schema, and its one-line summary."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from onnxcomp.errors import OnnxcompError
from onnxcomp.files.atomic import replacing
from onnxcomp.machine import machine
from onnxcomp.reports.figures import figures
from onnxcomp.reports.measured_parts import BenchmarkPart
from onnxcomp.reports.outcome import Origin
from onnxcomp.reports.schema import LoweringPart, RecipePart, RemedyPart, ReportPart, StepPart
from onnxcomp.version import REPORT_SCHEMA, __version__

if TYPE_CHECKING:
    from onnxcomp.benchmarking.benchmark import BenchReport
    from onnxcomp.reports.outcome import Lowering, Remedy, Report, Step
    from onnxcomp.validation.results import Validation

__all__ = [
    "finite",
    "headline",
    "quality",
    "schema",
    "slower",
    "speed_headline",
    "text",
    "to_json",
    "versions",
    "write",
]

PACKAGES = ("onnxcomp", "onnx", "onnx-ir", "onnxscript", "numpy", "onnxruntime", "onnxruntime-gpu")


# ---- the schema ------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """JSON schema of report.json."""
    whole = TypeAdapter(ReportPart).json_schema(mode="serialization")
    whole["properties"]["schema_version"] = {"const": REPORT_SCHEMA}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "onnxcomp report"}


# ---- report to JSON --------------------------------------------------------------------------------------------------


def to_json(report: Report) -> ReportPart:
    """A report as plain values that `schema()` describes."""
    origin = report.origin or Origin("", "", "", "", "", "", "", "", 0)
    validation, benchmark = report.validation, report.benchmark
    whole: ReportPart = {
        "schema_version": REPORT_SCHEMA,
        "kind": report.kind,
        "summary": headline(report),
        "command": report.command,
        "models": list(report.models),
        "refused": [*(str(v) for v in report.verdicts if not v.passed), *report.refused],
        "figures": figures(report),
        "job": origin.job_hash,
        "source": {"path": origin.source, "sha256": origin.source_hash},
        "recipe": _recipe(origin),
        "target": origin.target,
        "seed": origin.seed,
        "data": {"calibration": _plain(report.calibration), "evaluation": _plain(report.evaluation)},
        "size": _plain(report.size),
        "steps": [_step(s) for s in report.steps],
        "verdicts": [{"gate": v.gate, "value": v.value, "passed": v.passed} for v in report.verdicts],
        "layers": [_plain(x) for x in report.layers],
        "stream_note": report.stream_note,
        "by_layer": report.by_layer,
        "rungs": [_plain(r) for r in report.rungs],
        "remedy": None if report.remedy is None else _remedy(report.remedy),
        "culprit": _plain(report.culprit),
        "validation": None if validation is None else finite(validation.json()),
        "benchmark": None if benchmark is None else _benchmark(benchmark, report.kind),
        "lowering": None if report.lowering is None else _lowering(report.lowering),
        "placement": _plain(report.placement),
        "integer_check": _plain(report.integer),
        "warnings": list(report.warnings),
        "machine": machine(),  # type: ignore[typeddict-item]
        "versions": versions(),
    }
    plain: ReportPart = finite(whole)
    return plain


def text(report: Report) -> str:
    """The content of report.json."""
    return json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"


def write(report: Report, path: Path) -> Path:
    """Write report.json whole or not at all; raises `OnnxcompError` where the place cannot be written."""
    content = text(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except OSError as e:
        raise OnnxcompError(f"{path}: cannot write the report: {e}") from e
    return path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version(), "onnxcomp": __version__}
    for name in PACKAGES:
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def finite(x: Any) -> Any:
    """Plain JSON values all the way down: NaN and infinity become None, tuples lists, numpy numbers Python's."""
    if isinstance(x, Mapping):
        return {str(k): finite(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset)):
        return [finite(v) for v in x]
    x = x.item() if hasattr(x, "item") else x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (str, int)) else str(x)


def _benchmark(b: BenchReport, kind: str) -> BenchmarkPart:
    """The benchmark, models of a job called by their roles, since its result is timed before it has its final path."""
    called = {} if kind == "bench" else dict(zip(b.models, ("original", "result"), strict=False))
    plain = finite(b.json())
    for row in (*plain["rows"], *plain["ratios"]):
        row["model"] = called.get(row["model"], row["model"])
    plain["slower"] = [called.get(name, name) for name in plain["slower"]]
    part: BenchmarkPart = plain
    return part


def _plain(part: Any) -> Any:
    """A part of the report whose fields are those of the schema."""
    return None if part is None else finite(dataclasses.asdict(part))


def _lowering(x: Lowering) -> LoweringPart:
    ratios = [{"shape": shape, **dataclasses.asdict(r)} for shape, r in x.ratios.items()]
    part: LoweringPart = finite({"kept": x.kept, "why": x.why, "ratios": ratios})
    return part


def _remedy(x: Remedy) -> RemedyPart:
    shares = [{"site": site, "share": share} for site, share in x.shares]
    part: RemedyPart = finite({**dataclasses.asdict(x), "shares": shares})
    return part


def _recipe(x: Origin) -> RecipePart:
    return {"name": x.recipe_name, "text": x.recipe, "sha256": x.recipe_hash, "advice": x.advice}


def _step(s: Step) -> StepPart:
    step: StepPart = finite(dataclasses.asdict(s))
    return step


# ---- the one line that matters ---------------------------------------------------------------------------------------


def slower(report: Report) -> list[str]:
    """Where the benchmark shows the result slower than the original at 95 % confidence: one line per shape."""
    if report.benchmark is None:
        return []
    return [speed([r], report.benchmark.busy) for r in _ratios(report.benchmark) if r["high"] < 1]


def headline(report: Report) -> str:
    """The first line of the summary: that the result is slower, whatever the gates say; else size, speed and drift."""
    if report.kind == "bench" and report.benchmark is not None:
        return speed_headline(report.benchmark) or "one model was timed"
    if worse := slower(report):
        return f"slower than the original: {'; '.join(worse)}"
    parts = []
    if report.size is not None:
        parts.append(f"{report.size.ratio:.2f}x the size")
    if report.benchmark is not None:
        parts.append(speed(_ratios(report.benchmark), report.benchmark.busy))
    if report.validation is not None:
        parts += quality(report.validation)
    return ", ".join(parts) or "nothing was measured"


def quality(v: Validation) -> list[str]:
    """Task metrics of original and result, and the drift of the worst output, by name where there are several."""
    named = [(m, f"{m.name} of '{x}'" if (x := v.read_by(m.name)) else m.name) for m in v.metrics.values()]
    shown = [f"{name} {m.reference:.4g} > {m.candidate:.4g}" for m, name in named]
    broken = [name for name, d in v.outputs.items() if not d.finite]
    if broken:
        return [*shown, f"the result's output '{broken[0]}' is not finite"]
    d, random = v.drift, " on random data" if v.random else ""
    if d.equal:
        lacking = "" if v.equal else f" ({', '.join(v.uncompared)} not compared)"
        return [*shown, f"equal outputs{random}{lacking}"]
    drift = f"SQNR {d.sqnr:.1f} dB" if d.sqnr is not None else f"{d.exact_match:.2%} of entries equal"
    return [
        *shown,
        drift + random + (f" in '{v.worst}', the worst of {len(v.outputs)} outputs" if len(v.outputs) > 1 else ""),
    ]


def speed(ratios: list[dict[str, Any]], busy: Collection[str] = ()) -> str:
    """The smallest ratio with its interval and shape, and that the machine was `busy` at that shape."""
    r = min(ratios, key=lambda r: float(r["value"]))
    noise = " on a busy machine" if r["shape"] in busy else ""
    return f"{r['value']:.2f}x the speed [{r['low']:.2f}, {r['high']:.2f}] at {r['shape']}{noise}"


def speed_headline(b: BenchReport) -> str:
    """One line for a benchmark: who is slower than the first model, else how fast each is."""
    if worse := b.slower():
        return "\n".join(f"{name}: slower than {b.models[0]}: {speed(_ratios(b, name), b.busy)}" for name in worse)
    return "\n".join(f"{name}: {speed(_ratios(b, name), b.busy)}" for name in b.models[1:])


def _ratios(b: BenchReport, model: str | None = None) -> list[dict[str, Any]]:
    """Ratios of a model (by default the last) to the first one, by shape."""
    wanted = model or b.models[-1]
    return [r for r in b.json()["ratios"] if r["model"] == wanted]
