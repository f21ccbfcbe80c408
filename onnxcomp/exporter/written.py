"""What an exporter made, with the task's names, named axes and the asked operator set, as a file."""

from __future__ import annotations

import ast
import collections
import re
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError
from onnxcomp.exporter.checkpoints import versions
from onnxcomp.exporter.work import Work

__all__ = ["write"]


def write(job: Work, program: Any, opset: int, staging: Path) -> None:
    """Save an exported program with the task's input and output names, named axes and the asked opset."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    from onnxcomp.canonical.opset import convert
    from onnxcomp.files.storage import save
    from onnxcomp.graph import Graph
    from onnxcomp.graph.sharing import share_equal

    graph = program.graph
    for v in [v for v in graph.inputs if v.name == "position_ids" and not v.uses()]:
        graph.inputs.remove(v)  # positions that follow from the mask
        job.inputs = tuple(n for n in job.inputs if n != v.name)
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
    metadata = {"task": job.task, "exported_by": f"onnxcomp {versions()['onnxcomp']}"}
    save(exported, staging, metadata=metadata, name=job.file)


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
    """Give the exporter's symbols (`s18`) the names of the axes, in every recorded shape."""
    import onnx_ir as ir

    axes = job.axes()
    symbols: dict[str, str] = {}
    for v in program.graph.inputs:
        for d, name in zip(v.shape, axes[v.name], strict=False):
            if (
                isinstance(name, str)
                and name
                and not isinstance(d, int)
                and d.value is not None
                and str(d.value).isidentifier()
            ):
                symbols.setdefault(str(d.value), name)

    def renamed(d: Any) -> Any:
        if isinstance(d, int) or d.value is None:
            return d
        return ir.SymbolicDim(re.sub(r"\b\w+\b", lambda m: symbols.get(m[0], m[0]), str(d.value)))

    for graph in program.graphs():
        for v in (*graph.inputs, *(x for n in graph for x in n.outputs)):
            if v.shape is not None:
                v.shape = ir.Shape([renamed(d) for d in v.shape])
    ends = job.axes() | job.output_axes()
    for v in (*program.graph.inputs, *program.graph.outputs):
        named = ends.get(v.name, ()) if job.past else ()
        if v.shape is not None and len(named) == len(v.shape):
            v.shape = ir.Shape([name or d for name, d in zip(named, v.shape, strict=True)])
