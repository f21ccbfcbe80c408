"""One unit of work: a model, a recipe and data in; a published model with its report out, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.data.datasets import as_dataset, load_data
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import GateFailed
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.lowering import tensorrt
from onnxcomp.reports.json_report import SCHEMA_VERSION
from onnxcomp.reports.outcome import Report, Result
from onnxcomp.target import Target, resolved
from onnxcomp.validation.gates import Gate
from onnxcomp.version import __version__

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset
    from onnxcomp.files.stored import Stored

__all__ = ["Job"]

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """Everything that decides a result, as values; equal hashes mean equal results on one machine and version."""

    model: Path
    recipe: Recipe
    target: Target
    calibration: Any = None
    evaluation: Any = None
    samples: int | None = None
    batch: int = 8
    sequence: int | None = None
    seed: int = 0
    shapes: tuple[Mapping[str, int], ...] = ()
    memory: int | None = None
    cache: Path | None = None
    measure: bool = True
    allow_code: bool = False
    choices: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", resolved(self.target))

    def hash(self, source: str | None = None) -> str:
        """SHA-256 (hex) over the model's content (`source`, if known), recipe, target, data and seed."""
        parts = {
            "version": __version__,
            "model": source or storage.fingerprint(self.model),
            "recipe": self.recipe.hash(),
            "target": dataclasses.asdict(self.target),
            "data": [str(self.calibration), str(self.evaluation), self.samples, self.batch, self.sequence],
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def dataset(self, source: Any, graph: Graph) -> Dataset | None:
        """The data behind a source given as text, path or batches; None where nothing is given."""
        if source is None or (isinstance(source, (tuple, list)) and not source):
            return None
        if not isinstance(source, (str, Path)):
            return as_dataset(source, graph)
        return load_data(
            source,
            graph,
            self.model.parent,
            batch=self.batch,
            samples=self.samples,
            sequence=self.sequence,
            allow_code=self.allow_code,
            seed=self.seed,
        )

    def manager(self, watch: Watch | None = None, *, dry: bool = False) -> PassManager:
        """The pass manager this job runs."""
        return PassManager(
            self.recipe.passes,
            target=self.target,
            gate=Gate(self.recipe.gates),
            memory=self.memory,
            cache=self.cache,
            watch=watch,
            on_fail=self.recipe.on_fail,
            seed=self.seed,
            any_order=self.recipe.any_order,
            allow_unchanged=self.recipe.allow_unchanged,
            measure=self.measure,
            shapes=[dict(s) for s in self.shapes],
            allow_code=self.allow_code,
            choices=self.choices,
            dry=dry,
        )

    def run(self, watch: Watch | None = None, source: Stored | None = None) -> Result:
        """Compress in memory, with quality gates; raises `GateFailed`, whose report tells what was measured.

        `source` is the model where the caller has parsed it already.
        """
        source = source or storage.read(self.model)
        calibration, evaluation = (self.dataset(x, source.graph) for x in (self.calibration, self.evaluation))
        try:
            result = self.manager(watch).run(source.graph, calibration, evaluation)
        except GateFailed as e:
            if isinstance(e.report, Report):
                self._describe(e.report, source)
            raise
        self._describe(result.report, source)
        result.report.warnings += tensorrt.require(result.model, self.target)
        return result

    def plan(self, watch: Watch | None = None) -> Result:
        """A dry run in memory: sizes as they will be, nothing measured, judged or written; data where sizes need it.

        `info["plan"]` has parameters, multiplications per token and the files' bytes, and what data is needed for.
        """
        passes = [p.planning() for p in self.recipe.passes]
        unplanned = [p.name for p, q in zip(self.recipe.passes, passes, strict=True) if q is None]
        with_data = bool(unplanned) and self.calibration is not None
        made = [q or p for p, q in zip(self.recipe.passes, passes, strict=True) if q is not None or with_data]
        recipe = dataclasses.replace(self.recipe, passes=tuple(made), gates=())
        data = self.calibration if with_data else None
        dry = dataclasses.replace(self, recipe=recipe, calibration=data, evaluation=None, measure=False)
        source = storage.read(self.model)
        graph = source.graph
        result = dry.manager(watch, dry=True).run(graph, dry.dataset(data, graph), ())
        self._describe(result.report, source)
        info = result.report.info
        info["plan"] = {
            "parameters": [parameters(g) for g in (graph, result.model)],
            "macs": [macs(g) for g in (graph, result.model)],
            "bytes": [source.nbytes, storage.written_bytes(result.model, info["metadata"])],
            "needs_data": [] if with_data else unplanned,
        }
        return result

    def _describe(self, report: Report, source: Stored) -> None:
        report.info |= {
            "source": str(self.model),
            "source_hash": source.fingerprint,
            "job_hash": self.hash(source.fingerprint),
            "recipe": self.recipe.to_yaml(),
            "recipe_name": self.recipe.name,
            "advice": self.recipe.advice,
            "target": self.target.name,
            "seed": self.seed,
            "metadata": {
                "onnxcomp.version": __version__,
                "onnxcomp.source": source.fingerprint,
                "onnxcomp.recipe": self.recipe.hash(),
                "onnxcomp.target": self.target.name,
                "onnxcomp.schema": str(SCHEMA_VERSION),
            },
        }
