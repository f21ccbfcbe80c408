"""Heads and head width of key-value caches that an exporter left open, from the operator that takes them.

onnxruntime-genai's model builder declares a cache as `[batch_size, 2, past_sequence_length, kv_cache_dim]`; its kernel
takes one width only, which whoever makes up inputs has to know.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

__all__ = ["settle_caches"]

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)  # others pack their values
PAST = {3: 1, 4: 2}  # where GroupQueryAttention takes a cache, and where the new keys or values that go there
HEADS, WIDTH = 1, 3  # axes of a cache `[b, kv_heads, t, h]`


def settle_caches(graph: onnx.GraphProto) -> None:
    """Write the sizes of the caches of GroupQueryAttention into the declared inputs and outputs, where known."""
    ports = {v.name: v for v in (*graph.input, *graph.output)}
    taking = [n for n in graph.node if n.op_type == "GroupQueryAttention" and len(n.input) > max(PAST)]
    if not taking:
        return
    widths = _Widths(graph)
    for node in taking:
        counts = {a.name: a.i for a in node.attribute}
        heads, groups = counts.get("num_heads", 0), counts.get("kv_num_heads", 0)
        for past, new in PAST.items():
            packed = not node.input[new]
            width, parts = widths(node.input[0 if packed else new]), heads + 2 * groups if packed else groups
            if width and parts and width % parts == 0:
                for name in (node.input[past], *node.output[new : new + 1]):
                    if name in ports:
                        _settle(ports[name], {HEADS: groups, WIDTH: width // parts})


def _settle(port: onnx.ValueInfoProto, sizes: Mapping[int, int]) -> None:
    kind = port.type.tensor_type
    if kind.elem_type in FLOATS and len(kind.shape.dim) == 4:
        for axis, n in sizes.items():
            if not kind.shape.dim[axis].HasField("dim_value"):
                kind.shape.dim[axis].dim_value = n


class _Widths:
    """The size of the last axis of a value: as it is declared, or as the weights behind it say; 0 if unknown."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.declared = {
            v.name: v.type.tensor_type.shape.dim[-1].dim_value
            for v in (*graph.input, *graph.value_info)
            if v.type.tensor_type.shape.dim
        } | {t.name: t.dims[-1] for t in graph.initializer if t.dims}
        self.producers = {name: node for node in graph.node for name in node.output}

    def __call__(self, name: str) -> int:
        while not self.declared.get(name) and (node := self.producers.get(name)) is not None:
            if node.op_type == "MatMulNBits":
                return int(next((a.i for a in node.attribute if a.name == "N"), 0))
            if node.op_type not in ("MatMul", "Add", "Identity", "Cast"):
                break
            known = [x for x in node.input if self.declared.get(x)]
            name = node.input[1] if node.op_type == "MatMul" else next(iter(known), node.input[0])
        return int(self.declared.get(name, 0))
