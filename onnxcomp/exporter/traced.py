"""Export by running the module once and recording its operators; weights stay PyTorch's own memory until written."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from onnxcomp.exporter.work import Work

__all__ = ["traced"]


def traced(job: Work, opset: int) -> Any:
    """The model as an onnx_ir graph; weights that the module ties are one constant.

    A trace knows only the branches that its sample took, which is why every result is compared with PyTorch.
    """
    import onnx
    import onnx_ir as ir

    module, axes = job.module(), job.axes() | job.output_axes()
    named = {n: {i: a for i, a in enumerate(x) if isinstance(a, str)} for n, x in axes.items()}
    recorded = io.BytesIO()
    with _quiet(), _repeats():
        _record(module, job, opset, named, recorded)
    program = ir.from_proto(onnx.load_from_string(recorded.getvalue()))
    _bind(program, module, job.inputs)
    _tidy(program)
    return program


def _record(module: Any, job: Work, opset: int, named: Mapping[str, Any], out: io.BytesIO) -> None:
    import torch

    with torch.no_grad():
        torch.onnx.export(
            module,
            tuple(job.sample().values()),
            out,
            dynamo=False,
            opset_version=opset,
            export_params=False,  # they would be copied, and a file of more than 2 GB is no protobuf
            do_constant_folding=False,  # so that weights keep their names
            input_names=list(job.inputs),
            output_names=list(job.outputs),
            dynamic_axes=named,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Meanwhile the recorder prints no graph where an operator fails."""
    import torch

    torch._C._jit_set_onnx_log_enabled(False)
    try:
        yield
    finally:
        torch._C._jit_set_onnx_log_enabled(True)


@contextlib.contextmanager
def _repeats() -> Iterator[None]:
    """Meanwhile repeats along a negative axis are stacked: the recorder writes a wrong concatenation for them."""
    import torch

    def repeat(x: Any, repeats: Any, dim: Any = None, **more: Any) -> Any:
        if dim is None or not isinstance(repeats, int):
            return before(x, repeats, dim, **more)
        axis = dim % x.ndim
        return torch.stack((x,) * repeats, axis + 1).flatten(axis, axis + 1)

    before = torch.repeat_interleave
    kept = torch.Tensor.repeat_interleave
    torch.repeat_interleave = torch.Tensor.repeat_interleave = repeat
    try:
        yield
    finally:
        torch.repeat_interleave, torch.Tensor.repeat_interleave = before, kept


def _bind(program: Any, module: Any, inputs: tuple[str, ...]) -> None:
    """Turn inputs that stand for parameters into constants; those that share memory become one."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    graph, first = program.graph, dict[object, Any]()
    for v in [v for v in graph.inputs if v.name not in inputs]:
        graph.inputs.remove(v)
        t = tensors[v.name].detach()
        key = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
        if t.numel() and key in first:
            v.replace_all_uses_with(first[key])
            continue
        first[key] = v
        v.name = v.name.removeprefix("model.")
        v.const_value = TorchTensor(t, name=v.name)
        v.shape, v.type = ir.Shape(list(t.shape)), ir.TensorType(v.const_value.dtype)
        graph.register_initializer(v)


def _tidy(program: Any) -> None:
    """Name nodes by their module, fold what is constant, and store matrices the way their products read them."""
    from onnxcomp.canonical.fold import fold_constants
    from onnxcomp.canonical.tidy import lift_constants
    from onnxcomp.graph import Graph

    for node in program.graph:
        for v in node.outputs:
            if not v.is_graph_output():
                v.shape = None  # names of axes there are the recorder's own
        node.name = _module_name(str(node.name))
    g = Graph(program)
    lift_constants(g)
    fold_constants(g)
    for node in g.nodes("Transpose"):
        weight = node.inputs[0]
        t = Graph.tensor(weight)
        if t is not None and weight is not None and len(weight.uses()) == 1 and len(t.shape) == 2:
            g.replace(node.outputs[0], g.constant(_turned(t), str(weight.name)))
    g.sweep()


def _module_name(name: str) -> str:
    """`/model/model/layers.0/mlp/MatMul_1` as `model.layers.0.mlp/MatMul_1`."""
    *path, operator = name.strip("/").split("/")
    return f"{'.'.join(path[1:])}/{operator}" if len(path) > 1 else name


def _turned(t: Any) -> Any:
    """A matrix transposed when it is read, so that only one is in memory."""
    import onnx_ir as ir

    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(t.numpy().T), dtype=t.dtype),
        dtype=t.dtype,
        shape=ir.Shape(t.shape.numpy()[::-1]),
    )
