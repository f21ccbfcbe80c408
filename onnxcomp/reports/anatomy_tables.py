"""What `onnxcomp inspect` prints of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from onnxcomp.reports.tables import fact, grouped, table

__all__ = ["anatomy"]


def anatomy(facts: Mapping[str, Any], *, verbose: bool = False) -> list[Table]:
    """What a model is, one fact a line, its stacks and parts, and what was not recognised, grouped by reason."""
    hidden = {"name", "not_recognised", "stacks", "parameters", "macs_per_token", "linears"}
    hidden |= {"layers", "hidden", "mlp", "norm"} if facts["stacks"] else set()
    shown = dict(facts) if verbose else {**facts, **{k: _alike(facts[k]) for k in ("inputs", "outputs")}}
    rows = [(k.replace("_", " "), fact(v)) for k, v in shown.items() if k not in hidden and v is not None]
    found = [table(f"{facts['name']}", ("", ""), rows, left=2)]
    if facts["stacks"]:
        found.append(_stacks(facts["stacks"]))
    found.append(_parts(facts))
    if facts.get("linears"):
        found.append(_linears(facts["linears"], every=verbose))
    if lost := facts["not_recognised"]:
        left = grouped([(d["site"], d["why"]) for d in lost], every=verbose)
        found.append(table("Not recognised", ("sites", "why", "such as"), left, left=3))
    return found


def _alike(ports: Mapping[str, str]) -> dict[str, str]:
    """Inputs or outputs in one line where only numbers in their names differ, such as the caches of all layers."""
    same: dict[tuple[str, str], list[str]] = {}
    for name, kind in ports.items():
        same.setdefault((re.sub(r"\d+", "*", name), kind), []).append(name)
    return {
        names[0] if len(names) == 1 else f"{pattern} ({len(names)} times)": kind
        for (pattern, kind), names in same.items()
    }


def _linears(found: Sequence[Mapping[str, Any]], *, every: bool) -> Table:
    """Linears of one shape together; all of them by name with `every`."""
    kinds = [f"{' x '.join(map(str, x['shape']))}{', quantized' if x['quantized'] else ''}" for x in found]
    named = [(str(x["name"]), kind) for x, kind in zip(found, kinds, strict=True)]
    return table("Linears", ("count", "shape", "such as"), grouped(named, every=every), left=3)


def _stacks(found: Iterable[Mapping[str, Any]]) -> Table:
    """One row per kind of attention and layer."""
    rows: list[tuple[Any, ...]] = []
    for s in found:
        shared = "" if s["distinct"] == s["layers"] else f" ({s['distinct']} distinct)"
        mlp, norm = s["mlp"], s["norm"]
        own = (fact(mlp["kind"]), fact(mlp["width"]), f"{fact(norm['kind'])}, {fact(norm['position'])}")
        rows.append((s["kind"], f"{s['layers']}{shared}", fact(s["hidden"]), *_heads(s["attention"]), *own))
        if s["cross_attention"]:
            rows.append(("  cross attention", "", "", *_heads(s["cross_attention"]), "", "", ""))
    columns = ("layers of", "count", "width", "heads", "KV", "head width", "mask", "MLP", "MLP width", "norm")
    return table("Layers", columns, rows, left=len(columns))


def _heads(a: Mapping[str, Any]) -> tuple[str, ...]:
    mask = fact(a["masks"]) + (f" + {fact(a['bias'])} bias" if a["bias"] else "") + (" + sink" if a["sinks"] else "")
    return (*(fact(a[k]) for k in ("heads", "kv_heads", "head_width")), mask)


def _parts(facts: Mapping[str, Any]) -> Table:
    """Parameters and multiplications by part."""
    macs = facts["macs_per_token"]
    rows = [(part, f"{n:,}", f"{macs[part]:,}" if part in macs else "") for part, n in facts["parameters"].items()]
    rows.append(("scores, per key", "", f"{macs['attention_per_key']:,}"))
    return table("Parts", ("part", "parameters", "MACs per token"), rows)
