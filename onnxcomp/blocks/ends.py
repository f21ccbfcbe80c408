"""The ends of a model: its embedding tables and its output projection (the head)."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.blocks.linears import Index, Linear, stored
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import is_layout
from onnxcomp.graph.values import untransposed

__all__ = ["Embedding", "Head", "embeddings", "head"]


@dataclass(frozen=True)
class Embedding:
    """A constant table `[rows, width]` read by index; `kind` is tokens, positions or types."""

    node: ir.Node
    table: ir.Value
    indices: ir.Value
    rows: int
    width: int
    kind: str


@dataclass(frozen=True)
class Head:
    """The product before a graph output; `tied` where its weight is an embedding table, possibly transposed."""

    node: ir.Node
    weight: ir.Value
    outputs: int
    tied: bool
    linear: Linear | None


def embeddings(g: Graph) -> list[Embedding]:
    """Every table with computed or fed indices; the largest one that a graph input indexes is the tokens' table."""
    tables: list[Embedding] = []
    counted = {v for v in g.inputs if "position" in str(v.name).lower()}  # the name that all exporters give them
    for node in g.nodes("Gather"):
        table, _ = stored(g, node.inputs[0]) if node.inputs[0] is not None else (None, None)
        indices, axis = node.inputs[1], node.attributes.get_int("axis", 0)
        if table is None or indices is None or table.shape is None or len(table.shape) != 2 or axis != 0:
            continue
        rows, width = table.shape.numpy()
        if g.is_constant(indices) or (table.dtype is not None and table.dtype.is_integer() and table is node.inputs[0]):
            continue
        source = _source(indices)
        kind = "types" if source.is_graph_input() and source not in counted else "positions"
        tables.append(Embedding(node, table, indices, rows, width, kind))
    fed = [e for e in tables if e.kind == "types"]
    most = max((e.rows for e in fed), default=0)
    return [
        Embedding(e.node, e.table, e.indices, e.rows, e.width, "tokens" if e in fed and e.rows == most else e.kind)
        for e in tables
    ]


def _source(v: ir.Value) -> ir.Value:
    """What indices are behind layout operators: a graph input where they are fed."""
    node = v.producer()
    while node is not None and is_layout(node) and node.inputs[0] is not None:
        v = node.inputs[0]
        node = v.producer()
    return v


def head(g: Graph) -> Head | None:
    """The last product before the first graph output, where only layout operators or a soft-cap lie between."""
    index = Index.of(g)
    for out in g.outputs:
        v: ir.Value | None = out
        while v is not None and v not in index.by_output:
            node = v.producer()
            if node is not None and node.op_type == "MatMul":
                return _tied_head(g, node)
            v = _layout_source(g, node) if node is not None else None
        if v is not None:
            linear = index.by_output[v]
            tables = {id(g.tensor(e.table)) for e in embeddings(g)}
            return Head(linear.node, linear.weight, linear.sizes[1], id(g.tensor(linear.weight)) in tables, linear)
    return None


def _layout_source(g: Graph, node: ir.Node) -> ir.Value | None:
    """The operand of a layout operator or of a step of a soft-cap on the logits."""
    if node.domain:
        return None
    if is_layout(node) or node.op_type == "Tanh":
        return node.inputs[0]
    if node.op_type in ("Mul", "Div") and (t := g.tensor(node.inputs[1])) is not None and t.size == 1:
        return node.inputs[0]
    return None


def _tied_head(g: Graph, node: ir.Node) -> Head | None:
    made = node.inputs[1].producer() if node.inputs[1] is not None else None
    codes = made.inputs[0] if made is not None and made.op_type == "DequantizeLinear" else node.inputs[1]
    table = untransposed(codes)
    if table is None or table is codes or not g.is_constant(table) or table.shape is None:
        return None
    return Head(node, table, table.shape.numpy()[0], any(e.table is table for e in embeddings(g)), None)
