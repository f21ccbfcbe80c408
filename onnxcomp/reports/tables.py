"""Reports as tables for people."""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from onnxcomp.machine import MIB, megabytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxcomp.benchmarking.benchmark import BenchReport
    from onnxcomp.blocks.stored_parts import StoredPart
    from onnxcomp.engine.catalog import PassInfo
    from onnxcomp.lowering.choices import Choice
    from onnxcomp.reports.outcome import Culprit, Remedy, Report, Rung, Step
    from onnxcomp.validation.gates import Verdict
    from onnxcomp.validation.results import Validation

__all__ = [
    "benchmark",
    "checks",
    "choices",
    "culprit",
    "fact",
    "grouped",
    "option_table",
    "outputs",
    "pass_table",
    "preset_table",
    "remedy",
    "report_tables",
    "table",
    "validation",
    "verdicts",
]

SHOWN = 3  # declined sites named per reason
NARROW_TYPES = ("int8", "uint8", "int4", "uint4", "float16", "bfloat16", "float8")  # what weights are compressed to
LISTED = 1e-3  # of the largest part: what is smaller is not listed
OUTPUTS = 8  # outputs listed unless all are asked for, the worst ones


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    t = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(columns):
        t.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        t.add_row(*("" if x is None else str(x) for x in row))
    return t


def report_tables(report: Report, *, verbose: bool = False) -> list[RenderableType]:
    """What was measured; with `verbose`, or for a dry run, also what was done, and what was left alone and why."""
    found = _work(report, verbose) if verbose or report.plan is not None else _changed(report.steps)
    if report.rungs:
        found.append(rungs(report.rungs))
    if report.verdicts:
        found.append(verdicts(report.verdicts))
    if report.validation is not None:
        found.append(validation(report.validation))
        if len(report.validation.outputs) > 1:
            found.append(outputs(report.validation, every=verbose))
    if report.size is not None and report.size.parts:
        found += stored(report.size.parts)
    if report.benchmark is not None:
        found.append(benchmark(report.benchmark, ("original", "result"), every=verbose))
        found += [f"note: {w}" for w in report.benchmark.warnings]
    if (check := report.integer) is not None and check.quantized_linears and (verbose or not check.ok):
        found.append(
            f"integer check {'passed' if check.ok else 'FAILED'}: {check.integer_products} integer products for "
            f"{check.quantized_linears} quantized linears, {check.dequantized_weights} weights dequantized at run time"
        )
    if (said := report.lowering) is not None and verbose:
        found.append(f"lowering: the {said.kept} model was kept: {said.why}")
    if (where := report.placement) is not None and (where.elsewhere or not where.ran):
        lost = f"; not on {where.provider}: {', '.join(where.elsewhere)}" if where.elsewhere else ""
        found.append(f"placement: {where.detail or 'run'}{lost}")
    return [*found, *(f"note: {w}" for w in report.warnings)]


def _work(report: Report, verbose: bool) -> list[RenderableType]:
    """Passes, what they cut and left alone, and the forms that were chosen."""
    found: list[RenderableType] = [steps(report.steps)]
    if any(s.noted for s in report.steps):
        found.append(noted(report.steps, every=verbose))
    if any(s.declined for s in report.steps):
        found.append(declined(report.steps, every=verbose))
    if any(s.choices for s in report.steps):
        found.append(choices([c for s in report.steps for c in s.choices], every=verbose))
    return found


def _changed(found: Sequence[Step]) -> list[RenderableType]:
    """One line on what lossy passes changed of what they found."""
    lossy = [f"{s.name} {s.changed} of {s.eligible}" for s in found if s.fidelity == "lossy"]
    return [f"changed: {', '.join(lossy)} sites (-v: each pass, form and reason)"] if lossy else []


def steps(found: Sequence[Step]) -> Table:
    """One row per pass."""
    rows = [
        (
            s.spec,
            s.eligible,
            s.changed,
            len(s.declined),
            f"{s.nodes[0]} > {s.nodes[1]}",
            f"{megabytes(s.nbytes[0])} > {megabytes(s.nbytes[1])}",
            _drift(s),
            f"{s.seconds:.1f}" + (" (cached)" if s.cached else ""),
        )
        for s in found
    ]
    return table("Passes", ("pass", "eligible", "changed", "declined", "nodes", "MB", "drift", "s"), rows)


def noted(found: Sequence[Step], *, every: bool = False) -> Table:
    """What became of sites, equal ones together; all of them by name with `every`."""
    rows = [(s.name, *row) for s in found for row in grouped([(n.site, n.what) for n in s.noted], every=every)]
    return table("Cut", ("pass", "sites", "what", "such as"), rows, left=4)


def declined(found: Sequence[Step], *, every: bool = False) -> Table:
    """Sites left alone, grouped by reason; all of them by name with `every`."""
    rows = [(s.name, *row) for s in found for row in grouped([(d.site, d.why) for d in s.declined], every=every)]
    return table("Left alone", ("pass", "sites", "why", "such as"), rows, left=4)


def choices(found: Sequence[Choice], *, every: bool = False) -> Table:
    """What each kind of site became and why; with `every` each form with its times."""
    rows: list[tuple[Any, ...]] = []
    for c in found:
        rows.append((c.kind, len(c.sites), c.site, c.form, c.reason, c.source))
        for x in c.candidates if every else ():
            times = ", ".join(f"{ms:.3f} ms" for ms in x.ms)
            ratio = "" if x.ratio is None else f"{x.ratio:.2f}x [{x.low:.2f}, {x.high:.2f}]"
            rows.append(("", "", times, f"  {x.form}", ratio or x.note, ""))
    return table("Forms", ("kind", "sites", "what", "form", "why", "from"), rows, left=6)


def verdicts(found: Sequence[Verdict]) -> Table:
    """Gates with what was measured."""
    rows = [(v.gate, _number(v.value, "not measured"), "passed" if v.passed else "REFUSED") for v in found]
    return table("Gates", ("gate", "measured", "verdict"), rows)


def rungs(found: Sequence[Rung]) -> Table:
    """What each recipe of a ladder gave and cost."""
    shown = ("sqnr", "pooled-sqnr", "kl", "exact-match", "accuracy-drop", "perplexity-rise")
    used = [k for k in shown if any(k in r.values for r in found)]
    rows = [
        (
            r.name,
            *("" if k not in r.values else _number(r.values[k]) for k in used),
            "" if r.nbytes is None else megabytes(r.nbytes),
            f"{r.seconds:.1f}",
            r.refused or "met the gates",
        )
        for r in found
    ]
    return table("Rungs", ("rung", *used, "MB", "s", "gates"), rows)


def validation(v: Validation) -> Table:
    """Drift and task metrics on held-out data, metrics with their interval."""
    of = f" of '{v.scored}'" if len(v.outputs) > 1 else ""
    rows: list[tuple[Any, ...]] = []
    for m in v.metrics.values():
        numbers = (_number(x) for x in (m.reference, m.candidate, m.change))
        rows.append((m.name + (of if v.read_by(m.name) else ""), *numbers, f"[{m.low:.4g}, {m.high:.4g}]"))
    rows += [(name, "", _number(value), "", "") for name, value in v.summary().items() if not _is_change(name, v)]
    if (d := v.outputs.get(v.scored)) is not None and d.kl_error is not None:
        told = f"{d.kl:.4g} ± {d.kl_error:.2g}, {d.kl_p99:.4g}, {d.kl_max:.4g}"
        rows.append((f"kl mean, 99 %, most{of}", "", told, "", ""))
        rows.append((f"same top{of}", "", f"{d.agreement:.2%} ± {d.agreement_error or 0:.2%}", "", ""))
    title = f"Against the original, {v.samples} samples" + (" of random data" if v.random else "")
    title += f", the worst of {len(v.outputs)} outputs" if len(v.outputs) > 1 else ""
    return table(title, ("metric", "original", "result", "change", "95 % interval"), rows)


def outputs(v: Validation, *, every: bool = False) -> Table:
    """One row per output, the worst first; of many only the worst unless `every`."""
    ranked = sorted(v.outputs.items(), key=lambda x: -math.inf if math.isnan(x[1].decibels) else x[1].decibels)
    shown = ranked if every else ranked[:OUTPUTS]
    keys = ("sqnr", "cosine", "max_abs", "agreement", "kl", "exact_match")
    used = [k for k in keys if any(getattr(d, k) is not None for _, d in shown)]
    rows = [(name, *("" if (x := getattr(d, k)) is None else _number(x) for k in used)) for name, d in shown]
    if rest := len(ranked) - len(shown):
        rows.append((f"and {rest} others, none of them worse (-v)", *("" for _ in used)))
    return table("Outputs", ("output", *(k.replace("_", "-") for k in used)), rows)


def stored(parts: Sequence[StoredPart]) -> list[str]:
    """A line per element type: what is stored in it, and whether it is what stayed float beside integers.

    Scales stay nothing, so they stand last and by themselves.
    """
    types = list(dict.fromkeys(p.dtype for p in parts))
    narrow = any(t.startswith(NARROW_TYPES) for t in types)
    lines = []
    for dtype in types:
        held = [p for p in parts if p.dtype == dtype and p.part != "scales"]
        listed = ", ".join(f"{p.part} {megabytes(p.nbytes)} MB" for p in held if p.nbytes >= LISTED * parts[0].nbytes)
        if listed:
            lines.append(f"{dtype}{' that stayed' if narrow and dtype == 'float32' else ''}: {listed}")
    scales = sum(p.nbytes for p in parts if p.part == "scales")
    return [
        *lines,
        *([f"scales and zero points: {megabytes(scales)} MB"] if scales >= LISTED * parts[0].nbytes else []),
    ]


def benchmark(b: BenchReport, names: Sequence[str] = (), *, every: bool = True) -> Table:
    """Times per model and shape; the ratio is how many times faster than the first model.

    Without `every` no tail of the times, and no time to load.
    """
    data = b.json()
    called = dict(zip(b.models, names, strict=False))
    rows = []
    for r, x in zip(b.rows, data["ratios"], strict=True):
        rate = f"{r.throughput:.1f}/s" if r.tokens is None else f"{r.tokens:.0f} tok/s"
        times = (f"{r.median_ms:.2f}", *((f"{r.p90:.2f}", f"{r.p99:.2f}") if every else ()))
        ratio = f"{x['value']:.2f}x [{x['low']:.2f}, {x['high']:.2f}]"
        sizes = (f"{r.peak_mib * MIB / 1e6:.0f}", megabytes(r.size_mib * MIB), *((f"{r.load_s:.2f}",) if every else ()))
        rows.append((called.get(r.model, r.model), r.shape, *times, ratio, rate, *sizes))
    where = f"{b.rows[0].provider}, {b.rows[0].threads} threads" if b.rows else ""
    tail, load = (("p90", "p99"), ("load s",)) if every else ((), ())
    columns = ("model", "shape", "ms", *tail, "speed", "rate", "memory MB", "file MB", *load)
    return table(f"Speed on {data['machine'].get('cpu', 'this machine')}, {where}", columns, rows, left=2)


def remedy(r: Remedy) -> str:
    """What this model loses most by, and the recipe that leaves it alone, ready to paste."""
    of = f"{r.measured} of {r.sites} sites of {r.name}" if r.measured < r.sites else f"the {r.sites} sites of {r.name}"
    lines = [f"What loses most, {of} measured one at a time (share of their errors):"]
    lines += [f"  {share:4.0%}  {name}" for name, share in r.shares]
    if not r.skip:
        said = "; ".join(r.verdicts)
        return "\n".join([*lines, f"Leaving the worst {r.tried} as they were is not enough: {said}."])
    kept = "the first of them as it was" if r.tried == 1 else f"the first {r.tried} of them as they were"
    if r.skip != tuple(glob.escape(name) for name, _ in r.shares[: r.tried]):
        kept = f"{r.tried} as before, of which those not measured alone were ranked by their kind,"
    lines.append(f"Leaving {kept} lets the gates pass ({'; '.join(r.verdicts)}). As a recipe, for --recipe FILE:")
    return "\n".join([*lines, "", r.recipe])


def culprit(c: Culprit) -> str:
    """The pass that broke the gates, and its sites by what each adds on its own, in sentences."""
    lines = [f"The gates began to fail behind pass '{c.spec}': {'; '.join(c.verdicts)}."]
    for s in c.suspects:
        times = f", {outstanding(s.outstanding)}" if s.outstanding >= 2 else ""
        lines.append(
            f"  {s.site} ({s.place}): {s.error:.2%} of error of its own{times}; reaches {', '.join(s.outputs)}"
        )
    return "\n".join([*lines, *([c.why.capitalize() + "."] if c.why else [])])


def outstanding(times: float | None) -> str:
    """By how much an error stands out; None as reports write an infinite number."""
    exact = times is None or math.isinf(times)
    return "where most others are exact" if exact else f"{times:.0f} times the usual"


def pass_table(found: Iterable[PassInfo]) -> Table:
    """All passes, one line each."""
    rows = [(i.name, i.stage, i.fidelity, i.doc.partition("\n")[0]) for i in found]
    return table("Passes", ("name", "stage", "fidelity", "what it does"), rows, left=4)


def preset_table(found: Iterable[Mapping[str, Any]], *, every: bool = False) -> Table:
    """All presets; with `every` their passes and gates too."""
    rows: list[tuple[str, ...]] = []
    for p in found:
        rows.append((p["name"], p["target"], p["data"], p["about"]))
        if every:
            lists = {"passes": p["passes"], **{f"rung {k}": v for k, v in p["rungs"].items()}, "gates": p["gates"]}
            rows += [("", "", what, ", ".join(map(str, listed))) for what, listed in lists.items()]
    return table("Presets", ("name", "target", "data", "what it is for"), rows, left=4)


def option_table(info: PassInfo) -> Table | str:
    """Options of one pass."""
    if not info.options:
        return "No options."
    rows = [(o.name, o.type, "required" if o.required else _default(o.default), o.range, o.doc) for o in info.options]
    return table("Options", ("option", "type", "default", "range", "what it does"), rows, left=5)


def checks(found: Iterable[Mapping[str, str]]) -> Table:
    """What `doctor` found."""
    rows = [(c["status"], c["check"], c["detail"], c["advice"]) for c in found]
    return table("", ("status", "what", "found", "what to do"), rows, left=4)


def _is_change(name: str, v: Validation) -> bool:
    return name.rpartition("-")[0] in v.metrics


def level_text(metric: str, value: float) -> str:
    """An error with its metric."""
    return f"{value:.3g} kl" if metric == "kl" else f"{value:.1f} dB {metric}"


def _drift(s: Step) -> str:
    if s.rolled_back:
        return f"rolled back: {s.rolled_back}"
    if s.drift is None:
        return ""
    sqnr = s.drift["values"].get("sqnr")
    if said := s.drift.get("left_out"):
        metric = said["metric"]
        return f"{level_text(metric, said['evaluation'])} (left-out calibration {level_text(metric, said['left_out'])})"
    return f"{sqnr:.1f} dB" if sqnr is not None else "none" if s.drift["finite"] else "not finite"


def grouped(declined: Sequence[tuple[str, str]], *, every: bool) -> list[tuple[int, str, str]]:
    """Count, reason and names, the most frequent reason first."""
    rows = []
    for why, count in Counter(why for _, why in declined).most_common():
        sites = [site for site, reason in declined if reason == why]
        named = sites if every else sites[:SHOWN]
        rows.append((count, why, ", ".join(named) + (", ..." if len(named) < count else "")))
    return rows


def _default(x: Any) -> str:
    if isinstance(x, bool):
        return str(x).lower()
    return "none" if x is None or x == [] else str(x)


def _number(x: float | None, missing: str = "-") -> str:
    return missing if x is None else f"{x:.4g}"


def fact(x: Any) -> str:
    """A fact in words: lists and mappings by commas, integers with separators, nothing for None."""
    if isinstance(x, Mapping):
        return ", ".join(f"{k}: {fact(v)}" for k, v in x.items() if v is not None)
    if isinstance(x, (list, tuple)):
        return ", ".join(fact(v) for v in x)
    return f"{x:,}" if isinstance(x, int) and not isinstance(x, bool) else "" if x is None else str(x)
