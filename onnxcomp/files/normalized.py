"""What runtimes accept and the rest of the package need not know: a parsed model in the one form it is loaded in.

Done on the protobuf, before anything else reads it: nodes in topological order, the default domain under one name, the
operator sets that nodes use declared, graphs named, names of nodes in UTF-8, negative sizes as open axes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from typing import Any

import onnx

from onnxcomp.errors import ModelError
from onnxcomp.files.cache_shapes import settle_caches

__all__ = ["DOMAINS", "called", "free_names", "normalize", "subgraphs"]

Counts = dict[str, int]
ALIAS = "ai.onnx"  # what the default domain is called as well
OLDEST_IR = 4  # the first IR version whose initializers need not be listed as inputs
# Domains that ONNX Runtime knows without a declaration; operators of `com.microsoft` have one version.
DOMAINS = (
    *("", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft"),
    *("com.microsoft.experimental", "com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten"),
)


def normalize(proto: onnx.ModelProto) -> None:
    """Bring a model into the form in which it is loaded, in place; raises `ModelError` for a cycle."""
    proto.ir_version = max(proto.ir_version, OLDEST_IR)
    _domains(proto.opset_import, proto.graph.node, {(f.domain, f.name) for f in proto.functions})
    _graph(proto.graph)
    _distinct(proto.graph)
    for function in proto.functions:
        function.domain = _plain(function.domain)
        _domains(function.opset_import, function.node, {(f.domain, f.name) for f in proto.functions})
        _nodes(function.node)


# ---- walking ---------------------------------------------------------------------------------------------------------


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in the attributes of a node, such as the branches of an If."""
    for a in node.attribute:
        if a.HasField("g"):
            yield a.g
        yield from a.graphs


def free_names(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads from the graph it stands in: its inputs, and what its subgraphs take from there."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        own.update(name for n in graph.node for name in n.output)
        yield from (name for n in graph.node for name in free_names(n) if name not in own)
        yield from (v.name for v in graph.output if v.name not in own)


def called(node: onnx.NodeProto) -> str:
    """A node in an error message: by its name, or by what it computes where it has none."""
    name = node.name or next(filter(None, node.output), "")
    return f"node '{name}' ({node.op_type})" if name else f"an unnamed node ({node.op_type})"


# ---- operator sets ---------------------------------------------------------------------------------------------------


def _plain(domain: str) -> str:
    return "" if domain == ALIAS else domain


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _all_nodes(graph.node)


def _domains(imports: Any, nodes: Iterable[onnx.NodeProto], functions: set[tuple[str, str]]) -> None:
    """One declaration for each operator set; the first one counts, and those that the runtime implies are written."""
    used = set()
    for node in _all_nodes(nodes):
        if node.domain == ALIAS:
            node.domain = ""
        name: object = node.name
        if isinstance(name, bytes):  # what is no UTF-8 is read as bytes, and runtimes do not mind
            node.name = name.decode(errors="replace")
        if (node.domain, node.op_type) not in functions:
            used.add(node.domain)
    versions: dict[str, int] = {}
    for declared in imports:
        versions[_plain(declared.domain)] = declared.version  # the last one counts, as in the runtime
    for domain in sorted(used - set(versions)):
        if domain in DOMAINS:
            versions[domain] = _newest(domain)
    del imports[:]
    for domain, version in versions.items():
        imports.add(domain=domain, version=version)


def _newest(domain: str) -> int:
    """The newest version of a domain's operators, which is what a runtime takes where none is declared."""
    if domain == "":
        return onnx.defs.onnx_opset_version()
    schemas = onnx.defs.get_all_schemas_with_history()
    return max((s.since_version for s in schemas if s.domain == domain), default=1)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _graph(graph: onnx.GraphProto) -> None:
    graph.name = graph.name or "graph"
    _keep(graph.initializer, lambda t: t.name)  # no node can read what has no name
    _keep(graph.input, lambda v: v.name)
    stored = {t.name for t in graph.initializer}
    _keep(graph.value_info, lambda v: v.name not in stored)  # the tensor knows its own type and shape
    given = {t.name: _type_of(t) for t in graph.initializer}
    given.update((v.name, v.type) for v in graph.input)
    for v in graph.output:
        if v.name in given:  # an input or a constant that is an output as well: that is what the runtime gives
            v.type.CopyFrom(given[v.name])
    for v in itertools.chain(graph.input, graph.output, graph.value_info):
        _open_axes(v.type)
    for v in graph.input:
        _two_names(v.type.tensor_type)
    _nodes(graph.node)
    settle_caches(graph)


def _type_of(t: onnx.TensorProto) -> onnx.TypeProto:
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = t.data_type
    kind.tensor_type.shape.SetInParent()
    for size in t.dims:
        kind.tensor_type.shape.dim.add(dim_value=size)
    return kind


def _keep(items: Any, wanted: Any) -> None:
    for i in reversed([i for i, x in enumerate(items) if not wanted(x)]):
        del items[i]


def _open_axes(kind: onnx.TypeProto) -> None:
    """Converters write -1 for a size that is known at run time only."""
    for field in ("sequence_type", "optional_type"):
        if kind.HasField(field):
            _open_axes(getattr(kind, field).elem_type)
    if kind.HasField("tensor_type"):
        for d in kind.tensor_type.shape.dim:
            if d.HasField("dim_value") and d.dim_value < 0:
                d.ClearField("dim_value")


def _two_names(kind: onnx.TypeProto.Tensor) -> None:
    """Ids and masks `[n, n]` are a slip of who named the axes, and runtimes take any sizes there."""
    if kind.elem_type in (onnx.TensorProto.INT32, onnx.TensorProto.INT64) and len(kind.shape.dim) == 2:
        first, second = kind.shape.dim
        if first.dim_param and first.dim_param == second.dim_param:
            second.ClearField("dim_param")


def _distinct(graph: onnx.GraphProto) -> None:
    """Give what subgraphs compute names of its own: two branches of an If may use the same, shape inference may not."""
    taken = dict.fromkeys((v.name for v in (*graph.input, *graph.initializer)), 1)
    taken.update((name, 1) for node in graph.node for name in node.output)
    named = {node.name: 1 for node in graph.node}
    around = frozenset(taken)
    for node in graph.node:
        for inner in subgraphs(node):
            _rename(inner, {}, taken, named, around)


def _rename(
    graph: onnx.GraphProto, outer: Mapping[str, str], taken: Counts, named: Counts, around: frozenset[str]
) -> None:
    """Rename what a graph defines and is taken already; `outer` are the new names of values around it.

    A node may not give what has a name of a graph `around`: that stays, and is refused later.
    """
    new = dict(outer)
    own = around | {v.name for v in (*graph.input, *graph.initializer)} | {x for n in graph.node for x in n.output}
    for v in (*graph.input, *graph.initializer):
        new[v.name] = v.name = _fresh(v.name, taken)
    for node in graph.node:
        node.name = _fresh(node.name, named)
        node.input[:] = [new.get(x, x) for x in node.input]
        for inner in subgraphs(node):
            _rename(inner, new, taken, named, own)
        for i, name in enumerate(node.output):
            new[name] = node.output[i] = name if name in around else _fresh(name, taken)
    for v in (*graph.value_info, *graph.output):
        v.name = new.get(v.name, v.name)


def _fresh(name: str, taken: Counts) -> str:
    """A name that nothing has yet; none stays none. `taken` holds the last number tried with each name."""
    found = name
    while found and found in taken:
        taken[name] += 1
        found = f"{name}_{taken[name]}"
    taken[found] = 1
    return found


def _nodes(nodes: MutableSequence[onnx.NodeProto]) -> None:
    for node in nodes:
        for graph in subgraphs(node):
            _graph(graph)
    _sort(nodes)


def _sort(nodes: Any) -> None:
    """Sort nodes topologically in linear time, without moving any that need not be; raises `ModelError` for a cycle."""
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [{producer[name] for name in free_names(node) if name in producer} for node in nodes]
    if all(max(before, default=-1) < i for i, before in enumerate(needs)):
        return
    users: list[list[int]] = [[] for _ in needs]
    for i, before in enumerate(needs):
        for j in before:
            users[j].append(i)
    waiting = [len(before) for before in needs]
    ready = [i for i, n in enumerate(waiting) if n == 0]
    place: dict[int, int] = {}
    while ready:
        i = heapq.heappop(ready)
        place[i] = len(place)
        for j in users[i]:
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(ready, j)
    if len(place) < len(needs):
        stuck = next(i for i in range(len(needs)) if i not in place)
        raise ModelError(f"{called(nodes[stuck])} is part of a cycle, or reads what one computes")
    order = iter([place[i] for i in range(len(needs))])
    nodes.sort(key=lambda _: next(order))
