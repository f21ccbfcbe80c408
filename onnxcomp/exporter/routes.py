"""From a PyTorch module to a verified ONNX model: by the exporter of transformers, else by those of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnxcomp.errors import ExportError
from onnxcomp.exporter.checkpoints import one_line
from onnxcomp.exporter.experts import looped_experts
from onnxcomp.exporter.traced import traced
from onnxcomp.exporter.work import TOLERANCE, Work
from onnxcomp.exporter.written import write

__all__ = ["CACHED_ROUTES", "ROUTES", "TOLERANCE", "Watch", "first_verified"]

DIRECT_OPSET = 20  # torch's own graphs above it (RotaryEmbedding-23) do not run at more than one sample
Watch = Callable[[str], None]
Route = Callable[[Work, int], Any]


def first_verified(job: Work, staging: Path, say: Watch) -> dict[str, Any]:
    """Try exporters and attention implementations in order until one is verified; returns the facts for export.json."""
    routes = CACHED_ROUTES if job.past else ROUTES
    before = set(staging.iterdir())
    for opset, attention, name in _order(job, routes):
        say(f"exporting through {name} ({attention} attention, opset {opset})")
        try:
            job.model.set_attn_implementation(attention)
            with looped_experts(job.model):
                program = routes[name](job, opset)
            write(job, program, opset, staging)
            say("comparing with PyTorch")
            verified = job.verify(staging / job.file)
        except Exception as e:  # noqa: BLE001  exporters raise anything; every cause is reported
            for failed in set(staging.iterdir()) - before:
                failed.unlink()
            why = one_line(e, staging)
            job.attempts.append({"route": name, "attention": attention, "opset": str(opset), "error": why})
            continue
        converted = opset if opset != job.opset else None
        return {
            "route": name,
            "attention": attention,
            "opset": job.opset,
            "converted_from_opset": converted,
            "verification": verified,
        }
    causes = "; ".join(f"{a['route']} ({a['attention']}, opset {a['opset']}): {a['error']}" for a in job.attempts)
    raise ExportError(f"{type(job.model).__name__} could not be exported as {job.task}. {causes}")


def _order(job: Work, routes: dict[str, Route]) -> Iterator[tuple[int, str, str]]:
    direct = min(job.opset, DIRECT_OPSET)
    if job.past:  # tracing takes a second where torch's other exporter takes minutes, so both its forms come first
        yield from ((direct, attention, name) for name in routes for attention in ("sdpa", "eager"))
        return
    if job.opset > DIRECT_OPSET:
        yield from ((job.opset, "sdpa", name) for name in routes)
    yield from itertools.product([direct], ("sdpa", "eager"), routes)


def _dynamic(job: Work) -> dict[str, dict[int, Any]]:
    import torch

    free = torch.export.Dim.DYNAMIC
    return {name: {i: free for i, a in enumerate(axes) if a} for name, axes in job.axes().items()}


def _through_transformers(job: Work, opset: int) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    settings = OnnxConfig(opset_version=opset, dynamic_shapes=_dynamic(job))
    return OnnxExporter().export(job.model, job.sample(), settings).program


def _through_torch(job: Work, opset: int) -> Any:
    import torch

    program = torch.onnx.export(
        job.module(),
        args=tuple(job.sample().values()),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(tuple(_dynamic(job).values()),),
        input_names=list(job.inputs),
        output_names=list(job.outputs),
    )
    return program.model


ROUTES: dict[str, Route] = {
    "transformers.exporters": _through_transformers,
    "torch.onnx.export": _through_torch,
}
CACHED_ROUTES: dict[str, Route] = {"torch.jit.trace": traced, "torch.onnx.export": _through_torch}
