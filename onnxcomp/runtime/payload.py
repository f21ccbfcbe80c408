"""A graph as ONNX Runtime takes it: a small serialized message that refers to large constants in files or in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import serde

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
    """A serialized graph; `folder` holds its external data, `shared` its large constants in memory, with their types.

    (The runtime takes bytes as files in memory too, but not from a session with external data in real files.)
    """

    message: bytes = b""
    folder: Path | None = None
    shared: dict[str, tuple[Array, ir.DataType]] = field(default_factory=dict)


def payload(model: ir.Model, taps: Sequence[str] = ()) -> Payload:
    """Serialize a model without its large constants, with intermediate values (`taps`) as additional outputs.

    The runtime maps constants in files, and copies those in memory once when the session is made. The model is not
    cloned, which took longer than all that the runtime does to create a session of a small one.
    """
    constants = {
        str(v.name): t for v in model.graph.initializers.values() if (t := v.const_value) is not None and _used(v)
    }
    folder = _main_folder(list(constants.values()))
    out = Payload(folder=None if folder is None else Path(folder or ".").resolve())
    for name, t in constants.items():
        if isinstance(t, ir.ExternalTensor) and str(t.base_dir) == folder:
            continue
        if t.size == 0:
            constants[name] = ir.tensor(t.numpy())
        elif t.dtype is not ir.DataType.STRING and (t.nbytes >= INLINE_BYTES or isinstance(t, ir.ExternalTensor)):
            constants[name] = _in_memory(name, t, out)
    out.message = _message(model, constants, _tapped(model, taps))
    return out


def _used(v: ir.Value) -> bool:
    """The runtime removes unused initializers, then fails to find them."""
    return bool(v.uses()) or v.is_graph_output() or v.is_graph_input()


def _message(model: ir.Model, constants: Mapping[str, ir.TensorProtocol], taps: Sequence[ir.Value]) -> bytes:
    """The bytes of a ModelProto with these constants, and more outputs."""
    proto, tapped = onnx.ModelProto(ir_version=model.ir_version), set(taps)
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for key, value in model.metadata_props.items():
        proto.metadata_props.add(key=key, value=value)
    for function in model.functions.values():
        serde.serialize_function_into(proto.functions.add(), function, create_value_info=False)
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    for v in model.graph.inputs:
        serde.serialize_value_into(graph.input.add(), v)
    for name, t in constants.items():
        initializer = graph.initializer.add()
        serde.serialize_tensor_into(initializer, t)
        initializer.name = name
    for node in model.graph:
        serde.serialize_node_into(graph.node.add(), node)
        for v in node.outputs:  # what is recorded of shapes decides which fusions the runtime makes
            if v.name and not v.is_graph_output() and v not in tapped and (v.type is not None or v.shape is not None):
                serde.serialize_value_into(graph.value_info.add(), v)
    for v in model.graph.outputs:
        serde.serialize_value_into(graph.output.add(), v)
    for v in taps:  # the runtime warns where a recorded shape is out of date
        output = graph.output.add(name=str(v.name))
        if v.type is not None:
            serde.serialize_type_into(output.type, v.type)
    message: bytes = proto.SerializeToString()
    return message


def _main_folder(tensors: Sequence[ir.TensorProtocol]) -> str | None:
    """The folder with most of the external data; a session accepts only one."""
    sizes: Counter[str] = Counter()
    for t in tensors:
        if isinstance(t, ir.ExternalTensor):
            sizes[str(t.base_dir)] += t.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def _in_memory(name: str, t: ir.TensorProtocol, out: Payload) -> ir.ExternalTensor:
    """A reference to a constant in memory that is passed to the session beside the message."""
    place = f"in-memory-{len(out.shared)}"
    out.shared[name] = _shareable(t), t.dtype
    return ir.ExternalTensor(place, 0, t.nbytes, t.dtype, shape=ir.Shape(t.shape.numpy()), name=name)


def _shareable(t: ir.TensorProtocol) -> Array:
    """An array of the constant's shape whose memory is as the runtime wants it, in place where it can be.

    Several codes in a byte fill only the beginning of an array of bytes, whose other pages are never touched.
    """
    a = t.numpy()
    if a.dtype in SHAREABLE:
        return np.require(a, requirements=["C", "A"])
    packed = np.frombuffer(t.tobytes(), np.uint16 if t.dtype.bitwidth == 16 else np.uint8)
    if t.dtype.bitwidth >= 8:
        return packed.reshape(a.shape)
    room = np.empty(a.size, np.uint8)
    room[: packed.size] = packed
    return room.reshape(a.shape)


def _tapped(model: ir.Model, taps: Sequence[str]) -> list[ir.Value]:
    """The values of these names that are neither inputs nor outputs; raises `ModelError` where there is none."""
    known = {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    wanted = [name for name in dict.fromkeys(taps) if name not in known]
    computed = {str(v.name): v for node in model.graph for v in node.outputs} if wanted else {}
    for name in wanted:
        if name not in computed:
            raise ModelError(f"the graph has no computed value named '{name}'")
    return [computed[name] for name in wanted]


def add_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Make intermediate values outputs of the graph, whatever shapes were recorded for them."""
    for v in _tapped(model, names):
        v.shape = None
        model.graph.outputs.append(v)


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
