"""Removal of what nothing uses, bodies of control flow included."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp.graph.operators import has_body

__all__ = ["remove_unused"]


def remove_unused(model: ir.Model) -> None:
    """Remove unused nodes and constants; the body of a node that is gone uses nothing any more."""
    while True:
        bodies = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if has_body(n)]
        RemoveUnusedNodesPass()(model)
        gone = [n for n in bodies if n.graph is None]
        for node in gone:
            _release(node)
        if not gone:
            return


def _release(node: ir.Node) -> None:
    for a in node.attributes.values():
        if a.type is ir.AttributeType.GRAPH:
            for inner in ir.traversal.RecursiveGraphIterator(a.as_graph()):
                for i in range(len(inner.inputs)):
                    inner.replace_input_with(i, None)
