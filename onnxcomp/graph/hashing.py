"""The content hash of a graph: the key of everything that is cached about it."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from onnxcomp.graph.graph import Graph

__all__ = ["content_hash"]


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
