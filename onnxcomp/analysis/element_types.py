"""Element types inferred from operators where none are recorded: optimizers often write graphs without them."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph

__all__ = ["fill_types", "from_integers", "is_float", "narrowest_float"]

BOOLS = """
    And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor
"""
FIXED = {
    **dict.fromkeys(BOOLS.split(), ir.DataType.BOOL),
    **dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), ir.DataType.INT64),
    "MatMulInteger": ir.DataType.INT32,
}
# The input whose type the output has, where that is not the first one.
TYPE_INPUT = {"Where": 1, "CastLike": 1, "DequantizeLinear": 1, "RMSNormalization": 1, "MatMulIntegerToFloat": 2}
TYPE_INPUT |= {"EmbedLayerNormalization": 2, "GatherBlockQuantized": 2}
# Operators whose outputs all have one type; of others only the first output's is known.
ALL_OUTPUTS = ("Split", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Attention", "MultiHeadAttention")


def fill_types(g: Graph) -> None:
    """Record the type that its operator implies for every value of a top-level node without one; not an edit."""
    for node in g.nodes():
        if node.domain in ("", CONTRIB) and any(v.dtype is None for v in node.outputs):
            dtype = _type_of(node)
            for v in node.outputs if node.op_type in ALL_OUTPUTS else node.outputs[:1]:
                if v.dtype is None and dtype is not None:
                    v.type = ir.TensorType(dtype)


def _type_of(node: ir.Node) -> ir.DataType | None:
    """The element type of the first output, or None where it is unknown."""
    if node.op_type in FIXED:
        return FIXED[node.op_type]
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 1))
    if node.op_type in ("Constant", "ConstantOfShape"):
        t = Graph.tensor(node.outputs[0]) if node.op_type == "Constant" else None
        value = node.attributes.get("value")
        return t.dtype if t is not None else ir.DataType.FLOAT if value is None else value.as_tensor().dtype
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        output_dtype = node.attributes.get_int("output_dtype", 0)
        return zero.dtype if zero is not None else ir.DataType(output_dtype) if output_dtype else ir.DataType.UINT8
    index = TYPE_INPUT.get(node.op_type, 0)
    x = node.inputs[index] if index < len(node.inputs) else None
    return x.dtype if x is not None else None


def narrowest_float(g: Graph) -> ir.DataType:
    """The float type with the fewest digits that a graph computes in: bfloat16, float16, else float32."""
    types = {v.dtype for v in g.model.graph.initializers.values()} | {v.dtype for n in g.nodes() for v in n.outputs}
    return next((t for t in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) if t in types), ir.DataType.FLOAT)


def from_integers(g: Graph) -> set[ir.Value]:
    """Float values computed from integers alone (positions, counts, numeric masks), not looked up in a float table."""
    integral: set[ir.Value] = set()
    for node in g.nodes():
        computed = [v for v in node.inputs if v is not None and not g.is_constant(v)]
        floats = [v for v in computed if is_float(v)]
        is_cast = node.op_type == "Cast" and bool(computed) and not floats and computed[0].dtype is not ir.DataType.BOOL
        if is_cast or node.op_type == "Range" or (floats and all(v in integral for v in floats)):
            integral.update(v for v in node.outputs if is_float(v))
    return integral


def is_float(v: ir.Value | None) -> bool:
    return v is not None and v.dtype is ir.DataType.FLOAT
