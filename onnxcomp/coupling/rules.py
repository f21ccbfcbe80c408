"""Coupling rules of arithmetic operators, and the table of all rules. An axis without a rule cannot be cut."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.shape_rules import axes_of, axis_of
from onnxcomp.coupling.layouts import LAYOUT_RULES
from onnxcomp.coupling.trace import FROZEN, UNKNOWN, Axis, Rule, Tracer, input_and_output
from onnxcomp.maths import Array

__all__ = ["RULES"]

ELEMENTWISE = """
    Abs Acos Add And Asin Atan BitShift Cast CastLike Ceil Celu Clip Cos Div Dropout Elu Equal Erf Exp Floor Gelu
    Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish
    Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish
    Tan Tanh ThresholdedRelu Where Xor
"""
REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
POOLINGS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"
ALONG_ONE_AXIS = "ArgMax ArgMin CumSum Hardmax LogSoftmax LpNormalization Softmax TopK"


def _elementwise(t: Tracer, node: ir.Node) -> None:
    """Axes are aligned from the right; an axis of length 1 is broadcast and stays."""
    out = node.outputs[0]
    rank = t.f.rank(out) or 0
    for v in node.inputs:
        offset = rank - (t.f.rank(v) or 0)
        for i in range(t.f.rank(v) or 0) if v is not None else ():
            assert v is not None
            axis = t.axis(v, i, node)
            t.broadcast(axis, t.axis(out, i + offset))
            if node.op_type in ("Add", "Sum") and t.g.is_constant(v) and t.size(v, i) == t.size(out, i + offset):
                t.role(axis, "writes")
    _stop_repeated(t, out, range(rank), node.inputs)


def _stop_repeated(t: Tracer, out: ir.Value, axes: Iterable[int], inputs: Iterable[ir.Value | None]) -> None:
    """Axes of an output along which every input is broadcast stay: no input holds their units."""
    for i in axes:
        n, rank = t.dim(out, i), t.f.rank(out) or 0
        sizes = [d for v in inputs if v is not None and (d := t.dim(v, i - rank)) is not None]
        if n is not None and n != 1 and not any(t.f.same(d, n) for d in sizes):
            t.stop(t.axis(out, i), f"axis {i} of '{out.name}' is broadcast from length 1")


def _matmul(t: Tracer, node: ir.Node) -> None:
    a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
    if a is None or b is None or (t.f.rank(a) or 0) < 2 or (t.f.rank(b) or 0) < 2:
        return
    _product(t, node, t.axis(a, -1, node), t.axis(b, -2, node), t.axis(b, -1, node), t.axis(out, -1))
    t.same(t.axis(a, -2, node), t.axis(out, -2))
    t.role(t.axis(a, -2, node), "writes")  # of a weight on the left, as experts have them
    rank = t.f.rank(out) or 0
    for v in (a, b):
        for i in range(-rank, -2):
            if i < -(t.f.rank(v) or 0):
                continue
            if t.size(v, i) == 1 != t.size(out, i):
                t.followed(t.axis(v, i, node))
            else:
                t.same(t.axis(v, i, node), t.axis(out, i))


def _product(t: Tracer, node: ir.Node, x: Axis, rows: Axis, columns: Axis, y: Axis) -> None:
    """`y = x @ w`: the contracted axis and the produced one; a constant reads the first or writes the second."""
    t.same(x, rows)
    t.same(columns, y)
    for side in (x, rows):
        t.role(side, "reads")
    for side in (columns,):
        t.role(side, "writes")


def _gemm(t: Tracer, node: ir.Node) -> None:
    a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
    if a is None or b is None:
        return
    trans_a, trans_b = (node.attributes.get_int(k, 0) for k in ("transA", "transB"))
    rows, columns = t.axis(b, trans_b, node), t.axis(b, 1 - trans_b, node)
    _product(t, node, t.axis(a, 1 - trans_a, node), rows, columns, t.axis(out, 1))
    t.same(t.axis(a, trans_a, node), t.axis(out, 0))
    c = node.inputs[2] if len(node.inputs) > 2 else None
    for i in range(-(t.f.rank(c) or 0), 0) if c is not None else ():
        assert c is not None
        t.broadcast(t.axis(c, i, node), t.axis(out, i))
        if t.size(c, i) == t.size(out, i) and t.size(c, i) is not None:
            t.role(t.axis(c, i, node), "writes")


def _conv(t: Tracer, node: ir.Node) -> None:
    """Convolutions: a dense one separates input from output channels, a depthwise one couples them.

    Groups of several channels are cut as units, since all groups share the weight's second axis.
    """
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if x is None or w is None:
        return
    groups, is_transposed = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    t.same(t.axis(x, 0, node), t.axis(y, 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        t.same(t.axis(bias, 0, node), t.axis(y, 1))
        t.role(t.axis(bias, 0, node), "writes")
    if groups == 1:
        rows, columns = (0, 1) if is_transposed else (1, 0)
        _product(t, node, t.axis(x, 1, node), t.axis(w, rows, node), t.axis(w, columns, node), t.axis(y, 1))
        return
    ins, outs, first = t.size(x, 1), t.size(y, 1), t.size(w, 0)
    if ins is None or outs is None or first is None or ins % groups or outs % groups:
        return
    places = [(t.axis(x, 1, node), ins), (t.axis(y, 1), outs), (t.axis(w, 0, node), first)]
    units = t.blocks([(place, n // groups) for place, n in places], groups)
    t.attrs[node, "group"] = units
    t.followed(t.axis(w, 1, node))


def _einsum(t: Tracer, node: ir.Node) -> None:
    """Axes of the same letter are coupled, whether they are summed over or not."""
    text = node.attributes.get_string("equation", "").replace(" ", "")
    if "..." in text or "->" not in text:
        return
    operands, right = text.split("->")
    terms = [*zip(operands.split(","), node.inputs, strict=True), (right, node.outputs[0])]
    axis_of_letter: dict[str, Axis] = {}
    for letters, v in terms:
        for i, letter in enumerate(letters):
            assert v is not None
            axis = t.axis(v, i, node if v is not node.outputs[0] else None)
            t.same(axis_of_letter.setdefault(letter, axis), axis)
            if v is not node.outputs[0]:
                t.role(axis, "writes" if letter in right else "reads")


# ---- norms, pooling, reductions ----------------------------------------------------------------------------------


def _per_channel(t: Tracer, node: ir.Node) -> None:
    """BatchNormalization and InstanceNormalization: one parameter a channel, on axis 1."""
    x, y = input_and_output(node)
    t.same(t.axis(x, 0, node), t.axis(y, 0))
    t.same(t.axis(x, 1, node), t.axis(y, 1))
    for v in node.inputs[1:]:
        if v is not None:
            t.same(t.axis(v, 0, node), t.axis(y, 1))
    if node.op_type == "BatchNormalization":
        for i in range(2, t.f.rank(x) or 0):
            t.same(t.axis(x, i, node), t.axis(y, i))


def _group_norm(t: Tracer, node: ir.Node) -> None:
    """Statistics are taken over a group of channels, so groups are cut as units."""
    (x, y), groups = input_and_output(node), node.attributes.get_int("num_groups", 1)
    channels = t.size(x, 1)
    if channels is None:
        return
    t.same(t.axis(x, 0, node), t.axis(y, 0))
    places = [(t.axis(x, 1, node), channels // groups), (t.axis(y, 1), channels // groups)]
    for v in node.inputs[1:]:
        if v is not None:
            places.append((t.axis(v, 0, node), (t.size(v, 0) or 0) // groups))
    t.attrs[node, "num_groups"] = t.blocks(places, groups)


def _pooling(t: Tracer, node: ir.Node) -> None:
    for i in (0, 1):
        assert node.inputs[0] is not None
        t.same(t.axis(node.inputs[0], i, node), t.axis(node.outputs[0], i))


def _along(t: Tracer, node: ir.Node) -> None:
    """Softmax and similar operators: every axis but the one along which they work."""
    x, _ = input_and_output(node)
    rank = t.f.rank(x) or 0
    axis = axis_of(node, rank, 0 if node.op_type in ("ArgMax", "ArgMin") else -1)
    if node.op_type == "CumSum":
        at = t.f.scalar(node.inputs[1])
        axis = int(at) % rank if at is not None and rank else -1
    if axis < 0 or (node.op_type in ("ArgMax", "ArgMin") and not node.attributes.get_int("keepdims", 1)):
        return
    for i in range(rank):
        if i != axis:
            for out in node.outputs:
                t.same(t.axis(x, i, node), t.axis(out, i))
        else:
            t.stop(t.axis(x, i, node), f"{node.op_type} '{node.name}' works along that axis")


def _layer_norm(t: Tracer, node: ir.Node) -> None:
    """Axes in front pass through; a cut of the normalized ones would change LayerNormalization's mean and variance."""
    x, y = input_and_output(node)
    rank = t.f.rank(x) or 0
    first = axis_of(node, rank)
    for i in range(first):
        t.same(t.axis(x, i, node), t.axis(y, i))
    exact = node.op_type == "RMSNormalization" and first == rank - 1
    if not exact:
        for i in range(first, rank):
            why = f"{node.op_type} '{node.name}' takes mean and variance over that axis"
            t.stop(t.axis(x, i, node), why)
            t.stop(t.axis(y, i), why)
        return
    t.same(t.axis(x, -1, node), t.axis(y, -1))
    for v in node.inputs[1:]:
        if v is not None:
            t.same(t.axis(v, -1, node), t.axis(y, -1))
    units = t.at(t.axis(x, -1, node))
    if units is not None:
        t.norms[node] = units


def _reduction(t: Tracer, node: ir.Node) -> None:
    (x, y), axes = input_and_output(node), axes_of(t.f, node)
    rank = t.f.rank(x) or 0
    if axes is None or (not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1):
        return
    reduced = {a % rank for a in axes} or set(range(rank))
    keep = node.attributes.get_int("keepdims", 1)
    to = 0
    for i in range(rank):
        if i in reduced:
            t.stop(t.axis(x, i, node), f"{node.op_type} '{node.name}' reduces that axis")
        else:
            t.same(t.axis(x, i, node), t.axis(y, to))
        to += 1 if keep or i not in reduced else 0


# ---- quantizers --------------------------------------------------------------------------------------------------


def _quantizer(t: Tracer, node: ir.Node) -> None:
    """QuantizeLinear and DequantizeLinear: scales and zero points per channel or block are cut with the tensor."""
    x, y = input_and_output(node)
    rank = t.f.rank(x) or 0
    along, block = axis_of(node, rank, 1), node.attributes.get_int("block_size", 0)
    for i in range(rank):
        t.same(t.axis(x, i, node), t.axis(y, i))
        for role in t.roles.get(t.axis(y, i), ()):
            t.role(t.axis(x, i, node), role)
    for v in node.inputs[1:]:
        if v is None:
            continue
        for i in range(t.f.rank(v) or 0):
            scale_axis, data_axis = t.axis(v, i, node), t.axis(x, i if block else along, node)
            if block and i == along and (n := t.size(x, i)) is not None:
                t.mapped(scale_axis, data_axis, np.arange(n) // block)
            elif not block or i != along:
                t.broadcast(scale_axis, data_axis)
            else:
                t.stop(data_axis, f"{node.op_type} '{node.name}' has scales per block of it")


Places = list[tuple[ir.Value | None, int | None]]  # values with the axis of heads, None for the usual one


# ---- attention ---------------------------------------------------------------------------------------------------


def _attention(t: Tracer, node: ir.Node) -> None:
    """Heads are cut as units: a key-value head with all its query heads, or equally many query heads of each."""
    q, k, v, y = node.inputs[0], node.inputs[1], node.inputs[2], node.outputs[0]
    if q is None or k is None or v is None:
        return
    flat = t.f.rank(q) == 3
    heads, kv = (
        (node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0))
        if flat
        else (t.size(q, 1) or 0, t.size(k, 1) or 0)
    )
    if not heads or not kv or heads % kv:
        return
    for a in (q, k, v):
        t.same(t.axis(a, 0, node), t.axis(y, 0))
    inputs = [*node.inputs, None, None, None][:6]
    outputs = [*node.outputs, None, None, None][:4]
    for other, reader in [*((x, node) for x in inputs[3:]), *((x, None) for x in outputs[1:])]:
        if other is not None and t.f.rank(other) == 4:
            t.broadcast(t.axis(other, 0, reader), t.axis(y, 0))
    query_places: Places = [(q, None), (y, None)] + [(x, 1) for x in (inputs[3], outputs[3]) if t.size(x, -3) == heads]
    kv_places: Places = [(k, None), (v, None)] + [(x, 1) for x in (inputs[4], inputs[5], outputs[1], outputs[2])]
    queries = t.blocks(_heads(t, node, query_places, heads, flat), heads)
    keys = t.blocks(_heads(t, node, kv_places, kv, flat), kv)
    _tie(t, node, queries, keys, (query_places, kv_places, flat))
    if flat:
        queries, keys = (t.blocks(_heads(t, node, p, n, flat), n) for p, n in ((query_places, heads), (kv_places, kv)))
        for name, units in (("q_num_heads", queries), ("kv_num_heads", keys)):
            if (units > FROZEN).any():
                t.attrs[node, name] = units


def _heads(t: Tracer, node: ir.Node, places: Places, heads: int, flat: bool) -> list[tuple[Axis, int]]:
    """The axes that hold heads, with how many positions each head has there."""
    axes = []
    for v, axis in places:
        if v is None:
            continue
        reader = node if v in node.inputs else None
        at = (2 if flat else 1) if axis is None else (t.f.rank(v) or 3) - 3
        n = t.size(v, at)
        if n is not None and n % heads == 0:
            axes.append((t.axis(v, at, reader), n // heads))
    return axes


def _tie(t: Tracer, node: ir.Node, queries: Array, keys: Array, places: tuple[Places, Places, bool]) -> None:
    """Couple query heads to the key-value heads that they share."""
    query_places, kv_places, flat = places
    kv, repeat = len(keys), len(queries) // len(keys)
    grouped = queries.reshape(kv, repeat)
    one_group_each = (grouped == grouped[:, :1]).all()
    if (keys != UNKNOWN).any() or one_group_each:
        merged = np.where(keys != UNKNOWN, keys, grouped.max(axis=1))
        t.join(merged[:, None], grouped)
        for values, n, units in ((query_places, kv, merged), (kv_places, kv, merged)):
            for place, block in _heads(t, node, values, n, flat):
                t.put(place, np.repeat(units, block), None) if (units != UNKNOWN).any() else None
        t.parts.pop(node, None)
    elif (queries != UNKNOWN).any():
        t.parts[node] = grouped


def _rotary(t: Tracer, node: ir.Node) -> None:
    """A rotation mixes channels of a head: heads can be cut, channels of a head cannot."""
    x, y = input_and_output(node)
    t.same(t.axis(x, 0, node), t.axis(y, 0))
    for v in node.inputs[1:3] if len(node.inputs) == 3 else node.inputs[3:]:
        if v is not None:
            t.broadcast(t.axis(v, 0, node), t.axis(y, 0))
    n, heads = t.size(x, -1), node.attributes.get_int("num_heads", 0)
    if t.f.rank(x) == 4:
        t.same(t.axis(x, 1, node), t.axis(y, 1))
        if heads and (units := t.at(t.axis(x, 1, node))) is not None:
            t.attrs[node, "num_heads"] = units
    elif n is not None and heads and n % heads == 0:
        places = [(t.axis(x, -1, node), n // heads), (t.axis(y, -1), n // heads)]
        t.attrs[node, "num_heads"] = t.blocks(places, heads)


RULES: dict[tuple[str, str], Rule] = LAYOUT_RULES | {
    ("", op): rule
    for rule, ops in (
        (_elementwise, ELEMENTWISE),
        (_reduction, REDUCTIONS),
        (_pooling, POOLINGS),
        (_along, ALONG_ONE_AXIS),
        (_per_channel, "BatchNormalization InstanceNormalization"),
        (_group_norm, "GroupNormalization"),
        (_layer_norm, "LayerNormalization RMSNormalization"),
        (_quantizer, "QuantizeLinear DequantizeLinear"),
        (_conv, "Conv ConvTranspose"),
        (_matmul, "MatMul"),
        (_gemm, "Gemm"),
        (_einsum, "Einsum"),
        (_attention, "Attention"),
        (_rotary, "RotaryEmbedding"),
    )
    for op in ops.split()
}
