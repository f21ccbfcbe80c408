"""One unit of work: a model, a recipe and data in; a published model with its report out, or nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.benchmarking import benchmark
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.data import open_axes, vocabulary
from onnxcomp.data.datasets import as_dataset, load_data
from onnxcomp.engine import config_file, confirm
from onnxcomp.engine.manager import PassManager, host_of
from onnxcomp.engine.recipe import Recipe, with_exact_rows
from onnxcomp.engine.smoke import smoke
from onnxcomp.errors import DataError, GateFailed, ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.storage import chosen_graphs
from onnxcomp.graph import Graph
from onnxcomp.lowering import tensorrt
from onnxcomp.pipeline import Pass, Stage
from onnxcomp.reports.json_report import SCHEMA_VERSION, write
from onnxcomp.reports.outcome import Report, Result
from onnxcomp.runtime import sessions
from onnxcomp.runtime.integer import saturating
from onnxcomp.runtime.placement import Placement, placement
from onnxcomp.target import CPU, Target, find, resolved
from onnxcomp.validation.gates import Gate
from onnxcomp.version import __version__

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset

__all__ = ["Job", "compress", "compress_each", "optimize"]

Watch = Callable[[str, int, int], None]
CUTTING = (Stage.DEPTH, Stage.WIDTH, Stage.ATTENTION)  # passes after which a configuration may name other sizes


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

    def run(self, watch: Watch | None = None) -> Result:
        """Compress in memory, with quality gates; raises `GateFailed`, whose report tells what was measured."""
        graph = storage.load(self.model)
        calibration, evaluation = (self.dataset(x, graph) for x in (self.calibration, self.evaluation))
        try:
            result = self.manager(watch).run(graph, calibration, evaluation)
        except GateFailed as e:
            if isinstance(e.report, Report):
                self._describe(e.report)
            raise
        self._describe(result.report)
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
        graph = storage.load(self.model)
        result = dry.manager(watch, dry=True).run(graph, dry.dataset(data, graph), ())
        self._describe(result.report)
        info = result.report.info
        info["plan"] = {
            "parameters": [parameters(g) for g in (graph, result.model)],
            "macs": [macs(g) for g in (graph, result.model)],
            "bytes": [storage.file_bytes(self.model), storage.written_bytes(result.model, info["metadata"])],
            "needs_data": [] if with_data else unplanned,
        }
        return result

    def _describe(self, report: Report) -> None:
        source = storage.fingerprint(self.model)
        report.info |= {
            "source": str(self.model),
            "source_hash": source,
            "job_hash": self.hash(source),
            "recipe": self.recipe.to_yaml(),
            "recipe_name": self.recipe.name,
            "advice": self.recipe.advice,
            "target": self.target.name,
            "seed": self.seed,
            "metadata": {
                "onnxcomp.version": __version__,
                "onnxcomp.source": source,
                "onnxcomp.recipe": self.recipe.hash(),
                "onnxcomp.target": self.target.name,
                "onnxcomp.schema": str(SCHEMA_VERSION),
            },
        }


def compress(model: str | Path, out: str | Path, **options: Any) -> Result:
    """Compress one model and publish it in the folder (or `.onnx` file) `out`; see `compress_each` for the options.

    Raises `GateFailed` when a gate refuses the result; nothing is written then.
    """
    held = storage.graphs_of(model)
    if len(held) > 1 and not options.get("graph"):
        raise ModelError(f"{model}: holds the graphs {', '.join(held)}; name one with graph=, or call compress_each")
    return next(iter(compress_each(model, out, **options).values()))


def compress_each(
    model: str | Path,
    out: str | Path | None,
    *,
    preset: str | None = None,
    recipe: Recipe | str | Path | None = None,
    passes: Iterable[Pass | str] | None = None,
    target: str | Target | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    samples: int | None = None,
    gates: Iterable[str] = (),
    on_fail: str | None = None,
    shapes: Sequence[Mapping[str, int]] = (),
    opset: int | None = None,
    memory: int | None = None,
    plan: bool = False,
    measure: bool = True,
    cache: str | Path | None = None,
    report: str | Path | None = None,
    choices: str | Path | None = None,
    allow_code: bool = False,
    graph: str | None = None,
    seed: int = 0,
    batch: int | None = None,
    sequence: int | None = None,
    exact_rows: bool = False,
    watch: Watch | None = None,
) -> dict[str, Result]:
    """Compress every graph of a model and publish all of them or none; returns results by graph name.

    One of `preset`, `recipe` and `passes` says what to do; `gates` add to the recipe's; `plan` writes nothing;
    `measure=False` runs no benchmark and takes the target's tables; `choices` is a file that `tune` wrote;
    `exact_rows` is an option of canonicalize and lower.
    """
    chosen = _recipe(preset, recipe, passes)
    chosen = with_exact_rows(chosen) if exact_rows else chosen
    asked: dict[str, Any] = {} if on_fail is None else {"on_fail": on_fail}
    chosen = dataclasses.replace(chosen, gates=(*chosen.gates, *gates), **asked)
    aim = _aim(target or chosen.target, opset)
    data = chosen.data
    calibration = data.calibration if calibration is None else calibration
    evaluation = data.evaluation if evaluation is None else evaluation
    _needs_data(chosen, calibration, plan)
    jobs = {
        name: Job(
            path, chosen, aim, calibration, evaluation, samples or data.samples, batch or data.batch or 8,
            sequence or data.sequence, seed, tuple(shapes), memory,
            Path(cache) if cache else None, measure and not plan, allow_code, Path(choices) if choices else None,
        )
        for name, path in chosen_graphs(Path(model), graph).items()
    }  # fmt: skip
    if plan or out is None:
        return {name: job.plan(watch) if plan else job.run(watch) for name, job in jobs.items()}
    return _publish(jobs, Path(out), Path(report) if report else None, watch)


def optimize(model: str | Path, out: str | Path, **options: Any) -> Result:
    """Make a model faster without changing its outputs (recipe `optimize`, no data); options as for `compress`."""
    return compress(model, out, **({"preset": "optimize"} | options))


def _aim(target: str | Target, opset: int | None) -> Target:
    """The target by name or as given, with an older operator set where one is asked for."""
    aim = target if isinstance(target, Target) else find(target)
    return aim if opset is None else dataclasses.replace(aim, max_opset=opset)


def _recipe(preset: str | None, recipe: Recipe | str | Path | None, passes: Iterable[Pass | str] | None) -> Recipe:
    from onnxcomp.engine.recipe import parse_pass

    given = [name for name, x in (("preset", preset), ("recipe", recipe), ("passes", passes)) if x]
    if len(given) != 1:
        raise RecipeError(
            f"say what to do with exactly one of preset, recipe and pass; got {', '.join(given) or 'none'}"
        )
    if preset:
        return Recipe.preset(preset)
    if recipe is not None:
        return recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe))
    return Recipe(name="custom", passes=tuple(p if isinstance(p, Pass) else parse_pass(p) for p in passes or ()))


def _needs_data(recipe: Recipe, calibration: Any, plan: bool) -> None:
    needing = [p.name for p in recipe.passes if p.wants_data]
    if needing and calibration is None and not plan:
        raise RecipeError(
            f"pass '{needing[0]}' needs calibration data; give it with --calibration, for example a calib.jsonl with "
            'one {"text": "..."} a line, an .npz of arrays by input name, a folder of images, or the word random'
        )


# ---- publishing ------------------------------------------------------------------------------------------------------


def _publish(jobs: Mapping[str, Job], out: Path, report_file: Path | None, watch: Watch | None) -> dict[str, Result]:
    """Run all jobs into a staging folder, judge the written files, then move everything into place at once."""
    folder, file_name = (out.parent, out.name) if out.suffix == ".onnx" else (out, None)
    if file_name and len(jobs) > 1:
        raise ModelError(f"{out}: several graphs need a folder as output, not a file")
    results = {}
    try:
        with storage.publish(folder) as staging:
            for name, job in jobs.items():
                results[name] = _stage(job, staging, _file_name(job, folder, file_name), watch)
            source = next(iter(jobs.values())).model.parent
            whole = file_name is None and not (folder.exists() and folder.samefile(source))
            if whole:
                storage.copy_companions(source, staging)
                for result in results.values():
                    config_file.rewrite(staging, result.config)
            _renumber(jobs, results, staging, whole=whole)
    except GateFailed as e:
        if report_file is not None and isinstance(e.report, Report):
            write(e.report, report_file)
        raise
    if report_file is not None:
        write(next(iter(results.values())).report, report_file)
    return results


def _renumber(jobs: Mapping[str, Job], results: Mapping[str, Result], staging: Path, *, whole: bool) -> None:
    """Write tokenizer files to match a reduced vocabulary; refuse where they would belong to another model as well."""
    words = [w for r in results.values() if (w := vocabulary.renumbering(r.model)) is not None]
    if not words:
        return
    if not whole or len(jobs) > 1:
        raise RecipeError(
            "prune-vocab renumbers the tokens, so the result needs a tokenizer of its own: "
            "compress one graph (--graph NAME) into a new folder"
        )
    vocabulary.rewrite(staging, words[0])


def _file_name(job: Job, folder: Path, asked: str | None) -> str:
    """The source's file name, or one with the recipe's name where that would overwrite the source."""
    name = asked or job.model.name
    if folder.exists() and folder.samefile(job.model.parent) and name == job.model.name:
        if asked:
            raise ModelError(f"{job.model}: is the source model and is never overwritten; choose another output")
        return f"{job.model.stem}-{job.recipe.name}.onnx"
    return name


def _stage(job: Job, staging: Path, name: str, watch: Watch | None) -> Result:
    result = job.run(watch)
    words = vocabulary.renumbering(result.model)
    if words is not None:
        result.report.warnings.append(
            f"{len(words.kept)} of {words.size} tokens are left and have new ids: use the tokenizer beside the result"
        )
    if result.report.validation is not None:
        result.report.warnings += result.report.validation.notes
    if any(p.stage in CUTTING and not p.is_identity for p in job.recipe.passes):
        result.config, notes = config_file.follow(job.model, result.unlowered or result.model)
        result.report.warnings += notes
    path = storage.save(result.model, staging, metadata=result.report.info["metadata"], name=name)
    timed = job.measure and job.target.here and not host_of(job.target)[1]
    confirm.confirm(job.model, path, result, job.target, job.shapes, measure=timed)
    _check(job, path, result)
    stem = Path(name).stem
    write(result.report, staging / ("report.json" if stem == "model" else f"{stem}.report.json"))
    return result


def _check(job: Job, path: Path, result: Result) -> None:
    """What can only be judged on the written file: it runs at two shapes, keeps integer products, size, speed."""
    r = result.report
    r.info["size"] = {"original": storage.file_bytes(job.model), "result": storage.file_bytes(path)}
    values = {"size": r.info["size"]["result"] / max(1, r.info["size"]["original"])}
    gate = Gate(job.recipe.gates)
    host, elsewhere = host_of(job.target)
    r.warnings += smoke(job.model, path, host)
    if job.target.provider == CPU.provider:
        r.integer = sessions.integer_check(path, host)
    r.placement = _placed(path, job.target, host, elsewhere)
    if job.measure and job.target.here and not elsewhere:
        r.benchmark = r.benchmark or benchmark.bench([job.model, path], job.target, job.shapes)
        values["latency"] = max(1 / r.benchmark.ratio(1, s).value for s in r.benchmark.shapes)
    elif gate.wants_latency:
        raise RecipeError("a latency gate needs measuring on this machine; drop --no-measure or the gate")
    r.verdicts += gate.judge(values, files=True)
    refused = [str(v) for v in r.verdicts if not v.passed]
    if r.integer is not None and not r.integer.ok:
        refused.append(f"integer check: {r.integer.detail}")
    if job.target.quantized.saturates:
        refused += _saturating(job, path, r)
    if refused:
        raise GateFailed("the result was refused: " + "; ".join(refused), r)


def _saturating(job: Job, path: Path, r: Report) -> list[str]:
    """Weights of the written file whose sums can saturate: refused if made here, a warning if the source had them."""
    model = storage.load(path).model
    if job.target.provider != CPU.provider or not (broken := saturating(model)):
        return []
    made = saturating(model, storage.load(job.model).model)
    can = "on this CPU sums of its products can saturate at 16 bits, so results may be wrong"
    r.warnings += [f"weight '{w}' is int8 in the source already: {can}" for w in broken if w not in made]
    return [f"weight '{w}': {can}; a pass that cuts its inputs belongs before the one that quantizes" for w in made]


def _placed(path: Path, target: Target, host: Target, elsewhere: str) -> Placement:
    """Who runs what, at a small size; a target that is not here is only looked up."""
    if elsewhere or not target.here:
        return placement(path, target, None, elsewhere or f"'{target.name}' is another machine")
    g = storage.load(path)
    try:
        feeds = open_axes.feeds_for(g, {k: min(n, 8) for k, n in open_axes.default_shapes(g)[0].items()})
    except DataError as e:
        return placement(path, host, None, str(e))
    return placement(path, host, feeds)
