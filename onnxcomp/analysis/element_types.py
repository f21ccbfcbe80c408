"""Element types inferred from operators where none are recorded: optimizers often write graphs without them."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from onnxcomp.graph import CONTRIB, Graph

__all__ = ["fill_types", "from_integers", "is_float", "narrowest_float"]

# The input whose type the output has, for operators whose schema does not say it or that have none.
TYPE_INPUT = {"DequantizeLinear": 1, "MatMulIntegerToFloat": 2, "EmbedLayerNormalization": 2, "GatherBlockQuantized": 2}
# Fused operators whose outputs all have one type; of others only the first output's is known.
ALL_OUTPUTS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Attention", "MultiHeadAttention")
TENSORS = {f"tensor({dtype.name.lower()})": dtype for dtype in ir.DataType}


def fill_types(g: Graph) -> None:
    """Record the type that its operator implies for every value of a top-level node without one; not an edit."""
    for node in g.nodes():
        if node.domain in ("", CONTRIB) and any(v.type is None for v in node.outputs):
            for v, kind in zip(node.outputs, _types_of(node, g.opset), strict=False):
                v.type = v.type or kind


def _types_of(node: ir.Node, version: int) -> list[ir.TypeProtocol | None]:
    """The types of the outputs, None where one is unknown."""
    dtype = _by_attribute(node)
    if dtype is not None:
        return [ir.TensorType(dtype)]
    schema = _schema(node.op_type, version) if node.domain == "" and node.op_type not in TYPE_INPUT else None
    if schema is not None:
        return _by_schema(node, *schema)
    index = TYPE_INPUT.get(node.op_type, 0)
    x = node.inputs[index] if index < len(node.inputs) else None
    kind = x.type if x is not None else None
    return [kind] * (len(node.outputs) if node.op_type in ALL_OUTPUTS else 1)


def _by_attribute(node: ir.Node) -> ir.DataType | None:
    """The element type of the first output where attributes or a constant decide it."""
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
    return None


Formals = tuple[tuple[str, bool], ...]  # type variable and whether it is one type, of each formal parameter


@functools.cache
def _schema(op: str, version: int) -> tuple[Formals, Formals, dict[str, ir.DataType]] | None:
    """Formal inputs and outputs of an operator, and the type variables that allow one type of tensors only."""
    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None
    only = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1}
    inputs, outputs = (tuple((x.type_str, x.is_homogeneous) for x in xs) for xs in (schema.inputs, schema.outputs))
    fixed = {name: TENSORS[only.get(name, name)] for name, _ in outputs if only.get(name, name) in TENSORS}
    return inputs, outputs, fixed


def _by_schema(
    node: ir.Node, inputs: Formals, outputs: Formals, fixed: dict[str, ir.DataType]
) -> list[ir.TypeProtocol | None]:
    """Types of outputs that are fixed, or that of an input of the same type variable."""
    bound: dict[str, ir.TypeProtocol] = {}
    for i, x in enumerate(node.inputs):
        name, same = inputs[min(i, len(inputs) - 1)]
        if x is not None and x.type is not None and same:
            bound.setdefault(name, x.type)
    formals = [outputs[min(i, len(outputs) - 1)] for i in range(len(node.outputs))] if outputs else []
    return [
        ir.TensorType(fixed[name]) if name in fixed else bound.get(name) if same else None for name, same in formals
    ]


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
