"""Which nodes of a graph can run in a half type, and which constants and masks stand in the way.

A node's ports are its float32 inputs and outputs whose type ONNX lets follow the half type. Arithmetic on positions and
masks (floats made from integers) is no port: it is cheap, and half types cannot count beyond 2048 (fp16) or 256 (bf16).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.analysis.element_types import from_integers, is_float
from onnxcomp.graph import CONTRIB, Graph
from onnxcomp.graph.operators import ELEMENT_PRESERVING, has_body
from onnxcomp.maths import Array

__all__ = [
    "HEAVY",
    "Ports",
    "candidates",
    "clipped",
    "constant_trouble",
    "content",
    "fills",
    "from_fills",
    "islands",
    "ports",
    "precise",
]

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL
# Operators without half kernels, or whose results must be precise; for the others ONNX's schemas decide.
KEPT = {
    *("Sin", "Cos", "Range", "CumSum", "NonMaxSuppression", "RoiAlign", "Resize", "Upsample", "TopK", "Multinomial"),
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike", "Det"),
    *("Shape", "Size", "LSTM", "GRU", "RNN", "If", "Loop", "Scan", "SequenceMap", "Optional", "DynamicQuantizeLinear"),
}
CONTRIB_HALF = {
    *("MultiHeadAttention", "GroupQueryAttention", "Attention", "RotaryEmbedding", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "BiasGelu", "FastGelu", "QuickGelu", "FusedMatMul"),
}
INFINITE = 1e8  # constants from this size on stand for infinity in masks: no weight or activation is that large
FILL = {ir.DataType.FLOAT16: 3e4, ir.DataType.BFLOAT16: 3e38}  # what replaces them; sums of several stay finite
SOFT = {
    *ELEMENT_PRESERVING,
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Min",
    "Max",
    "Concat",
    "Cast",
    "CastLike",
    "Trilu",
    "Clip",
    "Pad",
}
CHUNK = 1 << 22  # elements of a weight examined at a time: bounds memory, not the result
HEAVY = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention", *CONTRIB_HALF}


@dataclass(frozen=True)
class Ports:
    """Indices of the inputs and outputs of a node that become half."""

    node: ir.Node
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def values(self) -> list[ir.Value]:
        """The values at the ports, inputs first."""
        node = self.node
        values = [*(node.inputs[i] for i in self.inputs), *(node.outputs[i] for i in self.outputs)]
        return list(dict.fromkeys(v for v in values if v is not None))


@cache
def _variables(op: str, version: int, half: str) -> tuple[tuple[str, ...], tuple[str, ...], frozenset[str]] | None:
    """Type variables of the inputs and outputs (the last repeats), and those that can be float and the half type."""
    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None
    both = {"tensor(float)", f"tensor({half})"}
    free = {c.type_param_str for c in schema.type_constraints if both <= set(c.allowed_type_strs)}
    return tuple(x.type_str for x in schema.inputs), tuple(x.type_str for x in schema.outputs), frozenset(free)


def ports(g: Graph, node: ir.Node, half: ir.DataType) -> Ports | None:
    """The ports of a node, None where no float32 input or output of it could be half."""
    if has_body(node):
        return None
    if node.domain == CONTRIB and node.op_type in CONTRIB_HALF and half is ir.DataType.FLOAT16:
        return _made(node, [is_float(v) for v in node.inputs], [is_float(v) for v in node.outputs])
    if node.domain != "" or node.op_type in KEPT or "output_dtype" in node.attributes:
        return None
    known = _variables(node.op_type, g.opset, half.name.lower())
    if known is None:
        return None
    reads, makes, free = known
    ins = [is_float(v) and _at(reads, i) in free for i, v in enumerate(node.inputs)]
    outs = [is_float(v) and _at(makes, i) in free for i, v in enumerate(node.outputs)]
    if node.op_type in ("LayerNormalization", "RMSNormalization"):
        outs = outs[:1]  # the others are of the stash type
    return _made(node, ins, outs)


def _made(node: ir.Node, ins: list[bool], outs: list[bool]) -> Ports | None:
    inputs, outputs = (tuple(i for i, ok in enumerate(xs) if ok) for xs in (ins, outs))
    return Ports(node, inputs, outputs) if inputs or outputs else None


def _at(names: tuple[str, ...], i: int) -> str:
    return names[min(i, len(names) - 1)] if names else ""


def candidates(g: Graph, half: ir.DataType) -> list[Ports]:
    """Ports of every node that could run in half, without arithmetic on positions and masks of numbers."""
    if any(v.dtype is None for node in g.nodes() for v in node.outputs):
        g.infer_shapes()
    counted, eligible = from_integers(g), list[Ports]()
    for node in g.nodes():
        floats = [v for v in node.inputs if is_float(v) and not g.is_constant(v)]
        if any(v in counted for v in node.outputs) or (floats and all(v in counted for v in floats)):
            continue
        p = ports(g, node, half)
        if p is not None and node.op_type != "Constant":
            eligible.append(p)
    return eligible


def precise(g: Graph) -> set[ir.Node]:
    """Nodes that compute the angle of a sine or cosine, back to the products with weights: angles need float32."""
    of_angles: set[ir.Node] = set()
    stack = [v for node in g.nodes("Sin", "Cos") for v in node.inputs]
    while stack:
        v = stack.pop()
        node = v.producer() if v is not None and is_float(v) else None
        if node is not None and node not in of_angles and node.op_type not in HEAVY:
            of_angles.add(node)
            stack.extend(node.inputs)
    return of_angles


def islands(chosen: Collection[Ports]) -> set[ir.Node]:
    """Light nodes whose producers and consumers all stay float32: half would cost Casts and gain nothing."""
    kept = {p.node: p for p in chosen}
    removed: set[ir.Node] = set()
    while True:
        produced = {p.node.outputs[i] for p in kept.values() for i in p.outputs}
        isolated = [p.node for p in kept.values() if p.node.op_type not in HEAVY and not _touches(p, produced, kept)]
        if not isolated:
            return removed
        for node in isolated:
            removed.add(node)
            del kept[node]


def _touches(p: Ports, produced: Collection[ir.Value], nodes: Collection[ir.Node]) -> bool:
    """Whether a half node produces an input of a node or consumes one of its outputs."""
    consumes = any(p.node.inputs[i] in produced for i in p.inputs)
    return consumes or any(u in nodes for v in p.node.outputs for u, _ in v.uses())


def fills(g: Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Float32 constants that stand for infinity in masks: some of their elements are beyond any real weight."""
    constants = {v: g.tensor(v) for node in g.nodes(*SOFT) for v in node.inputs if v is not None}
    constants |= {node.outputs[0]: content(node) for node in g.nodes("ConstantOfShape")}
    return {v: t for v, t in constants.items() if t is not None and t.dtype is FLOAT and _peak(t) >= INFINITE}


def content(node: ir.Node) -> ir.TensorProtocol | None:
    """The value that a ConstantOfShape repeats, None for other nodes."""
    value = node.attributes.get("value")
    return value.as_tensor() if node.op_type == "ConstantOfShape" and value is not None else None


def from_fills(g: Graph, constants: Collection[ir.Value]) -> set[ir.Value]:
    """Values computed from stand-ins for infinity on the way to a softmax; their magnitude says nothing."""
    marked = set(constants)
    for node in g.nodes():
        if node.op_type in SOFT and any(v in marked for v in node.inputs):
            marked.update(node.outputs)
    return marked


def _pieces(t: ir.TensorProtocol) -> Iterator[Array]:
    flat = t.numpy().reshape(-1)
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]
    release_pages = getattr(t, "release", None)
    if release_pages is not None:
        release_pages()


def _peak(t: ir.TensorProtocol) -> float:
    return max((float(np.abs(a).max()) for a in _pieces(t)), default=0.0)


def clipped(a: Array, half: ir.DataType) -> Array:
    """Float32 with stand-ins for infinity brought into the half type's range; true infinities stay."""
    bound = FILL[half]
    return np.where((np.abs(a) >= INFINITE) & np.isfinite(a), np.clip(a, -bound, bound), a).astype(a.dtype)


def constant_trouble(t: ir.TensorProtocol, half: ir.DataType) -> str:
    """Why a constant cannot be half, empty if it can: out of range, or rounding it loses more than rounding does."""
    limits, energy, lost, peak = ml_dtypes.finfo(half.numpy()), 0.0, 0.0, 0.0
    for piece in _pieces(t):
        a = clipped(piece, half)
        a = a[np.isfinite(a)].astype(np.float64)
        peak = max(peak, float(np.abs(a).max(initial=0)))
        if peak <= float(limits.max):
            energy += float(a @ a)
            lost += float(np.sum((a - a.astype(half.numpy()).astype(np.float64)) ** 2))
    if peak > float(limits.max):
        return f"its constant reaches {peak:.3g}, beyond {float(limits.max):.3g}"
    if lost > energy * (2 * float(limits.eps)) ** 2:
        return f"its constant (up to {peak:.3g}) is too small for the type: rounding loses {np.sqrt(lost / energy):.1%}"
    return ""
