"""A graph as the runtime takes it: a small message, with large constants left in their files or in our memory."""

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

__all__ = ["Model", "Payload", "graph_of", "payload", "prepacks", "tap", "whole_caches", "write_optimized"]

# Constants from this size on are handed to the runtime where they lie; smaller ones travel inside the message.
INLINE_BYTES = 16384
# Weights from this size on stay in their file: prepacking would copy them to memory.
PREPACK_BELOW = 1 << 30
# The types of which the runtime can use a numpy array in place.
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
    """A serialized graph; `folder` holds its external data, `shared` and `files` its large constants in memory."""

    message: bytes = b""
    folder: Path | None = None
    shared: dict[str, Array] = field(default_factory=dict)
    files: dict[str, Array] = field(default_factory=dict)


def payload(model: ir.Model) -> Payload:
    """Serialize a model without its large constants; the model is used up (pass a clone).

    The runtime maps constants that lie in files, and copies the ones in memory once when the session is made.
    """
    for v in [v for v in model.graph.initializers.values() if not (v.uses() or v.is_graph_output())]:
        if not v.is_graph_input():
            del model.graph.initializers[str(v.name)]  # the runtime drops it first and then misses it
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]
    home = _home([t for v in values if (t := v.const_value) is not None])
    out = Payload(folder=None if home is None else Path(home or ".").resolve())
    for v in values:
        t = v.const_value
        if t is None or (isinstance(t, ir.ExternalTensor) and str(t.base_dir) == home):
            continue
        if t.nbytes >= INLINE_BYTES or isinstance(t, ir.ExternalTensor):
            _leave(v, t, out)
    out.message = ir.to_proto(model).SerializeToString()
    return out


def _home(tensors: Sequence[ir.TensorProtocol]) -> str | None:
    """The folder with most of the external data; the runtime can be given only one."""
    sizes: Counter[str] = Counter()
    for t in tensors:
        if isinstance(t, ir.ExternalTensor):
            sizes[str(t.base_dir)] += t.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _leave(v: ir.Value, t: ir.TensorProtocol, out: Payload) -> None:
    """Replace a constant by a reference to memory that the session is given beside the message."""
    name, place = str(v.name), f"in-memory-{len(out.shared) + len(out.files)}"
    a = t.numpy()
    if a.dtype in SHAREABLE and a.size:
        out.shared[name] = np.require(a, requirements=["C", "A"])
    else:
        out.files[place] = np.frombuffer(t.tobytes(), np.uint8)
    v.const_value = ir.ExternalTensor(place, 0, t.nbytes, t.dtype, shape=ir.Shape(t.shape.numpy()), name=name)


def tap(model: ir.Model, taps: Sequence[str]) -> set[str]:
    """Add intermediate values to the outputs; returns the taps that are inputs, which need no run to be known."""
    made = {v.name: v for node in model.graph for v in node.outputs}
    fed = {str(v.name) for v in model.graph.inputs}
    outputs = {str(v.name) for v in model.graph.outputs}
    for name in dict.fromkeys(taps):
        if name in outputs or name in fed:
            continue
        if name not in made:
            raise ModelError(f"the graph has no computed value named '{name}' to look at")
        made[name].shape = None  # a stale shape would only make the runtime complain
        model.graph.outputs.append(made[name])
    return (set(taps) & fed) - outputs


def whole_caches(model: ir.Model) -> None:
    """Give attentions that take a cache their outputs for the longer one back: the runtime runs none without them."""
    for node in model.graph:
        if node.op_type == "Attention" and node.domain == "" and len(node.inputs) > 4 and node.inputs[4] is not None:
            node.resize_outputs(max(3, len(node.outputs)))
            for i, v in enumerate(node.outputs[1:3]):
                v.name = v.name or f"{node.name}_present_{i}"


def prepacks(model: Model, asked: bool | None) -> bool:
    """Whether weights are copied into the layout of the kernels; by default only while they are small."""
    if asked is not None:
        return asked
    if isinstance(model, Graph):
        return model.nbytes < PREPACK_BELOW and model.spool is None  # the rest of a large model stays in files as well
    if isinstance(model, Stored):
        return model.nbytes < PREPACK_BELOW
    return sum(map(storage.file_bytes, storage.graphs_of(model).values())) < PREPACK_BELOW


def write_optimized(options: Any, path: Path) -> None:
    """Have a session write the graph as it has rewritten it, large constants beside it."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.stem}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
