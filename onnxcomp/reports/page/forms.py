"""What each form of a kind of sites cost on the target, and which won, as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcomp.reports.page import plots
from onnxcomp.reports.page.numbers import Figure, pointer
from onnxcomp.reports.page.pictures import MOST, Picture
from onnxcomp.reports.page.plots import Bar, Series

__all__ = ["best_others", "costs"]


def best_others(report: Mapping[str, Any]) -> Picture | None:
    """How many times faster than the default the best other form of each kind of sites is, and which were taken."""
    found = []
    for i, step in enumerate(report["steps"]):
        for j, c in enumerate(step["choices"]):
            timed = [(x["ratio"], k) for k, x in enumerate(c["candidates"]) if x["ratio"] is not None]
            others = [(ratio, k) for ratio, k in timed if c["candidates"][k]["form"] != c["default"]]
            if others:
                _, k = max((c["candidates"][k]["form"] == c["form"], ratio, k) for ratio, k in others)[1:]
                found.append((c, c["candidates"][k], pointer("steps", i, "choices", j, "candidates", k)))
    if not found:
        return None
    taken = [" (taken)" if x["form"] == c["form"] else "" for c, x, _ in found]
    names = [
        f"{c['kind']} ({len(c['sites'])}): {x['form']}{said}" for (c, x, _), said in zip(found, taken, strict=True)
    ]
    bars = [Bar(x["ratio"], f"{where}/ratio") for _, x, where in found]
    title = "What each form cost, and why it won"
    svg = plots.rows(names[:MOST], Series("ratio", bars[:MOST]), "times", title)
    rows: list[list[str | Figure]] = [
        [
            f"{name}; such as {c['site']}: {c['reason']}",
            *(Figure(f"{where}/{k}", "times") for k in ("ratio", "low", "high")),
        ]
        for name, (c, _, where) in zip(names, found, strict=True)
    ]
    says = (
        "How many times faster than the default the best other form of each kind of sites is, by the clock of this "
        "machine; in brackets how many sites. It was taken where that is reliably above 1."
    )
    return Picture("forms", title, says, svg, ("kind and form", "times faster", "from", "to"), rows)


def costs(report: Mapping[str, Any]) -> dict[str, Picture]:
    """The time of every form by shape, by the place of the choice in the report."""
    found = {}
    for i, step in enumerate(report["steps"]):
        for j, c in enumerate(step["choices"]):
            where = pointer("steps", i, "choices", j)
            timed = [(k, x) for k, x in enumerate(c["candidates"]) if len(x["ms"]) == len(c["shapes"]) > 0]
            if len(timed) < 2:
                continue
            series = [
                Series(
                    f"{x['form']}{' (chosen)' if x['form'] == c['form'] else ''}",
                    [Bar(ms, f"{where}{pointer('candidates', k, 'ms', s)}") for s, ms in enumerate(x["ms"])],
                )
                for k, x in timed[: plots.COLORS]
            ]
            title = f"Time of each form of {c['kind']}"
            svg = plots.columns(c["shapes"], series, "ms", title)
            legend = [(s.name, f"color-{n}") for n, s in enumerate(series)]
            found[where] = Picture(
                f"forms-{i}-{j}",
                title,
                "Median by the clock of this machine; less is better.",
                svg,
                (),
                (),
                legend=legend,
            )
    return found
