"""Recipes with rungs: each is tried in turn, and the first whose result meets the gates is the result."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.engine.order import allowed, check_order
from onnxcomp.engine.recipe import Recipe
from onnxcomp.engine.walk import Shared
from onnxcomp.errors import GateFailed
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.machine import MEMORY
from onnxcomp.reports.outcome import Report, Result, Rung
from onnxcomp.validation.gates import Condition, Verdict

if TYPE_CHECKING:
    from onnxcomp.engine.job import Job, Watch
    from onnxcomp.files.stored import Stored

__all__ = ["climb"]


def climb(job: Job, source: Stored, attempt: Callable[[Job], Result], watch: Watch | None) -> tuple[Job, Result]:
    """The first rung of a job that `attempt` makes a result of, with that; the job itself where it has no rungs.

    Rungs share the original's answers, and through a cache finished passes, statistics and measured forms: a folder of
    their own where none is given and the model is small. Raises `GateFailed` with the report of the rung that came
    nearest, which tells of all.
    """
    if not job.recipe.rungs:
        return job, attempt(job)
    for recipe in job.recipe.steps:  # all that is wrong with a later rung is said before the first
        if not recipe.any_order:
            check_order(recipe.passes)
        allowed(recipe.passes, job.settings.allow_code, job.settings.target)
    with scratch_folder() as folder:
        return _climb(_sharing(job, source, folder), attempt, watch)


def _sharing(job: Job, source: Stored, folder: Path) -> Job:
    s = job.settings
    small = source.nbytes <= (s.memory or MEMORY) // 2  # finished passes are kept as whole models
    settings = dataclasses.replace(s, cache=folder) if s.cache is None and small else s
    return dataclasses.replace(job, settings=settings, shared=Shared(kept=True))


def _climb(job: Job, attempt: Callable[[Job], Result], watch: Watch | None) -> tuple[Job, Result]:
    tried, refusals = list[Rung](), list[GateFailed]()
    left = list(zip(job.recipe.rungs, job.recipe.steps, strict=True))
    while left:
        name, recipe = left.pop(0)
        if watch:
            watch(f"rung '{name}': {', '.join(map(str, recipe.passes))}", 0, 0)
        job.shared.advise = not left and len(tried) < len(job.recipe.rungs)
        rung, began = dataclasses.replace(job, recipe=recipe), time.perf_counter()
        try:
            result = attempt(rung)
        except GateFailed as e:
            tried.append(_rung(name, rung, e.report, time.perf_counter() - began, str(e)))
            refusals.append(e)
            left += _sparing(name, e)
        else:
            tried.append(_rung(name, rung, result.report, time.perf_counter() - began))
            result.report.rungs = tried
            return rung, result
    at = min(range(len(tried)), key=lambda i: _shortfall(refusals[i]))
    report = refusals[at].report
    if isinstance(report, Report):
        report.rungs = tried
        report.remedy = next(
            (r.report.remedy for r in refusals if isinstance(r.report, Report) and r.report.remedy), None
        )
    raise GateFailed(f"no rung met the gates; '{tried[at].name}' came nearest: {tried[at].refused}", report)


def _sparing(name: str, e: GateFailed) -> list[tuple[str, Recipe]]:
    """After the last rung, that one without the sites that a remedy found: with them left alone gates passed."""
    remedy = e.report.remedy if isinstance(e.report, Report) else None
    return [(f"{name}, sparing", Recipe.from_yaml(remedy.recipe))] if remedy is not None and remedy.recipe else []


def _rung(name: str, job: Job, report: object, seconds: float, refused: str = "") -> Rung:
    spec = ", ".join(map(str, job.recipe.passes))
    if not isinstance(report, Report):  # refused by a pass
        return Rung(name, spec, {}, None, seconds, refused)
    values = report.validation.summary() if report.validation is not None else {}
    size = report.size.result if report.size is not None else report.steps[-1].nbytes[1]
    return Rung(name, spec, values, size, seconds, refused)


def _shortfall(e: GateFailed) -> float:
    """How far the worst refused gate is from its bound, relative to that."""
    verdicts: Sequence[Verdict] = e.report.verdicts if isinstance(e.report, Report) else ()
    return max((_distance(v) for v in verdicts if not v.passed), default=math.inf)


def _distance(v: Verdict) -> float:
    if v.value is None or not math.isfinite(v.value):
        return math.inf
    bound = Condition.parse(v.gate).bound
    return abs(v.value - bound) / max(abs(bound), 1e-12)
