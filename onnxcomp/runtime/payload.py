"""A graph as ONNX Runtime takes it: a small serialized message that refers to large constants in files or in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = [
    "Model",
    "Payload",
    "add_outputs",
    "complete_cache_outputs",
    "graph_of",
    "payload",
    "prepacks",
    "write_optimized",
]

# Constants from this size on are passed by reference; smaller ones are serialized into the message.
INLINE_BYTES = 16384
# Bytes of all weights up to which they are prepacked. Prepacking copies every weight of a product to memory (3.4 GB for
# a model of 3.4 GB, 0.2 GB without) and makes runs at most 24 % faster.
PREPACK_BELOW = 1 << 30
# Element types of which the runtime reads a numpy array in place.
SHAREABLE = {np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)} | {
    np.dtype(t) for t in ("float16", "float32", "float64", "bool")
}

# In memory; a file that was parsed, which the runtime loads itself; a file or folder that was not.
Model = Graph | Stored | Path | str


def graph_of(model: Model) -> Graph:
    """The graph of a model; only what was not parsed yet is."""
    if isinstance(model, Graph):
        return model
    return model.graph if isinstance(model, Stored) else storage.load(model)


@dataclass
class Payload:
    """A serialized graph; `folder` holds its external data, `shared` and `files` its large constants in memory.

    `shared` are arrays that become OrtValues; `files` are the bytes of other types, passed as files in memory.
    """

    message: bytes = b""
    folder: Path | None = None
    shared: dict[str, Array] = field(default_factory=dict)
    files: dict[str, Array] = field(default_factory=dict)


def payload(model: ir.Model) -> Payload:
    """Serialize a model without its large constants; the model is modified (pass a clone).

    The runtime maps constants in files, and copies those in memory once when the session is made.
    """
    for v in [v for v in model.graph.initializers.values() if not (v.uses() or v.is_graph_output())]:
        if not v.is_graph_input():
            del model.graph.initializers[str(v.name)]  # the runtime removes unused ones, then fails to find them
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    folder = _main_folder([t for v in values if (t := v.const_value) is not None])
    out = Payload(folder=None if folder is None else Path(folder or ".").resolve())
    for v in values:
        t = v.const_value
        if t is None or (isinstance(t, ir.ExternalTensor) and str(t.base_dir) == folder):
            continue
        if t.nbytes >= INLINE_BYTES or isinstance(t, ir.ExternalTensor):
            _refer_to_memory(v, t, out)
    out.message = ir.to_proto(model).SerializeToString()
    return out


def _main_folder(tensors: Sequence[ir.TensorProtocol]) -> str | None:
    """The folder with most of the external data; a session accepts only one."""
    sizes: Counter[str] = Counter()
    for t in tensors:
        if isinstance(t, ir.ExternalTensor):
            sizes[str(t.base_dir)] += t.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _refer_to_memory(v: ir.Value, t: ir.TensorProtocol, out: Payload) -> None:
    """Replace a constant by a reference to memory that is passed to the session beside the message."""
    name, place = str(v.name), f"in-memory-{len(out.shared) + len(out.files)}"
    a = t.numpy()
    if a.dtype in SHAREABLE and a.size:
        out.shared[name] = np.require(a, requirements=["C", "A"])
    else:
        out.files[place] = np.frombuffer(t.tobytes(), np.uint8)
    v.const_value = ir.ExternalTensor(place, 0, t.nbytes, t.dtype, shape=ir.Shape(t.shape.numpy()), name=name)


def add_outputs(model: ir.Model, taps: Sequence[str]) -> set[str]:
    """Add intermediate values to the graph's outputs; returns the taps that are graph inputs, which need no run."""
    computed = {v.name: v for node in model.graph for v in node.outputs}
    inputs = {str(v.name) for v in model.graph.inputs}
    outputs = {str(v.name) for v in model.graph.outputs}
    for name in dict.fromkeys(taps):
        if name in outputs or name in inputs:
            continue
        if name not in computed:
            raise ModelError(f"the graph has no computed value named '{name}'")
        computed[name].shape = None  # the runtime warns where a recorded shape is out of date
        model.graph.outputs.append(computed[name])
    return (set(taps) & inputs) - outputs


def complete_cache_outputs(model: ir.Model) -> None:
    """Add the outputs `present_key` and `present_value` to Attention with a cache: the runtime needs them to run it."""
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "" and len(node.inputs) > 4 and node.inputs[4] is not None:
            node.resize_outputs(max(3, len(node.outputs)))
            for i, v in enumerate(node.outputs[1:3]):
                v.name = v.name or f"{node.name}_present_{i}"


def prepacks(model: Model, asked: bool | None) -> bool:
    """Whether weights are copied into the layout of the kernels (prepacked): as asked, else while they are small."""
    if asked is not None:
        return asked
    if isinstance(model, Graph):
        return model.nbytes < PREPACK_BELOW and model.spool is None  # a spool: large weights stay in files
    if isinstance(model, Stored):
        return model.nbytes < PREPACK_BELOW
    return sum(map(storage.file_bytes, storage.graphs_of(model).values())) < PREPACK_BELOW


def write_optimized(options: Any, path: Path) -> None:
    """Set the options that make a session write its optimized graph, large constants in a file beside it."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.stem}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
