"""A copy of a graph with vectors moved in their last bit: what kernels that round their inputs make of float noise.

Where a kernel quantizes its inputs, as int4 products do, a difference in the last bit moves a value over a rounding
edge, and outputs differ by as much as rounding itself moves them; no rewriting of such a model can do better.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.graph import Graph

__all__ = ["nudged"]

LONGEST = 1 << 16  # entries of a vector, such as the scale of a norm, up to which it is moved: copies stay small


def nudged(g: Graph) -> Graph | None:
    """A copy whose constant float32 vectors of the main graph moved by one unit in the last place; None without any."""
    twin, rng, count = g.clone(), np.random.default_rng(0), 0
    for v in twin.model.graph.initializers.values():
        tensor = v.const_value
        if tensor is None or tensor.dtype is not ir.DataType.FLOAT or len(tensor.shape) != 1:
            continue
        if 1 < tensor.size <= LONGEST:
            a = tensor.numpy()
            toward = np.where(rng.random(a.shape) < 0.5, -np.inf, np.inf).astype(np.float32)
            v.const_value = ir.tensor(np.nextafter(a, toward), name=v.name)
            count += 1
    return twin if count else None
