"""Sets of operator types that several analyses share, named after what their members do to elements.

The sets differ on purpose: each site follows an operator only where its own proof holds for it.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = [
    "ADDITIONS",
    "BRANCH_OPS",
    "BRANCH_REARRANGING",
    "ELEMENT_PRESERVING",
    "LAYER_OPS",
    "LAYOUT_OPS",
    "LAYOUT_OR_CAST",
    "MASK_LAYOUT_OPS",
    "NORMS",
    "ONNX_ONLY",
    "PROJECTION_TO_ATTENTION",
    "REARRANGING",
    "RUNTIME_OPS",
    "TABLE_REPEATING",
    "TIMED_OPS",
    "TOKEN_SELECTING",
    "WEIGHT_PRODUCTS",
    "has_body",
    "is_layout",
]

ADDITIONS = ("Add", "Sum")
NORMS = ("LayerNormalization", "RMSNormalization")

# ---- operators that move elements --------------------------------------------------------------------------------

REARRANGING = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# All elements, each once: a layout is followed backwards through these.
LAYOUT_OPS = REARRANGING | {"Flatten", "Identity"}
# Between a projection, an attention, a cache and a graph output, where a cast may stand; Flatten would merge heads.
LAYOUT_OR_CAST = REARRANGING | {"Cast", "Identity"}
# Through these a mask keeps its meaning, whatever its type: every element of the result is one of the mask's.
MASK_LAYOUT_OPS = REARRANGING | {"Expand", "Identity", "Slice"}
# Every element of the result is one of the first input's, so bounds on all elements hold for it too.
ELEMENT_PRESERVING = LAYOUT_OPS | {"Expand", "Gather", "GatherElements", "GatherND", "Slice", "Tile"}
# Repetitions of the entries of a table; a Transpose would change which axis is the last.
TABLE_REPEATING = frozenset({"Expand", "Identity", "Reshape", "Squeeze", "Tile", "Unsqueeze"})
# May select tokens of a residual stream; its width stays.
TOKEN_SELECTING = frozenset({"Gather", "Identity", "Slice"})
# What cuts an image into windows and puts these together again inside a residual branch.
BRANCH_REARRANGING = REARRANGING | {"Concat", "Gather", "Pad", "Slice", "Split"}
# Through these a branch reaches the residual addition.
BRANCH_OPS = BRANCH_REARRANGING | {"Cast", "Identity", "Mul", *NORMS}
# Between a projection and the Attention that reads it: layout, rotation, norm, scale, copies of heads, cached keys.
PROJECTION_TO_ATTENTION = LAYOUT_OPS | {"Cast", "Concat", "Div", "Expand", "Mul", "RotaryEmbedding", *NORMS}

# ---- operators that do a layer's work ----------------------------------------------------------------------------

# Products whose second input may be a weight.
WEIGHT_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
LAYER_OPS = frozenset({"Attention", "Conv", "Gemm", "MatMul", "Softmax", *NORMS})
# Besides these, bodies of loops and branches have a run time of their own.
TIMED_OPS = LAYER_OPS | {"If", "Loop", "Scan"}

# ---- operators that are not ONNX's -------------------------------------------------------------------------------

# ONNX Runtime has these names of ONNX's in its own domain as well (1.32); another of them there is nobody's operator.
_SHARED_NAMES = {
    *("Attention", "CausalConvWithState", "DequantizeLinear", "GatherND", "Gelu", "GridSample", "LinearAttention"),
    *("Pad", "QLinearConv", "QuantizeLinear", "Range", "RotaryEmbedding", "SwiGLU", "Trilu", "Unique"),
}
ONNX_ONLY = frozenset({s.name for s in onnx.defs.get_all_schemas() if not s.domain} - _SHARED_NAMES)
# ONNX Runtime has these in the default domain whatever the operator set, with a schema of its own.
RUNTIME_OPS = frozenset(
    [
        "Affine",
        "Crop",
        "DynamicSlice",
        "GRUUnit",
        "GivenTensorFill",
        "ImageScaler",
        "LayerNormalization",
        "ParametricSoftplus",
        "Scale",
        "ScaledTanh",
        "SimplifiedLayerNormalization",
        "ThresholdedRelu",
    ]
)

# ---- operators with graphs inside --------------------------------------------------------------------------------


def has_body(node: ir.Node) -> bool:
    """Whether an attribute of the node is a graph, as of loops and branches."""
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def is_layout(node: ir.Node) -> bool:
    """Whether a node is one of ONNX's own that moves elements or changes their type."""
    return not node.domain and node.op_type in LAYOUT_OR_CAST
