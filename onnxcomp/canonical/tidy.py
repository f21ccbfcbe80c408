"""Clean-up between the recognizers: no-ops are removed, equal computations merged, arithmetic normalized."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.analysis.element_types import from_integers
from onnxcomp.analysis.facts import Facts
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import has_body

__all__ = ["drop_no_ops", "drop_round_trips", "lift_constants", "merge_equal", "normalize_arithmetic"]

RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
MAX_COMPARED = 16  # elements of a constant whose content is compared: scalars and shape vectors
BROADCASTING = ("Add", "Sub", "Mul", "Div", "And", "Or", "Where")
SMALLEST_DIVISOR = 1e-4  # the reciprocal of every larger divisor is finite in every float type

WIDER = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


def drop_round_trips(g: Graph) -> None:
    """Remove casts to a wider float type followed by one back."""
    for node in g.nodes("Cast"):
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        x, y = (inner.inputs[0] if inner is not None and inner.op_type == "Cast" else None), node.outputs[0]
        if x is None or inner is None or x.dtype != node.attributes.get_int("to", 0) or y.is_graph_output():
            continue
        if x.dtype in WIDER and inner.attributes.get_int("to", 0) in WIDER[x.dtype]:
            g.replace(y, x)


def drop_no_ops(g: Graph, f: Facts) -> None:
    """Remove Identity, inference Dropout, products with one, and casts, expansions and slices without effect."""
    for node in g.nodes("Concat"):
        _drop_empty_parts(g, f, node)
    for node in g.nodes("Expand"):
        _drop_expansion(g, node)
    _replace_cast_like(g)
    for node in g.nodes("Identity", "Dropout", "Cast", "Expand", "Mul", "Div", "Slice", "Concat"):
        x, y = node.inputs[0], node.outputs[0]
        if node.domain or x is None or not _is_no_op(g, f, node, x):
            continue
        if not y.is_graph_output() or (x.producer() is not None and not x.is_graph_output()):
            g.replace(y, x)


def _replace_cast_like(g: Graph) -> None:
    """Replace CastLike by Cast where the type is known."""
    for node in g.nodes("CastLike"):
        like = node.inputs[1]
        if node.domain == "" and like is not None and like.dtype is not None:
            g.replace(node.outputs[0], g.op("Cast", node.inputs[0], to=like.dtype.value, like=node.outputs[0]))


def _drop_expansion(g: Graph, node: ir.Node) -> None:
    """Remove an Expand to the shape of a value that every user broadcasts it with anyway."""
    x, target, y = node.inputs[0], node.inputs[1], node.outputs[0]
    shape = target.producer() if target is not None else None
    if (
        shape is None
        or shape.op_type != "Shape"
        or shape.domain
        or shape.attributes
        or y.is_graph_output()
        or x is None
    ):
        return
    users = [u for u, _ in y.uses()]
    if users and all(u.op_type in BROADCASTING and not u.domain and shape.inputs[0] in u.inputs for u in users):
        g.replace(y, x)


def _drop_empty_parts(g: Graph, f: Facts, node: ir.Node) -> None:
    """Remove operands of a Concat without elements, such as the unrotated channels of a fully rotated head."""
    shapes = [f.shape(x) for x in node.inputs]
    nonempty = [x for x, s in zip(node.inputs, shapes, strict=True) if s is None or 0 not in s or len(s) < 2]
    if node.domain or not nonempty or len(nonempty) == len(node.inputs):
        return
    joined = g.op("Concat", *nonempty, like=node.outputs[0], axis=node.attributes.get_int("axis", -1))
    g.replace(node.outputs[0], joined)


def _keeps_everything(f: Facts, node: ir.Node) -> bool:
    """Whether a Slice keeps every element in order."""
    a, b = f.shape(node.inputs[0]), f.shape(node.outputs[0])
    steps = f.content(node.inputs[4]) if len(node.inputs) > 4 else None
    forward = len(node.inputs) < 5 or (steps is not None and all(n == 1 for n in steps.reshape(-1)))
    return forward and a is not None and a == b


def _is_no_op(g: Graph, f: Facts, node: ir.Node, x: ir.Value) -> bool:
    if node.op_type == "Concat":
        return len(node.inputs) == 1
    if node.op_type == "Slice":
        return _keeps_everything(f, node)
    if node.op_type == "Cast":
        return x.dtype is not None and x.dtype == node.attributes.get_int("to", 0)
    if node.op_type in ("Expand", "Mul", "Div"):
        if node.op_type != "Expand" and f.scalar(node.inputs[1]) != 1:
            return False
        a, b = f.shape(x), f.shape(node.outputs[0])
        return a is not None and b is not None and a == b
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        is_inference = training is None or (f.uniform(training) is not None and f.uniform(training).value == 0.0)  # type: ignore[union-attr]
        return is_inference and not any(list(v.uses()) or v.is_graph_output() for v in node.outputs[1:])
    return True


INTEGER_TYPES = {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.BOOL}


def normalize_arithmetic(g: Graph, f: Facts) -> None:
    """Write quotients by a constant as products, and two bounds as Clip.

    Not where the result is rounded, nor on values computed from integers: that moves borders of position buckets.
    """
    integral = from_integers(g)
    for node in g.nodes("Div"):
        number, y = f.scalar(node.inputs[1]), node.outputs[0]
        dtype = y.dtype if y.dtype is not None and y.dtype.is_floating_point() else None
        if node.domain or dtype is None or number is None or not g.is_constant(node.inputs[1]) or y in integral:
            continue
        if np.isfinite(number) and abs(number) > SMALLEST_DIVISOR and not any(_is_rounding(u) for u, _ in y.uses()):
            g.replace(y, g.op("Mul", node.inputs[0], np.array(1 / number, dtype.numpy()), like=y))
    for node in g.nodes("Min"):
        _as_clip(g, f, node)


def _is_rounding(node: ir.Node) -> bool:
    """Whether a node rounds its input to integers."""
    return node.op_type in ("Floor", "Ceil", "Round", "Mod") or (
        node.op_type == "Cast" and node.attributes.get_int("to", 0) in INTEGER_TYPES
    )


def _as_clip(g: Graph, f: Facts, node: ir.Node) -> None:
    """`Min(Max(x, low), high)` with scalar bounds, constant or computed, as Clip."""
    if node.domain or len(node.inputs) != 2:
        return
    for inner, high in (node.inputs, node.inputs[::-1]):
        bound = inner.producer() if inner is not None else None
        if bound is None or bound.op_type != "Max" or bound.domain or len(bound.inputs) != 2 or f.shape(high) != ():
            continue
        for x, low in (bound.inputs, bound.inputs[::-1]):
            shape = f.shape(x)
            if f.shape(low) == () and shape and shape == f.shape(node.outputs[0]):
                return g.replace(node.outputs[0], g.op("Clip", x, low, high, like=node.outputs[0]))
    return


def lift_constants(g: Graph) -> None:
    """Turn Constant nodes into initializers, but for those of strings, which no recognizer asks for."""
    for node in g.nodes("Constant"):
        out = node.outputs[0]
        tensor = g.tensor(out)
        if (
            tensor is not None
            and tensor.dtype != ir.DataType.STRING
            and node.domain == ""
            and not out.is_graph_output()
        ):
            g.replace(out, g.constant(_renamed_view(tensor), str(out.name)))


def _renamed_view(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The same content under a new name: clones of the graph share the tensor."""
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))


def merge_equal(g: Graph) -> None:
    """Merge equal computations; constants are equal where they are one value, or small with equal content."""
    first_by_key: dict[Any, ir.Node] = {}
    constants: dict[Any, ir.Value] = {}
    for node in g.nodes():
        if node.op_type in RANDOM or has_body(node):
            continue
        inputs = tuple(_representative(g, x, constants) for x in node.inputs)
        key = (node.domain, node.op_type, inputs, _attributes(node), len(node.outputs))
        first = first_by_key.setdefault(key, node)
        if first is not node and not any(v.is_graph_output() for v in node.outputs):
            for old, new in zip(node.outputs, first.outputs, strict=True):
                g.replace(old, new)


def _representative(g: Graph, x: ir.Value | None, constants: dict[Any, ir.Value]) -> ir.Value | None:
    """The representative of all equal values."""
    t = g.tensor(x)
    if x is None or t is None or t.size > MAX_COMPARED or t.dtype == ir.DataType.STRING:
        return x
    return constants.setdefault((t.dtype, tuple(t.shape), t.tobytes()), x)


def _attributes(node: ir.Node) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((k, _attribute_text(a)) for k, a in node.attributes.items()))


def _attribute_text(a: ir.Attr) -> str:
    """The attribute's content as text; a large tensor is equal to itself only."""
    if a.type != ir.AttributeType.TENSOR:
        return str(a.value)
    t = a.as_tensor()
    return (
        f"{t.dtype} {t.shape} {t.tobytes()!r}"
        if t.size <= MAX_COMPARED and t.dtype != ir.DataType.STRING
        else str(id(t))
    )
