"""What codes cover: the ranges of values and weights as a quantizer found and chose them, for the report."""

from __future__ import annotations

import numpy as np

from onnxcomp.graph import Covered, Graph
from onnxcomp.maths import Array
from onnxcomp.maths.clipping import clip_loss
from onnxcomp.maths.formats import Format, Quantized, dequantize

__all__ = ["values_covered", "weight_covered"]

COLUMNS = 64  # out-channels of a weight that its error is taken of, which is shown with three digits


def values_covered(g: Graph, site: str, value: str, counts: Array, scale: Array, zero: Array, fmt: Format) -> None:
    """Note which of the values of a histogram `[65536]` codes with one scale cover, and what the rest costs."""
    low, high = (float(dequantize(np.array(c), scale, zero)) for c in (fmt.low, fmt.high))
    least, most, outside, error = clip_loss(counts, low, high, fmt.bits)
    of = "input" if site != value else "value"
    g.covered.append(Covered(site, of, value, fmt.bits, least, most, low, high, outside, error))


def weight_covered(g: Graph, site: str, name: str, weight: Array, q: Quantized, bits: int) -> None:
    """Note the range of a weight `[K, N]`, that of its codes, and how far they are from it."""
    n = weight.shape[1]
    least, most = int(weight.argmin()), int(weight.argmax())
    even = np.unique(np.linspace(0, n - 1, COLUMNS).astype(np.int64))
    w, made = np.asarray(weight[:, even], np.float64), _columns(q, even)
    size = float(np.square(w).sum())
    error = float(np.sqrt(np.square(made - w).sum() / size)) if size else 0.0
    ends = _columns(q, np.array([least % n, most % n]))
    low, high = min(made.min(), ends.min()), max(made.max(), ends.max())
    lie = float(weight.flat[least]), float(weight.flat[most])
    g.covered.append(Covered(site, "weight", name, bits, *lie, float(low), float(high), None, error))


def _columns(q: Quantized, which: Array) -> Array:
    """The numbers of some columns of codes `[K, N]`."""
    scale, zero = (x[..., which] if x.ndim else x for x in (q.scale, q.zero))
    return Quantized(q.codes[:, which], scale, zero, q.axis, q.block).array().astype(np.float64)
