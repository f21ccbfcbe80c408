"""A canonical model described: sizes, kinds, parameters and multiplications by part, and what was not recognised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph
from onnxcomp.structure.shapes import Facts

__all__ = ["describe"]


def describe(g: Graph) -> dict[str, Any]:
    """JSON-able facts; a number where all layers agree, a list (one entry a layer) where they differ."""
    found = blocks.layers(g)
    heads = [a for layer in found for a in layer.attentions]
    mlps = [layer.mlp for layer in found if layer.mlp is not None]
    tables, end = blocks.embeddings(g), blocks.head(g)
    own = {n.node for layer in found for n in layer.norms}
    norms = [n for n in blocks.norms(g) if n.node in own]
    return {
        "layers": len(found),
        "hidden": _one([a.q.sizes[0] for a in heads] or [m.up.sizes[0] for m in mlps]),
        "attention": {
            "recognised": sum(1 for n in g.nodes("Attention") if n.domain == ""),
            "with_projections": len(heads),
            "not_recognised": sum(1 for d in g.declined if d.why.startswith("attention:")),
            "heads": _one([a.heads for a in heads]),
            "kv_heads": _one([a.kv_heads for a in heads]),
            "head_width": _one([a.head_dim for a in heads]),
            "cross": sum(a.is_cross for a in heads),
            "masks": _one([_mask(g, a) for a in heads]),
        },
        "mlp": {
            "kind": _one([("gated " if m.gate is not None else "") + m.activation for m in mlps]),
            "width": _one([m.width for m in mlps]),
            "count": len(mlps),
        },
        "norm": {"kind": _one([n.kind for n in norms]), "position": _one([layer.position for layer in found])},
        "positions": _positions(g, heads, tables),
        "vocabulary": next((e.rows for e in tables if e.kind == "tokens"), None),
        "head": None if end is None else {"outputs": end.outputs, "tied": end.tied},
        "quantized_linears": sum(x.quantized for x in blocks.linears(g)),
        "parameters": _parameters(g, found, tables, end),
        "macs_per_token": _macs(found, end),
        "opset": g.opset,
        "nodes": sum(1 for _ in g.nodes()),
        "not_recognised": [{"site": d.site, "why": d.why} for d in g.declined],
    }


def _one(xs: Sequence[Any]) -> Any:
    """The common entry, the list if they differ, None for none."""
    if not xs:
        return None
    return xs[0] if all(x == xs[0] for x in xs) else list(xs)


def _mask(g: Graph, a: blocks.Attention) -> str:
    if a.node.attributes.get_int("is_causal", 0):
        return "causal"
    if a.mask is None:
        return "none"
    kind = "bool" if a.mask.dtype == ir.DataType.BOOL or _makes_bool(a.mask) else "float"
    return f"{kind}, {'from inputs' if _reads_input(a.mask) else 'from positions'}"


def _makes_bool(v: ir.Value) -> bool:
    node = v.producer()
    if node is not None and node.op_type in ("Expand", "Reshape", "Unsqueeze") and node.inputs[0] is not None:
        return _makes_bool(node.inputs[0])
    return node is not None and node.op_type in ("And", "Or", "Not", "LessOrEqual", "Less", "Greater", "GreaterOrEqual")


def _reads_input(v: ir.Value) -> bool:
    """Whether a value depends on the content of a graph input, not only on its shape."""
    todo, seen = [v], set()
    while todo:
        x = todo.pop()
        if x in seen:
            continue
        seen.add(x)
        node = x.producer()
        if node is None and x.is_graph_input():
            return True
        if node is not None and node.op_type != "Shape":
            todo.extend(i for i in node.inputs if i is not None)
    return False


def _positions(g: Graph, heads: Iterable[blocks.Attention], tables: Iterable[blocks.Embedding]) -> str:
    kinds = []
    if any(a.rotary for a in heads):
        kinds.append("rotary")
    if any(e.kind == "positions" for e in tables) or _adds_table(g):
        kinds.append("learned")
    return " and ".join(kinds) or "none"


def _adds_table(g: Graph) -> bool:
    """Whether a constant `[1, s, h]` is added before any norm, as vision models do."""
    f = Facts(g)
    for node in g.nodes("Add"):
        for x in node.inputs:
            shape = f.shape(x) if g.is_constant(x) else None
            if shape is not None and len(shape) == 3 and shape[0] == 1 and shape[1] != 1:
                return True
    return False


def _parameters(
    g: Graph, found: list[blocks.Layer], tables: list[blocks.Embedding], end: blocks.Head | None
) -> dict[str, int]:
    """Elements of constants by part; a tensor used twice counts once, where it is used first."""
    counted: set[int] = set()

    def count(values: Iterable[ir.Value | None]) -> int:
        total = 0
        for v in values:
            t = g.tensor(v)
            if t is not None and id(t) not in counted:
                counted.add(id(t))
                total += t.size
        return total

    def of(linears: Iterable[blocks.Linear]) -> int:
        return count(v for x in linears for v in (x.weight, x.bias))

    parts = {
        "embeddings": count(e.table for e in tables),
        "attention": of(x for layer in found for a in layer.attentions for x in a.linears),
        "mlp": of(x for layer in found if layer.mlp is not None for x in layer.mlp.linears),
        "norms": count(v for n in blocks.norms(g) for v in (n.gain, n.bias)),
        "head": 0 if end is None else count([end.weight, end.linear.bias if end.linear is not None else None]),
    }
    every = {id(v.const_value): v.const_value for v in g.model.graph.initializers.values() if v.const_value is not None}
    parts["other"] = sum(t.size for i, t in every.items() if i not in counted)
    return parts | {"total": sum(parts.values())}


def _macs(found: list[blocks.Layer], end: blocks.Head | None) -> dict[str, int]:
    """Multiply-accumulates per token; those of the scores are per token and key."""

    def of(linears: Iterable[blocks.Linear]) -> int:
        return sum(x.sizes[0] * x.sizes[1] for x in linears)

    heads = [a for layer in found for a in layer.attentions]
    last = 0
    if end is not None:
        last = end.linear.sizes[0] * end.outputs if end.linear is not None else _size(end.weight)
    return {
        "attention": of(x for a in heads for x in a.linears),
        "mlp": of(x for layer in found if layer.mlp is not None for x in layer.mlp.linears),
        "head": last,
        "attention_per_key": sum(a.heads * (a.head_dim + a.v.sizes[1] // a.kv_heads) for a in heads),
    }


def _size(v: ir.Value) -> int:
    return 0 if v.const_value is None else v.const_value.size
