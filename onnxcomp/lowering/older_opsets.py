"""Conversion to older opsets: Attention, RMSNormalization, RotaryEmbedding and Gelu decomposed into older operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.errors import TargetError
from onnxcomp.graph import Graph, Site

__all__ = ["decompose_attention", "lower_opset", "newer_sites", "not_decomposable", "scale_of"]

OLDEST = 18
FLOAT_MOD = 28  # the opset in which Mod takes floats without fmod=1
# The opset that introduced an operator.
INTRODUCED = {"Attention": 23, "RMSNormalization": 23, "RotaryEmbedding": 23, "Gelu": 20}


def newer_sites(g: Graph, version: int) -> list[Site]:
    """Nodes of operators that `version` does not have and that can be decomposed."""
    nodes = [n for n in g.nodes(*INTRODUCED) if n.domain == "" and INTRODUCED[n.op_type] > version]
    return [Site(str(n.name), (str(n.name),), n.op_type) for n in nodes]


def lower_opset(g: Graph, version: int, *, exact_rows: bool = False) -> None:
    """Decompose operators that `version` lacks and declare it; raises `TargetError` naming a node that it cannot have.

    Other operators differ between these opsets in allowed types only, which are checked against the schemas.
    `exact_rows` is that of `decompose_attention`.
    """
    if version < OLDEST:
        raise TargetError(f"opset {version} is too old: results are written for opset {OLDEST} and newer ones")
    if g.opset <= version:
        return
    for site in newer_sites(g, version):
        node = g.node(site.nodes[0])
        exact = exact_rows and node.op_type == "Attention"
        spelled = decompose_attention(g, node, exact_rows=True) if exact else _DECOMPOSE[node.op_type](g, node)
        g.replace(node.outputs[0], spelled)
    g.sweep()
    for node in g.nodes():
        if node.domain == "" and (why := _lacks(node, version)):
            keeps = f"--opset {g.opset} keeps the model's own operator set, where the runtime has it"
            raise TargetError(f"node '{node.name}': {why} in opset {version}; {keeps}")
    g.model.opset_imports[""] = version
    g.edits += 1


def _lacks(node: ir.Node, version: int) -> str:
    """What an operator set has not that a node needs, empty if it has everything."""
    op = node.op_type
    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return f"there is no {op}"
    if unknown := [a for a in node.attributes if a not in schema.attributes]:
        return f"{op} has no attribute '{unknown[0]}'"
    if len(node.inputs) > schema.max_input:
        return f"{op} takes fewer inputs"
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for formal, x in zip(schema.inputs, node.inputs, strict=False):
        kind = _type(x)
        if kind and kind not in allowed.get(formal.type_str, (kind,)):
            return f"{op} does not take {kind}"
    x = node.inputs[0] if node.inputs else None
    floats = x is not None and x.dtype is not None and x.dtype.is_floating_point()
    if op == "Mod" and version < FLOAT_MOD and floats and not node.attributes.get_int("fmod", 0):
        return "Mod of floats must have fmod=1"
    return ""


def _type(x: ir.Value | None) -> str:
    """The type of a tensor as schemas write it, empty for others and where it is unknown."""
    return f"tensor({x.type.dtype.name.lower()})" if x is not None and isinstance(x.type, ir.TensorType) else ""


def _ints(*xs: int) -> np.ndarray:
    return np.array(xs, np.int64)


def _float(node: ir.Node) -> np.dtype[Any]:
    dtype = node.outputs[0].dtype or (node.inputs[0].dtype if node.inputs[0] is not None else None)
    return (dtype or ir.DataType.FLOAT).numpy()


def decompose_attention(g: Graph, node: ir.Node, *, scaled: bool = True, exact_rows: bool = False) -> ir.Value:
    """`softmax(scale q k^T + mask) v`, `[B, S, H D]` in and out; q is scaled, grouped heads repeated, caches appended.

    With `scaled=False` q is scaled already. With `exact_rows`, queries whose bool mask hides every key give zeros, as
    the operator does; else the mean of the values. Raises `TargetError` for what cannot be decomposed.
    """
    name, attrs, dtype = str(node.name), node.attributes, _float(node)
    q, k, v, mask, past_k, past_v = [*node.inputs, *[None] * 6][:6]
    if (reason := not_decomposable(node)) or q is None:
        raise TargetError(f"node '{name}': {reason}, which cannot be decomposed for opsets below 23")
    heads, kv = attrs.get_int("q_num_heads"), attrs.get_int("kv_num_heads")
    keys = _keys(g, node, k, past_k)
    values = _heads(g, v, kv, f"{name}_v", past_v, _output(node, 2))
    queries = _heads(g, q, heads, f"{name}_q")
    if scaled:
        queries = g.op("Mul", queries, np.array(scale_of(node), dtype), name=f"{name}_scaled")
    scores = g.op("MatMul", queries, keys, name=f"{name}_scores")
    if cap := attrs.get_float("softcap", 0.0):
        bound = np.array(cap, dtype)
        scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, bound)), bound, name=f"{name}_capped")
    if mask is not None and mask.dtype is ir.DataType.BOOL:
        scores = g.op("Where", mask, scores, np.array(ml_dtypes.finfo(dtype).min, dtype), name=f"{name}_masked")
    elif mask is not None:
        scores = g.op("Add", scores, mask, name=f"{name}_masked")
    repeated = _repeated(g, values, v, kv, heads // kv, f"{name}_v")
    probabilities = g.op("Softmax", scores, axis=-1, name=f"{name}_softmax")
    if exact_rows and mask is not None and mask.dtype is ir.DataType.BOOL:
        probabilities = g.op("Where", mask, probabilities, np.array(0, dtype), name=f"{name}_shares")
    mixed = g.op("MatMul", probabilities, repeated, name=f"{name}_mixed")
    merged = g.op("Transpose", mixed, perm=[0, 2, 1, 3], name=f"{name}_merged")
    return g.op("Reshape", merged, _ints(0, 0, -1), name=f"{name}_out", like=node.outputs[0])


def not_decomposable(node: ir.Node) -> str:
    """Why an Attention cannot be decomposed into products and a Softmax, empty if it can."""
    q = node.inputs[0]
    if q is None or q.shape is None or len(q.shape) != 3:
        return "an Attention without three axes"
    if node.attributes.get_int("is_causal", 0):
        return "a causal flag"
    if any(x is not None for x in node.inputs[6:]) or _output(node, 3) is not None:
        return "an Attention that counts its keys or returns its scores"
    if _output(node, 1) is not None and (len(node.inputs) < 6 or node.inputs[4] is None):
        return "a cache that starts empty"
    heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    if not heads or not kv:
        return "an Attention without head counts"
    k, v = node.inputs[1], node.inputs[2]
    known = all(
        x is not None and x.shape is not None and len(x.shape) == 3 and isinstance(x.shape[2], int) for x in (k, v)
    )
    return "" if heads == kv or known else "grouped heads of unknown width"


def scale_of(node: ir.Node) -> float:
    """The factor on the scores of an Attention of rank 3: its attribute, or `1 / sqrt(head width)`."""
    q, heads = node.inputs[0], node.attributes.get_int("q_num_heads", 1)
    width = q.shape[2] if q is not None and q.shape is not None and len(q.shape) == 3 else None
    given = node.attributes.get_float("scale", 0.0)
    return float(given or 1.0 / np.sqrt(width / heads if isinstance(width, int) else 1.0))


def _output(node: ir.Node, index: int) -> ir.Value | None:
    """An optional output, None where nothing reads it."""
    v = node.outputs[index] if index < len(node.outputs) else None
    return v if v is not None and (v.is_graph_output() or v.uses()) else None


def _keys(g: Graph, node: ir.Node, k: ir.Value | None, past: ir.Value | None) -> ir.Value:
    """Transposed keys `[B, heads, D, T]`, by a single Transpose where there is no cache and no repetition."""
    heads, kv, name = node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads"), f"{node.name}_k"
    if past is None and heads == kv:
        return _heads(g, k, kv, name, perm=(0, 2, 3, 1))
    k4 = _repeated(g, _heads(g, k, kv, name, past, _output(node, 1)), k, kv, heads // kv, name)
    return g.op("Transpose", k4, perm=[0, 1, 3, 2], name=f"{name}_turned")


def _heads(
    g: Graph,
    x: ir.Value | None,
    heads: int,
    name: str,
    past: ir.Value | None = None,
    present: ir.Value | None = None,
    *,
    perm: tuple[int, ...] = (0, 2, 1, 3),
) -> ir.Value:
    """`[B, T, heads D]` as `[B, heads, T, D]`, appended to the cache `past`; `present` returns both."""
    split = g.op("Reshape", x, _ints(0, 0, heads, -1), name=f"{name}_split")
    by_head = g.op("Transpose", split, perm=list(perm), name=f"{name}_heads")
    if past is None:
        return by_head
    appended = g.op("Concat", past, by_head, axis=2, name=f"{name}_cached", like=present)
    if present is not None:
        g.replace(present, appended)
    return appended


def _repeated(g: Graph, x4: ir.Value, x: ir.Value | None, heads: int, repeat: int, name: str) -> ir.Value:
    """`[B, heads, T, D]` with each head repeated `repeat` times; `x` is the same value as `[B, T, heads D]`."""
    if repeat == 1:
        return x4
    total = x.shape[2] if x is not None and x.shape is not None else 0
    expanded = g.op("Expand", g.op("Unsqueeze", x4, _ints(2)), _ints(1, 1, repeat, 1, 1), name=f"{name}_repeated")
    target = _ints(0, heads * repeat, -1, int(total) // heads if isinstance(total, int) else -1)
    return g.op("Reshape", expanded, target, name=f"{name}_grouped")


def _rms(g: Graph, node: ir.Node) -> ir.Value:
    """`x / sqrt(mean(x^2) + eps) * gain` over the last axis; float16 and bfloat16 in float32, as squares overflow."""
    x, gain = node.inputs[:2]
    if node.attributes.get_int("axis", -1) != -1:
        raise TargetError(f"node '{node.name}': RMSNormalization over several axes cannot be decomposed")
    original, dtype = x, _float(node)
    inner = dtype if dtype.itemsize > 2 else np.dtype(np.float32)
    if inner != dtype:
        x = g.op("Cast", x, to=ir.DataType.FLOAT.value, name=f"{node.name}_wide")
    epsilon = np.array(node.attributes.get_float("epsilon", 1e-5), inner)
    power = g.op("ReduceMean", g.op("Mul", x, x), _ints(-1), keepdims=1, name=f"{node.name}_power")
    root = g.op("Sqrt", g.op("Add", power, epsilon), name=f"{node.name}_root")
    scaled = g.op("Div", x, root)
    if inner != dtype:
        scaled = g.op("Cast", scaled, to=ir.DataType.from_numpy(dtype).value, name=f"{node.name}_narrow", like=original)
    return g.op("Mul", scaled, gain, name=f"{node.name}_scaled", like=node.outputs[0])


def _rotary(g: Graph, node: ir.Node) -> ir.Value:
    """Rotation of `[B, S, H D]` by cos and sin `[B, S, R/2]` in the first R channels of each head (default: all)."""
    x, cos, sin = node.inputs[:3]
    attrs, name = node.attributes, str(node.name)
    three = x is not None and x.shape is not None and len(x.shape) == 3
    heads, rotated = attrs.get_int("num_heads", 0), attrs.get_int("rotary_embedding_dim", 0)
    width = x.shape[2] if three and x is not None and x.shape is not None else None
    if not three or not heads or len(node.inputs) > 3 or (rotated and not isinstance(width, int)):
        raise TargetError(f"node '{name}': this RotaryEmbedding cannot be decomposed for opsets below 23")
    part: ir.Value = g.op("Reshape", x, _ints(0, 0, heads, -1), name=f"{name}_split")
    unrotated = None
    if rotated and isinstance(width, int) and rotated < width // heads:
        part, unrotated = _parts(g, part, f"{name}_kept", _ints(rotated, width // heads - rotated))
    rotated_part = _rotated(g, part, cos, sin, name, heads if attrs.get_int("interleaved", 0) else 0)
    joined = (
        rotated_part if unrotated is None else g.op("Concat", rotated_part, unrotated, axis=-1, name=f"{name}_whole")
    )
    return g.op("Reshape", joined, _ints(0, 0, -1), name=f"{name}_out", like=node.outputs[0])


def _rotated(
    g: Graph, x: ir.Value, cos: ir.Value | None, sin: ir.Value | None, name: str, interleaved: int
) -> ir.Value:
    """`[B, S, H, R]` with pairs of channels rotated: channel i with i + R/2, or neighbours.

    `interleaved` is the number of heads for neighbours, else 0.
    """
    if interleaved:
        pairs = g.op("Reshape", x, _ints(0, 0, interleaved, -1, 2), name=f"{name}_pairs")
        a, b = (g.op("Squeeze", v, _ints(-1)) for v in _parts(g, pairs, f"{name}_halves"))
    else:
        a, b = _parts(g, x, f"{name}_halves")
    c, s = (g.op("Unsqueeze", t, _ints(2)) for t in (cos, sin))
    real = g.op("Sub", g.op("Mul", a, c), g.op("Mul", b, s))
    imaginary = g.op("Add", g.op("Mul", b, c), g.op("Mul", a, s))
    if not interleaved:
        return g.op("Concat", real, imaginary, axis=-1, name=f"{name}_turned")
    both = [g.op("Unsqueeze", v, _ints(-1)) for v in (real, imaginary)]
    return g.op("Reshape", g.op("Concat", *both, axis=-1), _ints(0, 0, interleaved, -1), name=f"{name}_turned")


def _parts(g: Graph, x: ir.Value, name: str, sizes: np.ndarray | None = None) -> tuple[ir.Value, ir.Value]:
    """The last axis split in two, into halves by default."""
    node = g.op("Split", x, sizes, axis=-1, num_outputs=2 if sizes is None else None, outputs=2, name=name).producer()
    assert node is not None
    return node.outputs[0], node.outputs[1]


def _gelu(g: Graph, node: ir.Node) -> ir.Value:
    """`x/2 (1 + erf(x / sqrt 2))`, or the tanh form `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`."""
    x, dtype = node.inputs[0], _float(node)
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = g.op("Mul", g.op("Mul", x, x), g.op("Mul", x, np.array(0.044715, dtype)))
        inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), np.array(np.sqrt(2 / np.pi), dtype)))
    else:
        inner = g.op("Erf", g.op("Mul", x, np.array(np.sqrt(0.5), dtype)))
    gate = g.op("Add", inner, np.array(1, dtype))
    return g.op("Mul", g.op("Mul", x, np.array(0.5, dtype)), gate, name=f"{node.name}_out", like=node.outputs[0])


_DECOMPOSE: dict[str, Callable[[Graph, ir.Node], ir.Value]] = {
    "Attention": decompose_attention,
    "RMSNormalization": _rms,
    "RotaryEmbedding": _rotary,
    "Gelu": _gelu,
}
