"""Attention: every recognized core becomes the standard operator on `[b, s, n * h]`, key-value heads uncopied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.layout import MergedHeads, merge_heads, reshaped, trace
from onnxcomp.analysis.shape_rules import total_length
from onnxcomp.analysis.sizes import Shape
from onnxcomp.canonical.attention_cache import Cache, cache_of, give_present
from onnxcomp.canonical.attention_core import NotAttention, find_core, is_routing, raise_core
from onnxcomp.canonical.masks import Masks
from onnxcomp.canonical.shape_targets import Sizes
from onnxcomp.canonical.sinks import has_sink, with_zero_key, without_zero_key
from onnxcomp.graph import Graph
from onnxcomp.graph.operators import LAYOUT_OPS

__all__ = ["raise_attention"]

# Those of opset 23; later operator sets add more.
ATTRIBUTES = {
    "is_causal",
    "kv_num_heads",
    "q_num_heads",
    "qk_matmul_output_mode",
    "scale",
    "softcap",
    "softmax_precision",
}


def raise_attention(g: Graph, f: Facts, *, exact_rows: bool = False) -> None:
    """Raise every recognized attention; the others are declined with a reason."""
    masks, sizes = Masks(g, f), Sizes(g, f)
    for softmax in g.nodes("Softmax"):
        if softmax.domain == "" and not is_routing(softmax):
            _raise_core(g, sizes, masks, softmax, exact_rows)
    g.sort()
    g.sweep()  # remaining users of the keys tell whether they are a cache
    for node in g.nodes("Attention"):
        if node.domain == "":
            _normalise(g, f, masks, sizes, node, exact_rows)


def _raise_core(g: Graph, sizes: Sizes, masks: Masks, softmax: ir.Node, exact_rows: bool) -> None:
    edits, node_count, masks_before = g.edits, len(g.model.graph), masks.state()
    try:
        core = find_core(g, sizes.f, masks, softmax)
        if exact_rows and core.changes:
            raise NotAttention("rows without visible keys would change, and exact rows are requested")
        raise_core(g, sizes, masks, core)
    except NotAttention as why:
        for node in reversed(list(g.model.graph)[node_count:]):  # nodes that were added for its masks
            g.model.graph.remove(node, safe=True)
        masks.restore(masks_before)
        g.edits = edits
        g.decline(softmax, f"attention: {why}")


def _normalise(g: Graph, f: Facts, masks: Masks, sizes: Sizes, node: ir.Node, exact_rows: bool) -> None:
    """Bring one operator to the canonical form: explicit scale, real KV heads, fitted bool mask, three axes."""
    q, k = f.shape(node.inputs[0]), f.shape(node.inputs[1])
    if q is None or k is None or len(q) not in (3, 4) or len(q) != len(k):
        g.decline(node, "attention: the shapes of queries and keys are unknown")
        return
    if (len(node.inputs) > 6 and node.inputs[6] is not None) or set(node.attributes) - ATTRIBUTES:
        g.decline(node, "attention: it has inputs or attributes of an operator set above 23")
        return
    if any(list(v.uses()) or v.is_graph_output() for v in node.outputs[3:]):
        g.decline(node, "attention: its scores are read or are a model output")
        return
    _explicit_scale(g, node, q)
    _mask(g, f, masks, sizes, node, exact_rows)
    if len(q) == 4:
        _merge_heads(g, f, node, q)
    else:
        _fold_scales(g, f, node)


def _explicit_scale(g: Graph, node: ir.Node, q: Shape) -> None:
    width = q[-1]
    if "scale" in node.attributes or not isinstance(width, int):
        return
    heads = 1 if len(q) == 4 else node.attributes.get_int("q_num_heads", 1)
    g.set_attr(node, scale=(width // heads) ** -0.5)


def _fold_scales(g: Graph, f: Facts, node: ir.Node) -> None:
    """Fold scalar factors of queries and keys, in any layout, into the operator's scale."""
    for i in (0, 1) if len(node.inputs) <= 4 else (0,):  # keys in a cache are scaled already
        reader, index, x = node, i, node.inputs[i]
        rotation = x.producer() if x is not None else None
        if (
            rotation is not None
            and rotation.op_type == "RotaryEmbedding"
            and x is not None
            and len(list(x.uses())) == 1
        ):
            reader, index, x = rotation, 0, rotation.inputs[0]  # a rotation commutes with scaling
        if x is None or f.rank(x) != 3 or "scale" not in node.attributes:
            continue
        scaled = [t for t in trace(f, x, through=(*LAYOUT_OPS, "Mul", "Div")) if t.scale != 1 and t.axes == t.origin]
        if scaled and scaled[-1].scale > 0 and f.rank(scaled[-1].value) == 3:
            g.set_input(reader, index, scaled[-1].value)
            g.set_attr(node, scale=node.attributes.get_float("scale") * scaled[-1].scale)


def _mask(g: Graph, f: Facts, masks: Masks, sizes: Sizes, node: ir.Node, exact_rows: bool) -> None:
    """Replace the mask by one bool mask of full last axes or none; remove a guard behind the operator if redundant."""
    q, keys = f.shape(node.inputs[0]) or (), total_length(f, node)
    original = node.inputs[3] if len(node.inputs) > 3 else None
    trimmed = None if original is None else masks.trimmed(original)
    mask = None if trimmed is None or masks.allows_all(trimmed) else trimmed
    bool_mask = masks.as_bool(mask) if mask is not None else None
    guarded = masks.guarded(node.outputs[0], bool_mask if bool_mask is not None or exact_rows else mask)
    if guarded is not None:
        g.replace(guarded, node.outputs[0])
    if mask is not None and bool_mask is not None and not (exact_rows and guarded is None and masks.is_finite(mask)):
        mask = bool_mask
    if node.attributes.get_int("is_causal", 0):
        past = f.shape(node.inputs[4]) if len(node.inputs) > 4 else None
        causal = masks.causal(q[-2], keys, sizes, 0 if past is None else past[-2])
        if causal is None:
            g.decline(node, "attention: its causal flag stays, since its queries and keys differ in number")
            return
        combine = masks.both if mask is None or masks.is_bool(mask) else masks.bias_where_allowed
        mask = causal if mask is None else combine(causal, mask)
        g.set_attr(node, is_causal=None)
    if mask is not None and not masks.is_bool(mask) and not exact_rows:
        mask = masks.as_where(mask)
    mask = masks.simplified(mask) if mask is not None else None
    fitted = masks.with_full_axes(mask, q[-2], keys, sizes) if mask is not None else None
    if mask is not None and fitted is None:
        g.decline(node, "attention: the mask's axes are unknown")
    elif fitted is not original:
        g.set_input(node, 3, fitted)


def _merge_heads(g: Graph, f: Facts, node: ir.Node, q: Shape) -> None:
    has_cache, sink = len(node.inputs) > 4, has_sink(node)
    cache = None if has_cache else cache_of(g, f, node)
    inputs = [node.inputs[0], *(cache.new if cache is not None else node.inputs[1:3])]
    if sink:
        inputs[1:] = [without_zero_key(v) for v in inputs[1:]]
    parts = [_merged(g, f, x, i, grouped=not has_cache) for i, x in enumerate(inputs)]
    if any(p is None for p in parts):
        g.decline(node, "attention: head count or head width is not static")
        return
    queries, keys, values = (p for p in parts if p is not None)
    if (keys.heads, keys.repeat) != (values.heads, values.repeat) or queries.heads % keys.heads:
        keys = _merged(g, f, inputs[1], 1, grouped=False) or keys
        values = _merged(g, f, inputs[2], 2, grouped=False) or values
    out = node.outputs[0]
    if keys.heads != values.heads or queries.heads % keys.heads:
        g.decline(node, f"attention: {queries.heads} query heads cannot be grouped over {keys.heads} key heads")
        return
    if sink:
        keys, values = (replace(p, value=with_zero_key(g, p.value, 3)) for p in (keys, values))
    new = _attention_3d(g, node, (queries, keys, values), cache)
    split = reshaped(g, f, new.outputs[0], [q[0], q[2], queries.heads, (f.shape(out) or (0,))[-1]])
    if split is not None:
        g.replace(out, g.op("Transpose", split, perm=[0, 2, 1, 3], like=out))
    for old, present in zip(node.outputs[1:], new.outputs[1:], strict=False):
        present.type, present.shape = old.type, old.shape
        g.replace(old, present)
    if cache is not None:
        give_present(g, new, cache)


def _attention_3d(
    g: Graph, node: ir.Node, parts: tuple[MergedHeads, MergedHeads, MergedHeads], cache: Cache | None
) -> ir.Node:
    """Add the operator on `[b, s, n * h]`, with scale, mask and cache of the one it replaces."""
    queries, keys, values = parts
    scale = node.attributes.get_float("scale", 1.0) * queries.scale * keys.scale
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    past: Sequence[ir.Value | None] = node.inputs[4:]
    if cache is not None:
        scale, past = scale * cache.keys.scale, cache.past
    y = g.op("Attention", queries.value, keys.value, values.value, mask, *past, outputs=3 if past else 1)
    new = y.producer()
    assert new is not None
    attrs = {k: a.value for k, a in node.attributes.items() if a.value}
    g.set_attr(new, **{**attrs, "scale": scale, "q_num_heads": queries.heads, "kv_num_heads": keys.heads})
    return new


def _merged(g: Graph, f: Facts, x: ir.Value | None, index: int, *, grouped: bool) -> MergedHeads | None:
    return None if x is None else merge_heads(g, f, x, scaled=index < 2, grouped=grouped and index > 0)
