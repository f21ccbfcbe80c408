"""Ranges of values and weights, and what codes cover of them: a drawing for each of the worst sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxcomp.reports.page.numbers import pointer

__all__ = ["Ends", "Kind", "covered"]

WORST = 8  # sites of each kind; report.json has all
WIDTH = 100.0  # of a drawing, from the least to the largest of its numbers and of what codes cover


@dataclass(frozen=True)
class Ends:
    """Where the figures of a site are, and its drawing: starts and widths of the numbers and of the codes, and zero."""

    site: str
    where: str
    numbers: tuple[float, float]
    codes: tuple[float, float]
    zero: float


@dataclass(frozen=True)
class Kind:
    """Numbers of one kind, such as inputs, whose codes err most, the worst first, of `count`.

    `counted` says whether the share outside the codes was.
    """

    of: str
    step: str
    count: int
    counted: bool
    sites: tuple[Ends, ...]


def covered(report: Mapping[str, Any]) -> list[Kind]:
    """The worst sites of each kind and pass that notes what its codes cover."""
    found = []
    for i, step in enumerate(report["steps"]):
        for of in dict.fromkeys(x["of"] for x in step["covered"]):
            places = [j for j, x in enumerate(step["covered"]) if x["of"] == of]
            places.sort(key=lambda j: -step["covered"][j]["error"])
            sites = tuple(_ends(step["covered"][j], pointer("steps", i, "covered", j)) for j in places[:WORST])
            counted = any(step["covered"][j]["outside"] is not None for j in places)
            found.append(Kind(of, step["name"], len(places), counted, sites))
    return found


def _ends(x: Mapping[str, Any], where: str) -> Ends:
    low = min(x["low"], x["covered_low"], 0.0)
    high = max(x["high"], x["covered_high"], 0.0)
    scale = WIDTH / ((high - low) or 1.0)

    def bar(start: float, end: float) -> tuple[float, float]:
        return round((start - low) * scale, 2), round(max(0.0, end - start) * scale, 2)

    numbers, codes = bar(x["low"], x["high"]), bar(x["covered_low"], x["covered_high"])
    return Ends(x["site"], where, numbers, codes, round(-low * scale, 2))
