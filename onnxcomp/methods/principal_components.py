"""The bases of SliceGPT: principal components of what the norms of a residual stream make of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.linears import NormSite
from onnxcomp.blocks.stream import Stream
from onnxcomp.graph import Graph
from onnxcomp.maths import Float64
from onnxcomp.methods.rotate_stream import basis
from onnxcomp.pipeline import Env
from onnxcomp.stats import gram

__all__ = ["bases"]

EMPTY = 1e-30  # in place of the trace of a Gram matrix that is all zero: its share of the sum is then zero, not NaN


def bases(g: Graph, stream: Stream, width: int, env: Env, shared: bool) -> dict[ir.Value, ir.TensorProtocol]:
    """The first principal components `[d, width]` of each norm's output before gain and bias, by the norm's input.

    With `shared` one basis for all, in which every norm counts the same. A dry run has the first channels instead.
    """
    inputs = dict.fromkeys(n.input for n in stream.norms)
    if env.dry:
        first = basis(g, np.eye(stream.width, width))
        return {v: first if shared else basis(g, np.eye(stream.width, width)) for v in inputs}
    probe = g.clone()
    normalized = _without_gain(probe, stream.norms)
    stats = env.collect(probe, [gram(v) for v in normalized.values()])
    # Gram matrices are loaded one by one where they are used: together they may not fit into memory.
    moments = {v: gram(normalized[str(v.name)]) for v in inputs}
    if not shared:
        return {v: basis(g, _components(stats[m], width)) for v, m in moments.items()}
    total = np.zeros((stream.width, stream.width))
    for m in moments.values():
        total += stats[m] / max(float(np.trace(stats[m])), EMPTY)
    return dict.fromkeys(moments, basis(g, _components(total, width)))


def _without_gain(probe: Graph, norms: Sequence[NormSite]) -> dict[str, ir.Value]:
    """The outputs of the norms before gain and bias, as extra values, by the name of the norm's input."""
    values: dict[str, ir.Value] = {}
    for norm in norms:
        name = str(norm.input.name)
        if name not in values:
            unit = np.ones_like(probe.array(probe.value(str(norm.gain.name))))
            epsilon = norm.node.attributes.get_float("epsilon", 1e-5)  # ONNX's default
            values[name] = probe.op(norm.node.op_type, probe.value(name), unit, axis=-1, epsilon=epsilon, name="probe")
    return values


def _components(moments: Float64, width: int) -> Float64:
    """The eigenvectors `[d, width]` of the largest eigenvalues; signs are fixed by a positive largest entry."""
    vectors = np.linalg.eigh((moments + moments.T) / 2)[1][:, : -width - 1 : -1]
    top = vectors[np.abs(vectors).argmax(axis=0), np.arange(width)]
    return np.ascontiguousarray(vectors * np.where(top < 0, -1.0, 1.0))
