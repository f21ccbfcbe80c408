"""The content of a graph: its hash, the key of everything that is cached about it, and whether two have the same."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from onnxcomp.graph.graph import Graph

__all__ = ["content_hash", "same_content"]


def content_hash(g: Graph) -> str:
    """SHA-256 over structure and weights, hex; weights in files are read once, tensor by tensor."""
    digest = hashlib.sha256()
    bare = g.model.clone()
    for v in bare.graph.initializers.values():
        if v.const_value is not None:
            digest.update(f"{v.name}{v.const_value.dtype}{v.const_value.shape}".encode())
            digest.update(v.const_value.tobytes())
            t = v.const_value
            v.const_value = ir.ExternalTensor("x", 0, 0, t.dtype, shape=ir.Shape([0]), name=str(v.name))
    digest.update(ir.serde.serialize_model(bare).SerializeToString(deterministic=True))
    return digest.hexdigest()


def same_content(a: Graph, b: Graph) -> bool:
    """Whether two graphs have the same nodes (in any order) and weights; tensors that both share are not read."""
    tensors = [{n: v.const_value for n, v in g.model.graph.initializers.items()} for g in (a, b)]
    if tensors[0].keys() != tensors[1].keys() or _structure(a) != _structure(b):
        return False
    pairs = ((t, tensors[1][name]) for name, t in tensors[0].items())
    return all(x is y or (x is not None and y is not None and x.tobytes() == y.tobytes()) for x, y in pairs)


def _structure(g: Graph) -> list[object]:
    """Parts of the graph that are to be equal, without the content of its weights and recorded shapes."""
    bare = g.model.clone()
    for name, v in bare.graph.initializers.items():
        if (t := v.const_value) is not None:
            v.const_value = ir.ExternalTensor("x", 0, 0, t.dtype, shape=ir.Shape(t.shape.numpy()), name=name)
    proto = ir.serde.serialize_model(bare)
    graph, opsets = proto.graph, sorted((o.domain, o.version) for o in proto.opset_import)
    free = [sorted(x.SerializeToString(deterministic=True) for x in xs) for xs in (graph.node, graph.initializer)]
    fixed = [[x.SerializeToString(deterministic=True) for x in xs] for xs in (graph.input, graph.output)]
    return [*free, *fixed, opsets]
