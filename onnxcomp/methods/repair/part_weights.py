"""Weights of a linear or of a feed-forward part as arrays for a fit, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcomp.blocks import Linear, Mlp
from onnxcomp.graph import Graph
from onnxcomp.graph.groups import Slot
from onnxcomp.maths import Array
from onnxcomp.maths.activations import DERIVED
from onnxcomp.maths.newton_mlp import Ffn
from onnxcomp.methods.repair.readers import Reader, replace

__all__ = ["affine", "put_affine", "read", "reader_of", "unfit_reason", "write"]


def reader_of(x: Linear) -> Reader:
    """One linear as the reader of its own weight, with no axis that is cut."""
    return Reader(Slot(str(x.weight.name), int(x.transposed), ()), (x,))


def unfit_reason(g: Graph, m: Mlp) -> str:
    """Why only the down projection of a part can be fitted, empty if all its weights can."""
    if m.activation not in DERIVED:
        return f"the derivative of its activation '{m.activation}' is not known"
    inner = [x for x in m.linears if x is not m.down]
    if any(x.quantized or len(list(x.weight.uses())) > 1 or not g.is_constant(x.weight) for x in inner):
        return "weights before its activation are quantized, shared or computed"
    if len({x.bias is None for x in inner}) > 1:
        return "only one of up and gate has a bias"
    biases = [x for x in m.linears if x.bias is not None]
    if any(not g.is_constant(x.bias) or g.array(x.bias).size != x.sizes[1] for x in biases if x.bias is not None):
        return "a bias is computed, or the same for all channels"
    return ""


def read(g: Graph, m: Mlp) -> Ffn:
    """The weights of a feed-forward part, float32."""
    up, gate, down = (None if x is None else affine(g, x) for x in (m.up, m.gate, m.down))
    assert up is not None
    assert down is not None
    return Ffn(up, gate, down, m.activation, m.down.bias is not None)


def affine(g: Graph, x: Linear) -> Array:
    """Weight `[K, N]` with the bias as a last row where there is one."""
    weight = reader_of(x).weight(g)
    rows = [weight] if x.bias is None else [weight, g.array(x.bias).reshape(1, -1)]
    return np.concatenate(rows).astype(np.float32)


def write(g: Graph, m: Mlp, weights: Sequence[Array]) -> None:
    """Store the weights of a feed-forward part, as `read` gives them."""
    for x, w in zip(m.linears, weights, strict=True):
        put_affine(g, x, w)


def put_affine(g: Graph, x: Linear, w: Array) -> None:
    """Store what `affine` gives: a weight, and the bias as its last row where there is one."""
    free = x.bias is not None
    dtype = g.array(x.weight).dtype
    replace(g, reader_of(x), (w[:-1] if free else w).astype(dtype), w[-1].astype(np.float64) if free else None)
