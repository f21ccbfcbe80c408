"""The rules of TensorRT's ONNX parser and of its fusions, checked on a graph before it is written; needs no device.

Sources: NVIDIA's pages on explicit quantization and fused attention (TensorRT 10 and 11), the checks in onnx-tensorrt's
importer of QuantizeLinear and DequantizeLinear, and the issues named at the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph
from onnxcomp.target import TENSORRT, Target

__all__ = ["RULES", "Violation", "check", "require"]

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
CODES = {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN}
# Operators the parser has no importer for (onnx-tensorrt, docs/operators.md).
UNSUPPORTED = {
    *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "Compress", "Det"),
    *("BitShift", "MaxRoiPool", "Multinomial", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
    *("SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional"),
    *("OptionalGetElement", "OptionalHasElement", "StringNormalizer", "TfIdfVectorizer", "Unique", "MelWeightMatrix"),
}
DATA_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast")


@dataclass(frozen=True)
class Violation:
    """A place where a graph breaks a rule."""

    rule: str
    node: str
    detail: str

    def __str__(self) -> str:
        return f"rule '{self.rule}' at '{self.node}': {self.detail}"


def check(g: Graph, target: Target = TENSORRT) -> list[Violation]:
    """Every violation of every rule, in the order of the rules."""
    view = g.clone()
    view.infer_shapes()
    return [Violation(name, *violation) for name, rule in RULES.items() for violation in rule(view, target)]


def require(g: Graph, target: Target) -> list[str]:
    """Raise `TargetError` where the target is TensorRT and its parser would refuse the graph.

    Returns violations that only prevent fusions, as lines for the report.
    """
    if not target.provider.startswith("Tensorrt"):
        return []
    violations = check(g, target)
    fatal = [v for v in violations if v.rule not in LAYOUT]
    if fatal:
        more = f"; and {len(fatal) - 3} more" if len(fatal) > 3 else ""
        raise TargetError(f"the result is not legal for '{target.name}': {'; '.join(map(str, fatal[:3]))}{more}")
    return [f"'{target.name}' will run this unfused: {v}" for v in violations]


Violations = Iterator[tuple[str, str]]


def _standard(g: Graph, target: Target) -> Violations:
    """All operators are standard ones that the parser knows; others would need a plugin."""
    for node in g.nodes():
        if node.domain != "" or node.op_type in UNSUPPORTED:
            yield str(node.name), f"{node.domain or 'ai.onnx'}.{node.op_type} is no operator of TensorRT's parser"


def _opset(g: Graph, target: Target) -> Violations:
    """The operator set is one the oldest supported parser reads."""
    if g.opset > target.newest_opset:
        why = f"opset {g.opset} is newer than {target.newest_opset}; end the recipe with a pass of the last stage"
        yield "the model", why


def _typed(g: Graph, target: Target) -> Violations:
    """Every value has a known type (engines are strongly typed) and none is float64, which would become float32."""
    for node in g.nodes():
        for v in node.outputs:
            if v.name and (v.dtype is None or v.dtype is ir.DataType.DOUBLE):
                yield str(node.name), f"'{v.name}' has type {v.dtype.name if v.dtype else 'unknown'}"


def _symmetric(g: Graph, target: Target) -> Violations:
    """Codes are int8 (or int4 and fp8) with zero points that are constant zeros (TensorRT #4698, #2774)."""
    for node, codes, _, zero in _quantizers(g):
        kind = codes.dtype if codes is not None else None
        if kind not in CODES:
            yield str(node.name), f"its codes are {kind.name if kind else 'unknown'}; int8 is needed"
        elif zero is not None and (not g.is_constant(zero) or np.any(g.array(zero).astype(np.float32) != 0)):
            yield str(node.name), f"its zero point '{zero.name}' is not a constant zero"


def _scales(g: Graph, target: Target) -> Violations:
    """Scales are constant, positive and finite."""
    for node, _, scale, _ in _quantizers(g):
        if scale is None or not g.is_constant(scale):
            yield str(node.name), "its scale is not a constant"
            continue
        a = g.array(scale).astype(np.float64)
        if not (np.isfinite(a).all() and (a > 0).all()):
            yield str(node.name), f"its scale '{scale.name}' is not positive and finite everywhere"


def _per_tensor(g: Graph, target: Target) -> Violations:
    """Activations have one scale for the whole tensor."""
    for node, _, scale, _ in _quantizers(g):
        if not g.is_constant(node.inputs[0]) and not _is_weight(g, node) and scale is not None and _size(scale) != 1:
            yield str(node.name), f"an activation with {_size(scale)} scales; one is needed"


def _channel_axis(g: Graph, target: Target) -> Violations:
    """Scales of a weight run along its output channels: `N` of `[K, N]`, or of `[N, K]` behind transB."""
    for node in g.nodes(*PRODUCTS):
        made = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        scale = made.inputs[1] if made is not None and made.op_type == "DequantizeLinear" else None
        if made is None or scale is None or not _is_weight(g, made) or _size(scale) == 1:
            continue
        if made.attributes.get_int("block_size", 0):
            continue
        shape = node.inputs[1].shape if node.inputs[1] is not None else None
        rank = len(shape) if shape is not None else 2
        axis, want = made.attributes.get_int("axis", 1) % rank, _channels(node, rank)
        if axis != want:
            yield str(made.name), f"its scales run along axis {axis}; the output channels of '{node.name}' are {want}"
        elif shape is not None and shape[axis] != _size(scale):
            yield str(made.name), f"{_size(scale)} scales for {shape[axis]} output channels"


def _channels(node: ir.Node, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        return 0
    return 1 if node.op_type == "ConvTranspose" else rank - 1


def _pairs(g: Graph, target: Target) -> Violations:
    """QuantizeLinear feeds DequantizeLinear only, with the same scale; DequantizeLinear reads one or a constant."""
    for node in g.nodes("QuantizeLinear"):
        users = [u for u, _ in node.outputs[0].uses()]
        if not users or any(u.op_type != "DequantizeLinear" for u in users):
            yield str(node.name), f"feeds {', '.join(u.op_type for u in users) or 'nothing'}, not DequantizeLinear only"
        elif any(not _same_scale(g, node.inputs[1], u.inputs[1]) for u in users if u.op_type == "DequantizeLinear"):
            yield str(node.name), "its DequantizeLinear has another scale"
    for node in g.nodes("DequantizeLinear"):
        codes = node.inputs[0]
        made = codes.producer() if codes is not None else None
        if not g.is_constant(codes) and (made is None or made.op_type != "QuantizeLinear"):
            yield str(node.name), "reads neither a QuantizeLinear nor a constant"


def _bias(g: Graph, target: Target) -> Violations:
    """Biases stay float: the parser takes no DequantizeLinear there (onnxruntime #14229)."""
    for node in g.nodes("DequantizeLinear"):
        for user, index in node.outputs[0].uses():
            added = user.op_type in ("Add", "Sum") and _is_weight(g, node)
            if (user.op_type in PRODUCTS and index == 2) or added:
                yield str(node.name), f"the bias of '{user.name}' is quantized"


def _direct(g: Graph, target: Target) -> Violations:
    """Nothing stands between DequantizeLinear and the product that reads it, else they do not fuse."""
    for node in g.nodes(*PRODUCTS):
        for v in node.inputs[:2]:
            step = v.producer() if v is not None else None
            between = []
            while step is not None and step.op_type in DATA_MOVEMENT:
                between.append(step.op_type)
                step = step.inputs[0].producer() if step.inputs[0] is not None else None
            if between and step is not None and step.op_type == "DequantizeLinear":
                yield str(node.name), f"{', '.join(between)} between it and '{step.name}'"


def _both(g: Graph, target: Target) -> Violations:
    """A product with one quantized side has the other one quantized too, or it runs as float with a conversion."""
    for node in g.nodes(*PRODUCTS):
        kinds = [_codes(v) for v in node.inputs[:2]]
        if len(kinds) == 2 and kinds.count(None) == 1 and ir.DataType.INT8 in kinds:
            yield str(node.name), "one of its two inputs is quantized, the other is not"


def _codes(v: ir.Value | None) -> ir.DataType | None:
    """The type of the codes behind a DequantizeLinear; None for what is not quantized."""
    node = v.producer() if v is not None else None
    codes = node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else None
    return codes.dtype if codes is not None else None


def _attention(g: Graph, target: Target) -> Violations:
    """Attention is scaled on q (or k) before the first product, not on the scores (NVIDIA, Fused Attention)."""
    for softmax in g.nodes("Softmax"):
        v = softmax.inputs[0]
        while v is not None and (node := v.producer()) is not None and node.op_type in ("Add", "Where", "Cast"):
            v = next((x for x in node.inputs if x is not None and _from_product(x)), None)
        node = v.producer() if v is not None else None
        if node is not None and node.op_type in ("Mul", "Div") and _from_product(v):
            factor = next((x for x in node.inputs if g.is_constant(x) and _size(x) == 1), None)
            if factor is not None:
                yield str(node.name), f"the scores of '{softmax.name}' are scaled after the product; scale q before it"


def _from_product(v: ir.Value | None) -> bool:
    """Whether a value is a product of two computed values, added to, masked or scaled."""
    while v is not None and (node := v.producer()) is not None:
        if node.op_type == "MatMul":
            return True
        if node.op_type not in ("Add", "Where", "Cast", "Mul", "Div"):
            return False
        inside = [x for x in node.inputs if x is not None and x.producer() is not None]
        products = [x for x in inside if _from_product(x)]
        return bool(products)
    return False


RULES: dict[str, Callable[[Graph, Target], Violations]] = {
    "standard-operators": _standard,
    "opset": _opset,
    "explicit-types": _typed,
    "symmetric-int8": _symmetric,
    "scales": _scales,
    "per-tensor-activations": _per_tensor,
    "per-channel-axis": _channel_axis,
    "pairs": _pairs,
    "float-bias": _bias,
    "direct": _direct,
    "both-sides": _both,
    "scale-on-q": _attention,
}


LAYOUT = {"direct", "both-sides", "scale-on-q"}  # breaking these only costs speed; the parser refuses the others


def _quantizers(g: Graph) -> Iterator[tuple[ir.Node, ir.Value | None, ir.Value | None, ir.Value | None]]:
    """QuantizeLinear and DequantizeLinear nodes with the values of their codes, scale and zero point."""
    for node in g.nodes("QuantizeLinear", "DequantizeLinear"):
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        yield node, codes, node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None


def _is_weight(g: Graph, dequantize: ir.Node) -> bool:
    """Whether the codes are constant, or a constant quantized in the graph."""
    codes = dequantize.inputs[0]
    made = codes.producer() if codes is not None else None
    return g.is_constant(codes) or (
        made is not None and made.op_type == "QuantizeLinear" and g.is_constant(made.inputs[0])
    )


def _size(v: ir.Value | None) -> int:
    t = Graph.tensor(v)
    return 0 if t is None else t.size


def _same_scale(g: Graph, a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two scales are one value, or constants that differ by at most the rounding of float16 or bfloat16."""
    if a is b or not (g.is_constant(a) and g.is_constant(b)):
        return a is b
    x, y = (g.array(v).astype(np.float64) for v in (a, b))
    return x.shape == y.shape and bool(np.all(np.abs(x - y) <= 2**-8 * np.abs(x)))
