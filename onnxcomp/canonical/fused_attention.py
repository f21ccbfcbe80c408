"""ONNX Runtime's fused attentions and rotary embedding, decomposed to products and standard operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.sizes import Shape, multiply
from onnxcomp.canonical.fused_parts import (
    Mask,
    NotDecomposed,
    Parts,
    attend,
    dtype_of,
    index_range,
    ints,
    is_read,
    length,
    masked,
    optional_input,
    present,
    refuse_inputs,
    require_unread,
    shape_of,
    split_axis,
    static_size,
)
from onnxcomp.graph import Graph

__all__ = ["ATTENTION"]

# ---- operators -----------------------------------------------------------------------------------------------------


def _attention(g: Graph, f: Facts, node: ir.Node) -> None:
    """Attention: its projection with packed weights becomes a linear."""
    attrs = node.attributes
    if attrs.get_int("do_rotary", 0) or attrs.get_int("past_present_share_buffer", 0):
        raise NotDecomposed("it applies a rotary embedding, or shares its cache's buffer")
    x, w, bias, mask_input, past, attention_bias = (optional_input(node, i) for i in range(6))
    batch = shape_of(f, x, 3, "the input")[0]
    heads, width = attrs.get_int("num_heads", 0), static_size(shape_of(f, w, 2, "the weights")[1], "the weights' width")
    sizes = list(attrs.get_ints("qkv_hidden_sizes", [])) or [width // 3] * 3
    if len(sizes) != 3 or sum(sizes) != width or not heads or any(s % heads for s in sizes) or sizes[0] != sizes[1]:
        raise NotDecomposed("its widths do not fit its heads")
    mask = Mask(g, f, node, dtype_of(node))
    kind = mask.kind(mask_input, batch)
    y = g.op("MatMul", x, w)
    y = g.op("Add", y, bias) if bias is not None else y
    y.type = node.outputs[0].type or ir.TensorType(dtype_of(node))
    q, k, v = split_axis(g, y, -1, sizes)
    past_kv = None
    if past is not None:
        past_kv = tuple(g.op("Gather", past, np.array(i, np.int64), axis=0) for i in (0, 1))
    parts = Parts(q, k, v, heads, heads, sizes[0] // heads, past_kv)  # type: ignore[arg-type]
    outputs = attend(g, f, node, parts, masked(mask, parts, mask_input, kind, attention_bias))
    if is_read(node, 1):
        pair = (g.op("Unsqueeze", p, ints(0)) for p in present(g, parts, outputs))
        g.replace(node.outputs[1], g.op("Concat", *pair, axis=0, like=node.outputs[1]))
    g.replace(node.outputs[0], outputs[0])


def _merge_heads(g: Graph, x: ir.Value) -> ir.Value:
    """`[b, n, s, h]` as `[b, s, n * h]`."""
    transposed = g.op("Transpose", x, perm=[0, 2, 1, 3])
    transposed.type = x.type
    flat = g.op("Reshape", transposed, ints(0, 0, -1))
    flat.type = x.type
    return flat


def _unpack(g: Graph, x: ir.Value, parts: int) -> list[ir.Value]:
    """`[b, s, n, count, h]` as `count` values `[b, s, n * h]`."""
    return [g.op("Reshape", part, ints(0, 0, -1)) for part in split_axis(g, x, 3, [1] * parts)]


def _add_bias(g: Graph, x: ir.Value, bias: ir.Value) -> ir.Value:
    """`x + bias`; a part of the bias that is all zero is left out (`x + 0` is `x`)."""
    if g.is_constant(bias) and not np.any(g.array(bias)):
        return x
    return g.op("Add", x, bias, like=x)


def _split_bias(g: Graph, bias: ir.Value, sizes: list[int]) -> tuple[ir.Value, ...]:
    if not g.is_constant(bias):
        return split_axis(g, bias, 0, sizes)
    a, edges = g.array(bias), np.cumsum([0, *sizes])
    return tuple(g.constant(a[i:j], str(bias.name)) for i, j in itertools.pairwise(edges))


def _multi_head(g: Graph, f: Facts, node: ir.Node) -> None:
    """MultiHeadAttention: separate queries, keys and values, or ones packed along an extra axis."""
    refuse_inputs(node, a_past_length_of_a_shared_buffer=8, a_beam_index=9)
    require_unread(node, 3)
    q, k, v, bias, mask_input, attention_bias, old_k, old_v = (optional_input(node, i) for i in range(8))
    shapes = [f.shape(x) for x in (q, k, v)]
    heads = node.attributes.get_int("num_heads", 0)
    if q is None or not heads or (old_k is None) != (old_v is None):
        raise NotDecomposed("its heads are not given")
    if node.attributes.get_int("unidirectional", 0) and old_k is None and not _square(f, shapes):
        raise NotDecomposed("it is causal with possibly more keys than queries, which runtimes treat differently")
    ranks = [None if s is None else len(s) for s in shapes]
    if ranks not in ([3, 3, 3], [3, 4, 4], [3, 5, None], [5, None, None]) or (ranks[1] == 4 and old_k is not None):
        raise NotDecomposed("the rank of its inputs is unknown")
    mask = Mask(g, f, node, dtype_of(node))
    kind = mask.kind(mask_input, (shapes[0] or (0,))[0])
    if old_k is not None and kind:
        raise NotDecomposed("it has a cache and a padding mask, which may cover all keys or the new ones only")
    sizes = _widths(shapes, heads)
    q, k, v = _as_3d(g, q, k, v, ranks)
    if bias is not None:
        first, second, third = _split_bias(g, bias, sizes)
        q = _add_bias(g, q, first)
        if ranks[1] != 4:  # 4-D keys and values include their bias
            k, v = _add_bias(g, k, second), _add_bias(g, v, third)
    past = (old_k, old_v) if old_k is not None and old_v is not None else None
    parts = Parts(q, k, v, heads, heads, sizes[0] // heads, past)
    outputs = attend(g, f, node, parts, masked(mask, parts, mask_input, kind, attention_bias))
    if is_read(node, 1) or is_read(node, 2):
        for out, new in zip(node.outputs[1:3], present(g, parts, outputs), strict=False):
            g.replace(out, new)
    g.replace(node.outputs[0], outputs[0])


def _square(f: Facts, shapes: list[Shape | None]) -> bool:
    q, k = shapes[0], shapes[1]
    if q is None:
        return False
    if k is None:
        return len(q) == 5
    return f.same(q[1], k[2] if len(k) == 4 else k[1])


def _widths(shapes: list[Shape | None], heads: int) -> list[int]:
    """Widths of queries, keys and values with all heads."""
    q, _, v = shapes
    assert q is not None
    if len(q) == 5:
        return [static_size(multiply(q[2], q[4]), "the width")] * 3
    hidden = static_size(q[2], "the width of the queries")
    if v is None or hidden % heads:
        return [hidden] * 3
    values = static_size(v[2] if len(v) == 3 else multiply(v[1], v[3]), "the width of the values")
    return [hidden, hidden, values]


def _as_3d(
    g: Graph, q: ir.Value, k: ir.Value | None, v: ir.Value | None, ranks: list[int | None]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values as `[b, s, n * h]`."""
    if ranks[0] == 5:
        first, second, third = _unpack(g, q, 3)
        return first, second, third
    assert k is not None
    if ranks[1] == 5:
        second, third = _unpack(g, k, 2)
        return q, second, third
    assert v is not None
    return (q, _merge_heads(g, k), _merge_heads(g, v)) if ranks[1] == 4 else (q, k, v)


def _grouped(g: Graph, f: Facts, node: ir.Node) -> None:
    """GroupQueryAttention of a prompt without past keys; keys beyond a sample's length are hidden."""
    attrs = node.attributes
    refuse_inputs(node, past_keys_whose_place_depends_on_the_lengths=3, position_ids=9, a_head_sink=11, a_key_scale=12)
    refuse_inputs(node, a_value_scale=13, norms_of_queries=14, query_lengths=16)
    require_unread(node, 3)
    if attrs.get_int("smooth_softmax", 0) == 1 or attrs.get_int("sliding_window_cache", 0) != 0:
        raise NotDecomposed("its softmax is smoothed, or its cache is a window")
    heads, groups = attrs.get_int("num_heads", 0), attrs.get_int("kv_num_heads", 0)
    q, k, v = (optional_input(node, i) for i in range(3))
    total = static_size(shape_of(f, q, 3, "the queries")[2], "the width of the queries")
    width = total // (heads if k is not None else heads + 2 * groups) if heads and groups else 0
    tables = (optional_input(node, 7), optional_input(node, 8)) if attrs.get_int("do_rotary", 0) else (None, None)
    if (
        not width
        or q is None
        or (k is None) != (v is None)
        or (tables[0] is None) != (attrs.get_int("do_rotary", 0) == 0)
    ):
        raise NotDecomposed("its heads, or its rotation's tables, are not given")
    if k is None or v is None:
        q, k, v = split_axis(g, q, -1, [heads * width, groups * width, groups * width])
    if tables[0] is not None and tables[1] is not None:
        q, k = (_rotate(g, f, node, x, n, width, (tables[0], tables[1])) for x, n in ((q, heads), (k, groups)))
    parts = Parts(q, k, v, heads, groups, width)
    mask = Mask(g, f, node, dtype_of(node))
    bools = _grouped_bools(g, node, mask, parts)
    cap = attrs.get_float("softcap", 0.0) or None
    outputs = attend(g, f, node, parts, mask.joined(bools, optional_input(node, 10), -np.inf), softcap=cap)
    if is_read(node, 1) or is_read(node, 2):
        for out, new in zip(node.outputs[1:3], present(g, parts, outputs), strict=False):
            g.replace(out, new)
    g.replace(node.outputs[0], outputs[0])


def _grouped_bools(g: Graph, node: ir.Node, mask: Mask, parts: Parts) -> list[ir.Value]:
    total = length(g, parts.k, 1)
    lengths = g.op("Add", g.op("Cast", node.inputs[5], to=ir.DataType.INT64), np.array(1, np.int64))
    visible = [mask.padding(lengths, "lengths", total)]
    if not node.attributes.get_int("causal", 1):
        return visible
    return [mask.causal(parts.q, total, None, node.attributes.get_int("local_window_size", -1)), *visible]


# ---- rotary --------------------------------------------------------------------------------------------------------


def _rows_for_samples(g: Graph, table: ir.Value, x: ir.Value) -> ir.Value:
    """The first `s` rows of a table, repeated for every sample of `x` `[b, s, ..]`: `[b, s, w]`."""
    end = g.op("Shape", x, start=1, end=2)
    first = g.op("Unsqueeze", g.op("Slice", table, ints(0), end, ints(0)), ints(0))
    return g.op("Expand", first, g.op("Concat", g.op("Shape", x, start=0, end=1), ints(1, 1), axis=0))


def _rotate(
    g: Graph, f: Facts, node: ir.Node, x: ir.Value, heads: int, width: int, tables: tuple[ir.Value, ir.Value]
) -> ir.Value:
    rotated_width = 2 * static_size(shape_of(f, tables[0], 2, "the tables")[1], "the tables' width")
    attrs: dict[str, Any] = {
        "num_heads": heads,
        "interleaved": node.attributes.get_int("rotary_interleaved", 0) or None,
    }
    attrs["rotary_embedding_dim"] = rotated_width if rotated_width < width else None
    return g.op("RotaryEmbedding", x, *(_rows_for_samples(g, t, x) for t in tables), like=x, **attrs)


def _rotary(g: Graph, f: Facts, node: ir.Node) -> None:
    """RotaryEmbedding: rows of the tables by position, or from one first position on."""
    attrs, (x, positions, cos, sin) = node.attributes, node.inputs[:4]
    if attrs.get_float("scale", 1.0) != 1 or attrs.get_int("is_packed_batching", 0) != 0:
        raise NotDecomposed("it scales, or its batch is ragged")
    shape, table, rank = f.shape(x), shape_of(f, cos, 2, "the tables"), f.rank(positions)
    if x is None or shape is None or len(shape) not in (3, 4) or rank not in (1, 2):
        raise NotDecomposed("the rank of its inputs is unknown")
    rotated_width, heads = 2 * static_size(table[1], "the tables' width"), attrs.get_int("num_heads", 0)
    rotated_attr = attrs.get_int("rotary_embedding_dim", 0)
    if len(shape) == 3 and not (rotated_attr and heads):
        heads = static_size(shape[2], "the width") // rotated_width
    axis = 1 if len(shape) == 3 else 2
    if rank == 1:
        row = g.op("Add", g.op("Cast", positions, to=ir.DataType.INT64), index_range(g, length(g, x, axis)))
        batch = g.op("Concat", g.op("Shape", x, start=0, end=1), ints(1), axis=0)
        positions = g.op("Expand", g.op("Unsqueeze", row, ints(0)), batch)
    tables = [g.op("Gather", t, positions) for t in (cos, sin)]
    rest: dict[str, Any] = {
        "interleaved": attrs.get_int("interleaved", 0) or None,
        "rotary_embedding_dim": rotated_attr or None,
    }
    head_count = heads if len(shape) == 3 else None
    g.replace(node.outputs[0], g.op("RotaryEmbedding", x, *tables, num_heads=head_count, like=node.outputs[0], **rest))


ATTENTION: dict[str, Callable[[Graph, Facts, ir.Node], None]] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "RotaryEmbedding": _rotary,
}
