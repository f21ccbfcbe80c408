"""Weights and biases of linears as float64 matrices, whole or head by head, read and written for one user."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.blocks.linears import Linear
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["constants", "joined", "read", "split", "write"]


def constants(x: Linear) -> list[tuple[ir.Value, ir.Node]]:
    """Weight and bias with the node that reads each."""
    bias = [] if x.bias is None else [(x.bias, x.add or x.node)]
    return [(x.weight, x.node), *bias]


def read(g: Graph, x: Linear, value: ir.Value | None = None) -> Array:
    """A weight as `[K, N]` or a bias as `[1, N]`, in float64."""
    v = x.weight if value is None else value
    a = np.asarray(g.array(v), np.float64)
    return a.reshape(1, -1) if v is x.bias else a.T if x.transposed else a


def write(g: Graph, x: Linear, v: ir.Value, user: ir.Node, a: Array) -> None:
    """Give a weight or bias, as `read` shows it, a new content in its own type, for one user."""
    held = a.reshape(-1) if v is x.bias else a.T if x.transposed else a
    g.put(v, np.ascontiguousarray(held).astype(g.array(v).dtype), users=[user])


def split(a: Array, heads: int) -> Array:
    """`[K, heads D]` as `[heads, K, D]`."""
    return a.reshape(a.shape[0], heads, -1).transpose(1, 0, 2)


def joined(blocks: Array) -> Array:
    """`[heads, K, D]` as `[K, heads D]`."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)
