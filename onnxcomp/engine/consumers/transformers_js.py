"""A folder for transformers.js: the model in `onnx/`, named by its type, and what config.json must say of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from onnxcomp.engine.consumers.optimum import check_caches
from onnxcomp.engine.consumers.source import Source
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.graph import Graph

__all__ = ["dtype_of", "write"]

LARGEST = 2**31 - 2**20  # bytes of one protobuf file, with room for its other parts
INTEGER = frozenset(
    ("MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QuantizeLinear", "DynamicQuantizeLinear")
)


def write(source: Source, folder: Path) -> None:
    """Write one model file, the files beside it and its type into config.json; raises `ModelError` if it is large."""
    graph = source.graph
    if source.caches:
        check_caches(source, "transformers.js")
        graph = _with_batch_named(graph)
    if (size := storage.written_bytes(graph)) > LARGEST:
        raise ModelError(f"{source.path}: has {size / 1e9:.1f} GB; transformers.js is given one file of at most 2 GB")
    dtype, suffix = dtype_of(graph)
    storage.copy_companions(source.path.parent, folder)
    (folder / "onnx").mkdir()
    storage.save(graph, folder / "onnx" / f"model{suffix}.onnx", one_file=True)
    config = source.config | {"transformers.js_config": {"dtype": dtype}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def dtype_of(g: Graph) -> tuple[str, str]:
    """The type of a model as transformers.js calls it, and the suffix of its file."""
    if any(n.op_type == "MatMulNBits" for n in g.nodes()):
        bits = {n.attributes.get_int("bits", 4) for n in g.nodes() if n.op_type == "MatMulNBits"}
        return ("q4", "_q4") if min(bits) <= 4 else ("q8", "_quantized")
    if any(n.op_type in INTEGER for n in g.nodes()):
        return "q8", "_quantized"
    floats = {t.dtype for v in g.model.graph.initializers.values() if (t := v.const_value) is not None}
    return ("fp16", "_fp16") if ir.DataType.FLOAT16 in floats and ir.DataType.FLOAT not in floats else ("fp32", "")


def _with_batch_named(g: Graph) -> Graph:
    """A copy whose caches have a first axis called as transformers.js wants it."""
    copy = g.clone()
    for v in copy.inputs:
        if v.shape is not None and len(v.shape) == 4:
            v.shape = ir.Shape(["batch_size", *list(v.shape)[1:]])
    return copy
