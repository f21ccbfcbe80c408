"""The edits behind `Graph.take`: constants, sizes, attributes, norms and interface of one group shrink together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.graph import interface
from onnxcomp.graph.groups import AttrSlot, Entries, Group, IndexSlot, NormSlot, Slot
from onnxcomp.maths import Array

if TYPE_CHECKING:
    from onnxcomp.graph.graph import Graph

__all__ = ["cut_group"]

EPSILON = {"RMSNormalization": 1e-5}  # the default of the ONNX operator


def cut_group(g: Graph, group: Group, keep: Array) -> None:
    """Remove all units but `keep`; all places are looked up and checked before the first edit."""
    nodes = {str(n.name): n for n in g.nodes()}
    values = _values(g, nodes)
    for name in _referenced_nodes(group):
        if name not in nodes:
            raise ModelError(f"the graph has no node named '{name}', which the group cuts; compute the group again")
    for entries in group.entries:
        if any(nodes[entries.node].outputs[0] not in nodes[u].inputs for u in entries.users):
            raise ModelError(f"the users of '{entries.node}' have changed; compute the group again")
    for slot in group.slots:
        if slot.value not in values:
            raise ModelError(f"the graph has no constant named '{slot.value}', which the group cuts")
    tensors = {s.value: g.tensor(values[s.value]) for s in group.slots}
    group.check({name: tuple(t.shape.numpy()) for name, t in tensors.items() if t is not None})
    for slots in _slots_by_constant(group.slots):
        _cut_constant(g, values[slots[0].value], slots, keep, nodes)
    for index in group.indices:
        _renumber(g, nodes[index.node], index, keep)
    for norm in group.norms:
        _rescale(g, nodes[norm.node], norm, keep)
    for entries in group.entries:
        _write_counts(g, _copy_for_users(g, nodes[entries.node], [nodes[u] for u in entries.users]), entries, keep)
    for attr in group.attrs:
        g.set_attr(nodes[attr.node], **{attr.name: int(Slot("", 0, attr.units).kept(keep).sum())})
    _interface(g, group, keep)
    g.forget_shapes()


def _values(g: Graph, nodes: dict[str, ir.Node]) -> dict[str, ir.Value]:
    """Every constant by name."""
    initializers = {str(v.name): v for v in g.model.graph.initializers.values()}
    constants = {str(n.outputs[0].name): n.outputs[0] for n in nodes.values() if n.op_type == "Constant"}
    return initializers | constants


def _referenced_nodes(group: Group) -> set[str]:
    edits: tuple[Entries | AttrSlot | NormSlot | IndexSlot, ...] = (
        *group.entries, *group.attrs, *group.norms, *group.indices,
    )  # fmt: skip
    return {x.node for x in edits} | {u for users in _user_lists(group) for u in users}


def _user_lists(group: Group) -> list[tuple[str, ...]]:
    return [*(s.users for s in group.slots), *(e.users for e in group.entries)]


def _slots_by_constant(slots: tuple[Slot, ...]) -> list[list[Slot]]:
    """Slots by constant and users, so that each constant is written once."""
    groups: dict[tuple[str, tuple[str, ...]], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((slot.value, slot.users), []).append(slot)
    return list(groups.values())


def _cut_constant(g: Graph, v: ir.Value, slots: list[Slot], keep: Array, nodes: dict[str, ir.Node]) -> None:
    """Remove positions along each axis of one constant; users that the slots do not name keep the full one."""
    a = g.array(v)
    for slot in slots:
        a = np.compress(slot.kept(keep), a, axis=slot.axis)
    g.put(v, a, users=[nodes[u] for u in slots[0].users] or None)


def _copy_for_users(g: Graph, node: ir.Node, users: list[ir.Node]) -> ir.Node:
    """The node itself, or a copy for the given users."""
    out = node.outputs[0]
    if not users:
        return node
    copy = g.op(node.op_type, *node.inputs, name=f"{node.name}_cut", like=out)
    g.replace(out, copy, users=users)
    producer = copy.producer()
    assert producer is not None
    return producer


def _write_counts(g: Graph, node: ir.Node, entries: Entries, keep: Array) -> None:
    """Write the sizes after the cut into an integer input of a node."""
    v = node.inputs[entries.input] if entries.input < len(node.inputs) else None
    counts = {s.index: s.count(keep) for s in entries.sizes}
    if v is None:
        g.set_input(node, entries.input, g.constant(np.array([counts[i] for i in sorted(counts)], np.int64), "sizes"))
        g.set_attr(node, num_outputs=None)
        return
    if g.is_constant(v):
        a = g.array(v).copy()
        for i, n in counts.items():
            a.reshape(-1)[i] = n
        g.put(v, a, users=[node])
        return
    is_counted = np.array([i in counts for i in range(entries.length)])
    counted = np.array([counts.get(i, 0) for i in range(entries.length)], np.int64)
    sizes = _times_lengths(g, counted, entries)
    g.set_input(node, entries.input, g.op("Where", is_counted, sizes, v, name=f"{node.name}_sizes", like=v))


def _times_lengths(g: Graph, counts: Array, entries: Entries) -> Array | ir.Value:
    """The sizes; those of repeated units are multiplied by lengths read from the graph inputs at run time."""
    sizes: Array | ir.Value = counts
    for size in entries.sizes:
        for name, axis in size.times:
            length = g.op("Shape", g.value(name), start=axis, end=axis + 1)
            at_index = np.arange(entries.length) == size.index
            sizes = g.op("Mul", sizes, g.op("Where", at_index, length, np.ones(entries.length, np.int64)))
    return sizes


def _renumber(g: Graph, node: ir.Node, index: IndexSlot, keep: Array) -> None:
    """Renumber positions on a cut axis; entries that are cut themselves are removed by their own slot."""
    v = node.inputs[index.input]
    kept = Slot("", 0, index.units).kept(keep)
    new_positions = np.cumsum(kept) - 1
    a = g.array(v)
    new = new_positions[np.where(a < 0, a + kept.size, a)].astype(a.dtype)
    assert v is not None
    g.put(v, np.maximum(new, 0), users=[node])


def _rescale(g: Graph, node: ir.Node, norm: NormSlot, keep: Array) -> None:
    """Scale gain and epsilon so that the norm equals one over zeroed channels (see `NormSlot`)."""
    kept = Slot("", 0, norm.units).kept(keep)
    share = kept.sum() / kept.size
    gain = node.inputs[1]
    assert gain is not None
    a = g.array(gain)
    g.put(gain, (a.astype(np.float64) / np.sqrt(share)).astype(a.dtype), users=[node])
    epsilon = node.attributes.get_float("epsilon", EPSILON[node.op_type])
    g.set_attr(node, epsilon=float(epsilon / share))


def _interface(g: Graph, group: Group, keep: Array) -> None:
    """Shrink the axes of graph inputs and outputs, and record the new interface."""
    ports = {str(v.name): v for v in (*g.model.graph.inputs, *g.model.graph.outputs)}
    for io in group.io:
        v = ports[io.value]
        if v.shape is not None:
            count = int(Slot("", 0, io.units).kept(keep).sum())
            v.shape = ir.Shape([count if i == io.axis else d for i, d in enumerate(v.shape)])
    if group.io:
        g.interface = interface.interface(g.model.graph)
