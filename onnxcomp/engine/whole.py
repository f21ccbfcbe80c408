"""An encoder and a decoder as one model: its jobs one behind the other, its gates, its one report."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping

from onnxcomp.blocks.stored_parts import StoredPart
from onnxcomp.engine.job import Job
from onnxcomp.engine.repeat import command_of
from onnxcomp.errors import GateFailed, RecipeError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.reports.outcome import Origin, Report, Result, Size
from onnxcomp.runtime.encoder_source import DECODER, ENCODER, PAST, PRESENT, Pair
from onnxcomp.validation.gates import Condition, Gate, Verdict
from onnxcomp.validation.outputs import View
from onnxcomp.validation.results import together

__all__ = ["both_sizes", "check_caches", "check_gates", "jobs_of", "whole_report"]

OF_DECODER = ("kl", "agreement", "exact-match")  # what is measured of scores of words, besides task metrics


def jobs_of(pair: Pair, job: Job) -> dict[str, Job]:
    """The jobs of a pair's graphs, the encoder first; each has the gates on what it makes, the model those on both.

    Raises `RecipeError` for a gate on an output that neither has, `DataError` where targets of the data are missing.
    """
    graphs = {ENCODER: storage.read(pair.encoder).graph, DECODER: storage.read(pair.decoder).graph}
    gate, s = Gate(job.recipe.gates), job.settings
    check_gates(gate, *graphs.values())
    for source in (s.calibration, s.evaluation):
        s.dataset(source, graphs[DECODER], pair.decoder.parent)
    jobs = {}
    for name, graph in graphs.items():
        gates = tuple(c.text for c in gate.conditions if c.name != "size" and _is_of(c, name, graph))
        file = pair.encoder if name == ENCODER else pair.decoder
        jobs[name] = dataclasses.replace(job, model=file, recipe=dataclasses.replace(job.recipe, gates=gates))
    jobs[DECODER] = dataclasses.replace(jobs[DECODER], encoder=pair.encoder)
    return jobs


def _is_of(c: Condition, name: str, graph: Graph) -> bool:
    """Whether a condition is judged on one graph: on an output of its, or on what is measured of all its outputs."""
    if c.output is not None:
        return any(v.name == c.output for v in graph.outputs)
    return name == DECODER or not (c.metric or c.name in OF_DECODER)


def check_gates(gate: Gate, encoder: Graph, decoder: Graph) -> None:
    """Raise `RecipeError` where neither graph has what a condition is about."""
    gate.check(View.of(encoder).measures() | View.of(decoder).measures())


def check_caches(encoder: Graph, decoder: Graph) -> None:
    """Raise `RecipeError` where the decoder does not take the cross caches that the encoder makes."""
    made = {str(v.name).replace(PRESENT, PAST): v for v in encoder.outputs}
    for v in decoder.inputs:
        if (of := made.get(str(v.name))) is not None and _sizes(of.shape) != _sizes(v.shape):
            raise RecipeError(
                f"the decoder takes '{v.name}' {v.shape} and the encoder makes {of.shape}: passes cut heads of cross "
                "attention in one graph only; skip those sites"
            )


def _sizes(shape: object) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in shape] if isinstance(shape, (list, tuple)) else []


def whole_report(whole: Job, results: Mapping[str, Result]) -> Report:
    """The report of both graphs together, judged by the gates of the model; raises `GateFailed` with it."""
    encoder, decoder = (results[name].report for name in (ENCODER, DECODER))
    check_caches(results[ENCODER].model, results[DECODER].model)
    report = dataclasses.replace(
        decoder, steps=[], warnings=[], benchmark=None, placement=None, lowering=None, integer=None, layers=(),
        stream_note="the layers are in the reports of the two graphs", size=both_sizes(encoder.size, decoder.size),
        command=command_of(whole), models=(str(whole.model),),
    )  # fmt: skip
    for name, part in ((ENCODER, encoder), (DECODER, decoder)):
        report.steps += [dataclasses.replace(s, name=f"{name}: {s.name}") for s in part.steps]
        report.warnings += [f"{name}: {w}" for w in part.warnings]
    if encoder.validation is not None and decoder.validation is not None:
        report.validation = together(encoder.validation, decoder.validation)
    report.origin = _origin(whole, encoder.origin, decoder.origin)
    report.verdicts = _verdicts(Gate(whole.recipe.gates), report, [*encoder.verdicts, *decoder.verdicts])
    if refused := [str(v) for v in report.verdicts if not v.passed]:
        raise GateFailed("the result was refused: " + "; ".join(refused), report)
    return report


def _verdicts(gate: Gate, report: Report, of_parts: list[Verdict]) -> list[Verdict]:
    """The gates on both graphs together; speed was judged of each."""
    values = {} if report.validation is None else report.validation.values()
    values |= {} if report.size is None else {"size": report.size.ratio}
    judged = [v for files in (False, True) for v in gate.judge(values, files=files)]
    of_speed = [v for v in of_parts if Condition.parse(v.gate).name == "latency"]
    return [*(v for v in judged if Condition.parse(v.gate).name != "latency"), *of_speed]


def _origin(whole: Job, encoder: Origin | None, decoder: Origin | None) -> Origin | None:
    if encoder is None or decoder is None:
        return None
    return dataclasses.replace(
        decoder,
        source=str(whole.model),
        source_hash=storage.fingerprint(whole.model),
        job_hash=whole.hash(),
        recipe=whole.recipe.to_yaml(),
        recipe_hash=whole.recipe.hash(),
        files={**encoder.files, **decoder.files},
    )


def both_sizes(encoder: Size | None, decoder: Size | None) -> Size | None:
    """Bytes of both files, and of equal parts together."""
    if encoder is None or decoder is None:
        return None
    parts, before = _summed(encoder.parts, decoder.parts), _summed(encoder.before, decoder.before)
    return Size(encoder.original + decoder.original, encoder.result + decoder.result, parts, before)


def _summed(*parts: tuple[StoredPart, ...]) -> tuple[StoredPart, ...]:
    total = Counter[tuple[str, str]]()
    for p in itertools.chain(*parts):
        total[p.part, p.dtype] += p.nbytes
    return tuple(StoredPart(*key, nbytes) for key, nbytes in total.most_common())
