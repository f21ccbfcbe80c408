"""Caches of codes in `GroupQueryAttention`, which reads and writes them itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph, interface
from onnxcomp.maths import Array

__all__ = ["CodedCache", "as_floats", "as_inputs"]

NEW = ("Mul", "Transpose", "Reshape")  # from codes back to keys and values of new tokens, scales first
EIGHT = (("Cast",), ("QuantizeLinear", *NEW))
FOUR = (("Sub", "Cast", "Concat", "BitwiseAnd"), ("BitwiseOr", "Split", "QuantizeLinear", "Clip", *NEW))
K_SCALE = 12  # the operator's input for the scales of keys; those of values follow


@dataclass(frozen=True)
class CodedCache:
    """Steps between codes of keys and values `[kv_heads, width]`, and the bits of a code."""

    keys: Array
    values: Array
    bits: int


@dataclass(frozen=True)
class _Side:
    """Keys or values of an attention: new ones in three axes, the model's input and output, the bits of a code."""

    new: ir.Value
    past: ir.Value
    present: ir.Value
    bits: int


def as_floats(g: Graph) -> dict[str, CodedCache]:
    """Give attentions with caches of codes caches of floats; what the codes were by the name of the input of keys."""
    found = {}
    for node in g.nodes("Attention"):
        keys, values = (_side(node.inputs[i]) for i in (1, 2))
        asked = _scaled(node.inputs[0])
        given = _rescaled(node.outputs[0])
        if keys is None or values is None or asked is None or given is None:
            continue
        (q, key_steps), (out, value_steps) = asked, given
        kv = cast(int, keys.past.shape[1]) if keys.past.shape is not None else 0
        group = key_steps.shape[1] // kv
        found[str(keys.past.name)] = CodedCache(key_steps[0, ::group, 0], value_steps[0, ::group, 0], keys.bits)
        for side in (keys, values):
            for v in (side.past, side.present):
                _retype(v, q.dtype or ir.DataType.FLOAT, 2 if side.bits == 4 else 1)
        attrs = {k: a.value for k, a in node.attributes.items()}
        attrs |= {"q_num_heads": key_steps.shape[1], "kv_num_heads": kv}
        made = g.op(
            "Attention", q, keys.new, values.new, node.inputs[3], keys.past, values.past, outputs=3,
            name=f"{node.name}_plain", like=out, **attrs,
        ).producer()  # fmt: skip
        assert made is not None
        for old, new in zip((out, keys.present, values.present), made.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
            g.replace(old, new)
    if found:
        g.sweep()
        g.sort()
    return found


def as_inputs(g: Graph, coded: dict[str, CodedCache]) -> None:
    """Let every `GroupQueryAttention` keep codes where its caches held them."""
    for node in g.nodes("GroupQueryAttention"):
        past = node.inputs[3]
        if past is None or (c := coded.get(str(past.name))) is None:
            continue
        alike = all((s == s.flat[0]).all() for s in (c.keys, c.values))
        kind = "PER_TENSOR" if alike else "PER_CHANNEL"
        g.set_attr(node, k_quant_type=kind, v_quant_type=kind, kv_cache_bit_width=c.bits)
        for i, steps in enumerate((c.keys, c.values)):
            scale = steps.flat[:1] if alike else steps[None, :, None]
            name = f"{node.name}_{'kv'[i]}_scale"
            g.set_input(node, K_SCALE + i, g.constant(scale.astype(np.float32), name))
        for v in (past, node.inputs[4], *node.outputs[1:]):
            if v is not None:
                _coded_type(v, c.bits)
    g.interface = interface.interface(g.model.graph)


# ---- what quantize-cache wrote ---------------------------------------------------------------------------------------


def _side(v: ir.Value | None) -> _Side | None:
    for bits, (read, written) in ((8, EIGHT), (4, FOUR)):
        present = _behind(v, read)
        joined = present.producer() if present is not None else None
        if present is None or joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
            continue
        past, new = joined.inputs[0], _behind(joined.inputs[1], written)
        if past is not None and past.is_graph_input() and new is not None and present.is_graph_output():
            return _Side(new, past, present, bits)
    return None


def _behind(v: ir.Value | None, ops: tuple[str, ...]) -> ir.Value | None:
    """What nodes of these types made a value of, the last one first."""
    for op in ops:
        node = v.producer() if v is not None else None
        if node is None or node.op_type != op or node.domain:
            return None
        v = node.inputs[0]
    return v


def _scaled(v: ir.Value | None) -> tuple[ir.Value, Array] | None:
    """Queries in three axes, and what each channel is multiplied by, `[1, heads, 1, width]`."""
    source, node = _behind(v, NEW), v.producer() if v is not None else None
    steps = Graph.tensor(node.inputs[1]) if node is not None and source is not None else None
    return None if source is None or steps is None else (source, steps.numpy())


def _rescaled(v: ir.Value) -> tuple[ir.Value, Array] | None:
    """The output in three axes, and what each channel is multiplied by."""
    steps = None
    for op in NEW:
        users = list(v.uses())
        if len(users) != 1 or users[0][0].op_type != op or users[0][0].domain or users[0][1] != 0:
            return None
        node = users[0][0]
        steps = Graph.tensor(node.inputs[1]) if op == "Mul" else steps
        v = node.outputs[0]
    return None if steps is None else (v, steps.numpy())


def _retype(v: ir.Value, dtype: ir.DataType, times: int) -> None:
    v.type = ir.TensorType(dtype)
    if v.shape is not None and isinstance(v.shape[-1], int):
        v.shape = ir.Shape([*list(v.shape)[:-1], v.shape[-1] * times])


def _coded_type(v: ir.Value, bits: int) -> None:
    v.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
    if bits == 4 and v.shape is not None and isinstance(v.shape[-1], int):
        v.shape = ir.Shape([*list(v.shape)[:-1], v.shape[-1] // 2])
