"""Linears inside the subgraphs of If, Loop and Scan: passes look at the main graph only and leave these as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.data.inputs import specs
from onnxcomp.graph import Graph

__all__ = ["InnerLinears", "inner_linears"]

PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class InnerLinears:
    """What the subgraphs of one node hold: products with a constant matrix, and the entries of these matrices."""

    node: str
    op: str
    linears: int
    parameters: int
    cached: bool

    @property
    def why(self) -> str:
        """Why they are not compressed, and what to do."""
        what = f"{self.op}: its branches hold {self.linears} linears of {self.parameters:,} parameters, which stay"
        if self.cached:
            return f"{what}; compress the decoders with and without caches that it was merged from (decoder_model.onnx)"
        return f"{what}; export the model without the branch to compress them"


def inner_linears(g: Graph) -> list[InnerLinears]:
    """One entry for each node of the main graph whose subgraphs hold linears; a shared matrix counts once."""
    found = []
    for node in g.nodes():
        products = [n for n in _inside(node) if n.op_type in PRODUCTS and not n.domain and _weight(n) is not None]
        weights = {id(w): w for n in products if (w := _weight(n)) is not None}
        if products:
            count = sum(math.prod(w.shape.numpy()) for w in weights.values())
            cached = node.op_type == "If" and any(s.flag for s in specs(g))
            found.append(InnerLinears(str(node.name), node.op_type, len(products), count, cached))
    return found


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for a in node.attributes.values():
        for graph in [a.as_graph()] if a.type is ir.AttributeType.GRAPH else []:
            for inner in graph:
                yield inner
                yield from _inside(inner)


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant matrix of a product."""
    for v in node.inputs[:2]:
        tensor = Graph.tensor(v)
        if tensor is not None and len(tensor.shape) == 2:
            return tensor
    return None
