"""The sites of canonicalization: each ends raised, or declined with a reason under the same name."""

from __future__ import annotations

from collections.abc import Iterator

from onnxcomp.analysis.facts import Facts
from onnxcomp.canonical.activation import find_activations
from onnxcomp.canonical.attention_core import is_routing
from onnxcomp.canonical.fused import is_fused
from onnxcomp.canonical.norm import find_norms
from onnxcomp.graph import Graph, Site

__all__ = ["sites"]


def sites(g: Graph) -> Iterator[Site]:
    """Softmaxes, attentions in four axes, decomposed norms and activations, constant Gemms, fused operators."""
    f = Facts(g)
    for node in g.nodes():
        if is_fused(node):
            yield Site(str(node.name), (str(node.name),), "fused")
    for node in g.nodes("Softmax", "Attention", "Gemm"):
        decomposed = (node.op_type == "Softmax" and not is_routing(node)) or (
            node.op_type == "Attention" and f.rank(node.inputs[0]) == 4
        )
        if node.domain == "" and (decomposed or (node.op_type == "Gemm" and g.is_constant(node.inputs[1]))):
            yield Site(str(node.name), (str(node.name),), "linear" if node.op_type == "Gemm" else "attention")
    for mean, _ in find_norms(g, f):
        yield Site(str(mean.name), (str(mean.name),), "norm")
    for seed, _ in find_activations(g, f):
        yield Site(str(seed.name), (str(seed.name),), "activation")
