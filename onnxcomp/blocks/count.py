"""Parameters and multiply-accumulates of a canonical model by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.graph import Graph

__all__ = ["macs", "parameters"]


def parameters(
    g: Graph, layers: Sequence[blocks.Layer], tables: Sequence[blocks.Embedding], end: blocks.Head | None
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
        "attention": of(x for layer in layers for a in layer.attentions for x in a.linears),
        "mlp": of(x for layer in layers for m in layer.mlps for x in m.linears),
        **_experts(layers, lambda e: of(e.linears) + count(e.tables)),
        "norms": count(v for n in blocks.norms(g) for v in (n.gain, n.bias)),
        "head": 0 if end is None else count([end.weight, end.linear.bias if end.linear is not None else None]),
    }
    tensors = {
        id(v.const_value): v.const_value for v in g.model.graph.initializers.values() if v.const_value is not None
    }
    parts["other"] = sum(t.size for i, t in tensors.items() if i not in counted)
    return parts | {"total": sum(parts.values())}


def macs(g: Graph, layers: Sequence[blocks.Layer], end: blocks.Head | None) -> dict[str, int]:
    """Multiply-accumulates per token by part; those of the scores are per token and key.

    `other` holds linears outside the layers, and convolutions per element of their output's grid.
    """

    def of(linears: Iterable[blocks.Linear]) -> int:
        return sum(x.sizes[0] * x.sizes[1] for x in linears)

    heads = [a for layer in layers for a in layer.attentions]
    counted = {x.node for layer in layers for x in layer.linears} | ({end.node} if end is not None else set())
    last = 0
    if end is not None:
        last = end.linear.sizes[0] * end.outputs if end.linear is not None else _size(g, end.weight)
    return {
        "attention": of(x for a in heads for x in a.linears),
        "mlp": of(x for layer in layers for m in layer.mlps for x in m.linears),
        **_experts(layers, lambda e: _per_token(g, e)),
        "head": last,
        "other": of(x for x in blocks.linears(g) if x.node not in counted)
        + sum(_size(g, n.inputs[1]) for n in g.nodes("Conv")),
        "attention_per_key": sum(a.heads * (a.head_dim + a.v.sizes[1] // a.kv_heads) for a in heads),
    }


def _experts(layers: Iterable[blocks.Layer], number: Callable[[blocks.Experts], int]) -> dict[str, int]:
    """An entry for experts with their routers, where there are any."""
    every = [e for layer in layers for e in layer.experts]
    return {"experts": sum(number(e) for e in every)} if every else {}


def _per_token(g: Graph, e: blocks.Experts) -> int:
    """Multiplications of the router and of the experts that one token is sent to."""
    router, *looped = (x.sizes[0] * x.sizes[1] for x in e.linears)
    tables = (_size(g, v) for v in e.tables if v.shape is not None and len(v.shape) > 2 and 1 not in v.shape)
    return router + (sum(looped) + sum(tables)) * e.chosen // e.count


def _size(g: Graph, v: ir.Value | None) -> int:
    t = g.tensor(v)
    return 0 if t is None else t.size
