"""Recognition: any exporter's graph to the canonical form, in place, from dataflow alone."""

from __future__ import annotations

from onnx_ir.passes.common import InlinePass

from onnxcomp.analysis.element_types import fill_types
from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import fold_batch, simplify_layouts
from onnxcomp.canonical.activation import raise_activations
from onnxcomp.canonical.attention import raise_attention
from onnxcomp.canonical.attention_guards import lift_guards
from onnxcomp.canonical.einsum import spell_einsum
from onnxcomp.canonical.fold import choose_known, fold_constants, take_constants
from onnxcomp.canonical.fused import shelter, unfuse
from onnxcomp.canonical.group_norm import spell_group_norms
from onnxcomp.canonical.linear import raise_linears
from onnxcomp.canonical.norm import raise_norms
from onnxcomp.canonical.opset import convert
from onnxcomp.canonical.packed import split_packed
from onnxcomp.canonical.quantized import raise_quantized
from onnxcomp.canonical.rotary import raise_rotary
from onnxcomp.canonical.shape_targets import reroot
from onnxcomp.canonical.sites import sites
from onnxcomp.canonical.tidy import drop_no_ops, drop_round_trips, lift_constants, merge_equal, settle_arithmetic
from onnxcomp.graph import Graph

__all__ = ["OPSET", "canonicalize", "sites"]

OPSET = 23
ROUNDS = 4  # one recogniser may open the way for another; two rounds settle every graph seen so far


def canonicalize(graph: Graph, *, exact_rows: bool = False) -> None:
    """Raise a graph to standard operators of opset 23, in place; what is not recognised is declined with the reason.

    Outputs are equal to float noise on rows that see at least one key. With `exact_rows` sites where a row without
    any key would change stay as they are. Raises `ModelError` when the operator set cannot be raised.
    """
    start, names = graph.edits, {str(n.name) for n in graph.nodes()}
    if graph.model.functions:
        graph.adopt(_inlined(graph))
    shelter(graph)
    if graph.opset < OPSET:
        graph.adopt(convert(graph, OPSET))
    declined = list(graph.declined)
    for _ in range(ROUNDS):
        before, graph.declined = graph.edits, list(declined)  # what an earlier round could not raise may go now
        _round(graph, exact_rows)
        if graph.edits == before:
            break
    if graph.edits > start:
        graph.touched |= names - {str(n.name) for n in graph.nodes()}
        graph.verify()


def _round(graph: Graph, exact_rows: bool) -> None:
    lift_constants(graph)
    fold_constants(graph)
    merge_equal(graph)
    fill_types(graph)
    spell_einsum(graph)
    f = Facts(graph)
    spell_group_norms(graph, f)
    take_constants(graph, f)
    unfuse(graph, f, exact_rows=exact_rows)
    _settle(graph, f)
    lift_guards(graph, f)
    raise_activations(graph, f)
    raise_norms(graph, f)
    raise_linears(graph)
    raise_quantized(graph)
    _settle(graph, f)
    fold_batch(graph, f)
    simplify_layouts(graph, f)
    _settle(graph, f)
    raise_rotary(graph, f)
    raise_attention(graph, f, exact_rows=exact_rows)
    _settle(graph, f)
    split_packed(graph, f)
    _settle(graph, f)
    simplify_layouts(graph, f)
    _settle(graph, f)
    settle_arithmetic(graph, f)
    reroot(graph, f)
    merge_equal(graph)
    _settle(graph, f)


def _settle(graph: Graph, f: Facts) -> None:
    """Remove what lost its readers, so that counts of users are true."""
    graph.model.graph.sort()  # the sweep walks backwards
    fill_types(graph)
    choose_known(graph, f)
    drop_round_trips(graph)
    drop_no_ops(graph, f)
    graph.sweep()


def _inlined(graph: Graph) -> Graph:
    """A copy without local functions."""
    copy = graph.clone()
    InlinePass()(copy.model)
    return Graph(copy.model, graph.path)
