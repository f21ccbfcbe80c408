"""The pictures of a page: what each shows, and the same figures as a table; none of what was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.reports.page import plots
from onnxcomp.reports.page.numbers import Figure, at, pointer
from onnxcomp.reports.page.plots import Bar, Series

__all__ = ["MOST", "Picture", "pictures", "short_names"]

LAYERS = 64  # bars of a picture of layers: two for each of 32
MOST = 16  # bars of a picture; the table below it has the others
PARTS = ("embeddings", "attention", "feed-forward", "head", "linears", "convolutions", "norms")  # by their colours
ENTRY = "recipe"  # what a pass calls the note that is an entry of a recipe
LEAST = 0.005  # of a model's bytes: smaller parts are in the table alone


@dataclass(frozen=True)
class Picture:
    """A plot with its title, what it says, and its figures: each row a name and figures of the report.

    `recipe` is an entry of a recipe that follows from it; `legend` has names with the classes of their colours where
    there are several.
    """

    name: str
    title: str
    says: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Figure]]
    recipe: str = ""
    legend: Sequence[tuple[str, str]] = ()


def pictures(report: Mapping[str, Any]) -> list[Picture]:
    """All that there are figures for, in the order of the page."""
    made = (_sizes, _latency, _steps, _stream, _values, _suspects, _outputs, _losses, _shares)
    return [x for x in (make(report) for make in made) if x is not None]


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Names of models by their paths: the folder of a model.onnx, else the last part; whole paths where these agree."""
    known = list(dict.fromkeys(models))
    names = [Path(m).parent.name if Path(m).stem == "model" else Path(m).name for m in known]
    return dict(zip(known, names if len(set(names)) == len(names) and all(names) else known, strict=True))


def _bar(report: Mapping[str, Any], *keys: str | int) -> Bar:
    where = pointer(*keys)
    return Bar(at(report, where), where)


def _sizes(report: Mapping[str, Any]) -> Picture | None:
    """Bytes by part and element type, before and after."""
    size = report["size"]
    if size is None or not size["parts"] or not size["before"]:
        return None
    places: dict[tuple[str, str], dict[str, int]] = {}
    for side in ("before", "parts"):
        for i, x in enumerate(size[side]):
            places.setdefault((x["part"], x["dtype"]), {})[side] = i
    total = max(size["original"], size["result"], 1)
    series, rows = [], []
    for (part, dtype), found in sorted(
        places.items(), key=lambda x: (PARTS.index(x[0][0]) if x[0][0] in PARTS else len(PARTS), x[0][1])
    ):
        bars = [
            _bar(report, "size", side, found[side], "nbytes") if side in found else Bar(0, "")
            for side in ("before", "parts")
        ]
        if max(b.value or 0 for b in bars) >= LEAST * total:
            series.append(Series(f"{part} {dtype}", bars, _shade(part, dtype)))
        rows.append([f"{part}, {dtype}", *(Figure(b.where, "bytes") if b.where else "-" for b in bars)])
    title = "Size by part"
    svg = plots.stacks(("original", "result"), series, "bytes", title)
    says = "What the bytes of the constants are: a colour for each part that reads them, fainter with fewer bits."
    return Picture("size", title, says, svg, ("part", "original", "result"), rows, legend=_legend(series))


def _shade(part: str, dtype: str) -> str:
    """Classes of a part and of the bits of its elements."""
    bits = next((n for n in (64, 32, 16, 8) if str(n) in dtype), 4)
    return f"color-{PARTS.index(part) if part in PARTS else len(PARTS)} bits-{bits}"


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    return [(s.name, s.color or f"color-{i}") for i, s in enumerate(series)]


def _latency(report: Mapping[str, Any]) -> Picture | None:
    """Median times by shape, with the fastest run and the 90th percentile."""
    if (bench := report["benchmark"]) is None or not bench["rows"]:
        return None
    shapes = list(dict.fromkeys(r["shape"] for r in bench["rows"]))
    series, names = [], short_names(r["model"] for r in bench["rows"])
    for model in names:
        places = [i for i, r in enumerate(bench["rows"]) if r["model"] == model]
        bars = [
            Bar(r["median_ms"], pointer("benchmark", "rows", i, "median_ms"), r["min"], r["p90"])
            for i, r in ((i, bench["rows"][i]) for i in places)
        ]
        series.append(Series(names[model], bars))
    rows: list[list[str | Figure]] = [
        [
            f"{names[r['model']]}, {r['shape']}",
            *(Figure(pointer("benchmark", "rows", i, k), "ms") for k in ("min", "median_ms", "p90", "p99")),
            Figure(pointer("benchmark", "rows", i, "samples"), "count"),
        ]
        for i, r in enumerate(bench["rows"])
    ]
    title = "Latency by shape"
    svg = plots.columns(shapes, series, "ms", title)
    columns = ("model", "fastest", "median", "90 %", "99 %", "runs")
    says = "Median time of a run; the line is from the fastest run to the 90th percentile. Lower is better."
    return Picture("latency", title, says, svg, columns, rows, legend=_legend(series))


def _steps(report: Mapping[str, Any]) -> Picture | None:
    """Signal to noise of the outputs after each pass: where the error enters, step by step."""
    found = [
        (i, s)
        for i, s in enumerate(report["steps"])
        if s["drift"] is not None and s["drift"]["values"].get("sqnr") is not None
    ]
    first = next((n for n, (_, s) in enumerate(found) if s["fidelity"] != "exact"), len(found))
    found = found[first:]  # exact passes before it lose nothing that could be seen beside the others
    if len(found) < 2:
        return None
    where = [("steps", i, "drift", "values", "sqnr") for i, _ in found]
    names = [f"{i + 1}. {s['name']}" for i, s in found]
    title = "Where the error enters, step by step"
    svg = plots.rows(names, Series("SQNR", [_bar(report, *w) for w in where]), "dB", title)
    says = "Signal to noise of the worst output after each pass, against the original. 6 dB more halve the error."
    rows: list[list[str | Figure]] = [[n, Figure(pointer(*w), "dB")] for n, w in zip(names, where, strict=True)]
    return Picture("steps-error", title, says, svg, ("after", "SQNR"), rows)


def _stream(report: Mapping[str, Any]) -> Picture | None:
    """Relative error of the residual stream behind each part of each layer: where the error enters, and grows."""
    found = [
        (i, j, x)
        for i, layer in enumerate(report["layers"])
        for j, x in enumerate(layer["stream"])
        if x["error"] is not None
    ]
    if not found:
        return None
    names = [f"layer {report['layers'][i]['index']}, {x['part']}" for i, _, x in found]
    where = [("layers", i, "stream", j, "error") for i, j, _ in found]
    title = "Where the error enters, layer by layer"
    svg = plots.rows(names[:LAYERS], Series("error", [_bar(report, *w) for w in where[:LAYERS]]), "percent", title)
    says = "Relative error of the residual stream behind each part of each layer, on 4 samples (large models: 1)."
    rows: list[list[str | Figure]] = [[n, Figure(pointer(*w), "percent")] for n, w in zip(names, where, strict=True)]
    return Picture("layers-error", title, says, svg, ("layer", "error"), rows)


def _values(report: Mapping[str, Any]) -> Picture | None:
    """Values by what their own part gets wrong, of a comparison value by value."""
    if (found := report["by_layer"]) is None or found["unrelated"]:
        return None
    places = [i for i, x in enumerate(found["values"]) if x["own"] is not None and x["own"] > found["noise"]]
    if not places:
        return None
    places.sort(key=lambda i: -found["values"][i]["own"])
    names = [_place(found["values"][i]) for i in places]
    bars = [_bar(report, "by_layer", "values", i, "own") for i in places[:MOST]]
    title = "Where the error enters, value by value"
    svg = plots.rows(names[:MOST], Series("own error", bars), "percent", title)
    says = "What each part gets wrong although all before it is right (relative), the worst first."
    kinds = (("own", "percent"), ("error", "percent"), ("outstanding", "times"))
    rows: list[list[str | Figure]] = [
        [
            f"{n}: {found['values'][i]['result']}",
            *(Figure(pointer("by_layer", "values", i, k), kind) for k, kind in kinds),
        ]
        for n, i in zip(names, places, strict=True)
    ]
    return Picture("values", title, says, svg, ("value", "own error", "error", "times the usual"), rows)


def _place(x: Mapping[str, Any]) -> str:
    layer = x["layer"]
    return f"layer {layer}, {x['role']}" if layer is not None and layer >= 0 else f"{x['role']}, in no layer"


def _suspects(report: Mapping[str, Any]) -> Picture | None:
    """Sites of the pass behind which gates began to fail."""
    if (found := report["culprit"]) is None or not found["suspects"]:
        return None
    names = [f"{x['place']}" for x in found["suspects"]]
    where = [("culprit", "suspects", i, "error") for i in range(len(names))]
    title = f"Sites of {found['name']}, behind which gates fail"
    svg = plots.rows(names[:MOST], Series("error", [_bar(report, *w) for w in where[:MOST]]), "percent", title)
    rows: list[list[str | Figure]] = [
        [f"{x['place']}: {x['site']}", Figure(pointer(*w), "percent"), Figure(pointer(*w[:3], "outstanding"), "times")]
        for x, w in zip(found["suspects"], where, strict=True)
    ]
    says = f"What each gets wrong although its inputs are right (relative). {found['why']}"
    return Picture("suspects", title, says, svg, ("site", "error", "times the usual"), rows)


def _losses(report: Mapping[str, Any]) -> Picture | None:
    """Sites by what a form of them costs, where a pass measured that, with the entry that spares the worst."""
    found = [(i, s, _ranked(s)) for i, s in enumerate(report["steps"])]
    if not (ranked := next(((i, s, x) for i, s, x in found if x), None)):
        return None
    i, step, (form, places) = ranked
    forms = list(dict.fromkeys(k for j in places for k in step["noted"][j]["values"]))
    names = [step["noted"][j]["site"] for j in places]
    bars = [_bar(report, "steps", i, "noted", j, "values", form) for j in places[:MOST]]
    title = f"Sensitivity of sites, {form}"
    svg = plots.rows(names[:MOST], Series(form, bars), "number", title)
    rows: list[list[str | Figure]] = [
        [
            n,
            *(
                Figure(pointer("steps", i, "noted", j, "values", k), "number")
                if k in step["noted"][j]["values"]
                else "-"
                for k in forms
            ),
        ]
        for n, j in zip(names, places, strict=True)
    ]
    entry = next((x["what"] for x in step["noted"] if x["site"] == ENTRY), "")
    says = f"What each site costs in this form alone, as {step['name']} measured it; the worst first."
    return Picture("losses", title, says, svg, ("site", *forms), rows, f"- {entry}" if entry else "")


def _ranked(step: Mapping[str, Any]) -> tuple[str, list[int]] | None:
    """The form that a pass ranked its sites by, and their places, the worst first; None where it measured none.

    A pass that ranks sites ends with the entry of a recipe that follows from it.
    """
    if all(x["site"] != ENTRY for x in step["noted"]):
        return None
    valued = [j for j, x in enumerate(step["noted"]) if x["values"]]
    for form in {k: None for j in valued for k in step["noted"][j]["values"]}:
        places = [j for j in valued if form in step["noted"][j]["values"]]
        losses = [step["noted"][j]["values"][form] for j in places]
        if len(places) > 1 and losses == sorted(losses, reverse=True):
            return form, places
    return None


def _outputs(report: Mapping[str, Any]) -> Picture | None:
    """Each output against the original's, the worst first; a single output is in the table of figures."""
    v = report["validation"]
    if v is None or len(v["outputs"]) < 2:
        return None
    ranked = sorted(
        (n for n, d in v["outputs"].items() if d["sqnr"] is not None), key=lambda n: v["outputs"][n]["sqnr"]
    )
    if not ranked:
        return None
    title = "Where the error leaves, output by output"
    bars = [_bar(report, "validation", "outputs", n, "sqnr") for n in ranked]
    svg = plots.rows(ranked[:MOST], Series("SQNR", bars[:MOST]), "dB", title)
    kinds = (("sqnr", "dB"), ("cosine", "number"), ("max_abs", "number"), ("agreement", "percent"), ("kl", "nats"))
    rows: list[list[str | Figure]] = [
        [n, *(Figure(pointer("validation", "outputs", n, k), kind) for k, kind in kinds)] for n in ranked
    ]
    says = "Signal to noise of each output against the original's, the worst first. Longer is better."
    return Picture("outputs", title, says, svg, ("output", "SQNR", "cosine", "max abs", "top-1 equal", "KL"), rows)


def _shares(report: Mapping[str, Any]) -> Picture | None:
    """Sites that a refused pass loses most by."""
    if (r := report["remedy"]) is None or not r["shares"]:
        return None
    names = [s["site"] for s in r["shares"]]
    where = [("remedy", "shares", i, "share") for i in range(len(names))]
    title = f"Sites that {r['name']} loses most by"
    svg = plots.rows(names[:MOST], Series("share", [_bar(report, *w) for w in where[:MOST]]), "percent", title)
    says = "Share of the error of all measured sites, each changed alone."
    rows: list[list[str | Figure]] = [[n, Figure(pointer(*w), "percent")] for n, w in zip(names, where, strict=True)]
    return Picture("shares", title, says, svg, ("site", "share"), rows)
