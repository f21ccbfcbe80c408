"""A model as a graph of onnx-graphsurgeon and back; weights that nobody touches there are neither read nor copied."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.maths import Array

__all__ = ["from_graphsurgeon", "to_graphsurgeon"]


@functools.cache
def _stored_class() -> Any:
    """The class of lazy values behind a constant; onnx-graphsurgeon is imported only where it is used."""
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.ir.tensor import LazyValues

    assert gs.Graph

    class Stored(LazyValues):  # type: ignore[misc]
        """A tensor of ours that is read when a script asks for its values; `tensor` stands for it in a file."""

        def __init__(self, stored: ir.TensorProtocol) -> None:
            self.stored, self.dtype, self.nbytes = stored, np.dtype(stored.dtype.numpy()), stored.nbytes
            self.shape = list(stored.shape.numpy())
            self.tensor = ir.serde.serialize_tensor(_placeholder(stored))

        def load(self) -> Array:
            return np.array(self.stored.numpy())

    return Stored


def _placeholder(t: ir.TensorProtocol) -> ir.ExternalTensor:
    """A tensor of the same type and shape without content."""
    return ir.ExternalTensor("stored", 0, 0, t.dtype, shape=ir.Shape(t.shape.numpy()), name=str(t.name or "stored"))


def to_graphsurgeon(model: ir.Model) -> Any:
    """A copy of a model as `onnx_graphsurgeon.Graph`; constants are read when their `values` are."""
    import onnx_graphsurgeon as gs

    bare, stored = model.clone(), {}
    for graph in bare.graphs():
        for name, v in graph.initializers.items():
            tensor = v.const_value
            if tensor is not None and graph is bare.graph:
                stored[name], v.const_value = tensor, _placeholder(tensor)
            elif tensor is not None:
                v.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    surgeon = gs.import_onnx(ir.to_proto(bare))
    make = _stored_class()
    for name, tensor in _tensors(surgeon):
        if name in stored and isinstance(tensor, gs.Constant):
            tensor.values, tensor.data_location = make(stored[name]), None
    return surgeon


def _tensors(surgeon: Any) -> Iterator[tuple[str, Any]]:
    """Tensors of a graph and of its subgraphs, which read constants around them, by name."""
    for graph in (surgeon, *surgeon.subgraphs(recursive=True)):
        yield from graph.tensors().items()


def from_graphsurgeon(surgeon: Any) -> ir.Model:
    """The model of an `onnx_graphsurgeon.Graph`; raises `ModelError` for what is none or has no ONNX form."""
    import onnx_graphsurgeon as gs

    if not isinstance(surgeon, gs.Graph):
        raise ModelError(f"a graph of onnx-graphsurgeon is expected, not {type(surgeon).__name__}")
    kept = {
        name: t._values.stored
        for name, t in _tensors(surgeon)
        if isinstance(t, gs.Constant) and isinstance(t._values, _stored_class())
    }
    try:
        model: ir.Model = ir.from_proto(gs.export_onnx(surgeon, do_type_check=False))
    except Exception as e:  # whatever the library makes of a graph that a script left half done
        raise ModelError(f"onnx-graphsurgeon cannot write the graph: {type(e).__name__}: {e}") from e
    for graph in model.graphs():
        for name, v in graph.initializers.items():
            if name in kept and isinstance(v.const_value, ir.ExternalTensor):
                v.const_value = kept[name]
    return model
