"""Nodes in an order that follows from the graph alone, whatever order a file lists them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from onnxcomp.graph.graph import Graph

__all__ = ["postorder"]


def postorder(g: Graph, inputs: Callable[[ir.Node], Iterable[ir.Value]]) -> list[ir.Node]:
    """The nodes that outputs depend on, each after those that make its `inputs`, which are followed in that order."""
    order: dict[ir.Node, None] = {}
    ends = (v.producer() for v in reversed(g.model.graph.outputs))
    stack = [(node, False) for node in ends if node is not None]
    while stack:
        node, ready = stack.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
            continue
        stack.append((node, True))
        makers = (x.producer() for x in reversed(list(dict.fromkeys(inputs(node)))))
        stack += [(m, False) for m in makers if m is not None and m not in order and m.graph is g.model.graph]
    return list(order)
