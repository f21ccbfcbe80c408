"""Rewriting of layout operators: chains of them become one, and they move below the linears that they surround.

Recognition then meets linears, norms and activations on the axes that the model's inputs have.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import Trace, reshaped, target_of, trace
from onnxcomp.analysis.sizes import Shape
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS, LAYOUT_OPS, NORMS
from onnxcomp.graph.values import has_one_use

__all__ = ["clips_after_parts", "simplify_layouts", "sink_layouts"]

ACTIVATIONS = ("Gelu", "Relu", "Tanh")  # of one input, as they stand between the linears of a feed-forward part


def simplify_layouts(g: Graph, f: Facts) -> None:
    """Collapse chains of layout operators to nothing, to one Reshape or to one Transpose, where that is proved."""
    for node in g.nodes(*LAYOUT_OPS):
        if node.domain == "":
            _simplify(g, f, node)


def _simplify(g: Graph, f: Facts, node: ir.Node) -> None:
    out = node.outputs[0]
    shape = f.shape(out)
    if shape is None or not (out.is_graph_output() or list(out.uses())):
        return
    chain = list(trace(f, out))[1:]
    for t in reversed(chain):
        if t.axes == t.origin and len(f.shape(t.value) or ()) == len(shape):
            if not out.is_graph_output() or not (t.value.producer() is None or t.value.is_graph_output()):
                g.replace(out, t.value)
            return
    for t in reversed(chain[1:]):
        if _collapse(g, f, out, t, shape):
            return


def _collapse(g: Graph, f: Facts, out: ir.Value, t: Trace, shape: Shape) -> bool:
    """Replace a chain by one operator; False where one does not suffice."""
    flat = [a for group in t.axes for a in group]
    if flat == [a for group in t.origin for a in group]:
        new = reshaped(g, f, t.value, shape, like=out)
        if new is not None:
            g.replace(out, new)
        return new is not None
    if len(t.axes) != len(t.origin) or sum(1 for group in t.axes if not group) > 1:
        return False
    order = [t.axes.index(group) for group in t.origin if group in t.axes]
    if len(order) < len(t.axes):
        return False
    g.replace(out, g.op("Transpose", t.value, perm=order, like=out))
    return True


def sink_layouts(g: Graph, f: Facts) -> None:
    """Move Reshapes that merge leading axes, and Transposes, below linears, biases, norms, casts and activations."""
    for node in g.nodes(*NORMS):
        _lift_norm(g, node)
    for node in g.nodes("Cast"):
        _lift_cast(g, node)
    for node in g.nodes("MatMul", *ADDITIONS, *ACTIVATIONS):
        if node.domain == "" and node.op_type in ACTIVATIONS:
            _lift_activation(g, f, node)
        elif node.domain == "" and len(node.inputs) == 2:
            _lift_linear(g, f, node)


def clips_after_parts(g: Graph) -> None:
    """Move a Clip that only a Split reads behind it, so that the parts are known to be those of a packed linear."""
    for node in g.nodes("Split"):
        clip = node.inputs[0].producer() if node.inputs[0] is not None else None
        if node.domain or clip is None or clip.op_type != "Clip" or not has_one_use(clip.outputs[0]):
            continue
        g.set_input(node, 0, clip.inputs[0])
        for part in list(node.outputs):
            if part.is_graph_output():
                continue
            uses = list(part.uses())
            clipped = g.op("Clip", part, *clip.inputs[1:])
            clipped.type, clipped.shape = part.type, part.shape
            for user, i in uses:
                g.set_input(user, i, clipped)


def _lift_cast(g: Graph, node: ir.Node) -> None:
    """Move a cast between float types above layout operators with no other users, so that traces of heads pass it."""
    out, x, moves = node.outputs[0], node.inputs[0], []
    if x is None or out.is_graph_output() or any(v.dtype is None or not v.dtype.is_floating_point() for v in (x, out)):
        return
    while (move := x.producer()) is not None and move.op_type in LAYOUT_OPS and not move.domain and has_one_use(x):
        moves.append(move)
        source = move.inputs[0]
        if source is None:
            return
        x = source
    if not moves:
        return
    y = g.op("Cast", x, **{k: a.value for k, a in node.attributes.items()})
    y.type, y.shape = out.type, x.shape
    for move in reversed(moves):
        y = g.op(move.op_type, y, *move.inputs[1:], **{k: a.value for k, a in move.attributes.items()})
        y.type, y.shape = out.type, move.outputs[0].shape
    g.replace(out, y)


def _lift_norm(g: Graph, node: ir.Node) -> None:
    """Move a norm over the last axis above a Transpose of the other axes with no other users, such as one of heads."""
    x, out = node.inputs[0], node.outputs[0]
    transpose = x.producer() if x is not None else None
    if (
        node.domain
        or x is None
        or transpose is None
        or transpose.op_type != "Transpose"
        or transpose.domain
        or not has_one_use(x)
    ):
        return
    perm = transpose.attributes.get_ints("perm", [0])
    if perm[-1] != len(perm) - 1 or node.attributes.get_int("axis", -1) not in (-1, len(perm) - 1):
        return
    if out.is_graph_output() or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return
    attrs = {k: a.value for k, a in node.attributes.items()} | {"axis": -1}
    y = g.op(node.op_type, transpose.inputs[0], *node.inputs[1:], like=transpose.inputs[0], **attrs)
    g.replace(out, g.op("Transpose", y, perm=list(perm), like=out))


def _lift_activation(g: Graph, f: Facts, node: ir.Node) -> None:
    """Move an activation between two linears above a Reshape that merges leading axes."""
    folded, shape, out = node.inputs[0], f.shape(node.outputs[0]), node.outputs[0]
    producer = folded.producer() if folded is not None else None
    if folded is None or producer is None or shape is None or out.is_graph_output() or not _folds(f, folded):
        return
    new = g.op(node.op_type, producer.inputs[0], **{k: a.value for k, a in node.attributes.items()})
    reshaped_back = reshaped(g, f, new, shape, like=out)
    if reshaped_back is not None:
        g.replace(out, reshaped_back)


def _lift_linear(g: Graph, f: Facts, node: ir.Node) -> None:
    index = next((i for i, x in enumerate(node.inputs) if g.is_constant(node.inputs[1 - i]) and x is not None), None)
    if index is None or (node.op_type == "MatMul" and index != 0):
        return
    x, constant = node.inputs[index], node.inputs[1 - index]
    tensor, shape, input_shape = g.tensor(constant), f.shape(node.outputs[0]), f.shape(x)
    if tensor is None or shape is None or x is None or not input_shape or g.is_constant(x):
        return
    is_linear = len(tensor.shape) == 2 if node.op_type == "MatMul" else tuple(tensor.shape.numpy()) == input_shape[-1:]
    source = _before_fold(f, x) if is_linear else None
    if source is None:
        return
    value, swapped = source
    lead = f.shape(value) or ()
    if target_of(f, (*((lead[1], lead[0]) if swapped else lead[:-1]), shape[-1]), shape) is None:
        return
    new = g.op(node.op_type, *((value, constant) if index == 0 else (constant, value)))
    if swapped:
        new = g.op("Transpose", new, perm=[1, 0, 2])
    back = reshaped(g, f, new, shape, like=node.outputs[0])
    if back is not None:
        g.replace(node.outputs[0], back)


def _before_fold(f: Facts, x: ir.Value) -> tuple[ir.Value, bool] | None:
    """The value before leading axes were merged by a Reshape or exchanged, and whether they were exchanged."""
    node = x.producer()
    if _folds(f, x) and node is not None and node.inputs[0] is not None:
        x = node.inputs[0]
        unfolded: tuple[ir.Value, bool] | None = (x, False)
    else:
        unfolded = None
    for t in list(trace(f, x))[1:]:
        lead = tuple(a for group in t.origin[:-1] for a in group)
        if len(t.axes) == 3 and t.axes[2] == t.origin[-1] and t.axes[0] and t.axes[1] and lead == t.axes[1] + t.axes[0]:
            return t.value, True
    return unfolded


def _folds(f: Facts, v: ir.Value) -> bool:
    """Whether a value is the result of a Reshape that merges leading axes and keeps the last one."""
    node = v.producer()
    if node is None or node.op_type != "Reshape" or node.domain:
        return False
    a, b = f.shape(node.inputs[0]), f.shape(v)
    return a is not None and b is not None and len(a) > len(b) >= 2 and f.same(a[-1], b[-1])
