"""From a PyTorch module to a verified ONNX model: by the exporter of transformers, else by that of torch."""

from __future__ import annotations

import ast
import collections
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import ExportError, ModelError
from onnxcomp.exporter.checkpoints import TASKS, one_line, versions
from onnxcomp.exporter.experts import looped_experts

DIRECT_OPSET = 20  # torch's own graphs above it (RotaryEmbedding-23) do not run at more than one sample
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}  # largest difference, relative to the largest output
Watch = Callable[[str], None]


@dataclass
class Work:
    """One export: the module, its task, options and inputs, and the failed attempts so far."""

    model: Any
    task: str
    dtype: str
    opset: int
    static: dict[str, int]
    inputs: tuple[str, ...]
    attempts: list[dict[str, str]] = field(default_factory=list)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def outputs(self) -> tuple[str, ...]:
        return TASKS[self.task][1]


def first_verified(job: Work, staging: Path, say: Watch) -> dict[str, Any]:
    """Try exporters and attention implementations in order until one is verified; returns the facts for export.json."""
    for opset, attention, name in _order(job.opset):
        say(f"exporting through {name} ({attention} attention, opset {opset})")
        try:
            job.model.set_attn_implementation(attention)
            with looped_experts(job.model):
                program = ROUTES[name](job, opset)
            _write(job, program, opset, staging)
            say("comparing with PyTorch")
            verified = _verify(job, staging / "model.onnx")
        except Exception as e:  # noqa: BLE001  exporters raise anything; every cause is reported
            for old in staging.iterdir():
                old.unlink()
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


def _order(opset: int) -> Iterator[tuple[int, str, str]]:
    if opset > DIRECT_OPSET:
        yield from ((opset, "sdpa", name) for name in ROUTES)
    yield from itertools.product([min(opset, DIRECT_OPSET)], ("sdpa", "eager"), ROUTES)


def _dynamic(job: Work) -> dict[str, dict[int, Any]]:
    import torch

    axes = ("batch",) if job.inputs == ("pixel_values",) else ("batch", "sequence")
    free = {i: torch.export.Dim.DYNAMIC for i, a in enumerate(axes) if a not in job.static}
    return {name: dict(free) for name in job.inputs}


def _through_transformers(job: Work, opset: int) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    feeds = _example(job, 2, 9, seed=0)
    settings = OnnxConfig(opset_version=opset, dynamic_shapes=_dynamic(job))
    return OnnxExporter().export(job.model, feeds, settings).program


def _through_torch(job: Work, opset: int) -> Any:
    import torch

    program = torch.onnx.export(
        _wrapper(job),
        args=(),
        kwargs=_example(job, 2, 9, seed=0),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=_dynamic(job),
        input_names=list(job.inputs),
        output_names=list(job.outputs),
    )
    return program.model


ROUTES = {"transformers.exporters": _through_transformers, "torch.onnx.export": _through_torch}


def _wrapper(job: Work) -> Any:
    """The module with just the task's inputs and outputs."""
    import torch

    class Exported(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            token_type_ids: Any = None,
            pixel_values: Any = None,
        ) -> tuple[Any, ...]:
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "pixel_values": pixel_values,
            }
            outputs = self.model(**{k: v for k, v in inputs.items() if v is not None})
            return tuple(outputs[n] for n in job.outputs)

    return Exported().eval()


def _write(job: Work, program: Any, opset: int, staging: Path) -> None:
    """Save an exported program with the task's input and output names, named axes and the asked opset."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    from onnxcomp.canonical.opset import convert
    from onnxcomp.files.storage import save
    from onnxcomp.graph import Graph
    from onnxcomp.graph.sharing import share_equal

    graph = program.graph
    outputs = [v for v in graph.outputs if v.name in job.outputs]
    if len(outputs) != len(job.outputs) or {v.name for v in graph.inputs} != set(job.inputs):
        got = f"{[v.name for v in graph.inputs]} to {[v.name for v in graph.outputs]}"
        raise ModelError(f"the exporter gave {got}, not {list(job.inputs)} to {list(job.outputs)}")
    _set(graph.outputs, sorted(outputs, key=lambda v: job.outputs.index(v.name)))
    _set(graph.inputs, sorted(graph.inputs, key=lambda v: job.inputs.index(v.name)))
    share_equal(Graph(program))  # the exporter folds each use of a shared weight for itself
    RemoveUnusedNodesPass()(program)
    _name_nodes(program)
    ClearMetadataAndDocStringPass()(program)  # it holds stack traces and paths of this machine
    _name_axes(job, program)
    exported = Graph(program)
    if exported.opset != opset:
        raise ModelError(f"the exporter wrote opset {exported.opset} where {opset} was asked")
    if opset != job.opset:
        exported = convert(exported, job.opset)
    exported.verify(interface=False)
    save(exported, staging, metadata={"task": job.task, "exported_by": f"onnxcomp {versions()['onnxcomp']}"})


def _name_nodes(program: Any) -> None:
    """Name nodes by their PyTorch module, such as `model.layers.0.mlp.down_proj/MatMul`, as reports and options do."""
    counts: collections.Counter[str] = collections.Counter()
    for node in program.graph:
        try:
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        except (ValueError, SyntaxError):
            continue
        module = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
        if module:
            name = f"{module}/{node.op_type}"
            node.name = f"{name}_{counts[name]}" if counts[name] else name
            counts[name] += 1


def _set(values: Any, wanted: list[Any]) -> None:
    values.clear()
    values.extend(wanted)


def _name_axes(job: Work, program: Any) -> None:
    """Give the exporter's symbols (`s18`) the names `batch` and `sequence`, in every recorded shape."""
    import onnx_ir as ir

    names = ("batch", "sequence")
    symbols: dict[str, str] = {}
    for v in program.graph.inputs:
        for axis, d in enumerate(v.shape):
            if not isinstance(d, int) and d.value is not None and axis < len(names):
                symbols[str(d.value)] = names[axis]

    def renamed(d: Any) -> Any:
        if isinstance(d, int) or d.value is None:
            return d
        return ir.SymbolicDim(re.sub(r"\b\w+\b", lambda m: symbols.get(m[0], m[0]), str(d.value)))

    for graph in program.graphs():
        for v in (*graph.inputs, *(x for n in graph for x in n.outputs)):
            if v.shape is not None:
                v.shape = ir.Shape([renamed(d) for d in v.shape])


# ---- verification ----------------------------------------------------------------------------------------------------


def _example(job: Work, batch: int, sequence: int, seed: int, padded: bool = False) -> dict[str, Any]:
    """Random inputs as torch tensors; `padded` masks the last third of every second row."""
    import torch

    rng = np.random.default_rng(seed)
    batch, sequence = job.static.get("batch", batch), job.static.get("sequence", sequence)
    if job.inputs == ("pixel_values",):
        pixels = rng.standard_normal((batch, *_image(job.config))).astype(np.float32)
        return {"pixel_values": torch.from_numpy(pixels).to(job.model.dtype)}
    pad = job.config.pad_token_id
    ids = rng.integers(0, job.config.vocab_size, (batch, sequence))
    ids[ids == pad] = (1 if pad == 0 else 0) % job.config.vocab_size
    mask = np.ones_like(ids)
    if padded and sequence > 1:
        mask[1::2, sequence - max(sequence // 3, 1) :] = 0
        ids[mask == 0] = pad if isinstance(pad, int) and 0 <= pad < job.config.vocab_size else 0
    types = np.zeros_like(ids)
    types[:, sequence // 2 :] = 1
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {n: torch.from_numpy(arrays[n]) for n in job.inputs}


def _image(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def _verify(job: Work, file: Path) -> dict[str, Any]:
    """Largest differences to PyTorch on two shapes with padding, on rows that are not padding; raises `ModelError`."""
    from onnxcomp.runtime.sessions import Session

    positions = getattr(job.config, "max_position_embeddings", None) or 64
    shapes = [(2, min(9, positions)), (3, min(14, positions))]
    differences = []
    try:
        session = Session(file)
    except ModelError as e:
        if job.dtype != "bf16":
            raise
        return {"done": False, "why": f"the CPU runtime cannot run bf16: {one_line(e)}"}
    with session:
        for seed, (batch, sequence) in enumerate(shapes, 1):
            feeds = _example(job, batch, sequence, seed, padded=True)
            arrays = {k: _array(v) for k, v in feeds.items()}
            ours = session.run(arrays)
            theirs = _reference(job, feeds)
            for name in job.outputs:
                differences.append(_difference(job, name, theirs[name], ours[name], arrays))
    return {"done": True, "tolerance": TOLERANCE[job.dtype], "differences": differences}


def _array(t: Any) -> Any:
    import torch

    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return t.float().numpy().astype(ml_dtypes.bfloat16)
    return t.detach().cpu().numpy()


def _reference(job: Work, feeds: dict[str, Any]) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        out = job.model(**feeds)
    return {n: out[n].float().numpy() for n in job.outputs}


def _difference(job: Work, name: str, a: Any, b: Any, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The largest difference of one output where it is not padding; raises `ModelError` beyond the tolerance."""
    if a.shape != b.shape:
        raise ModelError(f"output '{name}' has shape {b.shape}, PyTorch gives {a.shape}")
    mask = feeds.get("attention_mask")
    if mask is not None and job.task != "text-classification":
        a, b = a[mask > 0], b[mask > 0]
    error, scale = float(np.abs(a - b.astype(np.float32)).max()), float(np.abs(a).max()) or 1.0
    if not np.isfinite(b.astype(np.float32)).all() or not error <= TOLERANCE[job.dtype] * scale:
        raise ModelError(f"output '{name}' differs from PyTorch by {error:.3g} where its largest value is {scale:.3g}")
    shape = {k: list(v.shape) for k, v in feeds.items()}
    return {"output": name, "inputs": shape, "max_abs": error, "scale": scale}
