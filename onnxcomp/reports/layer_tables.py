"""What a comparison value by value found: as plain values, as tables, and as node data for model viewers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.graph import Graph
from onnxcomp.reports.json_report import finite
from onnxcomp.reports.tables import outstanding, table

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["UNRELATED", "layer_json", "layer_tables", "node_data"]

UNRELATED = (
    "the two models have nothing in common: of the same inputs most weight products make something else in one than in "
    "the other, so no part is to blame and where an error enters means nothing"
)
OWN = "Largest errors of their own (with the original's values before them)"
SHOWN = 10  # values in the table, unless all are asked for
# Colours of model-explorer's gradient, from the smallest error to the largest; readable with black text.
GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#ff8a65"})


def layer_json(found: Any) -> dict[str, Any]:
    """A `ByLayer` as plain values: all that corresponds, in order, the first that differs, and what stands out."""
    rows = [_row(x) for x in found.values]
    first = None if found.first is None else _row(found.first)
    plain: dict[str, Any] = finite(
        {
            "samples": found.samples,
            "noise": found.noise,
            "unrelated": found.unrelated,
            "first": first,
            "culprits": [_row(x) for x in found.culprits],
            "worst": [_row(x) for x in found.worst[:SHOWN]],
            "values": rows,
            "missing": [{"layer": x.layer, "role": x.role or x.op, "node": x.node} for x in found.missing],
        }
    )
    return plain


def _row(x: Any) -> dict[str, Any]:
    return {
        "layer": x.reference.layer,
        "role": x.reference.role or x.reference.op,
        "original": x.reference.node,
        "result": x.candidate.node,
        "value": x.candidate.value,
        "error": x.error,
        "own": x.own,
        "outstanding": x.outstanding,
        "outputs": list(x.reference.outputs),
    }


def layer_tables(found: Mapping[str, Any], *, every: bool = False) -> list[RenderableType]:
    """Where two models begin to differ and what is to blame, of what `layer_json` gives."""
    count, missing, first = len(found["values"]), len(found["missing"]), found["first"]
    lines = [f"{count} values correspond" + (f", {missing} of the original have no counterpart" if missing else "")]
    if found["unrelated"]:
        return [f"{UNRELATED}. {lines[0]} by order and operator, no more.", *_values(found["values"])[:every]]
    lines.append("no value differs by more than noise" if first is None else f"the first that differs: {_said(first)}")
    lines += [f"stands out: {_said(x)}, {outstanding(x['outstanding'])}" for x in found["culprits"]]
    shown = _values(found["values"] if every else found["worst"], "" if every else OWN)
    return [". ".join(lines) + ".", *shown] if shown else [". ".join(lines)]


def _values(shown: Sequence[Mapping[str, Any]], title: str = "") -> list[RenderableType]:
    columns = ("place", "node of the result", "reaches", "error", "own error")
    return [table(title or "All values", columns, map(_cells, shown), left=3)] if shown else []


def _said(x: Mapping[str, Any]) -> str:
    return f"{_place(x)} ({x['result']})"


def _place(x: Mapping[str, Any]) -> str:
    return f"layer {x['layer']}, {x['role']}" if x["layer"] >= 0 else f"outside of layers, {x['role']}"


def _cells(x: Mapping[str, Any]) -> tuple[str, ...]:
    return _place(x), x["result"], _few(x["outputs"]), _percent(x["error"]), _percent(x["own"])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _percent(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.3%}"


def node_data(found: Mapping[str, Any], result: Graph) -> dict[str, Any]:
    """Node data of model-explorer for the result's file: the own error of what each node makes, in colours."""
    makers = {str(v.name): str(node.name) for node in result.nodes() for v in node.outputs}
    names = {str(node.name) for node in result.nodes()}
    values: dict[str, dict[str, float]] = {}
    for x in found["values"]:
        node = makers.get(x["value"]) or (x["result"] if x["result"] in names else "")
        if node and x["own"] is not None:
            values[node] = {"value": x["own"]}
    graph = {"name": "own error (relative)", "results": values, "gradient": list(GRADIENT)}
    return {str(result.model.graph.name or "main_graph"): graph}
