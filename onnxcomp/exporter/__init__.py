"""Export of a checkpoint to ONNX by the exporter of transformers or of torch, verified against PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcomp.errors import ExportError
from onnxcomp.exporter.checkpoints import (
    PAIRED,
    TASKS,
    cast,
    companions,
    inputs_of,
    load_checkpoint,
    quiet,
    title,
    versions,
)
from onnxcomp.exporter.decoder import Decoder
from onnxcomp.exporter.encoder_decoder import two_sides
from onnxcomp.exporter.preflight import check_installed, check_source
from onnxcomp.exporter.routes import TOLERANCE, Watch, first_verified
from onnxcomp.exporter.work import Work
from onnxcomp.files.pooling import pooling
from onnxcomp.files.storage import publish
from onnxcomp.version import EXPORT_SCHEMA

__all__ = ["TASKS", "export"]

OPSETS = (18, 23)
ALIASES = {"text-generation-with-past": "text-generation"}  # names of optimum
CACHED = ("text-generation",)  # tasks whose graphs take and give key-value caches


def export(
    source: str | Path | Any,
    out: str | Path,
    *,
    task: str | None = None,
    past: bool = True,
    last_logits: bool = False,
    opset: int = 18,
    dtype: str = "fp32",
    static: Mapping[str, int] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    watch: Watch | None = None,
) -> Path:
    """Export a checkpoint (local folder, hub id, or a loaded transformers model) to the folder `out`; returns it.

    Writes `model.onnx` with dynamic axes `batch` and `sequence` (or those of `static` fixed), the tokenizer, processor
    and configuration, and `export.json` with the route, versions and measured differences. Models that generate text
    take and give key-value caches (`past_key_values.N.key`, `present.N.key`), unless `past` is false, and with
    `last_logits` the logits of the last token only. Raises `ExportError`.
    """
    say = watch or (lambda _: None)
    if task in ALIASES and not past:
        raise ExportError(f"the task '{task}' asks for caches; --no-past goes with '{ALIASES[task]}'")
    task = ALIASES.get(task or "", task)
    if last_logits and not past:
        raise ExportError("--last-logits is for models with caches, --no-past is for models without")
    _check_options(task, opset, dtype, static or {})
    check_installed()
    if isinstance(source, (str, Path)):
        check_source(source, task, allow_pickle)
    log: list[str] = []
    with publish(Path(out)) as staging:
        with quiet(log):
            say("loading the checkpoint")
            model, task = load_checkpoint(source, task, revision, allow_pickle)
            jobs = _jobs(cast(model, dtype), task, dtype, opset, dict(static or {}), past, last_logits, source)
            graphs = {job.file: first_verified(job, staging, say) for job in jobs}
            job, record = jobs[-1], graphs[jobs[-1].file]
            if len(jobs) > 1:
                record = {**record, "graphs": graphs}
            companions(job.model, source, revision, staging, log)
        record |= {
            "schema": EXPORT_SCHEMA,
            "source": title(source, model),
            "task": task,
            "past": job.past,
            "dtype": dtype,
        }
        record |= {"static": job.static, "failed": job.attempts, "versions": versions(), "log": log[-200:]}
        if isinstance(source, (str, Path)) and (pooled := pooling(Path(source))) is not None:
            record |= {"pooling": dataclasses.asdict(pooled)}
        (staging / "export.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(out)


def _jobs(
    model: Any, task: str, dtype: str, opset: int, static: dict[str, int], past: bool, last: bool, source: Any
) -> list[Work]:
    """The graphs to write of a model."""
    if last and task not in CACHED:
        raise ExportError(f"--last-logits is for {' and '.join(CACHED)}, not for the task '{task}'")
    if task in PAIRED:
        if not past:
            raise ExportError(f"a model of the task '{task}' is always exported with caches, without --no-past")
        return [*two_sides(model, task, dtype, opset, static)]
    if past and task in CACHED:
        return [Decoder.of(model, task, dtype, opset, static, last=last)]
    return [Work(model, task, dtype, opset, static, inputs_of(model, source))]


def _check_options(task: str | None, opset: int, dtype: str, static: Mapping[str, int]) -> None:
    if task is not None and task not in TASKS:
        raise ExportError(f"unknown task '{task}'; there are {', '.join(TASKS)}")
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ExportError(f"opset {opset} is not possible; torch's exporter writes {OPSETS[0]} to {OPSETS[1]}")
    if dtype not in TOLERANCE:
        raise ExportError(f"unknown dtype '{dtype}'; there are {', '.join(TOLERANCE)}")
    for axis, size in static.items():
        if axis not in ("batch", "sequence") or size < 1:
            raise ExportError(
                f"static axis {axis}={size} is not possible; use batch=N or sequence=N with N of at least 1"
            )
