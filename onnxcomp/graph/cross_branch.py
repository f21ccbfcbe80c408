"""A decoder that makes the caches of an encoder's states itself, once: how other engines read encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.graph.extract import extract_subgraph
from onnxcomp.graph.graph import Graph
from onnxcomp.graph.operators import has_body

__all__ = ["FLAG", "STATES", "merged_decoder", "states_only"]

STATES, FLAG = "encoder_hidden_states", "use_cache_branch"
ENCODED = "last_hidden_state"
PREFIX = "cross."  # of names that come from the encoder's graph


def states_only(encoder: Graph) -> Graph:
    """A copy of an encoder without the caches that it makes of its states."""
    g = encoder.clone()
    outputs = g.model.graph.outputs
    outputs[:] = [_states_of(g)]
    g.sweep()
    return Graph(g.model, encoder.path)


def merged_decoder(encoder: Graph, decoder: Graph, crossed: Mapping[str, str]) -> Graph:
    """A copy of a decoder that takes the encoder's states and a flag, and gives the caches of the states as outputs.

    `crossed` has the encoder's output by the name of the decoder's input. Without the flag the caches are made of the
    states, by the nodes that make them in the encoder, else those that are given are passed on. Raises `ModelError`
    where they are not made of the states alone.
    """
    g, made = decoder.clone(), _made_of_states(encoder, list(crossed.values()))
    graph, inner = g.model.graph, made.model.graph
    past = [g.value(name) for name in crossed]
    readers = [[(u, i) for u, i in v.uses()] for v in past]
    states, flag = _port(STATES, made.inputs[0]), ir.Value(name=FLAG, type=ir.TensorType(ir.DataType.BOOL))
    flag.shape = ir.Shape([1])
    outputs = [made.value(f"{PREFIX}{name}") for name in crossed.values()]
    for v in list(inner.initializers.values()):
        del inner.initializers[str(v.name)]
        graph.register_initializer(v)
    for user, index in tuple(made.inputs[0].uses()):
        user.replace_input_with(index, states)
    nodes = list(inner)
    inner.outputs.clear()
    inner.remove(nodes)
    new = ir.Graph([], outputs, nodes=nodes, name="of_states")
    kept = [ir.node("Identity", [v], name=f"{PREFIX}keep_{v.name}") for v in past]
    for node, v in zip(kept, past, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{PREFIX}kept_{v.name}", v.type
    given = ir.Graph([], [n.outputs[0] for n in kept], nodes=kept, name="given")
    branch = ir.node(
        "If", [flag], {"then_branch": given, "else_branch": new}, num_outputs=len(past), name=f"{PREFIX}If"
    )
    for v, out, name, users in zip(past, branch.outputs, crossed.values(), readers, strict=True):
        out.name, out.type, out.shape = name, v.type, v.shape
        v.shape = ir.Shape([v.shape[0], v.shape[1], "encoder_sequence_length", v.shape[3]]) if v.shape else None
        for user, index in users:
            user.replace_input_with(index, out)
    graph.insert_before(graph[0], branch)
    graph.inputs[:] = _by_layer([*graph.inputs, states, flag])
    graph.outputs[:] = _by_layer([*graph.outputs, *branch.outputs])
    for domain, version in encoder.model.opset_imports.items():
        if g.model.opset_imports.setdefault(domain, version) != version:
            raise ModelError("encoder and decoder are of different operator sets, so they cannot be joined")
    return Graph(g.model, decoder.path)


def _made_of_states(encoder: Graph, names: Sequence[str]) -> Graph:
    """The nodes between the encoder's states and the caches, with names of their own."""
    states, stack = _states_of(encoder), [encoder.value(name) for name in names]
    wanted, outputs = dict[ir.Node, None](), list(stack)
    while stack:
        v = stack.pop()
        node = v.producer()
        if v is states or encoder.is_constant(v):
            continue
        if node is None:
            raise ModelError(f"the encoder's '{names[0]}' is made of its input '{v.name}', not of its states alone")
        if has_body(node):
            raise ModelError(f"the encoder's caches are made by '{node.op_type}', which holds graphs")
        if node not in wanted:
            wanted[node] = None
            stack += [x for x in node.inputs if x is not None]
    made = extract_subgraph(encoder, list(wanted), outputs)
    for node in made.model.graph:
        node.name = f"{PREFIX}{node.name}"
        for v in node.outputs:
            v.name = f"{PREFIX}{v.name}"
    for v in list(made.model.graph.initializers.values()):
        v.name = f"{PREFIX}{v.name}"
    return Graph(made.model)


def _states_of(encoder: Graph) -> ir.Value:
    found = next((v for v in encoder.outputs if v.name == ENCODED), None)
    if found is None:
        raise ModelError(f"{encoder.path}: the encoder gives no '{ENCODED}'")
    return found


def _port(name: str, like: ir.Value) -> ir.Value:
    return ir.Value(name=name, type=like.type, shape=like.shape)


def _by_layer(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Caches behind all else, layer after layer, each with its own ones first, as Optimum counts them; a flag last."""
    caches = [v for v in values if str(v.name).startswith(("past_key_values.", "present."))]
    others = [v for v in values if v not in caches]
    return sorted(others, key=lambda v: v.name == FLAG) + sorted(caches, key=_place)


def _place(v: ir.Value) -> tuple[int, bool, bool]:
    *_, layer, side, kind = str(v.name).split(".")
    return int(layer), side == "encoder", kind == "value"
