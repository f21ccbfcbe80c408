"""A job's results on disk: staged, judged as written, then moved into place all at once or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.blocks.stored_parts import stored_parts
from onnxcomp.data import open_axes
from onnxcomp.engine import config_file, confirm
from onnxcomp.engine.bisect import not_bisected
from onnxcomp.engine.blame import blaming
from onnxcomp.engine.encoded import is_cross
from onnxcomp.engine.evidence import Evidence
from onnxcomp.engine.host import host_of
from onnxcomp.engine.job import Job, Watch
from onnxcomp.engine.ladder import climb
from onnxcomp.engine.report_file import check_report_file, report_file, write_report
from onnxcomp.engine.smoke import smoke
from onnxcomp.engine.whole import whole_report
from onnxcomp.errors import DataError, GateFailed, ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.stored import Stored
from onnxcomp.pipeline import Companions, Stage
from onnxcomp.reports.outcome import Report, Result, Size
from onnxcomp.reports.page.files import page_file
from onnxcomp.runtime import sessions
from onnxcomp.runtime.integer import counted, saturating
from onnxcomp.runtime.placement import Placement, placement
from onnxcomp.target import CPU, Target
from onnxcomp.validation.gates import Gate

__all__ = ["publish"]

BESIDE = "{} and its result {} lie in one folder now: say which file in later commands"
LARGER = 1.05  # size relative to the source's from which on the report says so: names and shapes alone make less


def publish(
    jobs: Mapping[str, Job], out: Path, report: Path | None, watch: Watch | None, model: Job | None = None
) -> dict[str, Result]:
    """Run all jobs into a staging folder, judge the written files, then move everything into place at once.

    Jobs of the graphs of one `model`, an encoder and a decoder, are judged together as well.
    """
    folder, file_name = (out.parent, out.name) if out.suffix == ".onnx" else (out, None)
    if file_name and len(jobs) > 1:
        raise ModelError(f"{out}: several graphs need a folder as output, not a file")
    source = next(iter(jobs.values())).model.parent
    whole = file_name is None and not (folder.exists() and folder.samefile(source))
    names = {name: _file_name(job, folder, file_name) for name, job in jobs.items()}
    html = next(iter(jobs.values())).settings.html
    check_report_file(report, html=html)
    stale = () if html else [page_file(Path(_report_name(name))).name for name in names.values()]
    evidence = Evidence(folder, names, source if whole else None)
    results, made = dict[str, Result](), dict[str, Job]()
    try:
        with contextlib.ExitStack() as late:
            put_report = late.enter_context(report_file(report, html=html))
            owned = (*(storage.companions(source) if whole else ()), *stale)
            staging = late.enter_context(storage.publish(folder, owned, evidence.seal))
            for name, job in jobs.items():
                notes = evidence.notes if file_name or whole else [BESIDE.format(job.model.name, names[name])]
                made[name], results[name] = _stage(_behind(job, staging, names), staging, names[name], watch, notes)
                if model is not None:
                    _keeps_words(made[name], results[name])
            if model is not None:
                results[name].whole = both = whole_report(model, results)
                write_report(both, staging / "report.json", html=html)
            if whole:
                storage.copy_companions(source, staging)
                for result in results.values():
                    config_file.rewrite(staging, result.config)
            _rewrite_companions(made, results, staging, whole=whole)
            evidence.tell(made, results, staging)
            put_report(results[name].whole or next(iter(results.values())).report)
        for name, result in results.items():
            result.path = folder / names[name]
    except GateFailed as e:
        e.graph = next((n for n in jobs if n not in results), "") if len(jobs) > 1 else ""
        if report is not None and isinstance(e.report, Report):
            write_report(e.report, report, html=html)
        raise
    return results


def _behind(job: Job, staging: Path, names: Mapping[str, str]) -> Job:
    """The job of a decoder with the result of its encoder, which is staged already."""
    if job.encoder is None:
        return job
    return dataclasses.replace(job, encoder=staging / names[job.encoder.stem])


def _rewrite_companions(jobs: Mapping[str, Job], results: Mapping[str, Result], staging: Path, *, whole: bool) -> None:
    """Make the files beside a result say what it needs; refuse where they would belong to another model as well."""
    needed = [c for name, job in jobs.items() for c in _companions(job, results[name])]
    if needed and (not whole or len(jobs) > 1):
        raise RecipeError(f"{needed[0].why}: compress one graph (--graph NAME) into a new folder")
    for c in needed:
        c.rewrite(staging)


def _keeps_words(job: Job, result: Result) -> None:
    """Refuse what would need another tokenizer for one graph of a model than for the other."""
    if needed := _companions(job, result):
        raise RecipeError(f"{needed[0].why}: compress one graph (--graph NAME) into a new folder")


def _companions(job: Job, result: Result) -> list[Companions]:
    """What the passes of a job need of the files beside its result, once for each kind of pass."""
    found = []
    for p in {p.name: p for p in job.recipe.passes}.values():
        with blaming(p):
            found.append(p.companions(result.model))
    return [c for c in found if c is not None]


def _file_name(job: Job, folder: Path, asked: str | None) -> str:
    """The source's file name, or one with the recipe's name where that would overwrite the source."""
    name, beside = asked or job.model.name, folder.exists() and folder.samefile(job.model.parent)
    if beside and not asked:
        name = f"{job.model.stem}-{job.recipe.name}.onnx"
    place = folder / name
    if beside and place.exists() and place.samefile(job.model):
        raise ModelError(f"{job.model}: is the source model and is never overwritten; choose another output")
    if not asked and place.exists() and not storage.is_result(place):
        raise ModelError(
            f"{place}: is another model, not an earlier result; choose another folder, or overwrite it by its name: "
            f"-o {place}"
        )
    return name


def _stage(job: Job, staging: Path, name: str, watch: Watch | None, notes: Sequence[str]) -> tuple[Job, Result]:
    """The job as it was done, that of a rung where it has any, and its result."""
    source, there = storage.read(job.model), set(staging.iterdir())

    def attempt(rung: Job) -> Result:
        try:
            return _stage_one(rung, source, staging, name, watch, notes)
        except GateFailed:
            for left in set(staging.iterdir()) - there:  # the next rung may write other files
                left.unlink()
            raise

    try:
        done, result = climb(job, source, attempt, watch)
    except DataError as e:
        if job.encoder is not None and is_cross(str(e)):
            raise RecipeError(f"{e}: heads of cross attention were cut in the decoder alone; skip these sites") from e
        raise
    write_report(result.report, staging / _report_name(name), html=job.settings.html)
    return done, result


def _report_name(name: str) -> str:
    stem = Path(name).stem
    return "report.json" if stem == "model" else f"{stem}.report.json"


def _stage_one(job: Job, source: Stored, staging: Path, name: str, watch: Watch | None, notes: Sequence[str]) -> Result:
    result = job.run(watch, source)
    result.report.warnings += notes
    result.report.warnings += [c.note for c in _companions(job, result) if c.note]
    if result.report.validation is not None:
        result.report.warnings += result.report.validation.notes
    if any(p.changes_sizes and not p.is_identity for p in job.recipe.passes):
        original, cut = result.exact or source.graph, result.cut or result.unlowered or result.model
        result.config, notes = config_file.follow(job.model.parent, original, cut)
        result.report.warnings += notes
    result.exact = result.cut = None  # not needed any more, and each can hold another copy of every weight
    path = storage.save(result.model, staging, metadata=result.report.metadata, name=name)
    settings = job.settings
    timed = settings.measure and settings.target.here and not host_of(settings.target)[1]
    written = confirm.confirm(source, storage.read(path), result, settings, measure=timed, watch=watch)
    if result.report.lowering is not None and result.report.lowering.kept == "unlowered":
        _judge_again(job, result.report)
    _check(job, source, written, result, watch)
    return result


def _judge_again(job: Job, r: Report) -> None:
    """The gates on the unlowered model, which was kept."""
    if r.validation is None:
        r.warnings.append("the unlowered model, which was kept, was not compared with the original")
    elif r.verdicts:
        r.verdicts = Gate(job.recipe.gates).judge(r.validation.values())


def _check(job: Job, source: Stored, written: Stored, result: Result, watch: Watch | None) -> None:
    """What can only be judged on the written file: it runs at two shapes, keeps integer products, size, speed."""
    r, target = result.report, job.settings.target
    r.size = Size(source.nbytes, written.nbytes, stored_parts(written.graph), stored_parts(source.graph))
    if r.size.ratio > LARGER:
        r.warnings.append(f"the result is larger than its source: {r.size.original:,} > {r.size.result:,} bytes")
    values = {"size": r.size.ratio}
    gate = Gate(job.recipe.gates)
    host, elsewhere = host_of(target)
    r.warnings += smoke(source, written, host)
    if target.provider == CPU.provider:
        r.integer = sessions.integer_check(written, host)
    r.placement = _placed(written, target, host, elsewhere)
    if job.settings.measure and target.here and not elsewhere:
        r.benchmark = r.benchmark or confirm.timed([source, written], r, job.settings, watch)
        values["latency"] = max(1 / r.benchmark.ratio(1, s).value for s in r.benchmark.shapes)
    on_file = gate.judge(values, files=True)
    r.verdicts += on_file
    if job.settings.bisect and not all(v.passed for v in on_file):
        r.warnings.append(not_bisected(on_file, r.steps))
    refused = [str(v) for v in r.verdicts if not v.passed]
    r.refused = _slow_products(job, r)
    if target.quantized.saturates and target.provider == CPU.provider:
        r.refused += _saturating(source, written, r)
    if refused := [*refused, *r.refused]:
        raise GateFailed("the result was refused: " + "; ".join(refused), r)


def _slow_products(job: Job, r: Report) -> list[str]:
    """Weights that this CPU dequantizes at every run: refused, but for standard operators, which have no other form."""
    if r.integer is None or r.integer.ok:
        return []
    if any(p.options.get("standard") for p in job.recipe.passes):
        r.warnings.append(f"not all standard forms have a fast kernel on this CPU: {r.integer.detail}")
        return []
    lowered = any(p.stage is Stage.LOWER for p in job.recipe.passes)
    hint = (
        "" if lowered else f"; a pass of stage '{Stage.LOWER.name.lower()}' at the end writes products that read codes"
    )
    return [f"integer check: {r.integer.detail}{hint}"]


def _saturating(source: Stored, written: Stored, r: Report) -> list[str]:
    """Weights of the written file whose sums can saturate: refused if made here, a warning if the source had them."""
    model = written.graph.model
    if not (broken := saturating(model)):
        return []
    made = saturating(model, source.graph.model)
    can = "on this CPU sums of their products can saturate at 16 bits, so results may be wrong"
    if old := [w for w in broken if w not in made]:
        r.warnings.append(f"{counted(old)} int8 in the source already: {can}")
    return (
        [f"{counted(made)} int8: {can}; a pass that cuts inputs belongs before the one that quantizes"] if made else []
    )


def _placed(written: Stored, target: Target, host: Target, elsewhere: str) -> Placement:
    """Who runs what, at a small size; a target that is not here is only looked up."""
    if elsewhere or not target.here:
        return placement(written, target, None, elsewhere or f"'{target.name}' is another machine")
    g = written.graph
    try:
        feeds = open_axes.feeds_for(g, {k: min(n, 8) for k, n in open_axes.default_shapes(g)[0].items()})
    except DataError as e:
        return placement(written, host, None, str(e))
    return placement(written, host, feeds)
