"""What a refused pass should leave alone for the gates to pass: ranked and tried on the model at hand."""

from __future__ import annotations

import dataclasses
import glob
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from onnxcomp.graph import Graph
from onnxcomp.pipeline import Edit, Env, Pass
from onnxcomp.reports.outcome import Remedy
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.gates import Gate, Verdict
from onnxcomp.validation.results import Validation
from onnxcomp.validation.variants import Variants

__all__ = ["RANKED_ON", "find_remedy"]

RANKED_ON = 16  # samples: sites differ by factors, so few are enough to rank them; the remedy is tried on all
SECONDS = 20.0  # of ranking: a refusal must not take much longer than the work
TRIES = 8  # variants judged on all data: 1, 2, 4, ... of 64 sites and one step back
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

    As many are left alone as 1, 2, 4, ... up to half of all, until the gates pass on all data of the reference, then as
    few of these as `TRIES` allows; sites that there was no time to measure rank as those of their kind do.
    """
    sites = [s.name for s in p.sites(before, env.target) if s.name not in declined]
    if len(sites) < 2:
        return None
    errors = _errors(p, before, env, sites, declined, variants, watch)
    total = sum(errors.values())
    if not 0 < total < math.inf:
        return None
    expected = _expected(sites, errors)
    ranked = sorted(expected, key=lambda name: -expected[name])

    def judged(count: int) -> tuple[Verdict, ...]:
        if watch:
            watch(f"leaving sites of {p.name} alone", count, len(sites))
        variant = before.clone()
        _leaving(p, env, ranked[:count])(variant)
        return tuple(gate.judge(reference.against(variant).values()))

    count, verdicts, passed = _fewest(max(1, len(sites) // 2), judged)
    kept = ranked[: count if passed else 0]
    measured = [name for name in ranked if name in errors]
    shown = max(SHOWN, sum(name in errors for name in kept))
    shares = tuple((name, errors[name] / total) for name in measured[:shown])
    skip = tuple(glob.escape(name) for name in kept)
    return Remedy(p.name, shares, len(errors), len(sites), count, skip, tuple(map(str, verdicts)))


def _fewest(most: int, judged: Callable[[int], tuple[Verdict, ...]]) -> tuple[int, tuple[Verdict, ...], bool]:
    """How many sites to leave alone, with the verdicts then and whether they are all passed."""
    fails, count, tries = 0, 1, 1
    verdicts = judged(count)
    while not all(v.passed for v in verdicts):
        if count == most or tries == TRIES:
            return count, verdicts, False
        fails, count, tries = count, min(2 * count, most), tries + 1
        verdicts = judged(count)
    while count - fails > 1 and tries < TRIES:
        middle, tries = (fails + count) // 2, tries + 1
        found = judged(middle)
        if all(v.passed for v in found):
            count, verdicts = middle, found
        else:
            fails = middle
    return count, verdicts, True


def _expected(sites: Iterable[str], errors: Mapping[str, float]) -> dict[str, float]:
    """The error of every site: as measured, else the mean of its kind, which is its name without numbers."""
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        kinds.setdefault(re.sub(r"\d+", "", name), []).append(error)
    mean = sum(errors.values()) / len(errors)
    known = {kind: sum(found) / len(found) for kind, found in kinds.items()}
    return {name: errors.get(name, known.get(re.sub(r"\d+", "", name), mean)) for name in sites}


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
