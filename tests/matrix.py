"""One cell of the matrix architecture x spelling judged: all raised, outputs equal, nothing left for a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxcomp import blocks
from onnxcomp.blocks.attentions import unlinked
from onnxcomp.canonical import canonicalize, sites
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import zoo

SHAPES = ((2, 12, "right"), (3, 17, "left"), (1, 7, "none"))
TOLERANCE = 2e-6  # relative to the largest element, in fp32
# Half-precision graphs are compared in fp32 as well; constants that were folded in their type are rounded to it.
ROUNDING = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8}
# Operators of masks, positions and sizes, which exporters may spell differently.
SIDE = {"Shape", "Gather", "GatherND", "GatherElements", "Slice", "Concat", "Squeeze", "Unsqueeze", "Expand", "Cast"}
SIDE |= {
    "Range",
    "And",
    "Or",
    "Not",
    "GreaterOrEqual",
    "LessOrEqual",
    "Reshape",
    "Cos",
    "Sin",
    "CumSum",
    "Equal",
    "Flatten",
}
HALVES = {ir.DataType.FLOAT16: ir.DataType.FLOAT, ir.DataType.BFLOAT16: ir.DataType.FLOAT}
DOUBLE = {ir.DataType.FLOAT: ir.DataType.DOUBLE}


@dataclass
class Cell:
    """What became of one graph: `raised`, `declined` (all reasons given), `missed` (no reason given) or `wrong`.

    It is `absent` where an exporter wrote a file that runs at no shape, so that there is nothing to be equal to.
    """

    found: tuple[int, int, int] = (0, 0, 0)
    missing: str = ""
    declined: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    dead: str = ""
    difference: float = 0.0
    compared: int = 0
    folded: int = 0  # norms of constant tables that a tool computed before we saw the graph
    signature: dict[str, int] = field(default_factory=dict)
    attentions: int = 0  # operators, linked to projections or not
    experts: int = 0
    layers: int = 0

    @property
    def status(self) -> str:
        """The verdict, the worst first."""
        if self.dead:
            return "absent"
        if self.faults:
            return "wrong"
        if self.declined:
            return "declined"
        return "missed" if self.missing else "raised"

    @property
    def why(self) -> str:
        """The reasons in one line, empty for a raised graph."""
        if self.dead:
            return self.dead
        counted = Counter(reason.partition(": ")[2] or reason for reason in self.declined)
        parts = [f"{n} x {why}" if n > 1 else why for why, n in counted.items()]
        return "; ".join([*self.faults, *([self.missing] if self.missing else []), *parts])


def load(at: Path | str) -> Graph:
    """A cached graph, or a kept one by its name."""
    return Graph(ir.load(at) if isinstance(at, Path) else zoo.load_graph(at))


def judge(a: zoo.Architecture, at: Path | str) -> Cell:
    """Raise a graph and hold it against its source; whatever is raised by the way is a fault of the cell."""
    cell = Cell()
    try:
        source, raised = load(at), load(at)
        canonicalize(raised)
        cell.found, cell.folded = counts(raised), folded(a, raised)
        cell.attentions = sum(1 for _ in raised.nodes("Attention"))
        cell.experts, cell.layers = len(blocks.experts(raised)), len(blocks.layers(raised))
        wanted = (a.attentions, a.mlps, a.norms - cell.folded)
        if cell.found != wanted:
            parts = zip(("attentions", "MLPs", "norms"), cell.found, wanted, strict=True)
            cell.missing = "found " + ", ".join(f"{f} of {w} {name}" for name, f, w in parts if f != w)
        cell.declined = [f"{d.site}: {d.why}" for d in raised.declined]
        cell.declined += [f"{n.name}: attention: not linked: {why}" for n, why in unlinked(raised)]
        cell.missing = "; ".join(x for x in (cell.missing, silent(raised)) if x)
        raised.verify()
        again = raised.clone()
        canonicalize(again)
        if again.edits:
            cell.faults.append(f"raising it again makes {again.edits} edits")
        cell.signature = dict(sorted(signature(retyped(raised, HALVES)).items()))
        cell.difference, cell.compared = distance(a, retyped(source, HALVES), retyped(raised, HALVES))
        if TOLERANCE < cell.difference <= 4 * TOLERANCE:  # rounding of both: what is the source without its own?
            cell.difference = from_exact(a, retyped(source, HALVES), retyped(raised, HALVES))
        if not cell.difference <= tolerance(source):
            cell.faults.append(f"outputs differ by {cell.difference:.1e}")
    except Exception as e:  # noqa: BLE001  a crash is what the cell is about
        cell.faults.append(f"{type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}")
    cell.dead = never_runs(a, at) if cell.faults else ""
    return cell


def never_runs(a: zoo.Architecture, at: Path | str) -> str:
    """Why the graph runs at no shape as the exporter wrote it, empty where it runs or cannot be read."""
    why = ""
    try:
        with Session(load(at)) as s:
            for shape in SHAPES:
                try:
                    s.run({k: v for k, v in zoo.feeds(a, *shape).items() if k in {p.name for p in s.inputs}})
                except OnnxcompError as e:
                    why = f"what the exporter wrote runs at no shape: {str(e).splitlines()[0][-120:]}"
                else:
                    return ""
    except OnnxcompError as e:
        why = f"what the exporter wrote does not load: {str(e).splitlines()[0][-120:]}"
    return why


def tolerance(source: Graph) -> float:
    """Relative difference that is still noise, by the type of the weights."""
    types = {v.dtype for v in source.model.graph.initializers.values() if v.dtype is not None}
    return max((ROUNDING[t] for t in types if t in ROUNDING), default=TOLERANCE)


def counts(g: Graph) -> tuple[int, int, int]:
    """Attentions, feed-forward parts and norms that passes will see."""
    return len(blocks.attentions(g)), len(blocks.mlps(g)), len(blocks.norms(g))


def folded(a: zoo.Architecture, g: Graph) -> int:
    """How many of the norms that read nothing but parameters are no longer there; all others must be."""
    return max(0, a.constant_norms - sum(g.is_constant(n.input) for n in blocks.norms(g)))


def silent(g: Graph) -> str:
    """Places that stayed spelled out although nothing was said about them."""
    said = {d.site for d in g.declined}
    left = [s.name for s in sites(g) if s.name not in said]
    return f"{len(left)} places left without a reason, such as {left[0]}" if left else ""


def proto(g: Graph) -> Any:
    """The model as a message, for ONNX's reference evaluator."""
    return ir.to_proto(g.model)


def signature(g: Graph) -> Counter[str]:
    """Counts of the operators that make floats from the inputs, outside mask and position arithmetic.

    What reads parameters alone is not counted: a tool may compute it beforehand, and a runtime does so when it loads.
    """
    g.infer_shapes()
    alive = set(g.inputs)
    for n in g.nodes():
        if any(v in alive for v in n.inputs):
            alive.update(n.outputs)
    made = (n for n in g.nodes() if n.op_type not in SIDE and n.outputs[0].dtype == ir.DataType.FLOAT)
    return Counter(n.op_type for n in made if n.outputs[0] in alive)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def distance(a: zoo.Architecture, source: Graph, raised: Graph) -> tuple[float, int]:
    """Largest relative difference on rows that see a key, and the number of shapes where the source runs at all.

    Where a source does not run (torch's own opset 23 is refused at some shapes) the raised graph must still run.
    """
    worst, compared = 0.0, 0
    with Session(raised) as after:
        before = _session(source)
        for batch, length, padding in SHAPES:
            x = zoo.feeds(a, batch, length, padding)
            got = after.run(taken(raised, x))
            want = _run(before, taken(source, x))
            if want is not None:
                compared += 1
                worst = max(worst, *(_apart(a, x, want[name], got[name]) for name in want))
        if before is not None:
            before.close()
    return worst, compared


class FusedMatMul(OpRun):
    """What ONNX Runtime's sessions write for scaled products; the reference evaluator has no such operator."""

    op_domain = "com.microsoft"

    def _run(self, a, b, alpha=1.0, transA=0, transB=0, **_):  # type: ignore[no-untyped-def]
        return (alpha * (np.swapaxes(a, -1, -2) if transA else a) @ (np.swapaxes(b, -1, -2) if transB else b),)


class QuickGelu(OpRun):
    """`x * sigmoid(alpha * x)`."""

    op_domain = "com.microsoft"

    def _run(self, x, alpha=1.702):  # type: ignore[no-untyped-def]
        return (x / (1 + np.exp(-alpha * x)),)


def from_exact(a: zoo.Architecture, source: Graph, raised: Graph) -> float:
    """Largest relative difference of the raised graph to its source in double precision, on ONNX's reference."""
    exact, worst = ReferenceEvaluator(proto(retyped(source, DOUBLE)), new_ops=[FusedMatMul, QuickGelu]), 0.0
    with Session(raised) as after:
        for shape in SHAPES:
            x = zoo.feeds(a, *shape)
            wide = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in taken(source, x).items()}
            want: Any = exact.run(None, wide)
            got = after.run(taken(raised, x))
            for v, y in zip(source.outputs, want, strict=True):
                worst = max(worst, _apart(a, x, y, got[str(v.name)].astype(np.float64)))
    return worst


def _session(g: Graph) -> Session | None:
    try:
        return Session(g)
    except OnnxcompError:
        return None


def _run(s: Session | None, x: Mapping[str, Any]) -> Mapping[str, Any] | None:
    try:
        return None if s is None else s.run(x)
    except OnnxcompError:
        return None


def taken(g: Graph, x: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a graph has; exporters drop those that are not read."""
    names = {v.name for v in g.inputs}
    return {k: v for k, v in x.items() if k in names}


def _apart(a: zoo.Architecture, x: Mapping[str, Any], want: Any, got: Any) -> float:
    """Difference relative to the largest element, over the rows that are defined."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    rows = defined(a, x, want.shape)
    if want.dtype.kind not in "fc" or not rows.any():
        return 0.0 if np.array_equal(want, got) else float("inf")
    want, got = want[rows].astype(np.float64), got[rows].astype(np.float64)
    return float(np.max(np.abs(want - got)) / max(float(np.max(np.abs(want))), 1e-30))


def defined(a: zoo.Architecture, x: Mapping[str, Any], shape: tuple[int, ...]) -> Any:
    """Which rows `[batch]` or `[batch, sequence]` of an output depend on rows that see a key alone."""
    seen = visible(a, x)
    if seen is None or len(shape) < 2 or shape[0] != seen.shape[0]:
        return np.ones(shape[:1], bool)
    if a.past and len(shape) == 4:  # keys and values `[batch, heads, sequence, width]`
        return np.broadcast_to(seen[:, None, :], shape[:3])
    if a.past:
        seen = seen[:, -x["input_ids"].shape[1] :]
    if len(shape) > 2 and shape[1] == seen.shape[1]:
        return seen
    return seen.all(1)  # pooled from a row that is not known


def visible(a: zoo.Architecture, x: Mapping[str, Any]) -> Any:
    """Which positions `[batch, sequence]` see at least one key in every layer; None without a padding mask.

    Decoders behind an encoder get no mask of their own, and every sample has a key: all their rows see one.
    """
    mask = x.get("attention_mask")
    if mask is None or "decoder_input_ids" in x:
        return None
    keys = mask.astype(bool)
    i, j = np.arange(keys.shape[1])[:, None], np.arange(keys.shape[1])[None, :]
    reach = j <= i if a.causal else np.ones_like(j <= i)
    if a.window:
        reach = reach & ((i - j < a.window) if a.causal else (np.abs(i - j) <= a.window))
    seen = (reach[None] & keys[:, None, :]).any(-1)
    return seen & keys if a.square else seen


# ---- other element types ---------------------------------------------------------------------------------------------


def retyped(g: Graph, types: Mapping[ir.DataType, ir.DataType]) -> Graph:
    """A copy that computes in other types: constants, recorded types, casts and typed attributes are changed."""
    other = g.clone()
    for graph in other.model.graphs():
        for v in [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]:
            if v.dtype in types:
                v.type = ir.TensorType(types[v.dtype])
            if v.const_value is not None and v.is_initializer():
                v.const_value = _converted(v.const_value, types)
        for node in graph:
            for name, attr in list(node.attributes.items()):
                _retype_attribute(node, name, attr, types)
    return Graph(other.model)


def _retype_attribute(node: ir.Node, name: str, attr: ir.Attr, types: Mapping[ir.DataType, ir.DataType]) -> None:
    if name in ("to", "dtype") and attr.type == ir.AttributeType.INT and ir.DataType(attr.as_int()) in types:
        node.attributes[name] = ir.AttrInt64(name, int(types[ir.DataType(attr.as_int())]))
    elif attr.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, _converted(attr.as_tensor(), types))
    elif node.op_type == "Constant" and attr.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        number = np.array(attr.value, np.float32)
        del node.attributes[name]
        node.attributes["value"] = ir.AttrTensor("value", _converted(ir.tensor(number), types))


def _converted(t: ir.TensorProtocol, types: Mapping[ir.DataType, ir.DataType]) -> ir.TensorProtocol:
    if t.dtype not in types:
        return t
    return ir.tensor(np.asarray(t.numpy()).astype(types[t.dtype].numpy()), name=t.name)
