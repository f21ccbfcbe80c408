"""What a model file is: its interface and, after recognition on a copy, its layers, widths and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxcomp.blocks import anatomy, linears
from onnxcomp.comparison import chosen_graphs
from onnxcomp.data import specs
from onnxcomp.graph import Graph
from onnxcomp.storage import file_bytes, load
from onnxcomp.structure import canonicalize

__all__ = ["headline", "inspect"]


def inspect(model: Path, graph: str | None = None) -> dict[str, Any]:
    """Facts of every graph of a model, or of the named one; nothing is written. Raises `ModelError`."""
    found = chosen_graphs(model, graph)
    return {"model": str(model), "graphs": {name: _facts(name, path) for name, path in found.items()}}


def headline(found: dict[str, Any]) -> str:
    """One line per graph."""
    return "\n".join(_line(facts) for facts in found["graphs"].values())


def _facts(name: str, path: Path) -> dict[str, Any]:
    g = load(path)
    raised = g.clone()
    canonicalize(raised)
    facts = anatomy(raised)
    own = {
        "name": name,
        "file": str(path),
        "megabytes": round(file_bytes(path) / 1e6, 3),
        "inputs": {s.name: f"{s.dtype}{_shape(s.shape)}" for s in specs(g)},
        "outputs": _outputs(g),
    }
    own["linears"] = [
        {"name": x.name, "weight": str(x.weight.name), "shape": list(x.sizes), "quantized": x.quantized}
        for x in linears(raised)
    ]
    return own | facts | {"opset": g.opset, "nodes": sum(1 for _ in g.nodes()), "canonical_nodes": facts["nodes"]}


def _outputs(g: Graph) -> dict[str, str]:
    return {
        str(v.name): f"{v.dtype.name.lower() if v.dtype else '?'}{_shape(v.shape) if v.shape is not None else ''}"
        for v in g.outputs
    }


def _shape(shape: Any) -> str:
    return f"[{', '.join(str(d if isinstance(d, int) else getattr(d, 'value', d) or '?') for d in shape)}]"


def _line(facts: dict[str, Any]) -> str:
    heads = facts["attention"]["heads"]
    parts = [
        f"{facts['layers']} layers",
        f"width {facts['hidden']}" if facts["hidden"] else "",
        f"{heads} heads" if heads else "",
        f"{facts['parameters']['total']:,} parameters",
        f"{facts['megabytes']:.1f} MB",
        f"{facts['quantized_linears']} quantized linears" if facts["quantized_linears"] else "",
        f"{len(facts['not_recognised'])} places not recognised" if facts["not_recognised"] else "",
    ]
    return f"{facts['name']}: " + ", ".join(p for p in parts if p)
