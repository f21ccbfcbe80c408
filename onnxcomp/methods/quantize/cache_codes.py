"""Keys and values of a decoder's caches as codes of 8 or 4 bits, in operators that every runtime has.

Scales leave the cache: those of keys are multiplied into the queries, those of values into the attention's output, so
that of a cache only its codes are read: `q k^T = (q s) c^T` and `p v = (p c) s` with `k = c s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Attention
from onnxcomp.graph import Graph, interface
from onnxcomp.maths import Array, Float64

__all__ = ["CacheScales", "anywhere", "best_scales", "declare", "numbers", "partners", "store_codes", "why_not"]

LARGEST = {8: 127, 4: 7}  # the largest code, of either sign
HALF = 8  # what is added to a code of 4 bits, which is stored without a sign
CUTS = ("Slice", "Concat", "Identity")  # how caches slide
READERS = ("Attention", "Shape")  # of a cache that comes in
LENGTH = 2  # the axis of a cache `[b, kv_heads, t, h]` that grows with each token
SHRUNK = tuple(np.linspace(0.5, 1.0, 11))  # shares of the largest magnitude that are tried as the range of 4 bits


@dataclass(frozen=True)
class CacheScales:
    """The steps between codes of keys and values, `[kv_heads, width]`."""

    keys: Float64
    values: Float64


def why_not(a: Attention) -> str:
    """Why the caches of an attention cannot hold codes, "" if they can."""
    if a.past is None or a.present is None:
        return "it has no caches"
    if a.is_cross:
        return "its keys are those of another sequence, made once"
    if a.has_sink or any(x is not None for x in a.node.inputs[6:]) or bool(a.node.attributes.get_int("is_causal", 0)):
        return "it counts its keys, or has a score that belongs to no key"
    if any(not v.is_graph_input() for v in a.past) or not all(map(_cut_out, a.present)):
        return "its caches are not inputs and outputs of the model, whole or their last tokens"
    if any(n.op_type not in READERS for v in a.past for n, _ in v.uses()):
        return "its caches are read by more than the attention"
    if any(v.shape is None or not isinstance(v.shape[-1], int) for v in a.past):
        return "the width of its caches is not known"
    if any(v.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) for v in a.past):
        return f"its caches are {a.past[0].dtype} already"
    return ""


def _cut_out(present: ir.Value) -> list[ir.Value]:
    """A cache and what is cut out of it up to an output of the model, where it slides; none where others read it."""
    found, pending = list[ir.Value](), [present]
    while pending:
        v = pending.pop()
        if v not in found:
            found.append(v)
            for node, _ in v.uses():
                if node.op_type in CUTS:
                    pending += node.outputs
                elif node.op_type != "Shape":
                    return []
    return found if sum(v.is_graph_output() for v in found) == 1 else []


def numbers(a: Attention) -> int:
    """How many numbers the caches of an attention keep of a token."""
    widths = [v.shape[-1] for v in a.past or () if v.shape is not None]
    return sum(a.kv_heads * w for w in widths if isinstance(w, int))


# ---- scales ----------------------------------------------------------------------------------------------------------


def partners(a: Attention, width: int) -> Array:
    """The channel of a head that each is turned with by the rotary embedding, itself where it is not turned."""
    found = np.arange(width)
    if not a.rotary:
        return found
    node = a.rotary[-1]
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or width
    if node.attributes.get_int("interleaved", 0):
        found[:turned] ^= 1
    else:
        found[:turned] = np.roll(found[:turned], turned // 2)
    return found


def anywhere(partner: Array, rows: Float64, most: Float64) -> tuple[Float64, Float64]:
    """Keys and their largest magnitudes at all positions: a channel of a pair can be as large as both together."""
    paired = partner != np.arange(len(partner))
    return np.concatenate([rows, rows[..., partner]]), np.where(paired, np.hypot(most, most[..., partner]), most)


def best_scales(rows: Float64, most: Float64, bits: int, *, per_tensor: bool) -> Float64:
    """Scales `[kv_heads, width]` for magnitudes up to `most`; of 4 bits those that err least, squared, on `rows`.

    `rows` is `[n, kv_heads, width]`. Ranges are cut off only where codes are few (Banner et al., arXiv 1810.05723).
    """
    whole = np.full_like(most, most.max()) if per_tensor else most
    whole = np.maximum(whole, np.finfo(np.float32).tiny) / LARGEST[bits]
    if bits > 4:
        return whole
    errors = []
    for share in SHRUNK:
        step = whole * share
        codes = np.clip(np.rint(rows / step), -LARGEST[bits] - 1, LARGEST[bits])
        squared = ((codes * step - rows) ** 2).sum(axis=0)
        errors.append(np.full_like(squared, squared.sum()) if per_tensor else squared)
    return cast(Float64, whole * np.array(SHRUNK)[np.argmin(errors, axis=0)])


# ---- the graph -------------------------------------------------------------------------------------------------------


def store_codes(g: Graph, a: Attention, scales: CacheScales, bits: int) -> None:
    """Let the caches of an attention hold codes; its inputs and outputs of the model become int8, or uint8 of two."""
    assert a.past is not None
    assert a.present is not None
    node, dtype = a.node, a.past[0].dtype or ir.DataType.FLOAT
    kind = dtype.numpy()
    groups = a.heads // a.kv_heads
    keys = scales.keys.astype(kind)[None, :, None]
    values = scales.values.astype(kind)[None, :, None]
    q = _by_head(g, node.inputs[0], a.heads)
    q = g.op("Mul", q, np.repeat(keys, groups, axis=1), name=f"{a.name}_scaled")
    stored = [
        _append(g, past, present, _by_head(g, x, a.kv_heads), step, bits)
        for past, present, x, step in zip(a.past, a.present, node.inputs[1:3], (keys, values), strict=True)
    ]
    read = [_codes(g, v, bits, dtype) for v in stored]
    attrs = {k: v.value for k, v in node.attributes.items() if k not in ("q_num_heads", "kv_num_heads")}
    made = g.op("Attention", q, *read, node.inputs[3], name=f"{a.name}_coded", **attrs)
    scaled = g.op("Mul", made, np.repeat(values, groups, axis=1), name=f"{a.name}_rescaled")
    rows = g.op("Transpose", scaled, perm=[0, 2, 1, 3])
    out = g.op("Reshape", rows, np.array([0, 0, -1]), name=f"{a.name}_joined", like=node.outputs[0])
    g.replace(node.outputs[0], out)
    for present, new in zip(a.present, stored, strict=True):
        for v in _cut_out(present):
            v.type, v.shape = new.type, _stored_shape(v, bits)
        g.replace(present, new)


def declare(g: Graph) -> None:
    """Take the retyped caches into the interface of the model."""
    g.sweep()
    g.interface = interface.interface(g.model.graph)


def _by_head(g: Graph, x: ir.Value | None, heads: int) -> ir.Value:
    """`[b, s, heads * width]` as `[b, heads, s, width]`."""
    split = g.op("Reshape", x, np.array([0, 0, heads, -1]))
    return g.op("Transpose", split, perm=[0, 2, 1, 3])


def _append(g: Graph, past: ir.Value, present: ir.Value, new: ir.Value, step: Array, bits: int) -> ir.Value:
    """The codes of earlier tokens and those of new ones, as the model's output."""
    scaled = g.op("Mul", new, (1 / step.astype(np.float64)).astype(step.dtype), name=f"{present.name}_scaled")
    if bits == 8:
        codes = g.op("QuantizeLinear", scaled, np.array(1, step.dtype), np.array(0, np.int8))
    else:
        codes = _packed(g, scaled, step.dtype)
    past.type = ir.TensorType(ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8)
    past.shape = _stored_shape(past, bits)
    joined = g.op("Concat", past, codes, axis=LENGTH, name=f"{present.name}_codes")
    joined.type, joined.shape = past.type, _stored_shape(present, bits)
    return joined


def _stored_shape(v: ir.Value, bits: int) -> ir.Shape | None:
    if v.shape is None:
        return None
    axes = list(v.shape)
    width = axes[-1]
    if bits == 4 and isinstance(width, int):
        axes[-1] = width // 2
    return ir.Shape(axes)


def _packed(g: Graph, scaled: ir.Value, kind: np.dtype[np.generic]) -> ir.Value:
    """Codes of 4 bits, the channels of the first half of a head in the low bits and those of the second in the high."""
    bounded = g.op("Clip", scaled, np.array(-LARGEST[4] - 1, kind), np.array(LARGEST[4], kind))
    codes = g.op("QuantizeLinear", bounded, np.array(1, kind), np.array(HALF, np.uint8))
    low, high = _halves(g, codes)
    raised = g.op("BitShift", high, np.array(4, np.uint8), direction="LEFT")
    return g.op("BitwiseOr", low, raised)


def _halves(g: Graph, codes: ir.Value) -> tuple[ir.Value, ir.Value]:
    node = g.op("Split", codes, axis=-1, num_outputs=2, outputs=2).producer()
    assert node is not None
    return node.outputs[0], node.outputs[1]


def _codes(g: Graph, stored: ir.Value, bits: int, dtype: ir.DataType) -> ir.Value:
    """The codes of a cache as floats, which attention computes with."""
    if bits == 8:
        return g.op("Cast", stored, to=int(dtype))
    low = g.op("BitwiseAnd", stored, np.array(15, np.uint8))
    high = g.op("BitShift", stored, np.array(4, np.uint8), direction="RIGHT")
    both = g.op("Cast", g.op("Concat", low, high, axis=-1), to=int(dtype))
    return g.op("Sub", both, np.array(HALF, dtype.numpy()))
