"""Oblique projections of the residual stream, chosen by the weights that read it.

A stream `x [.., d]` that is read through `Q [d, d']` (a basis, or the kept channels) is replaced by `z = x D [.., d']`.
With `R [d, N]` the weights of all its consumers, `D = argmin |R - D Q^T R| = S Q (Q^T S Q)^-1`, `S = R R^T [d, d]`,
makes `z Q^T R` closest to `x R` for any `x`; and `Q^T D = I`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks.stream import Stream
from onnxcomp.graph import Graph
from onnxcomp.graph.scratch import release_pages
from onnxcomp.maths import Array, Float64
from onnxcomp.maths.solve import least_squares
from onnxcomp.methods.repair.readers import numbers
from onnxcomp.methods.rotate_stream import basis

__all__ = ["dual", "duals", "readers_moment"]

PIECE = 1 << 24  # elements of a weight converted to float32 at a time, 64 MiB: bounds memory, not the result


def readers_moment(g: Graph, linears: Iterable[blocks.Linear], width: int) -> Float64:
    """`R R^T [d, d]`, `R [d, N]` the weights of some linears times the gains of the norms in front of them."""
    gains = {n.output: g.array(n.gain).reshape(-1, 1) for n in blocks.norms(g)}
    total = np.zeros((width, width))
    for x in linears:
        a = numbers(g, x.weight)
        assert a is not None
        weight, step = a.T if x.transposed else a, max(1, PIECE // width)
        for i in range(0, weight.shape[1], step):
            rows = weight[:, i : i + step].astype(np.float32) * gains.get(x.source, np.ones(1, np.float32))
            total += rows @ rows.T
        release_pages([x.weight.const_value])
    return total


def dual(matrix: Float64, q: Array) -> Float64:
    """`D [d, d']` for `Q [d, d']`, from `S [d, d]`; directions that no consumer uses stay as in `Q`."""
    inner = matrix @ q
    return np.ascontiguousarray(least_squares(q.T @ inner, inner.T, start=q.T).weights.T)


def duals(g: Graph, stream: Stream, bases: Mapping[ir.Value, ir.TensorProtocol]) -> dict[ir.Value, ir.TensorProtocol]:
    """The dual of every basis of a stream; consumers of its norms that are no linears count with an identity weight."""
    outputs = {n.output for n in stream.norms}
    linears = [x for x in blocks.linears(g, tied=True) if x.source in outputs]
    matrix, nodes = readers_moment(g, linears, stream.width), {x.node for x in linears}
    for n in stream.norms:
        if n.output.is_graph_output() or not nodes.issuperset(n.readers):
            matrix += np.diag(g.array(n.gain).reshape(-1).astype(np.float64) ** 2)
    dual_of: dict[int, ir.TensorProtocol] = {}
    for q in bases.values():
        if id(q) not in dual_of:
            dual_of[id(q)] = basis(g, dual(matrix, np.asarray(q.numpy(), np.float64)))
            release_pages([q])
    return {v: dual_of[id(q)] for v, q in bases.items()}
