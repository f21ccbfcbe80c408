"""A report on a canonical model: stacks of layers, kinds, positions, masks, and unrecognized sites with reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks.attentions import unlinked
from onnxcomp.blocks.count import macs, parameters
from onnxcomp.blocks.experts import unseen_experts
from onnxcomp.blocks.inner import inner_linears
from onnxcomp.blocks.mask_names import Mask, name_masks
from onnxcomp.canonical.sites import sites
from onnxcomp.data.inputs import specs
from onnxcomp.graph import Graph

__all__ = ["describe"]

MAX_TABLE = 1 << 22  # elements of a table that is read to see whether it is sinusoidal
SINUSOID_TOLERANCE = 1e-2  # of a row's squared norm, relative to its width

MaskNames = Mapping[ir.Value | None, Mask]


def describe(g: Graph) -> dict[str, Any]:
    """Facts as JSON types; a value where all layers agree, a list with one entry a layer where they differ."""
    model_layers = blocks.layers(g)
    heads = [a for layer in model_layers for a in layer.attentions]
    tables, end = blocks.embeddings(g), blocks.head(g)
    named = name_masks(g, [a.mask for a in heads])
    return {
        "layers": len(model_layers),
        "hidden": _hidden(model_layers),
        "attention": {
            "recognised": sum(1 for n in g.nodes("Attention") if n.domain == ""),
            "with_projections": len(heads),
            "not_recognised": sum(1 for d in g.declined if d.why.startswith("attention:")),
            **_attention(heads, named),
            "cross": sum(a.is_cross for a in heads),
        },
        "mlp": _mlp(model_layers),
        "experts": _experts(model_layers),
        "norm": _norm(g, model_layers),
        "positions": _positions(g, model_layers, tables, named),
        "stacks": [_stack(g, kind, stack_layers, named) for kind, stack_layers in _stacks(g, model_layers, named)],
        "vocabulary": next((e.rows for e in tables if e.kind == "tokens"), None),
        "head": None if end is None else {"outputs": end.outputs, "tied": end.tied},
        "quantized_linears": sum(x.quantized for x in blocks.linears(g)),
        "parameters": parameters(g, model_layers, tables, end),
        "macs_per_token": macs(g, model_layers, end),
        "opset": g.opset,
        "nodes": sum(1 for _ in g.nodes()),
        "not_recognised": _not_recognised(g),
    }


def _common(xs: Sequence[Any]) -> Any:
    """The common entry, the list if they differ, None for none."""
    if not xs:
        return None
    return xs[0] if all(x == xs[0] for x in xs) else list(xs)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _stacks(g: Graph, layers: Sequence[blocks.Layer], named: MaskNames) -> list[tuple[str, list[blocks.Layer]]]:
    """Layers with cross attention are a decoder; the others are one if their masks are causal, else an encoder.

    Where attentions are not raised, a model that takes caches has decoder layers.
    """
    kinds: dict[str, list[blocks.Layer]] = {}
    cached = any(s.cache is not None for s in specs(g))
    for layer in layers:
        crosses = any(a.is_cross for a in layer.attentions)
        causal = any("causal" in _mask(a, named) for a in layer.attentions)
        decodes = crosses or causal or (cached and not layer.attentions)
        kinds.setdefault("decoder" if decodes else "encoder", []).append(layer)
    return sorted(kinds.items(), key=lambda item: item[1][0].index)


def _stack(g: Graph, kind: str, layers: Sequence[blocks.Layer], named: MaskNames) -> dict[str, Any]:
    self_attentions = [a for layer in layers for a in layer.attentions if not a.is_cross]
    cross = [a for layer in layers for a in layer.attentions if a.is_cross]
    return {
        "kind": kind,
        "layers": len(layers),
        "distinct": len({tuple(id(g.tensor(x.weight)) for x in layer.linears) for layer in layers}),
        "hidden": _hidden(layers),
        "attention": _attention(self_attentions, named),
        "cross_attention": _attention(cross, named) if cross else None,
        "mlp": _mlp(layers),
        "norm": _norm(g, layers),
    }


def _hidden(layers: Iterable[blocks.Layer]) -> Any:
    layer_list = list(layers)
    widths = [a.q.sizes[0] for layer in layer_list for a in layer.attentions]
    return _common(widths or [layer.linears[0].sizes[0] for layer in layer_list if layer.linears])


def _attention(heads: Sequence[blocks.Attention], named: MaskNames) -> dict[str, Any]:
    return {
        "heads": _common([a.heads for a in heads]),
        "kv_heads": _common([a.kv_heads for a in heads]),
        "head_width": _common([a.head_dim for a in heads]),
        "masks": _common([_mask(a, named) for a in heads]),
        "bias": _common([named[a.mask].bias or None for a in heads]),
        "sinks": sum(a.has_sink for a in heads),
    }


def _mask(a: blocks.Attention, named: MaskNames) -> str:
    name = named[a.mask].name
    if not a.node.attributes.get_int("is_causal", 0) or "causal" in name:
        return name
    return "causal" if name == "none" else f"causal+{name}"


def _mlp(layers: Iterable[blocks.Layer]) -> dict[str, Any]:
    mlps = [m for layer in layers for m in layer.mlps]
    return {
        "kind": _common([("gated " if m.gate is not None else "") + m.activation for m in mlps]),
        "width": _common([m.width for m in mlps]),
        "count": len(mlps),
    }


def _experts(layers: Iterable[blocks.Layer]) -> dict[str, Any] | None:
    experts = [e for layer in layers for e in layer.experts]
    if not experts:
        return None
    each = {"per_layer": "count", "chosen": "chosen", "width": "width", "form": "form"}
    return {"layers": len(experts), **{k: _common([getattr(e, name) for e in experts]) for k, name in each.items()}}


def _norm(g: Graph, layers: Sequence[blocks.Layer]) -> dict[str, Any]:
    layer_norms = {n.node for layer in layers for n in layer.norms}
    inner = {n.node for layer in layers for a in layer.attentions for n in a.inner_norms}
    kinds = [n.kind for n in blocks.norms(g) if n.node in layer_norms]
    positions = [layer.position for layer in layers]
    return {"kind": _common(kinds), "position": _common(positions), "inside_attention": len(inner)}


# ---- positions -------------------------------------------------------------------------------------------------------


def _positions(g: Graph, layers: Sequence[blocks.Layer], tables: Sequence[blocks.Embedding], named: MaskNames) -> str:
    heads = [a for layer in layers for a in layer.attentions]
    biases = {m.bias for m in named.values()}
    kinds = {
        "rotary": any(a.rotary for a in heads),
        "alibi": "alibi" in biases,
        "relative bias": "relative" in biases or "content" in biases,
        **_tables(g, layers, tables),
        "convolution": _adds_convolution(g, layers),
    }
    return " and ".join(k for k, present in kinds.items() if present) or "none"


def _tables(g: Graph, layers: Sequence[blocks.Layer], tables: Iterable[blocks.Embedding]) -> dict[str, bool]:
    """Whether a learned or a sinusoidal table of positions is added to the residual stream."""
    widths = {layer.linears[0].sizes[0] for layer in layers if layer.linears}
    tables = list(tables)
    widths |= {e.width for e in tables if e.kind == "tokens"}
    kind_by_table = {e.table: e.kind for e in tables if e.width in widths} | dict.fromkeys(
        _added_tables(g, widths), "positions"
    )
    waves = [_is_sinusoidal(g, v) for v, kind in kind_by_table.items() if kind == "positions"]
    return {"learned": not all(waves), "sinusoidal": any(waves)}


def _added_tables(g: Graph, widths: set[int]) -> list[ir.Value]:
    """Constants `[.., s, h]` of more than one row of which all or some rows are added to a value."""
    constants = []
    for node in g.nodes("Add"):
        for x in node.inputs:
            v = _stored_rows(g, x)
            t = g.tensor(v)
            if v is not None and t is not None and len(t.shape) > 1 and t.shape[-1] in widths and t.shape[-2] != 1:
                constants.append(v)
    return constants


def _stored_rows(g: Graph, v: ir.Value | None) -> ir.Value | None:
    """The constant that a value is a part of."""
    while v is not None and not g.is_constant(v):
        node = v.producer()
        if node is None or node.op_type not in ("Slice", "Unsqueeze", "Expand", "Reshape"):
            return None
        v = node.inputs[0]
    return v


def _is_sinusoidal(g: Graph, v: ir.Value) -> bool:
    """Whether a table holds sines and cosines of the same angles: each row's squared norm is half its width."""
    t = g.tensor(v)
    if t is None or not t.dtype.is_floating_point() or not 0 < t.size <= MAX_TABLE:
        return False
    a = t.numpy().astype(np.float64).reshape(-1, t.shape.numpy()[-1])
    return bool(np.abs((a**2).sum(1) - a.shape[1] / 2).max() <= SINUSOID_TOLERANCE * a.shape[1])


def _adds_convolution(g: Graph, layers: Sequence[blocks.Layer]) -> bool:
    """Whether a grouped convolution of the model's width is added to the stream."""
    hidden = _hidden(layers)
    return any(
        n.attributes.get_int("group", 1) > 1 and (t := g.tensor(n.inputs[1])) is not None and t.shape[0] == hidden
        for n in g.nodes("Conv")
    )


# ---- what is left ----------------------------------------------------------------------------------------------------


def _not_recognised(g: Graph) -> list[dict[str, str]]:
    """Declined sites with their reasons, and sites that stayed without one."""
    declined = {d.site for d in g.declined}
    unexplained = [s for s in sites(g) if s.name not in declined]
    return [
        *({"site": d.site, "why": d.why} for d in g.declined),
        *({"site": str(n.name), "why": f"attention: not linked to projections: {why}"} for n, why in unlinked(g)),
        *({"site": str(n.name), "why": why} for n, why in unseen_experts(g)),
        *({"site": s.name, "why": f"{s.kind}: not raised, and no recognizer gives a reason"} for s in unexplained),
        *({"site": x.node, "why": x.why} for x in inner_linears(g)),
    ]
