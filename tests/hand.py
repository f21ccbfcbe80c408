"""Graphs written by hand, node by node, for tests of recognition."""

import math
from collections import Counter

import numpy as np
import onnx_ir as ir

from onnxcomp.canonical import canonicalize
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session, rewritten
from tests import tiny

__all__ = ["LOWEST", "RNG", "f32", "graph", "i64", "ops", "optimized", "raised", "same", "weight"]

RNG = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)


def f32(x) -> np.ndarray:
    return np.asarray(x, np.float32)


def i64(*xs: int) -> np.ndarray:
    return np.array(xs, np.int64)


def optimized(model) -> Graph:
    """The graph after the runtime's own optimizations, weights in memory."""
    with rewritten(model) as graph:
        return Graph(ir.external_data.load_to_model(graph))


def weight(*shape: int) -> np.ndarray:
    return f32(RNG.standard_normal(shape) / math.sqrt(shape[0]))


def graph(opset: int = 18, **inputs) -> Graph:
    """An empty graph with float inputs of the given shapes; one ending in `bool` or `int` makes such an input."""
    values = []
    for name, shape in inputs.items():
        kind = {bool: ir.DataType.BOOL, int: ir.DataType.INT64}.get(shape[-1], ir.DataType.FLOAT)
        dims = [d for d in shape if d not in (bool, int)]
        values.append(ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(dims)))
    return Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": opset}, name="hand"), ir_version=10))


def raised(g: Graph, out: ir.Value, *shape, **options) -> tuple[Graph, Graph]:
    """The finished graph and its canonical form."""
    source = tiny.finish(g, out, "y", list(shape))
    new = source.clone()
    canonicalize(new, **options)
    again = new.clone()
    canonicalize(again, **options)
    assert again.edits == 0
    return source, new


def same(source: Graph, new: Graph, tolerance: float = 2e-6, **feeds) -> None:
    with Session(source) as a, Session(new) as b:
        x, y = a.run(feeds)["y"], b.run(feeds)["y"]
    assert x.shape == y.shape
    assert np.max(np.abs(x - y)) <= tolerance * np.max(np.abs(x))


def ops(g: Graph) -> Counter:
    return Counter(n.op_type for n in g.nodes())
