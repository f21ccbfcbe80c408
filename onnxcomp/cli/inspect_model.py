"""What a model file is: its interface and, after recognition on a copy, its layers, widths and parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict

from onnxcomp.blocks import linears
from onnxcomp.blocks.describe import describe as anatomy
from onnxcomp.canonical import canonicalize
from onnxcomp.data.datasets import specs
from onnxcomp.files.storage import chosen_graphs, read
from onnxcomp.graph import Graph
from onnxcomp.runtime.integer import quantized_linears
from onnxcomp.version import INSPECT_SCHEMA

__all__ = ["headline", "inspect", "schema"]

Sizes = int | list[int] | None  # one where all layers agree, else one a layer; null for none
Names = str | list[str | None] | None


@with_config(ConfigDict(extra="forbid"))
class AttentionPart(TypedDict):
    """Heads of a stack's attentions; `masks` such as `causal+padding`, `bias` what is added to the scores besides.

    `sinks` counts those with a score that belongs to no key.
    """

    heads: Sizes
    kv_heads: Sizes
    head_width: Sizes
    masks: Names
    bias: Names
    sinks: int


@with_config(ConfigDict(extra="forbid"))
class AllAttentionPart(AttentionPart):
    """Attentions of the whole model: operators, those with all four projections, softmaxes left, cross attentions."""

    recognised: int
    with_projections: int
    not_recognised: int
    cross: int


@with_config(ConfigDict(extra="forbid"))
class MlpPart(TypedDict):
    """Feed-forward parts: activation (`gated` before it if there is a gate), inner width, how many."""

    kind: Names
    width: Sizes
    count: int


@with_config(ConfigDict(extra="forbid"))
class ExpertsPart(TypedDict):
    """Mixtures of experts: layers that have one, experts in each, how many a token is sent to, their inner width.

    `form` is `batched` (the chosen weights are gathered for each token) or `looped` (one product for each expert).
    """

    layers: int
    per_layer: Sizes
    chosen: Sizes
    width: Sizes
    form: Names


@with_config(ConfigDict(extra="forbid"))
class NormPart(TypedDict):
    """Norms: `layer` or `rms`; `pre`, `post` or `pre and post`; how many sit on queries and keys."""

    kind: Names
    position: Names
    inside_attention: int


@with_config(ConfigDict(extra="forbid"))
class StackPart(TypedDict):
    """Layers of one kind, `encoder` or `decoder`; `distinct` is less than `layers` where weights are shared."""

    kind: str
    layers: int
    distinct: int
    hidden: Sizes
    attention: AttentionPart
    cross_attention: AttentionPart | None
    mlp: MlpPart
    norm: NormPart


@with_config(ConfigDict(extra="forbid"))
class HeadPart(TypedDict):
    """The last product: its outputs, and whether its weight is the embedding table."""

    outputs: int
    tied: bool


@with_config(ConfigDict(extra="forbid"))
class LinearPart(TypedDict):
    """A linear of the canonical graph; `shape` is `[fan-in, fan-out]`."""

    name: str
    weight: str
    shape: list[int]
    quantized: bool


@with_config(ConfigDict(extra="forbid"))
class LeftPart(TypedDict):
    """A place that stayed as it was, by the name of its node, with the reason."""

    site: str
    why: str


@with_config(ConfigDict(extra="forbid"))
class GraphPart(TypedDict):
    """One graph: its interface as given, and what recognition on a copy found."""

    name: str
    file: str
    megabytes: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    opset: int
    nodes: int
    canonical_nodes: int
    layers: int
    hidden: Sizes
    attention: AllAttentionPart
    mlp: MlpPart
    experts: ExpertsPart | None
    norm: NormPart
    positions: str
    stacks: list[StackPart]
    vocabulary: int | None
    head: HeadPart | None
    quantized_linears: int
    parameters: dict[str, int]
    macs_per_token: dict[str, int]
    linears: list[LinearPart]
    not_recognised: list[LeftPart]


@with_config(ConfigDict(extra="forbid"))
class ModelPart(TypedDict):
    """What `onnxcomp inspect --json` prints."""

    schema_version: int
    model: str
    graphs: dict[str, GraphPart]


def schema() -> dict[str, Any]:
    """JSON schema of what `inspect --json` prints."""
    whole = TypeAdapter(ModelPart).json_schema(mode="serialization")
    whole["properties"]["schema_version"] = {"const": INSPECT_SCHEMA}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "onnxcomp anatomy"}


def inspect(model: Path, graph: str | None = None, *, exact_rows: bool = False) -> dict[str, Any]:
    """Facts of every graph of a model, or of the named one; nothing is written. Raises `ModelError`."""
    found = chosen_graphs(model, graph)
    facts = {name: _facts(name, path, exact_rows) for name, path in found.items()}
    return {"schema_version": INSPECT_SCHEMA, "model": str(model), "graphs": facts}


def headline(found: dict[str, Any]) -> str:
    """One line per graph."""
    return "\n".join(_line(facts) for facts in found["graphs"].values())


def _facts(name: str, path: Path, exact_rows: bool) -> dict[str, Any]:
    held = read(path)
    g = held.graph
    raised = g.clone()
    canonicalize(raised, exact_rows=exact_rows)
    facts = anatomy(raised)
    own = {
        "name": name,
        "file": str(path),
        "megabytes": round(held.nbytes / 1e6, 3),
        "inputs": {s.name: f"{s.dtype}{_shape(s.shape)}" for s in specs(g)},
        "outputs": _outputs(g),
    }
    own["linears"] = [
        {"name": x.name, "weight": str(x.weight.name), "shape": list(x.sizes), "quantized": x.quantized}
        for x in linears(raised)
    ]
    facts["quantized_linears"] = max(
        facts["quantized_linears"], quantized_linears(g.model)
    )  # also as products of codes
    return own | facts | {"opset": g.opset, "nodes": sum(1 for _ in g.nodes()), "canonical_nodes": facts["nodes"]}


WRITTEN = "stay as they were written"  # why operators with quantized weights are not raised


def _outputs(g: Graph) -> dict[str, str]:
    return {
        str(v.name): f"{v.dtype.name.lower() if v.dtype else '?'}{_shape(v.shape) if v.shape is not None else ''}"
        for v in g.outputs
    }


def _shape(shape: Any) -> str:
    return f"[{', '.join(str(d if isinstance(d, int) else getattr(d, 'value', d) or '?') for d in shape)}]"


def _line(facts: dict[str, Any]) -> str:
    heads, stacks = facts["attention"]["heads"], facts["stacks"]
    layers = " and ".join(f"{s['layers']} {s['kind']}" for s in stacks) if len(stacks) > 1 else facts["layers"]
    parts = [
        f"{layers} layers",
        f"width {_spread(facts['hidden'])}" if facts["hidden"] else "",
        f"{_spread(heads)} heads" if heads else "",
        f"{facts['parameters']['total']:,} parameters",
        f"{facts['megabytes']:.1f} MB",
        f"{facts['quantized_linears']} quantized linears" if facts["quantized_linears"] else "",
        f"{len(facts['not_recognised'])} places not recognised" if facts["not_recognised"] else "",
    ]
    lowered = any(WRITTEN in str(x) for x in facts["not_recognised"])
    note = "; heads, widths and linears are counted without products of codes: inspect the source for these"
    return f"{facts['name']}: " + ", ".join(p for p in parts if p) + (note if lowered else "")


def _spread(sizes: int | list[int]) -> str:
    """One number, or the range where layers differ."""
    return str(sizes) if isinstance(sizes, int) else f"{min(sizes)} to {max(sizes)}"
