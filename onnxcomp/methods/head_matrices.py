"""Weights and biases of linears as float64 matrices, all heads together or head by head, read and written for one user.

Shapes: a weight is `[K, N]`, `N = heads D`, a bias `[1, N]`; by heads they are `[heads, K, D]` and `[heads, 1, D]`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.linears import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["constants", "merge", "read", "split", "write"]


def constants(x: Linear) -> list[tuple[ir.Value, ir.Node]]:
    """Weight and bias, each with its consumer."""
    bias = [] if x.bias is None else [(x.bias, x.add or x.node)]
    return [(x.weight, x.node), *bias]


def read(g: Graph, x: Linear, value: ir.Value | None = None) -> Array:
    """A weight as `[K, N]` or a bias as `[1, N]`, in float64."""
    v = x.weight if value is None else value
    a = np.asarray(g.array(v), np.float64)
    return a.reshape(1, -1) if v is x.bias else a.T if x.transposed else a


def write(g: Graph, x: Linear, v: ir.Value, user: ir.Node, a: Array) -> None:
    """Store a weight `[K, N]` or bias `[1, N]`, converted to its stored layout and type, for one user."""
    stored = a.reshape(-1) if v is x.bias else a.T if x.transposed else a
    g.put(v, np.ascontiguousarray(stored).astype(g.array(v).dtype), users=[user])


def split(a: Array, heads: int) -> Array:
    """`[K, heads D]` as `[heads, K, D]`."""
    return a.reshape(a.shape[0], heads, -1).transpose(1, 0, 2)


def merge(blocks: Array) -> Array:
    """`[heads, K, D]` as `[K, heads D]`."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)
