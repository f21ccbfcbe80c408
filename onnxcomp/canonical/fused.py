"""ONNX Runtime's fused operators (domain com.microsoft) decomposed to equivalent standard operators.

Semantics follow the operators' documentation (ContribOperators.md) and were checked against the CPU kernels. Operators
without an exact standard form are declined and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.canonical.fused_attention import ATTENTION
from onnxcomp.canonical.fused_parts import NotDecomposed, optional_input, require_unread
from onnxcomp.graph import CONTRIB, Graph

__all__ = ["is_fused", "move_to_contrib", "unfuse"]

QUANTIZED_OPS = (
    *("DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16"),
    *("MatMulIntegerToFloat", "MatMulNBits", "MatMulNBitsMlp", "MatMulNBitsQkv", "QAttention", "QGemm", "QMoE"),
    *("QEmbedLayerNormalization", "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearSoftmax"),
    *("QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization", "QOrderedMatMul"),
)
SPECIAL_OPS = (
    *("DecoderAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "FusedMatMulActivation"),
    *("GatedRelativePositionBias", "GemmaRotaryEmbedding", "LongformerAttention", "MoE", "PackedAttention"),
    *("PackedMultiHeadAttention", "PagedAttention", "SkipGroupNorm", "SparseAttention"),
)
KEPT = {
    **dict.fromkeys(QUANTIZED_OPS, "it computes with quantized weights, which stay as they were written"),
    **dict.fromkeys(SPECIAL_OPS, "it has no exact standard form"),
}
MASK_INPUT = {"Attention": 3, "MultiHeadAttention": 4}
# The operator set that adds an operator to the standard domain; none adds the second one.
NOT_STANDARD_BELOW = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 99}


def move_to_contrib(g: Graph) -> None:
    """Move operators without an ONNX schema from the standard domain to the runtime's: conversion keeps them there."""
    for node in g.nodes(*NOT_STANDARD_BELOW):
        if node.domain == "" and g.opset < NOT_STANDARD_BELOW[node.op_type]:
            attrs = {k: a.value for k, a in node.attributes.items()}
            new = g.op(
                node.op_type, *node.inputs, domain=CONTRIB, outputs=len(node.outputs), name=str(node.name), **attrs
            )
            producer = new.producer()
            for old, y in zip(node.outputs, producer.outputs if producer is not None else (), strict=True):
                y.type, y.shape = old.type, old.shape
                g.replace(old, y)
    g.sort()  # appended nodes belong before their users
    g.sweep()


def is_fused(node: ir.Node) -> bool:
    """Whether a node is one of the runtime's fused operators that are decomposed or declined."""
    return node.domain == CONTRIB and (node.op_type in RULES or node.op_type in KEPT)


def unfuse(g: Graph, f: Facts, *, exact_rows: bool = False) -> None:
    """Decompose every fused operator that has an exact standard form; the others are declined with a reason."""
    for node in g.nodes():
        if not is_fused(node):
            continue
        try:
            rule = RULES.get(node.op_type)
            if rule is None:
                raise NotDecomposed(KEPT[node.op_type])
            if exact_rows and optional_input(node, MASK_INPUT.get(node.op_type, len(node.inputs))) is not None:
                raise NotDecomposed("rows without visible keys would change, and exact rows are requested")
            rule(g, f, node)
        except NotDecomposed as why:
            g.decline(node, f"{node.op_type}: {why}")


def _number(node: ir.Node, value: float) -> np.ndarray:
    """A scalar constant of the node's element type."""
    x = node.inputs[0]
    dtype = node.outputs[0].dtype or (x.dtype if x is not None else None)
    return np.array(value, (dtype or ir.DataType.FLOAT).numpy())


# ---- norms ---------------------------------------------------------------------------------------------------------


def _norm(
    g: Graph, x: ir.Value | None, node: ir.Node, gain: ir.Value | None, bias: ir.Value | None, **attrs: Any
) -> None:
    simple = "Simplified" in node.op_type
    op = "RMSNormalization" if simple else "LayerNormalization"
    g.replace(node.outputs[0], g.op(op, x, gain, None if simple else bias, like=node.outputs[0], **attrs))


def _plain_norm(g: Graph, f: Facts, node: ir.Node) -> None:
    require_unread(node, 1, 2)
    attrs, bias = node.attributes, optional_input(node, 2)
    rest = {"axis": attrs.get_int("axis", -1), "epsilon": attrs.get_float("epsilon", 1e-5)}
    _norm(g, node.inputs[0], node, node.inputs[1], bias, stash_type=attrs.get_int("stash_type", 1), **rest)


def _skip_norm(g: Graph, f: Facts, node: ir.Node) -> None:
    """`norm(input + bias + skip)`, and the sum as fourth output."""
    require_unread(node, 1, 2)
    simple = "Simplified" in node.op_type
    x, skip, gain = node.inputs[:3]
    shift, bias = (None, optional_input(node, 3)) if simple else (optional_input(node, 3), optional_input(node, 4))
    first = g.op("Add", x, bias, like=node.outputs[0]) if bias is not None else x
    total = g.op("Add", first, skip, like=node.outputs[0])
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    _norm(g, total, node, gain, shift, axis=-1, epsilon=epsilon, stash_type=1)
    if len(node.outputs) > 3:
        g.replace(node.outputs[3], total)


def _embedding(g: Graph, f: Facts, node: ir.Node) -> None:
    """The normalized sum of word, segment and position embeddings; the mask index is the number of ones."""
    ids, segments, words, places, kinds, gain, shift = node.inputs[:7]
    mask, positions = optional_input(node, 7), optional_input(node, 8)
    counted = len(node.outputs) > 1 and bool(list(node.outputs[1].uses()) or node.outputs[1].is_graph_output())
    if counted and mask is None:
        raise NotDecomposed("the mask index is read but no mask is given")
    if segments is None and kinds is not None:
        raise NotDecomposed("it has segment rows but no segment ids")
    if positions is None:
        length = g.op("Squeeze", g.op("Shape", ids, start=1, end=2), np.array([0], np.int64))
        row = g.op("Range", np.array(0, np.int64), length, np.array(1, np.int64))
        positions = g.op("Unsqueeze", row, np.array([0], np.int64))
    out = node.outputs[0]
    total = g.op("Gather", words, ids, like=out)
    if kinds is not None:
        total = g.op("Add", total, g.op("Gather", kinds, segments, like=out), like=out)
    total = g.op("Add", total, g.op("Gather", places, positions), like=out)
    _norm(g, total, node, gain, shift, axis=-1, epsilon=node.attributes.get_float("epsilon", 1e-12), stash_type=1)
    if counted:
        ones = g.op("Cast", g.op("Equal", mask, g.op("CastLike", np.array(1, np.int64), mask)), to=ir.DataType.INT32)
        total_ones = g.op("ReduceSum", ones, np.array([1], np.int64), keepdims=0)
        g.replace(node.outputs[1], g.op("Cast", total_ones, to=ir.DataType.INT32))
    if len(node.outputs) > 2:
        g.replace(node.outputs[2], total)


# ---- activations ---------------------------------------------------------------------------------------------------


def _gelu(g: Graph, f: Facts, node: ir.Node) -> None:
    """Gelu, BiasGelu and FastGelu: the bias, then GELU (the tanh form in FastGelu)."""
    x, bias, out = node.inputs[0], optional_input(node, 1), node.outputs[0]
    shifted = g.op("Add", x, bias, like=out) if bias is not None else x
    how = "tanh" if node.op_type == "FastGelu" else None
    g.replace(out, g.op("Gelu", shifted, approximate=how, like=out))


def _quick_gelu(g: Graph, f: Facts, node: ir.Node) -> None:
    x, out, alpha = node.inputs[0], node.outputs[0], node.attributes.get_float("alpha", 1.702)
    inner = g.op("Mul", x, _number(node, alpha), like=out) if alpha != 1 else x
    g.replace(out, g.op("Mul", x, g.op("Sigmoid", inner, like=out), like=out))


def _bias_split_gelu(g: Graph, f: Facts, node: ir.Node) -> None:
    shape, out = f.shape(node.inputs[0]), node.outputs[0]
    if not shape or not isinstance(shape[-1], int) or shape[-1] % 2:
        raise NotDecomposed("the width is not static")
    total = g.op("Add", node.inputs[0], node.inputs[1], like=node.inputs[0])
    linear_half = g.op("Split", total, axis=-1, num_outputs=2, outputs=2)
    split = linear_half.producer()
    assert split is not None
    g.replace(out, g.op("Mul", linear_half, g.op("Gelu", split.outputs[1], like=out), like=out))


def _bias_add(g: Graph, f: Facts, node: ir.Node) -> None:
    out = node.outputs[0]
    g.replace(out, g.op("Add", g.op("Add", node.inputs[0], node.inputs[1], like=out), node.inputs[2], like=out))


def _bias_softmax(g: Graph, f: Facts, node: ir.Node) -> None:
    x, bias = f.shape(node.inputs[0]), f.shape(node.inputs[1])
    axis = node.attributes.get_int("axis", 1)
    if x is None or bias is None or len(x) != len(bias) or axis % len(x) != len(x) - 1:
        raise NotDecomposed("the bias does not broadcast as in an Add, or the softmax is not over the last axis")
    total = g.op("Add", node.inputs[0], node.inputs[1], like=node.outputs[0])
    g.replace(node.outputs[0], g.op("Softmax", total, axis=-1, like=node.outputs[0]))


# ---- products ------------------------------------------------------------------------------------------------------


def _product(g: Graph, f: Facts, node: ir.Node) -> None:
    """`alpha * A @ B`, where each factor may have its first axis moved back and then its last two exchanged."""
    parts: list[ir.Value | None] = list(node.inputs[:2])
    orders = [_order(f, x, node, side) for x, side in zip(parts, "AB", strict=True)]
    out, alpha = node.outputs[0], node.attributes.get_float("alpha", 1.0)
    for i, order in enumerate(orders):
        if order:
            parts[i] = g.op("Transpose", parts[i], perm=order)
    if alpha != 1 and g.is_constant(node.inputs[1]) and _is_biased(g, out):
        parts[0], alpha = g.op("Mul", parts[0], _number(node, alpha)), 1.0
    y = g.op("MatMul", *parts, like=out)
    g.replace(out, g.op("Mul", y, _number(node, alpha), like=out) if alpha != 1 else y)


def _is_biased(g: Graph, y: ir.Value) -> bool:
    """Whether a constant is added to a product: a linear with bias, whose two nodes must stay adjacent."""
    return any(u.op_type == "Add" and any(g.is_constant(x) for x in u.inputs) for u, _ in y.uses())


def _order(f: Facts, x: ir.Value | None, node: ir.Node, side: str) -> list[int]:
    """The permutation of one factor's axes, empty for none."""
    transpose, batch = (node.attributes.get_int(f"{name}{side}", 0) for name in ("trans", "transBatch"))
    rank = f.rank(x)
    if not transpose and not batch:
        return []
    if rank is None or rank < 2:
        raise NotDecomposed("the rank is unknown")
    order = [*range(1, rank - 1), 0, rank - 1] if batch else list(range(rank))
    return [*order[:-2], order[-1], order[-2]] if transpose else order


ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")


def _gemm(g: Graph, f: Facts, node: ir.Node) -> None:
    """Gemm, then the activation of its attribute."""
    attrs, out = node.attributes, node.outputs[0]
    activation = attrs.get_string("activation", "")
    slope: dict[str, Any] = {"alpha": attrs.get_float("activation_alpha", 0.01)} if activation == "LeakyRelu" else {}
    if activation not in (*ACTIVATIONS, "LeakyRelu", ""):
        raise NotDecomposed(f"its activation {activation} is not known")
    attrs_kept: dict[str, Any] = {k: a.value for k, a in attrs.items() if k in ("alpha", "beta", "transA", "transB")}
    y = g.op("Gemm", *node.inputs, like=out, **attrs_kept)
    g.replace(out, g.op(activation, y, like=out, **slope) if activation else y)


def _gemm_gelu(g: Graph, f: Facts, node: ir.Node) -> None:
    out, bias = node.outputs[0], optional_input(node, 2)
    y = g.op("MatMul", node.inputs[0], node.inputs[1], like=out)
    shifted = g.op("Add", y, bias, like=out) if bias is not None else y
    g.replace(out, g.op("Gelu", shifted, approximate="tanh", like=out))


# ---- quantization --------------------------------------------------------------------------------------------------


def _linear_scale(g: Graph, f: Facts, node: ir.Node) -> None:
    """QuantizeLinear and DequantizeLinear, which tools put there for types that older operator sets lack."""
    if node.attributes.get_int("block_size", 0) and len(node.inputs) < 2:
        raise NotDecomposed("it has blocks but no scale")
    attrs = {k: a.value for k, a in node.attributes.items() if k in ("axis", "block_size")}
    g.replace(node.outputs[0], g.op(node.op_type, *node.inputs, like=node.outputs[0], **attrs))


RULES: dict[str, Callable[[Graph, Facts, ir.Node], None]] = {
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization"), _plain_norm),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "EmbedLayerNormalization": _embedding,
    **dict.fromkeys(("Gelu", "BiasGelu", "FastGelu"), _gelu),
    "QuickGelu": _quick_gelu,
    "BiasSplitGelu": _bias_split_gelu,
    "BiasAdd": _bias_add,
    "BiasSoftmax": _bias_softmax,
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), _product),
    "FusedGemm": _gemm,
    "GemmFastGelu": _gemm_gelu,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _linear_scale),
    **ATTENTION,
}
