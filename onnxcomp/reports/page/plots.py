"""Plots as SVG: bars of figures of a report, in colours of the page, with text as text and no script."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxcomp.reports.page.numbers import clean, shown

__all__ = ["COLORS", "Bar", "Series", "available", "columns", "rows", "stacks"]

WIDTH = 380  # units of the drawing; about a pixel each on a phone, so that text can be read there
ROW = 24  # height of a horizontal bar with its gap
LONGEST = 28  # characters of a label; what is longer is cut in the middle, the table beside it has the whole name
COLORS = 8  # of the page
ROOM = 1.3  # of the longest bar: behind it stands its value
TICKS = 4  # steps of an axis at most; one less where their texts stand side by side


@dataclass(frozen=True)
class Bar:
    """A figure of the report: its value, where report.json has it, and a spread around it."""

    value: float | None
    where: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Bars of one colour, one for each label; `color` are its classes on the page, by default those of its place."""

    name: str
    bars: Sequence[Bar]
    color: str = ""


def available() -> bool:
    """Whether the library that draws is installed."""
    return importlib.util.find_spec("pygal") is not None


def rows(labels: Sequence[str], series: Series, kind: str, title: str) -> str:
    """Horizontal bars, the first at the top."""
    top = max((b.value for b in series.bars if b.value is not None), default=0.0)
    low = min((b.value for b in series.bars if b.value is not None), default=0.0)
    options: dict[str, Any] = {"range": (min(0.0, low), top * ROOM), "y_labels": _ticks(min(0.0, low), top, TICKS - 1)}
    chart = _chart("HorizontalBar", [_short(x) for x in reversed(labels)], kind, 40 + ROW * len(labels), **options)
    root = _tree(chart, [Series(series.name, series.bars[::-1])], title)
    for node in root.iter("text"):
        if node.get("class") == "value":  # behind the end of its bar, not across it
            node.set("text-anchor", "start")
    return _text(root)


def stacks(labels: Sequence[str], series: Sequence[Series], kind: str, title: str) -> str:
    """Horizontal bars of parts, one bar for each label, the first at the top."""
    height = 50 + 36 * len(labels)
    top = max((sum(s.bars[i].value or 0.0 for s in series) for i in range(len(labels))), default=0.0)
    chart = _chart(
        "HorizontalStackedBar", labels[::-1], kind, height, print_values=False, y_labels=_ticks(0.0, top, TICKS - 1)
    )
    return _text(_tree(chart, [Series(s.name, s.bars[::-1], s.color) for s in series], title))


def columns(labels: Sequence[str], series: Sequence[Series], kind: str, title: str) -> str:
    """Vertical bars in groups, with their spread."""
    top = max((x for s in series for b in s.bars for x in (b.value, b.high) if x is not None), default=1.0)
    options: dict[str, Any] = {"range": (0, top * 1.1)}
    options |= {"y_labels": _ticks(0.0, top), "print_values": False}
    return _text(_tree(_chart("Bar", [_short(x) for x in labels], kind, 280, **options), series, title))


def _ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Round values of an axis, at most so many steps."""
    if not math.isfinite(high - low) or high <= low:
        return [0.0]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if power * k * most >= high - low)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _chart(name: str, labels: Sequence[str], kind: str, height: int, **options: Any) -> Any:
    pygal = _library()
    shared = {
        "width": WIDTH, "height": height, "x_labels": [clean(x) for x in labels], "js": (), "css": (),
        "no_prefix": True, "print_values": True, "print_values_position": "top", "truncate_label": -1,
        "show_legend": False,
        "margin": 4, "spacing": 8,
        "value_formatter": lambda x: shown(x, kind), "style": _style(), "no_data_text": "",
    }  # fmt: skip
    return getattr(pygal, name)(**{**shared, **options})


def _library() -> Any:
    import pygal

    # Its finder of plugins is of a kind that Python's import has dropped, and warns of at every import after it.
    sys.meta_path[:] = [x for x in sys.meta_path if type(x).__module__ != "pygal"]
    return pygal


def _style() -> Any:
    """Sizes that the library lays text out by; colours are those of the page."""
    from pygal.style import Style

    sizes = dict.fromkeys(("label_font_size", "major_label_font_size", "value_font_size"), 11)
    return Style(font_family="sans-serif", **sizes)


def _tree(chart: Any, series: Sequence[Series], title: str) -> Any:
    """The drawing as a tree of elements, without the library's own style, script and comments."""
    for s in series:
        chart.add(clean(s.name), [_point(b) for b in s.bars])
    root = chart.render_tree()
    for parent in list(root.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag in ("defs", "title") or _hidden(child):
                parent.remove(child)
    colors = {f"color-{i}": s.color for i, s in enumerate(series) if s.color}
    for node in root.iter():
        node.attrib.pop("id", None)
        if own := [colors.get(c, c) for c in node.get("class", "").split()]:
            node.set("class", " ".join(own))
    root.set("role", "img")
    root.set("aria-label", clean(title))
    for node in root.iter("desc"):
        if node.get("class") == "value":  # browsers show a title where the pointer rests
            node.tag = "title"
    for parent in list(root.iter()):
        for child in [x for x in parent if x.tag == "desc"]:
            parent.remove(child)
    return root


def _text(root: Any) -> str:
    from pygal.etree import etree

    return str(etree.tostring(root, encoding="unicode"))


def _hidden(node: Any) -> bool:
    """Parts that only the library's script would use."""
    return node.get("class", "") in ("tooltip", "tooltip-overlay", "plot tooltip-overlay")


def _point(b: Bar) -> dict[str, Any] | None:
    if b.value is None:
        return None
    point: dict[str, Any] = {"value": b.value, "node": {"data-at": b.where}}
    if b.low is not None and b.high is not None:
        point["ci"] = {"low": b.low, "high": b.high}
    return point


def _short(text: str) -> str:
    half = (LONGEST - 1) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"
