"""Sparse weights stored as a bit mask and the non-zero values: standard operators that a runtime folds when it loads.

A sparse initializer would be ONNX's own way. ONNX Runtime loads one, but it takes 12 bytes for every value that is not
zero (8 of them its position), so that it gains nothing below two thirds of zeros, and onnx-ir drops it when it reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph

__all__ = ["compact"]

WORTH = 0.9  # share of the dense bytes that the compact form must stay below: a smaller gain is not worth its operators


def compact(g: Graph, weights: Iterable[ir.Value]) -> None:
    """Store the constants that have enough zeros as bits and values, for all their users."""
    for v in dict.fromkeys(weights):
        a = g.array(v)
        if v.is_initializer() and a.size // 8 + np.count_nonzero(a) * a.itemsize < WORTH * a.nbytes:
            _pack(g, v)


def _pack(g: Graph, v: ir.Value) -> None:
    """Replace a constant by standard operators on its bits and values, bit for bit the same weights when it runs."""
    a = g.array(v)
    flat, stem = a.reshape(-1), str(v.name)
    bits = flat != 0
    packed = np.packbits(bits, bitorder="little")
    values = g.constant(np.concatenate([flat[bits], flat[:1]]), f"{stem}_values")  # never empty
    spread = g.op("BitwiseAnd", packed[:, None], (1 << np.arange(8)).astype(np.uint8)[None], name=f"{stem}_bits")
    padded = g.op("Reshape", g.op("Cast", spread, to=ir.DataType.BOOL.value), np.array([-1], np.int64))
    mask = padded  # [size], true where a weight is not zero
    if flat.size % 8:
        zero, size = np.array([0], np.int64), np.array([flat.size], np.int64)
        mask = g.op("Slice", padded, zero, size)
    count = g.op("CumSum", g.op("Cast", mask, to=ir.DataType.INT32.value), np.array(0, np.int64))
    index = g.op("Max", g.op("Sub", count, np.array(1, np.int32)), np.array(0, np.int32))  # [size], into values
    dense = g.op("Where", mask, g.op("Gather", values, index), np.zeros((), a.dtype))
    new = g.op("Reshape", dense, np.array(a.shape, np.int64), name=f"{stem}_weight", like=v)
    g.replace(v, new, users=[u for u, _ in v.uses()])
