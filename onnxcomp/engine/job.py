"""One unit of work: a model, a recipe and data in; a published model with its report out, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.engine.blame import blaming
from onnxcomp.engine.ladder import climb
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.order import advice
from onnxcomp.engine.recipe import Recipe
from onnxcomp.engine.repeat import command_of
from onnxcomp.engine.settings import Settings
from onnxcomp.engine.walk import Shared
from onnxcomp.errors import GateFailed
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import tensorrt
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Origin, Plan, Remedy, Report, Result
from onnxcomp.validation.gates import Gate
from onnxcomp.version import __version__

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset
    from onnxcomp.files.stored import Stored

__all__ = ["Job"]

Watch = Callable[[str, int, int], None]  # what is done, how much of it, of how much; a remark where that is nothing


@dataclass(frozen=True)
class Job:
    """Everything that decides a result, as values; equal hashes mean equal results on one machine and version."""

    model: Path
    recipe: Recipe
    settings: Settings = field(default_factory=Settings)
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)
    encoder: Path | None = None  # of a decoder: what the encoder beside it became, which its result will read

    def hash(self, source: str | None = None) -> str:
        """SHA-256 (hex) over the model's content (`source`, if known), recipe, target, data and seed."""
        s = self.settings
        parts = {
            "version": __version__,
            "model": source or storage.fingerprint(self.model),
            "recipe": self.recipe.hash(),
            "target": dataclasses.asdict(s.target),
            "data": [str(s.calibration), str(s.evaluation), s.samples, s.batch, s.sequence],
            "seed": s.seed,
        }
        parts |= {"encoder": storage.fingerprint(self.encoder)} if self.encoder is not None else {}
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def manager(self, watch: Watch | None = None, *, dry: bool = False) -> PassManager:
        """The pass manager this job runs."""
        recipe = self.recipe
        return PassManager(
            recipe.passes,
            self.settings,
            gate=Gate(recipe.gates),
            on_fail=recipe.on_fail,
            any_order=recipe.any_order,
            allow_unchanged=recipe.allow_unchanged,
            watch=watch,
            dry=dry,
            shared=self.shared,
        )

    def _data(self, graph: Graph) -> tuple[Dataset | None, Dataset | None]:
        """Calibration and evaluation data."""
        s, folder = self.settings, self.model.parent
        calibration, evaluation = (s.dataset(x, graph, folder, self.encoder) for x in (s.calibration, s.evaluation))
        return calibration, evaluation

    def run(self, watch: Watch | None = None, source: Stored | None = None) -> Result:
        """Compress in memory, with quality gates; raises `GateFailed`, whose report tells what was measured.

        `source` is the model where the caller has parsed it already.
        """
        source = source or storage.read(self.model)
        if self.recipe.rungs:
            return climb(self, source, lambda rung: rung.run(watch, source), watch)[1]
        manager, notes = self.manager(watch), advice(self.recipe.passes)
        if watch:  # before minutes of work; the report has these as well
            of_passes = (remark for p in manager.passes for remark in p.advice(manager.target))
            for remark in filter(None, (manager.host_note, *of_passes, *notes)):
                watch(remark, 0, 0)
        try:
            result = manager.run(source, *self._data(source.graph))
            result.report.warnings[:0] = notes
        except GateFailed as e:
            if isinstance(e.report, Report):
                self._describe(e.report, source)
                if (r := e.report.remedy) is not None and r.skip:
                    e.report.remedy = dataclasses.replace(r, recipe=self._remedied(r).to_yaml())
            raise
        self._describe(result.report, source)
        result.report.warnings += tensorrt.require(result.model, self.settings.target)
        return result

    def _remedied(self, r: Remedy) -> Recipe:
        """The recipe whose refused pass leaves alone what the remedy names; its advice has been given."""
        at = max(i for i, p in enumerate(self.recipe.passes) if p.name == r.name)
        passes = list(self.recipe.passes)
        skip: Any = (*getattr(passes[at], "skip", ()), *r.skip)
        passes[at] = dataclasses.replace(passes[at], **{"skip": skip})
        return dataclasses.replace(self.recipe, passes=tuple(passes), about="", advice="")

    def plan(self, watch: Watch | None = None) -> Result:
        """A dry run in memory: sizes as they will be, nothing measured, judged or written; data where sizes need it.

        The report's `plan` tells them, and what data is needed for.
        """
        if self.recipe.rungs:  # later ones are tried only where gates refuse this one
            result = dataclasses.replace(self, recipe=self.recipe.steps[0]).plan(watch)
            first, *others = self.recipe.rungs
            result.report.warnings.append(f"planned is the rung '{first}'; where gates refuse it: {', '.join(others)}")
            return result
        passes = [_planning(p) for p in self.recipe.passes]
        unplanned = [p.name for p, q in zip(self.recipe.passes, passes, strict=True) if q is None]
        with_data = bool(unplanned) and self.settings.calibration is not None
        made = [q or p for p, q in zip(self.recipe.passes, passes, strict=True) if q is not None or with_data]
        recipe = dataclasses.replace(self.recipe, passes=tuple(made), gates=())
        data = self.settings.calibration if with_data else None
        settings = dataclasses.replace(self.settings, calibration=data, evaluation=None, measure=False)
        dry = Job(self.model, recipe, settings, encoder=self.encoder)
        source = storage.read(self.model)
        graph = source.graph
        result = dry.manager(watch, dry=True).run(graph, *dry._data(graph))
        result.report.warnings += _otherwise(self.recipe.passes, passes)
        self._describe(result.report, source)
        report, planned = result.report, result.unlowered or result.model  # lowering writes products in other ways
        report.plan = Plan(
            (parameters(graph, codes=True), parameters(planned, codes=True)),
            (macs(graph, codes=True), macs(planned, codes=True)),
            (source.nbytes, storage.written_bytes(result.model, report.metadata)),
            () if with_data else tuple(unplanned),
        )
        return result

    def _describe(self, report: Report, source: Stored) -> None:
        report.command, report.models = command_of(self), (str(self.model),)
        report.origin = Origin(
            source=str(self.model),
            source_hash=source.fingerprint,
            job_hash=self.hash(source.fingerprint),
            recipe=self.recipe.to_yaml(),
            recipe_name=self.recipe.name,
            recipe_hash=self.recipe.hash(),
            advice=self.recipe.advice,
            target=self.settings.target.name,
            seed=self.settings.seed,
            files=source.hashes,
            passes=", ".join(p.name for p in self.recipe.passes),
        )


def _otherwise(passes: Iterable[Pass], planned: Iterable[Pass | None]) -> Iterator[str]:
    """What a dry run decides by other options than the job will, for each pass."""
    for p, q in zip(passes, planned, strict=True):
        options = [f.name for f in dataclasses.fields(p) if q is not None and getattr(p, f.name) != getattr(q, f.name)]
        if options:
            said = ", ".join(f"{name}: {getattr(q, name)}" for name in options)
            yield f"pass '{p.name}' is planned without data ({said}): what each layer keeps may come out otherwise"


def _planning(p: Pass) -> Pass | None:
    with blaming(p):
        return p.planning()
