"""The sizes that a model's config.json names, so that the one beside a result says what its graph has."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.analysis.facts import Facts
from onnxcomp.files import storage
from onnxcomp.graph import Graph

__all__ = ["Sizes", "follow", "rewrite", "sizes", "update"]

CONFIG = "config.json"
# What transformers' configurations call each size.
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}


@dataclass(frozen=True)
class Sizes:
    """Number of layers, and what their attentions and feed-forward parts have: every number that occurs, ascending."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    ffn: tuple[int, ...]
    hidden: tuple[int, ...]
    experts: tuple[int, ...] = ()


def sizes(g: Graph) -> Sizes:
    """The sizes of a graph in the canonical form, quantized or not; attentions without projections count as well."""
    linked, mlps = blocks.attentions(g), blocks.mlps(g)
    widths = {a.o.sizes[1] for a in linked} | {m.down.sizes[1] for m in mlps}
    per = [{getattr(a, k) for a in linked} for k in ("heads", "kv_heads", "head_dim")]
    for heads, kv_heads, width in _others(g, {a.node for a in linked}):
        for numbers, n in zip(per, (heads, kv_heads, width), strict=True):
            numbers.update({n} if n else ())
    layers, ffn, experts = {len(blocks.layers(g))}, {m.width for m in mlps}, {e.count for e in blocks.experts(g)}
    return Sizes(*(tuple(sorted(x)) for x in (layers, *per, ffn, widths, experts)))


def _others(g: Graph, linked: Container[ir.Node]) -> Iterator[tuple[int, int, int]]:
    """Heads, key and value heads, and width of a head of attentions without projections; 0 for an unknown width."""
    others = [n for n in g.nodes("Attention") if n.domain == "" and n not in linked]
    facts = Facts(g) if others else None
    for node in others:
        heads, kv = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
        shape = facts.shape(node.inputs[0]) if facts is not None else None
        width = shape[-1] if shape else 0
        yield heads, kv, width // heads if isinstance(width, int) and heads else 0


def update(config: Mapping[str, Any], before: Sizes, after: Sizes) -> tuple[dict[str, int], list[str]]:
    """The entries of a configuration that a result has otherwise, and notes on those that no one number can say.

    Only entries that said what the original's layers have are touched; entries that follow from others where they are
    missing (the width of a head, the number of key and value heads) are made.
    """
    entries, notes = dict[str, int](), []
    for kind, names in NAMES.items():
        old, new = getattr(before, kind), getattr(after, kind)
        for name in (n for n in names if old != new and len(old) == 1 and config.get(n) == old[0]):
            if len(new) == 1:
                entries[name] = new[0]
            else:
                notes.append(f"{CONFIG} still says {name}: {old[0]}, but the layers have {_spread(new)}")
    touched = {kind for kind, names in NAMES.items() if any(n in entries for n in names)}
    if touched & {"heads", "hidden"} and "head_dim" not in config and len(after.head_dim) == 1:
        entries["head_dim"] = after.head_dim[0]
    if before.kv_heads != after.kv_heads and not set(NAMES["kv_heads"]) & set(config) and after.kv_heads != after.heads:
        if len(after.kv_heads) == 1:
            entries["num_key_value_heads"] = after.kv_heads[0]
        else:
            notes.append(f"{CONFIG} cannot say that the layers have {_spread(after.kv_heads)} key and value heads")
    return entries, notes


def _spread(numbers: tuple[int, ...]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"


def follow(folder: Path, original: Graph, result: Graph) -> tuple[dict[str, int], list[str]]:
    """What the configuration in a model's folder must say of a result made of it otherwise, and notes on it.

    Both graphs are in the canonical form: as the exact passes left the original, and as the cut one was lowered.
    """
    config = _read(folder)
    if not config:
        return {}, []
    if len(storage.graphs_of(folder)) > 1:
        return {}, [f"{CONFIG} beside the result describes the original: it is of several graphs"]
    entries, notes = update(config, sizes(original), sizes(result))
    changed = ", ".join(f"{k} {config.get(k, 'not said')} > {v}" for k, v in entries.items())
    return entries, [*([f"{CONFIG} beside the result: {changed}"] if changed else []), *notes]


def rewrite(folder: Path, entries: Mapping[str, int]) -> None:
    """Put entries into the configuration in a folder, if there is one."""
    if entries and (config := _read(folder)):
        text = json.dumps({**config, **entries}, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", "utf-8")


def _read(folder: Path) -> dict[str, Any]:
    """The configuration in a folder; empty where there is none that can be read."""
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
