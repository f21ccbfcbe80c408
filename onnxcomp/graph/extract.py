"""Micro-models for timing: one site extracted from its graph as a model of its own, and the key of its run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp.graph.graph import Graph
from onnxcomp.graph.operators import TIMED_OPS

__all__ = ["describe", "extract_subgraph", "light_prefix", "timing_key"]

# Elements from which on a float matrix that is indexed counts as an embedding table.
MIN_EMBEDDING = 1 << 16


def extract_subgraph(g: Graph, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> Graph:
    """A copy of some nodes: values that other nodes produce become inputs of the recorded type and shape, names stay.

    Constants are shared, their bytes are not read.
    """
    copied: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []
    copies = []
    for node in sorted(nodes, key=_graph_order(g)):
        new_inputs = [None if v is None else _external_input(g, v, copied, inputs, constants) for v in node.inputs]
        copy = ir.node(
            node.op_type, new_inputs, {k: a.value for k, a in node.attributes.items()}, domain=node.domain,
            num_outputs=len(node.outputs), name=node.name,
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copied[old] = new
        copies.append(copy)
    graph = ir.Graph(
        inputs, [copied[v] for v in outputs], nodes=copies, initializers=constants, name="site",
        opset_imports=dict(g.model.opset_imports),
    )  # fmt: skip
    return Graph(ir.Model(graph, ir_version=g.model.ir_version), g.path)


def _graph_order(g: Graph) -> Any:
    order = {node: i for i, node in enumerate(g.model.graph)}
    return lambda node: order[node]


def _external_input(
    g: Graph, v: ir.Value, copied: dict[ir.Value, ir.Value], inputs: list[ir.Value], constants: list[ir.Value]
) -> ir.Value:
    """The copy's value for an operand: a copied node's output, a constant, or else a new graph input."""
    if v in copied:
        return copied[v]
    tensor = g.tensor(v)
    new = ir.Value(name=v.name, type=v.type, shape=v.shape, const_value=tensor)
    if tensor is not None:
        new.type, new.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        constants.append(new)
    else:
        inputs.append(new)
    copied[v] = new
    return new


def light_prefix(g: Graph, values: Iterable[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """The values that only cheap nodes compute from graph inputs (masks, rotary angles), and all nodes they need."""
    is_light: dict[ir.Value, bool] = {}
    needed: dict[ir.Node, None] = {}
    light_values = []
    for v in dict.fromkeys(values):
        if v.producer() is not None and not g.is_constant(v) and _is_light(g, v, is_light):
            light_values.append(v)
            _collect_producers(g, v, needed)
    return list(needed), light_values


def _is_light(g: Graph, v: ir.Value, is_light: dict[ir.Value, bool]) -> bool:
    stack = [v]
    while stack:
        x = stack[-1]
        node = x.producer()
        if x in is_light or node is None or g.is_constant(x):
            is_light.setdefault(x, True)
            stack.pop()
            continue
        if node.op_type in TIMED_OPS or (node.domain and node.domain != "ai.onnx") or _reads_embedding_table(g, node):
            is_light[x] = False
            stack.pop()
            continue
        unknown = [y for y in node.inputs if y is not None and y not in is_light]
        if unknown:
            stack += unknown
        else:
            is_light[x] = all(is_light[y] for y in node.inputs if y is not None)
            stack.pop()
    return is_light[v]


def _reads_embedding_table(g: Graph, node: ir.Node) -> bool:
    """Whether a node looks up rows of an embedding table: there the model's main computation starts."""
    if node.op_type != "Gather" or node.inputs[0] is None:
        return False
    made = node.inputs[0].producer()
    table = g.tensor(made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else node.inputs[0])
    if table is None or len(table.shape) != 2 or table.size <= MIN_EMBEDDING:
        return False
    return table.dtype.is_floating_point() or table.dtype.bitwidth <= 8


def _collect_producers(g: Graph, v: ir.Value, needed: dict[ir.Node, None]) -> None:
    stack = [v]
    while stack:
        node = stack.pop().producer()
        if node is None or node in needed:
            continue
        needed[node] = None
        stack += [x for x in node.inputs if x is not None and not g.is_constant(x)]


def timing_key(g: Graph, shapes: Mapping[str, Sequence[int]]) -> str:
    """All that a run time depends on, as text: operators, attributes, types and sizes, but no names and no weights."""
    number: dict[int, int] = {}

    def ref(v: ir.Value | None) -> str:
        if v is None:
            return "-"
        index = number.setdefault(id(v), len(number))
        t = Graph.tensor(v)
        return f"{index}" if t is None else f"{index}:{t.dtype.name}{tuple(t.shape)}"

    lines = [f"{ref(v)} {v.dtype} {_fixed(v)} {tuple(shapes[str(v.name)])}" for v in g.inputs]
    for node in g.model.graph:
        ins, outs = " ".join(map(ref, node.inputs)), " ".join(map(ref, node.outputs))
        lines.append(f"{outs} = {node.domain}.{node.op_type} {ins} {sorted(map(str, node.attributes.values()))}")
    lines.append(f"{sorted(g.model.opset_imports.items())} -> {' '.join(map(ref, g.outputs))}")
    return "\n".join(lines)


def _fixed(v: ir.Value) -> str:
    """Which axes are static in the file, one letter each: the runtime's optimizers depend on it."""
    return "".join("n" if isinstance(d, int) else "?" for d in v.shape) if v.shape is not None else "-"


def describe(g: Graph, shapes: Mapping[str, Sequence[int]]) -> str:
    """One line about a site: its operators, and the sizes of its inputs and weights; `shapes` may lack unknown ones."""
    ops = list(dict.fromkeys(n.op_type for n in g.nodes() if n.op_type != "DequantizeLinear"))
    weights = [list(t.shape.numpy()) for n in g.nodes() for v in n.inputs if (t := g.tensor(v)) and len(t.shape) == 2]
    by_weights = f" by {', '.join('x'.join(map(str, w)) for w in weights)}" if weights else ""
    sizes = ", ".join(_size(v, shapes.get(str(v.name))) for v in g.inputs[:2])
    return f"{'+'.join(ops)} of {sizes}{by_weights}"


def _size(v: ir.Value, known: Sequence[int] | None) -> str:
    """The size of a value as text, `?` for what is not known."""
    dims = v.shape if known is None else known
    if dims is None:
        return "?"
    return "x".join(str(d) if isinstance(d, int) else "?" for d in dims) or "scalar"
