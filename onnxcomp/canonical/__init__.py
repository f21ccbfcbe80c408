"""Recognition: rewrite any exporter's graph to the canonical form, in place, from dataflow alone (never from names)."""

from __future__ import annotations

from onnx_ir.passes.common import InlinePass

from onnxcomp.analysis.element_types import fill_types
from onnxcomp.analysis.facts import Facts
from onnxcomp.canonical.activation import raise_activations
from onnxcomp.canonical.attention import raise_attention
from onnxcomp.canonical.attention_guards import lift_guards
from onnxcomp.canonical.batch_norm import fold_batch_norms
from onnxcomp.canonical.branches import inline_known_branches
from onnxcomp.canonical.einsum import decompose_einsum
from onnxcomp.canonical.expert_numbers import fix_expert_numbers
from onnxcomp.canonical.fold import fold_constants, fold_known, slice_constants
from onnxcomp.canonical.fused import move_to_contrib, unfuse
from onnxcomp.canonical.group_norm import decompose_group_norms
from onnxcomp.canonical.layouts import clips_after_parts, simplify_layouts, sink_layouts
from onnxcomp.canonical.linear import raise_linears
from onnxcomp.canonical.norm import raise_norms
from onnxcomp.canonical.opset import convert
from onnxcomp.canonical.packed import split_packed
from onnxcomp.canonical.per_head import join_head_norms
from onnxcomp.canonical.quantized import raise_quantized
from onnxcomp.canonical.rotary import raise_rotary
from onnxcomp.canonical.shape_targets import rebuild_sizes
from onnxcomp.canonical.sinks import drop_maxima
from onnxcomp.canonical.sites import sites
from onnxcomp.canonical.tidy import drop_no_ops, drop_round_trips, lift_constants, merge_equal, normalize_arithmetic
from onnxcomp.graph import Graph
from onnxcomp.graph.sharing import share_equal

__all__ = ["OPSET", "canonicalize", "sites"]

OPSET = 23
# At most this many rounds: one recognizer may enable another. Every graph tried so far was stable after two.
ROUNDS = 4


def canonicalize(graph: Graph, *, exact_rows: bool = False) -> None:
    """Raise a graph to standard operators of opset 23, in place; unrecognized sites are declined with a reason.

    Outputs are equal up to rounding on query rows with at least one visible key. With `exact_rows`, sites where a row
    without visible keys would change stay as they are. Raises `ModelError` when the operator set cannot be raised.
    """
    initial_edits, initial_names = graph.edits, {str(n.name) for n in graph.nodes()}
    if graph.model.functions:
        graph.adopt(_inlined(graph))
    move_to_contrib(graph)
    if graph.opset < OPSET:
        graph.adopt(convert(graph, OPSET))
    declined = list(graph.declined)
    for _ in range(ROUNDS):
        # A site declined in an earlier round may be recognized now.
        before, graph.declined = graph.edits, list(declined)
        _run_round(graph, exact_rows)
        if graph.edits == before:
            break
    if graph.edits > initial_edits:
        graph.touched |= initial_names - {str(n.name) for n in graph.nodes()}
        graph.verify()


def _run_round(graph: Graph, exact_rows: bool) -> None:
    lift_constants(graph)
    share_equal(graph)
    fold_constants(graph)
    inline_known_branches(graph)
    merge_equal(graph)
    fill_types(graph)
    f = Facts(graph)
    decompose_einsum(graph, f)
    decompose_group_norms(graph, f)
    fix_expert_numbers(graph, f)
    slice_constants(graph, f)
    unfuse(graph, f, exact_rows=exact_rows)
    _clean_up(graph, f)
    lift_guards(graph, f)
    drop_maxima(graph, f)
    raise_activations(graph, f)
    raise_norms(graph, f)
    raise_linears(graph)
    fold_batch_norms(graph, f)
    raise_quantized(graph)
    join_head_norms(graph, f)
    clips_after_parts(graph)
    _clean_up(graph, f)
    sink_layouts(graph, f)
    simplify_layouts(graph, f)
    _clean_up(graph, f)
    raise_rotary(graph, f)
    raise_attention(graph, f, exact_rows=exact_rows)
    _clean_up(graph, f)
    split_packed(graph, f)
    _clean_up(graph, f)
    simplify_layouts(graph, f)
    _clean_up(graph, f)
    normalize_arithmetic(graph, f)
    rebuild_sizes(graph, f)
    share_equal(graph)
    merge_equal(graph)
    _clean_up(graph, f)


def _clean_up(graph: Graph, f: Facts) -> None:
    """Remove unused nodes and no-ops, so that numbers of users are exact."""
    graph.sort()  # the sweep needs topological order
    fill_types(graph)
    fold_known(graph, f)
    drop_round_trips(graph)
    drop_no_ops(graph, f)
    graph.sweep()


def _inlined(graph: Graph) -> Graph:
    """A copy with local functions inlined."""
    copy = graph.clone()
    InlinePass()(copy.model)
    return Graph(copy.model, graph.path)
