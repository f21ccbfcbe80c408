"""Caches that hold the first and the last tokens only, for attentions that read no others.

A window counts positions by place among the keys, so it holds in a shorter cache as well: tokens that are left out lie
between the first ones, which all queries see, and the last ones, whose distances stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks import Attention
from onnxcomp.data.inputs import roles, specs, total_mask
from onnxcomp.data.narrowed import KEPT
from onnxcomp.graph import Graph, interface

__all__ = ["slide", "why_not"]

TOTAL = "total_sequence_length"  # of a mask: tokens seen, more than a cache holds
LAST = np.array([np.iinfo(np.int64).max], np.int64)


def why_not(g: Graph, chosen: Sequence[Attention]) -> str:
    """Why the caches of a model cannot slide, "" if they can: one mask tells of the tokens in all of them."""
    names = {a.name for a in chosen}
    if others := [n.name for n in g.nodes("Attention") if n.name not in names]:
        return f"'{others[0]}' keeps all its keys, and one mask is for all caches"
    for a in chosen:
        if a.past is None or a.present is None or any(not v.is_graph_input() for v in a.past):
            return f"'{a.name}' has no caches that are inputs of the model"
        if any(not v.is_graph_output() or list(v.uses()) for v in a.present):
            return f"the caches that '{a.name}' gives are not outputs of the model alone"
    inputs = specs(g)
    if total_mask(inputs) is None:
        return "no input is a mask of all tokens"
    if "positions" not in roles(inputs):
        return "positions are no input, so they would be counted from the first token that is kept"
    return ""


def slide(g: Graph, chosen: Sequence[Attention], width: int, sinks: int) -> None:
    """Keep the first `sinks` and the last `width - 1` tokens in every cache; the mask may tell of all tokens.

    Called before the windows are made, which count keys: those of the caches and the new ones.
    """
    told, past = total_mask(specs(g)), chosen[0].past
    assert told is not None
    assert past is not None
    mask = g.value(told.name)
    mask.shape = ir.Shape([mask.shape[0], TOTAL]) if mask.shape is not None else None
    readers = [(u, i) for u, i in mask.uses()]
    kept = _seen_by_caches(g, mask, past[0], g.value(roles(specs(g))["tokens"]), sinks)
    for user, index in readers:
        g.set_input(user, index, kept)
    for a in chosen:
        for present in a.present or ():
            whole = g.op("Identity", present, like=present)
            g.replace(present, _ends(g, whole, present, width - 1, sinks))
            reader = whole.producer()
            assert reader is not None
            g.set_input(reader, 0, present)  # replacing let it read what is made of it
    g.interface = interface.interface(g.model.graph)


def _seen_by_caches(g: Graph, mask: ir.Value, past: ir.Value, tokens: ir.Value, sinks: int) -> ir.Value:
    """The columns of a mask for the tokens in the caches and the new ones: its first ones and its last ones."""
    count = g.op("Add", g.op("Shape", past, start=2, end=3), g.op("Shape", tokens, start=1, end=2), name="keys")
    first = g.op("Min", count, np.array([sinks], np.int64))
    length = g.op("Shape", mask, start=1, end=2)
    last = g.op("Sub", length, g.op("Sub", count, first))
    return _joined(g, mask, first, last, axis=1, name="mask_of_kept", like=mask)


def _ends(g: Graph, whole: ir.Value, present: ir.Value, most: int, sinks: int) -> ir.Value:
    """The first `sinks` and the last `most` tokens of a cache `[b, kv_heads, t, h]`, for the output `present`."""
    length = g.op("Shape", whole, start=2, end=3)
    first = np.array([sinks], np.int64)
    last = g.op("Max", g.op("Sub", length, np.array([most], np.int64)), first)
    kept = _joined(g, whole, first, last, axis=2, name=f"{present.name}_kept", like=present)
    if present.shape is not None:
        axes = list(present.shape)
        whole.shape, present.shape = None, ir.Shape([*axes[:2], KEPT, *axes[3:]])
    return kept


def _joined(
    g: Graph, x: ir.Value, first: ir.Value | np.ndarray, last: ir.Value, *, axis: int, name: str, like: ir.Value
) -> ir.Value:
    """The entries of an axis before `first`, and from `last` on."""
    along = np.array([axis], np.int64)
    begin = g.op("Slice", x, np.array([0], np.int64), first, along)
    end = g.op("Slice", x, last, LAST, along)
    joined = g.op("Concat", begin, end, axis=axis, name=name)
    joined.type = like.type
    return joined
