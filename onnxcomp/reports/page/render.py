"""A report as one HTML file: no network, a script only to copy text, every figure with its place in the JSON."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.reports.layer_tables import UNRELATED
from onnxcomp.reports.page import plots
from onnxcomp.reports.page.covered import covered
from onnxcomp.reports.page.forms import best_others, costs
from onnxcomp.reports.page.numbers import Figure, at, clean, exact, pointer, shown
from onnxcomp.reports.page.pictures import pictures, short_names
from onnxcomp.reports.page.tasks import tasks

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

__all__ = ["page"]

FOLDER = Path(__file__).parent
# Of figures: the kind of their values before and after, and of their change. Others are plain numbers.
VALUES = {"bytes": "bytes", "ms": "ms", "dB": "dB", "nats": "nats"}
CHANGES = {"size": "times", "memory": "times", "latency": "times", "perplexity": "signed"}
LONGEST = 80  # characters of a title
SHARES = ("accuracy", "f1", "agreement", "exact-match")
NAMES = {
    "size": "Size on disk", "latency": "Latency", "memory": "Peak memory", "sqnr": "Signal to noise (SQNR)",
    "pooled-sqnr": "SQNR of mean-pooled embeddings", "kl": "KL divergence", "agreement": "Same top-1 answer",
    "exact-match": "Equal entries", "accuracy": "Accuracy", "f1": "Macro F1", "perplexity": "Perplexity",
    "cosine": "Cosine",
}  # fmt: skip


def page(report: Mapping[str, Any]) -> str:
    """The page of a report that `ReportPart` describes."""
    from markupsafe import Markup, escape

    def figure(where: str, kind: str) -> Markup:
        value = at(report, where)
        fields = {"value": exact(value), "data-at": where, "data-as": kind}
        named = " ".join(f'{k}="{escape(v)}"' for k, v in fields.items())
        return Markup(f"<data {named}>{escape(shown(value, kind))}</data>")

    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return clean(
        _template().render(
            r=report,
            style=Markup(style),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            fig=figure,
            is_figure=lambda x: isinstance(x, Figure),
            pointer=pointer,
            rows=_figure_rows(report["figures"]),
            svg=lambda p: Markup(p.svg),
            **_parts(report, drawn=plots.available()),
            verdict=_verdict(report),
            title=_title(report),
            grouped=_grouped,
        )
    )


def _parts(report: Mapping[str, Any], *, drawn: bool) -> dict[str, Any]:
    """Pictures and tables of the page, `drawn` where the library for that is there."""
    return {
        "pictures": pictures(report) if drawn else [],
        "forms": best_others(report) if drawn else None,
        "costs": costs(report) if drawn else {},
        "drawn": drawn,
        "covered": covered(report),
        "unrelated": UNRELATED,
        "short": short_names([r["model"] for r in (report["benchmark"] or {"rows": ()})["rows"]]),
        "tasks": tasks(report),
    }


@functools.cache
def _template() -> jinja2.Template:
    """The template, compiled once in a process that writes several pages."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template("page.html")


def _title(report: Mapping[str, Any]) -> str:
    """What was done to what."""
    names = list(short_names(report["models"]).values())
    if report["kind"] == "compress":
        return f"{names[0] if names else 'model'}, recipe {report['recipe']['name'] or 'unknown'}"
    said = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return said if len(said) <= LONGEST else f"{len(names)} models"


def _verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """The one word that matters, its tone, and what it means."""
    judged = len(report["verdicts"])
    if report["kind"] == "bench":
        return {"word": "Measured", "tone": "plain", "means": "a benchmark has no gates"}
    if report["refused"]:
        means = "a gate or a check failed" + (", so nothing was written" if report["kind"] == "compress" else "")
        return {"word": "Refused", "tone": "bad", "means": means}
    if not judged:
        return {"word": "Not judged", "tone": "plain", "means": "no gate was set that these figures could meet or miss"}
    slower = report["benchmark"] is not None and report["benchmark"]["slower"]
    means = f"meets {'its gate' if judged == 1 else f'all {judged} gates'}" + (", but is slower" if slower else "")
    return {"word": "Accepted", "tone": "mixed" if slower else "good", "means": means}


def _figure_rows(figures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of the first table for each figure: its name, kinds of its numbers, and what a change means."""
    rows = []
    for i, f in enumerate(figures):
        name = f["name"]
        kind = VALUES.get(f["unit"], "percent" if name in SHARES else "number")
        change = CHANGES.get(name, "signed" if name in SHARES else "number")
        means = {"latency": "the speed", "size": "the size", "memory": "the memory"}.get(name, "")
        rows.append({"i": i, "f": f, "name": NAMES.get(name, name), "kind": kind, "change": change, "means": means})
    return rows


def _grouped(found: Sequence[Mapping[str, str]], key: str) -> list[tuple[str, list[str]]]:
    """Sites by what is said of them, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for x in found:
        groups.setdefault(x[key], []).append(x["site"])
    return sorted(groups.items(), key=lambda g: -len(g[1]))
