"""What a refused pass should leave alone for the gates to pass: ranked and tried on the model at hand."""

from __future__ import annotations

import dataclasses
import glob
import math
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from onnxcomp.graph import Graph
from onnxcomp.pipeline import Edit, Env, Pass
from onnxcomp.reports.outcome import Remedy
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.gates import Gate
from onnxcomp.validation.results import Validation
from onnxcomp.validation.variants import Variants

__all__ = ["RANKED_ON", "find_remedy"]

RANKED_ON = 16  # samples: sites differ by factors, so few are enough to rank them; the remedy is tried on all
SECONDS = 20.0  # of ranking, and again of trying: a refusal must not take much longer than the work
SHOWN = 5  # sites at least that the ranking names


def find_remedy(
    p: Pass,
    before: Graph,
    env: Env,
    declined: Collection[str],
    reference: Reference,
    variants: Variants,
    gate: Gate,
    watch: Callable[[str, int, int], None] | None = None,
) -> Remedy | None:
    """The sites that lose most, each changed alone, and how many of them must stay as they were.

    As many are left alone as 1, 2, 4, ... up to half of all, until the gates pass on all data of the reference.
    """
    sites = [s.name for s in p.sites(before, env.target) if s.name not in declined]
    if len(sites) < 2:
        return None
    errors = _errors(p, before, env, sites, declined, variants, watch)
    ranked = sorted(errors, key=lambda name: -errors[name])
    total = sum(errors.values())
    if not 0 < total < math.inf:
        return None
    count, deadline = 1, time.perf_counter() + SECONDS
    most = min(len(ranked), max(1, len(sites) // 2))
    while True:
        variant = before.clone()
        _leaving(p, env, ranked[:count])(variant)
        verdicts = tuple(gate.judge(reference.against(variant).values()))
        passed = all(v.passed for v in verdicts)
        if passed or count == most or time.perf_counter() > deadline:
            break
        count = min(2 * count, most)
    kept = ranked[: count if passed else 0]
    shares = tuple((name, errors[name] / total) for name in ranked[: max(SHOWN, len(kept))])
    skip = tuple(glob.escape(name) for name in kept)
    return Remedy(p.name, shares, len(errors), len(sites), count, skip, tuple(map(str, verdicts)))


def _errors(
    p: Pass,
    before: Graph,
    env: Env,
    sites: list[str],
    declined: Collection[str],
    variants: Variants,
    watch: Callable[[str, int, int], None] | None,
) -> dict[str, float]:
    """The squared relative error of changing each site alone; of evenly spread ones where time is short."""
    errors, began, place, step = dict[str, float](), time.perf_counter(), 0, 1
    while place < len(sites):
        if watch:
            watch(f"ranking the sites of {p.name}", place, len(sites))
        others = [name for name in (*sites, *declined) if name != sites[place]]
        (errors[sites[place]],) = variants.compare(before, [_leaving(p, env, others)], _squared)
        if len(errors) == 2:  # the first one runs what lies before it as well
            step = max(1, math.ceil((time.perf_counter() - began) / 2 * len(sites) / SECONDS))
        place += step
    return errors


def _leaving(p: Pass, env: Env, names: Collection[str]) -> Edit:
    """The pass as an edit that leaves sites alone."""
    skip: Any = (*getattr(p, "skip", ()), *(glob.escape(name) for name in names))
    changed = dataclasses.replace(p, **{"skip": skip})

    def edit(g: Graph) -> None:
        changed.run(g, env)
        g.sweep()

    return edit


def _squared(v: Validation) -> float:
    error: Mapping[str, float] = v.values()
    return error.get("rel-l2", math.nan) ** 2
