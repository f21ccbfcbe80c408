"""What two models have otherwise: nodes, constants, shapes, types and bytes, by structure and content, not by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.graph.postorder import postorder

__all__ = ["Change", "ModelDiff", "NodeAt", "diff"]


@dataclass(frozen=True)
class NodeAt:
    """A node by its name and operator type."""

    name: str
    op: str


@dataclass(frozen=True)
class Change:
    """A node of the first model and the one in its place in the second, with what is otherwise, in words."""

    first: NodeAt
    second: NodeAt
    what: tuple[str, ...]


@dataclass(frozen=True)
class ModelDiff:
    """Pairs are of the first and the second model.

    `same` counts nodes that are equal up to names; `interface` says what inputs, outputs and operator sets have
    otherwise. `constants` counts those of equal content, and those that only one has; `nbytes` are those of constants
    by element type, `operators` counts nodes by type where the numbers differ.
    """

    same: int
    changed: tuple[Change, ...]
    removed: tuple[NodeAt, ...]
    added: tuple[NodeAt, ...]
    interface: tuple[str, ...]
    operators: dict[str, tuple[int, int]]
    constants: tuple[int, int, int]
    nbytes: dict[str, tuple[int, int]]

    @property
    def equal(self) -> bool:
        """Whether both are one model, up to names of nodes and inner values and their order."""
        return not (self.changed or self.removed or self.added or self.interface or any(self.constants[1:]))

    def json(self) -> dict[str, Any]:
        """Plain values."""
        return {"equal": self.equal, **dataclasses.asdict(self)}


def diff(first: Graph, second: Graph, *, raised: bool = False) -> ModelDiff:
    """Compare two models by structure; `raised` compares their canonical forms, so that exporters' spelling is none."""
    a, b = (_raised(g) if raised else g for g in (first, second))
    left, right = _Side(a), _Side(b)
    pairs, removed, added = _paired(left, right)
    places = {left.nodes[i]: right.nodes[j] for i, j in pairs}
    changes = [c for i, j in pairs if (c := _change(left, i, right, j, places)).what]
    counts = [Counter(n.op_type for n in s.nodes) for s in (left, right)]
    ops = sorted(counts[0].keys() | counts[1].keys())
    shared = (left.contents & right.contents).total()
    alone = (left.contents.total() - shared, right.contents.total() - shared)
    types = sorted(left.nbytes.keys() | right.nbytes.keys())
    return ModelDiff(
        len(pairs) - len(changes),
        tuple(changes),
        tuple(_at(left.nodes[i]) for i in removed),
        tuple(_at(right.nodes[j]) for j in added),
        (*_interface(a, b), *_rewired_outputs(a, b, places)),
        {op: (counts[0][op], counts[1][op]) for op in ops if counts[0][op] != counts[1][op]},
        (shared, *alone),
        {t: (left.nbytes[t], right.nbytes[t]) for t in types},
    )


def _raised(g: Graph) -> Graph:
    work = g.clone()
    canonicalize(work)
    work.sweep()
    return work


def _at(node: ir.Node) -> NodeAt:
    return NodeAt(str(node.name), node.op_type if not node.domain else f"{node.domain}::{node.op_type}")


class _Side:
    """One model: its nodes from the inputs on, what each looks like, and its constants by content."""

    def __init__(self, g: Graph) -> None:
        self.g = g
        listed = [n for n in g.model.graph if n.op_type != "Constant"]
        followed = postorder(g, lambda n: (x for x in n.inputs if x is not None))
        known = [n for n in followed if n.op_type != "Constant"]
        self.nodes = [*known, *(n for n in listed if n not in set(known))]
        self.keys: list[Hashable] = [self._key(n) for n in self.nodes]
        self.contents, self.nbytes = Counter[str](), Counter[str]()
        for t in {id(t): t for n in self.nodes for x in n.inputs if (t := g.tensor(x)) is not None}.values():
            self.contents[_content(t)] += 1
            self.nbytes[t.dtype.name] += t.nbytes

    def _key(self, node: ir.Node) -> Hashable:
        """What a node is, without names and without what its constants hold."""
        constants = tuple(
            (at, t.dtype.name, tuple(t.shape.numpy()))
            for at, x in enumerate(node.inputs)
            if (t := self.g.tensor(x)) is not None
        )
        return node.domain, node.op_type, tuple(sorted(_attributes(self.g, node).items())), constants, len(node.outputs)


def _content(t: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(f"{t.dtype.name}{tuple(t.shape.numpy())}".encode())
    digest.update(t.tobytes())
    return digest.hexdigest()


def _attributes(g: Graph, node: ir.Node) -> dict[str, str]:
    """The attributes of a node as text, those that it leaves to their defaults too."""
    given = {str(k): _value(a) for k, a in node.attributes.items()}
    return _defaults(node.op_type, node.domain, g.model.opset_imports.get(node.domain, 1)) | given


@functools.cache
def _defaults(op: str, domain: str, version: int) -> dict[str, str]:
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return {}
    known = {k: a.default_value for k, a in schema.attributes.items() if a.default_value.type}
    return {k: _value(ir.serde.deserialize_attribute(x)) for k, x in known.items()}


def _value(a: ir.Attr) -> str:
    """An attribute as text; of a graph or tensor the hash of its bytes."""
    if a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR):
        content = ir.serde.serialize_attribute(a).SerializeToString(deterministic=True)
        return f"{a.type.name.lower()} {hashlib.sha256(content).hexdigest()[:8]}"
    return f"{a.value:.6g}" if a.type is ir.AttributeType.FLOAT else str(a.value)


def _paired(a: _Side, b: _Side) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Nodes in each other's place; first those that look alike, then of one operator type in between; and the rest."""
    pairs, removed, added = list[tuple[int, int]](), list[int](), list[int]()
    for equal, i, j, k, m in _opcodes(a.keys, b.keys):
        if equal:
            pairs += zip(range(i, j), range(k, m), strict=True)
            continue
        for alike, i2, j2, k2, m2 in _opcodes([n.op_type for n in a.nodes[i:j]], [n.op_type for n in b.nodes[k:m]]):
            if alike:
                pairs += zip(range(i + i2, i + j2), range(k + k2, k + m2), strict=True)
            else:
                removed += range(i + i2, i + j2)
                added += range(k + k2, k + m2)
    return pairs, removed, added


def _opcodes(a: Sequence[Hashable], b: Sequence[Hashable]) -> Iterator[tuple[bool, int, int, int, int]]:
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        yield kind == "equal", i, j, k, m


def _change(a: _Side, i: int, b: _Side, j: int, places: Mapping[ir.Node, ir.Node]) -> Change:
    """What two nodes in each other's place have otherwise."""
    x, y = a.nodes[i], b.nodes[j]
    before, after = _attributes(a.g, x), _attributes(b.g, y)
    what = [
        f"{k}: {before.get(k, 'none')} > {after.get(k, 'none')}"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k)
    ]
    if len(x.inputs) != len(y.inputs):
        what.append(f"inputs: {len(x.inputs)} > {len(y.inputs)}")
    for at, (v, w) in enumerate(zip(x.inputs, y.inputs, strict=False)):
        if said := _constants(a.g.tensor(v), b.g.tensor(w)) or _rewired(v, w, places):
            what.append(f"input {at}: {said}")
    for at, (v, w) in enumerate(zip(x.outputs, y.outputs, strict=False)):
        if _differ(v, w):
            what.append(f"output {at}: {_typed(v)} > {_typed(w)}")
    return Change(_at(x), _at(y), tuple(what))


def _constants(t: ir.TensorProtocol | None, u: ir.TensorProtocol | None) -> str:
    """What two constants have otherwise, empty if nothing."""
    if t is None or u is None:
        return "" if t is u else ("computed > constant" if t is None else "constant > computed")
    kinds = [f"{x.dtype.name} {list(x.shape.numpy())}" for x in (t, u)]
    if kinds[0] != kinds[1]:
        return " > ".join(kinds)
    if t is u or t.tobytes() == u.tobytes():
        return ""
    if not t.dtype.is_floating_point():
        share = float(np.mean(t.numpy() != u.numpy()))
        return f"{kinds[0]}, {share:.2%} of entries differ"
    old, new = (np.asarray(x.numpy(), np.float64) for x in (t, u))
    size = float(np.linalg.norm(old))
    return f"{kinds[0]}, relative difference {float(np.linalg.norm(new - old)) / max(size, 1e-30):.2e}"


def _rewired(v: ir.Value | None, w: ir.Value | None, places: Mapping[ir.Node, ir.Node]) -> str:
    """That two inputs read values which are not in each other's place, though both have one there; empty if not."""
    if v is None or w is None:
        return "" if v is w else ("none > given" if v is None else "given > none")
    made, other = v.producer(), w.producer()
    if made is None and other is None:
        there = (v.is_graph_input() or w.is_graph_input()) and v.name != w.name
    elif made is None or other is None:
        there = made in places or other in set(places.values())
    else:
        known = made in places and other in set(places.values())
        there = known and (places[made] is not other or v.index() != w.index())
    return f"reads {v.name} > {w.name}, which is another value" if there else ""


def _rewired_outputs(a: Graph, b: Graph, places: Mapping[ir.Node, ir.Node]) -> list[str]:
    ends = {str(v.name): v for v in b.model.graph.outputs}
    pairs = ((v, ends[str(v.name)]) for v in a.model.graph.outputs if str(v.name) in ends)
    return [f"output '{v.name}' is another value" for v, w in pairs if _rewired(v, w, places)]


def _differ(v: ir.Value, w: ir.Value) -> bool:
    """Whether what is recorded of two values contradicts; names of open axes are names, so they do not count."""
    if v.dtype is not None and w.dtype is not None and v.dtype != w.dtype:
        return True
    if v.shape is None or w.shape is None:
        return False
    sizes = zip(v.shape, w.shape, strict=False)
    return len(v.shape) != len(w.shape) or any(isinstance(m, int) and isinstance(n, int) and m != n for m, n in sizes)


def _typed(v: ir.Value) -> str:
    shape = "?" if v.shape is None else f"[{', '.join(str(d) if isinstance(d, int) else '_' for d in v.shape)}]"
    return f"{v.dtype.name if v.dtype is not None else '?'} {shape}"


def _interface(a: Graph, b: Graph) -> list[str]:
    """What inputs, outputs and operator sets have otherwise, in words."""
    said = []
    for kind in ("inputs", "outputs"):
        old, new = ({str(v.name): _declared(v) for v in getattr(g.model.graph, kind)} for g in (a, b))
        names = [*old, *(n for n in new if n not in old)]
        said += [
            f"{kind[:-1]} '{n}': {old.get(n, 'none')} > {new.get(n, 'none')}" for n in names if old.get(n) != new.get(n)
        ]
        if list(old) != list(new) and old.keys() == new.keys():
            said.append(f"{kind} in another order")
    sets = [g.model.opset_imports for g in (a, b)]
    said += [
        f"operator set '{d or 'ai.onnx'}': {sets[0].get(d, 'none')} > {sets[1].get(d, 'none')}"
        for d in sorted(sets[0].keys() | sets[1].keys())
        if sets[0].get(d) != sets[1].get(d)
    ]
    return said


def _declared(v: ir.Value) -> str:
    shape = "?" if v.shape is None else f"[{', '.join(map(str, v.shape))}]"
    return f"{v.dtype.name if v.dtype is not None else '?'} {shape}"
