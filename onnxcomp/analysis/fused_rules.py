"""Shape rules of ONNX Runtime's fused operators (domain com.microsoft), so that inference continues behind them."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.analysis.known import Known, given, require
from onnxcomp.analysis.shape_rules import SHAPE_RULES, Rule
from onnxcomp.analysis.sizes import Shape, Size, divide, multiply

__all__ = ["CONTRIB_RULES"]

SAME = """
    BiasAdd BiasDropout BiasGelu BiasSoftmax FastGelu Gelu LayerNormalization QuantizeLinear DequantizeLinear QuickGelu
    RotaryEmbedding SimplifiedLayerNormalization SkipLayerNormalization SkipSimplifiedLayerNormalization
"""


def _factor(s: Shape, node: ir.Node, side: str) -> Shape:
    """The shape of a factor after its transpositions."""
    if node.attributes.get_int(f"transBatch{side}", 0):
        s = (*s[1:-1], s[0], s[-1])
    return (*s[:-2], s[-1], s[-2]) if node.attributes.get_int(f"trans{side}", 0) else s


def _product(f: Known, node: ir.Node) -> Shape | None:
    a, b = f.shape(given(node, 0)), f.shape(given(node, 1))
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    a, b = _factor(a, node, "A"), _factor(b, node, "B")
    return (*f.broadcast([a[:-2], b[:-2]]), a[-2], b[-1])


def _halved(f: Known, node: ir.Node) -> Shape | None:
    s = f.shape(given(node, 0))
    half = divide(s[-1], 2) if s else None
    return (*s[:-1], half) if s and half is not None else None


def _embedding(f: Known, node: ir.Node) -> Shape | None:
    ids, table = f.shape(given(node, 0)), f.shape(given(node, 2))
    return (*ids, table[-1]) if ids is not None and table else None


def _packed_attention(f: Known, node: ir.Node) -> Shape | None:
    """`[b, s, width of the values]` from the packed weights."""
    x, w = f.shape(given(node, 0)), f.shape(given(node, 1))
    if x is None or not w or len(x) != 3:
        return None
    sizes = node.attributes.get_ints("qkv_hidden_sizes", [])
    width: Size | None = sizes[2] if len(sizes) == 3 else divide(w[-1], 3)
    return None if width is None else (*x[:2], width)


def _multi_head(f: Known, node: ir.Node) -> Shape | None:
    q = f.shape(given(node, 0))
    v = f.shape(given(node, 2))
    if q is None or len(q) not in (3, 5):
        return None
    if v is None:
        return (*q[:2], multiply(q[2], q[4])) if len(q) == 5 else q
    require(len(v) in (3, 4))
    return (*q[:2], v[2] if len(v) == 3 else multiply(v[1], v[3]))


def _grouped(f: Known, node: ir.Node) -> Shape | None:
    q, n, kv = (
        f.shape(given(node, 0)),
        node.attributes.get_int("num_heads", 0),
        node.attributes.get_int("kv_num_heads", 0),
    )
    if q is None or len(q) != 3 or given(node, 1) is not None:
        return q
    width = divide(q[2], n + 2 * kv) if n + kv else None
    return None if width is None else (*q[:2], multiply(width, n))


def _first(f: Known, node: ir.Node) -> Shape | None:
    return f.shape(given(node, 0))


CONTRIB_RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME.split(), _first),
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), _product),
    "FusedGemm": SHAPE_RULES["Gemm"],
    "GemmFastGelu": SHAPE_RULES["MatMul"],
    "BiasSplitGelu": _halved,
    "EmbedLayerNormalization": _embedding,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
}
