"""The pass manager: snapshot, collect, run, verify, compare with the original, gate; every step is verified."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.datasets import Dataset
from onnxcomp.engine import data_used
from onnxcomp.engine.asked import check_asked
from onnxcomp.engine.bisect import Bisection
from onnxcomp.engine.blame import blaming, left_in_branches, listed, needs_of, settled, unmatched
from onnxcomp.engine.compared import NoKernel, answers, compared, possibly_compared
from onnxcomp.engine.exactness import Exactness
from onnxcomp.engine.host import host_of
from onnxcomp.engine.layer_map import layer_map
from onnxcomp.engine.left_out import beside_left_out, few_samples, other_kinds
from onnxcomp.engine.order import allowed, check_order
from onnxcomp.engine.remedy import RANKED_ON, find_remedy
from onnxcomp.engine.resume import StepCache
from onnxcomp.engine.settings import Settings
from onnxcomp.engine.smoke import proven
from onnxcomp.engine.walk import Shared, Walk
from onnxcomp.errors import DataError, GateFailed, ModelError, RecipeError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph, Site
from onnxcomp.graph.hashing import content_hash
from onnxcomp.lowering import costs
from onnxcomp.lowering.costs import Cost
from onnxcomp.lowering.planner import BUDGET, Planner, asked_shapes, known_choices
from onnxcomp.machine import MEMORY, peak_mib
from onnxcomp.maths.blas import one_thread
from onnxcomp.pipeline import Edit, Env, Fidelity, Pass, PassFault, Score, Stage
from onnxcomp.reports.outcome import Remedy, Report, Result, Step
from onnxcomp.runtime.payload import graph_of
from onnxcomp.stats import Need, Stats, calibrate
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.gates import Gate, score_of
from onnxcomp.validation.variants import Variants
from onnxcomp.version import __version__

__all__ = ["PassManager"]

NOTHING_TO_JUDGE_ON = (
    "gates need evaluation data: give --eval heldout.jsonl, at least 5 calibration samples, or --eval random, which "
    "says little"
)
EXACT_SAMPLES = 16  # samples, in whole batches, that an exact pass is checked on; other comparisons take all of them


class PassManager:
    """Runs passes in order on a copy of a model and says what each of them did.

    Raises `RecipeError` for a wrong order, `DataError` where a pass needs data and there is none, `GateFailed` when the
    result is refused (with `on_fail="rollback"` a refused lossy pass is undone instead). `options` are fields of
    `Settings`, such as `target`; without settings nothing is timed.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        settings: Settings | None = None,
        *,
        gate: Gate | None = None,
        on_fail: str = "raise",
        any_order: bool = False,
        allow_unchanged: bool = False,
        watch: Callable[[str, int, int], None] | None = None,
        dry: bool = False,
        shared: Shared | None = None,
        **options: Any,
    ) -> None:
        s = dataclasses.replace(settings or Settings(measure=False), **options)
        self.dry, self.watch, self.shared = dry, watch, shared or Shared()
        self.passes = tuple(passes)
        self.target, self.seed, self.measure, self.shapes = s.target, s.seed, s.measure, s.shapes
        self.memory, self.cache, self.allow_code = s.memory, s.cache, s.allow_code
        self.bisection = Bisection(active=s.bisect)
        self.threads, self.budget = s.threads, BUDGET if s.budget is None else s.budget / 2
        self.host, self.host_note = host_of(self.target)
        self.gate = gate or Gate()
        self.allow_unchanged = allow_unchanged
        self.choices = known_choices(self.target, s.choices, s.cache, s.threads)
        if on_fail not in ("raise", "rollback"):
            raise RecipeError(f"on_fail is 'raise' or 'rollback', not '{on_fail}'")
        self.on_fail = on_fail
        if not any_order:
            check_order(self.passes)
        allowed(self.passes, s.allow_code, self.target)

    def run(self, model: Graph | Stored | str | Path, calibration: Any = (), evaluation: Any = ()) -> Result:
        """Compress a copy of the model; `calibration` and `evaluation` are datasets or re-iterables of feed dicts.

        What is in a file answers as the runtime reads that file, not as it was read here. Without data to judge on the
        result is compared on random inputs; gates need data.
        """
        given = proven(model, self.host)
        original = graph_of(given)
        check_asked(original, self.gate, self.shapes)
        judged = bool(self.gate.conditions) and any(p.fidelity is Fidelity.LOSSY for p in self.passes)
        calib, evalu, notes = data_used.datasets(original, calibration, evaluation, made_up=not (judged or self.dry))
        if judged and evalu is None:
            raise DataError(NOTHING_TO_JUDGE_ON)
        report = Report(calibration=data_used.described(calib), evaluation=data_used.described(evalu))
        report.warnings += [*([self.host_note] if self.host_note else []), *notes, *left_in_branches(original)]
        with scratch_folder() as scratch:
            reference = self.shared.reference
            if evalu is not None and reference is None:
                place = None if self.shared.kept else scratch / "reference"
                judge = partial(self._reference, given, evalu, self.gate.metrics, place)
                reference = answers(judge, evalu, report)
                self.shared.reference = reference if self.shared.kept else None
            steps = self._steps(original, calib, evalu)
            work = original.clone()
            if original.nbytes > (self.memory or MEMORY) // 2:
                work.spool = scratch / "weights"
            walk = Walk(original, work, work, calib, reference, scratch, report, steps, bisection=self.bisection)
            for i, p in enumerate(self.passes):
                if self.watch:
                    self.watch(p.name, i, len(self.passes))
                with blaming(p), one_thread():
                    self._resume_or_step(walk, p)
            self._finish(walk)
        return Result(walk.graph, report, walk.unlowered, walk.exact, unlowered_validation=walk.plain, cut=walk.cut)

    def _reference(
        self, model: Graph | Stored, data: Dataset, metrics: Sequence[str], scratch: Path | None
    ) -> Reference:
        return Reference(model, data, self.host, metrics=metrics, scratch=scratch, allow_code=self.allow_code)

    def _steps(self, original: Graph, calib: Dataset | None, evalu: Dataset | None) -> StepCache:
        if self.cache is None or self.bisection.active:  # which compares behind every pass
            return StepCache(None)
        data = [d.fingerprint() if d is not None else "" for d in (calib, evalu)]
        choices = self.choices.json() if self.choices.pinned else self.choices.header.forms
        timing = (self.measure, self.shapes, self.threads, self.budget)
        settings = (self.target, self.gate, self.on_fail, self.seed, *timing, __version__)
        return StepCache(self.cache, content_hash(original), *data, *settings, choices)

    def _resume_or_step(self, walk: Walk, p: Pass) -> None:
        walk.steps.enter(f"{p}{p.content}")
        walk.report.warnings += p.advice(self.target)
        before, judged = walk.graph, walk.report.validation
        known = walk.steps.load(p, before)
        if known is None:
            self._step(walk, p)
            walk.steps.save(walk.graph, walk.report.steps[-1])
        else:
            walk.graph, step = known
            walk.report.steps.append(step)
            walk.report.validation = None  # stale: the last step's comparison is made again at the end
        walk.exact = walk.graph if p.fidelity is Fidelity.EXACT and walk.exact is before else walk.exact
        walk.cut = walk.graph if p.changes_sizes and walk.graph is not before else walk.cut
        if p.fidelity is Fidelity.LOSSY and walk.graph is not before and p.stage is not Stage.CORRECT:
            walk.lossy = p, before  # what corrections leave alone tells nothing of what they correct
        lowered = p.stage is Stage.LOWER and walk.report.steps[-1].edits
        if lowered and walk.unlowered is None and walk.graph is not before:
            walk.unlowered, walk.plain = before, judged

    # ---- one pass ------------------------------------------------------------------------------------------------

    def _step(self, walk: Walk, p: Pass) -> None:
        started, before = time.perf_counter(), walk.graph
        work = before.clone()
        work.sweep()
        sites = listed(p, "sites", p.sites(work, self.target), Site)
        step = Step(p.name, str(p), p.fidelity.value, eligible=len(sites))
        stats = self._collect(walk.fitted(p)[0], work, needs_of(p, work, walk.exact, self.target), p)
        work.edits, walk.planner, walk.costing = 0, None, 0.0
        p.run(work, self._env(walk, work, stats, p))
        step.choices = walk.planner.chosen if walk.planner is not None else []
        step.choosing = walk.costing + (walk.planner.seconds if walk.planner is not None else 0.0)
        self.choices.save()
        work.sweep()
        if p.changes_interface:
            work.interface = Graph(work.model).interface
        self._verify(work, p)
        step.changed = settled(p, work, sites, self.allow_unchanged)
        step.edits, step.declined, step.noted = work.edits, work.declined, work.noted
        step.covered = work.covered
        walk.report.warnings += unmatched(p, work.declined)
        step.nodes = (before.model.graph.num_nodes(), work.model.graph.num_nodes())
        step.nbytes = (before.nbytes, work.nbytes)
        walk.graph = self._judge(walk, p, step, before, work)
        step.seconds, step.peak_mib = time.perf_counter() - started, peak_mib()
        walk.report.steps.append(step)

    def _verify(self, work: Graph, p: Pass) -> None:
        try:
            work.infer_shapes()
            work.verify()
        except ModelError as e:
            raise PassFault(f"pass '{p.name}' left a broken graph: {e}") from e

    def _judge(self, walk: Walk, p: Pass, step: Step, before: Graph, work: Graph) -> Graph:
        """Compare with the original; keep the new graph, or the one before where the pass is refused."""
        if step.edits == 0:
            return before
        walk.report.validation = None  # of the graph before
        if walk.reference is None:
            return work
        try:
            refused = (self._inexact if p.fidelity is Fidelity.EXACT else self._failed)(walk, p, step, before, work)
        except NoKernel as e:  # a later pass may write other operators; the result is compared again at the end
            walk.report.warnings.append(f"not compared after pass '{p.name}': {e}")
            return work
        if not refused:
            return work
        step.roll_back(refused)
        walk.report.warnings.append(f"pass '{p.name}' was rolled back: {refused}")
        return before

    def _failed(self, walk: Walk, p: Pass, step: Step, before: Graph, work: Graph) -> str:
        """The gates that refuse a lossy pass, empty if it stays."""
        assert walk.reference is not None
        validation = compared(walk.reference, work, p.name)
        step.drift = validation.json()
        beside_left_out(walk, p, step, work, validation, self._reference)
        verdicts = self.gate.judge(validation.values())
        walk.bisection.judged(p, before, work, verdicts)
        failed = [v for v in verdicts if not v.passed]
        refused = "; ".join(map(str, failed)) if self.on_fail == "rollback" else ""
        walk.report.validation = None if refused else validation
        return refused

    def _inexact(self, walk: Walk, p: Pass, step: Step, before: Graph, work: Graph) -> str:
        """What an exact pass moved on a few samples, empty if nothing; behind a lossy pass it may not add drift."""
        assert walk.reference is not None
        judge = walk.exactness = walk.exactness or Exactness(walk.original, walk.reference.head(EXACT_SAMPLES))
        validation = compared(judge.few, work, p.name)
        step.drift = validation.json()
        done = zip(self.passes, walk.report.steps, strict=False)
        moved = judge.moved(validation, done, lambda: judge.few.against(before))
        if moved and self.on_fail == "raise":
            raise PassFault(f"pass '{p.name}' promised equal outputs but {moved}")
        if not moved and judge.covers(walk.reference):
            walk.report.validation = validation
        return moved

    # ---- what passes may ask -------------------------------------------------------------------------------------

    def _env(self, walk: Walk, work: Graph, stats: Stats, p: Pass) -> Env:
        measured, (fitted, left_out) = self.measure and not self.host_note, walk.fitted(p)
        env = Env(
            target=self.target,
            stats=stats,
            original=walk.exact,
            rng=np.random.default_rng([self.seed, len(walk.report.steps)]),
            memory=self.memory,
            scratch=walk.scratch,
            run_costs=lambda forms, shapes: self._costs(walk, forms, shapes, measured),
            **self._asked(fitted, work, p),
            run_split=lambda: self._split(fitted, work, env, p),
            run_unseen=lambda: unseen,
            watch=self.watch,
            run_plan=lambda: self._plan(walk, work, measured),
            measures=measured,
            dry=self.dry and walk.calibration is None,
            shapes=asked_shapes(work, self.shapes) if measured or self.choices.sites else (),
        )
        unseen = dataclasses.replace(env, **self._asked(left_out, work, p, fitted=False)) if left_out else None
        return env

    def _asked(self, walk: Walk, work: Graph, p: Pass, *, fitted: bool = True) -> dict[str, Any]:
        """What the world says of the data of a walk; only data to be fitted is as the pass makes it."""

        def score(edits: Sequence[Edit], metric: str | None, samples: int | None, of: Graph | None) -> list[Score]:
            return self._variants(walk, of or work, edits, metric, samples, p.name)

        return {"run_variants": score, "run_collect": self._collector(walk, work, p, fitted)}

    def _split(self, walk: Walk, work: Graph, env: Env, p: Pass) -> Env:
        fitted, left_out = walk.parts(data_used.HELD_OUT)
        env = dataclasses.replace(env, **self._asked(left_out, work, p))
        return dataclasses.replace(env, run_collect=self._collector(fitted, work, p))

    def _costs(
        self, walk: Walk, forms: Mapping[str, Graph], shapes: Mapping[str, Sequence[int]], measured: bool
    ) -> list[Cost]:
        began = time.perf_counter()
        now = measured and not self.choices.pinned and self._spare(walk) > 0
        known = self.choices.numbers
        found = costs.costs(forms, shapes, self.target, measure=now, threads=self.threads, known=known)
        walk.costing += time.perf_counter() - began
        return found

    def _spare(self, walk: Walk) -> float:
        """Seconds that choosing among forms may still take."""
        return self.budget - walk.costing - sum(s.choosing for s in walk.report.steps if not s.cached)

    def _plan(self, walk: Walk, work: Graph, measured: bool) -> Planner:
        """The planner of the step under way; what it had to leave to the table for want of sizes is a note."""
        if walk.planner is None:
            shapes: Sequence[Mapping[str, int]] = ()
            if measured or self.choices.sites:
                shapes = asked_shapes(work, self.shapes)
                if not shapes:
                    note = "forms were taken from the table: say the size of every open axis with --shape to measure"
                    walk.report.warnings.append(note)
            walk.planner = Planner(
                work, self.target, shapes, self.choices, measured, self._spare(walk), self.threads, self.watch
            )
        return walk.planner

    def _collect(self, walk: Walk, g: Graph, needs: list[Need], p: Pass) -> Stats:
        if not needs or (self.dry and walk.calibration is None):
            return Stats()
        if walk.calibration is None:
            raise DataError(
                f"pass '{p.name}' needs calibration data: give --calibration calib.jsonl (or .npz, a folder, 'random')"
            )
        return calibrate.collect(
            g,
            needs,
            p.calibration(walk.calibration, g),
            self.host,
            original=walk.exact,
            memory=self.memory,
            scratch=walk.scratch,
            cache=self.cache,
            notes=walk.steps.notes,
        )

    def _collector(
        self, walk: Walk, work: Graph, p: Pass, fitted: bool = True
    ) -> Callable[[Graph, Sequence[Need], Graph | None], Stats]:
        """Statistics of the graph while a pass edits it, walking forward with the edits."""
        folder, data = walk.scratch / f"walk-{len(walk.report.steps)}", walk.calibration
        made: dict[int, calibrate.Collector] = {}  # by identity of the graph that needs call the original

        def collect(g: Graph, needs: Sequence[Need], original: Graph | None) -> Stats:
            if data is None:
                return self._collect(walk, g, list(needs), p)
            of = original or walk.exact
            if id(of) not in made:
                given: dict[str, Any] = {"original": of, "memory": self.memory, "scratch": folder}
                used = p.calibration(data, work) if fitted else data
                made[id(of)] = calibrate.Collector(used, self.host, **given, sequential=True)
            return made[id(of)].collect(g, needs)

        return collect

    def _variants(
        self, walk: Walk, work: Graph, edits: Sequence[Edit], metric: str | None, samples: int | None, name: str
    ) -> list[Score]:
        if walk.calibration is None:
            raise DataError(f"pass '{name}' scores variants on calibration data: give --calibration")
        key = metric, samples, len(walk.calibration)  # a part of the data is another one
        if key not in walk.variants:
            metrics = [metric.rpartition("-")[0]] if metric and metric.endswith(("-drop", "-rise")) else []
            kept = walk.scratch / f"variants-{len(walk.variants)}"
            data = walk.calibration.spread(samples or len(walk.calibration))
            if work.spool is not None:  # what a large model gives for a batch is large as well
                data = data.rebatch(1)
            reference = self._reference(walk.original, data, metrics, kept)
            known = walk.steps.variants and walk.steps.variants / "-".join(map(str, key))
            memory, notes = self.memory or MEMORY, walk.steps.notes
            walk.variants[key] = Variants(reference, self.host, memory, kept, known, notes, self.watch)
        return [Score(x) for x in walk.variants[key].compare(work, edits, lambda v: score_of(v, metric))]

    def _finish(self, walk: Walk) -> None:
        """Judge the whole result; raises `GateFailed` where a quality gate refuses it."""
        report = walk.report
        data = (*few_samples(self.passes, report.steps, walk.calibration), *other_kinds(report.steps))
        report.warnings += dict.fromkeys([*self.choices.notes, *walk.steps.notes, *data])
        lossy = any(s.fidelity == "lossy" and s.changed for s in report.steps)
        if report.validation is None and walk.reference is not None and any(s.edits for s in report.steps):
            report.validation = compared(walk.reference, walk.graph, report.steps[-1].name)
        if walk.unlowered is not None and walk.plain is None and walk.reference is not None:
            walk.plain = possibly_compared(walk.reference, walk.unlowered)
        report.layers, report.stream_note = layer_map(walk, self.host, self.memory)
        if report.validation is not None and lossy:
            report.verdicts = self.gate.judge(report.validation.values())
        if refused := [v for v in report.verdicts if not v.passed]:
            report.culprit = walk.bisection.culprit(walk.original, walk.reference, self.host)
            report.remedy = self._remedy(walk) if self.shared.advise else None
            raise GateFailed("the result was refused: " + "; ".join(map(str, refused)), report)

    def _remedy(self, walk: Walk) -> Remedy | None:
        """What the last lossy pass should leave alone for the gates to pass, where it can leave something alone."""
        if walk.lossy is None or walk.reference is None:
            return None
        p, before = walk.lossy
        if p.chooses or not hasattr(p, "skip"):
            return None
        stats = self._collect(walk, before, needs_of(p, before, walk.exact, self.target), p)
        env = dataclasses.replace(self._env(walk, before, stats, p), measures=False, shapes=())
        few = walk.reference.head(RANKED_ON)
        variants = Variants(few, self.host, self.memory or MEMORY, walk.scratch / "remedy")
        declined = [d.site for d in walk.report.step(p.name).declined]
        return find_remedy(p, before, env, declined, walk.reference, variants, self.gate, self.watch)
