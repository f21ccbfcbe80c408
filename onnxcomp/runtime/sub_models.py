"""The part of a graph that computes some of its values, as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp.graph import Graph
from onnxcomp.graph.extract import extract_subgraph
from onnxcomp.graph.operators import has_body
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import add_outputs, complete_cache_outputs

__all__ = ["segment"]


def segment(graph: Graph, given: Mapping[str, Array], names: Sequence[str]) -> Graph:
    """The sub-model that computes the named values from the graph's inputs and the carried values; tensors are shared.

    `given` holds an example array of each carried value, for the type and rank of the new input of that name. Only the
    nodes in between are copied, unless there are bodies or functions: copying all took longer than running the segment.
    """
    graph.sort()
    if graph.model.functions or any(map(has_body, graph.model.graph)):
        part = graph.clone()
        part.model.graph.outputs.clear()
    else:
        part = extract_subgraph(graph, _between(graph, given, names), [])
        part.model.metadata_props.update(graph.model.metadata_props)
        _complete_inputs(part, graph)
    _feed(part, given)
    add_outputs(part.model, names)
    RemoveUnusedNodesPass()(part.model)
    complete_cache_outputs(part.model)
    return part


def _between(graph: Graph, given: Mapping[str, Array], names: Sequence[str]) -> list[ir.Node]:
    """The nodes on the way from the inputs and the given values to the named ones."""
    wanted, needed, nodes = set(names), set[ir.Value](), []
    for node in reversed(graph.model.graph):
        if any(v.name in wanted or (v in needed and v.name not in given) for v in node.outputs):
            nodes.append(node)
            needed.update(x for x in node.inputs if x is not None)
    return nodes


def _complete_inputs(part: Graph, graph: Graph) -> None:
    """Give a part all inputs of its graph, so that it takes the same data."""
    has = {v.name for v in part.inputs}
    missing = (v for v in graph.inputs if v.name not in has)
    part.model.graph.inputs.extend(ir.Value(name=v.name, type=v.type, shape=v.shape) for v in missing)


def _feed(part: Graph, given: Mapping[str, Array]) -> None:
    """Make the given values inputs of the types and ranks of the examples."""
    inputs = {v.name: v for v in part.model.graph.inputs}
    computed = {v.name: v for node in part.model.graph for v in node.outputs if v.name in given}
    for name, example in given.items():
        new = inputs.get(name) or ir.Value(name=name)
        new.type, new.shape = ir.TensorType(ir.DataType.from_numpy(example.dtype)), ir.Shape([None] * example.ndim)
        if name in computed:
            computed[name].name = f"{name}_computed"
            computed[name].replace_all_uses_with(new)
        if name not in inputs:
            part.model.graph.inputs.append(new)
