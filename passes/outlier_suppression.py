"""Outlier Suppression+: shift channels to their middle and scale down those that are wider than the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Float64
from onnxcomp.methods.quantize.rescaling import Change, Rescaling

__all__ = ["OutlierSuppression"]

WIDTHS = 24  # limits that are tried, from the median channel's width to the widest, evenly in the logarithm


@dataclass(frozen=True)
class OutlierSuppression(Rescaling):
    """Let linears read `(x - z) / s`: `z` the middle of a channel's range, `s = max(1, half its width / t)`.

    Wei et al., 2023 (arXiv 2304.09145): the limit `t` by the error of the outputs when inputs and weights are rounded,
    on left-out rows. Shifts are folded where a norm or a linear adds a constant; elsewhere channels are only scaled.
    """

    def proposals(self, rows: Float64, *, shifts: bool) -> Iterable[Change]:
        """One for each limit."""
        low, high = rows.min(axis=0), rows.max(axis=0)
        middle = (low + high) / 2 if shifts else np.zeros_like(low)
        half = np.maximum(high - middle, middle - low)
        widest, usual = float(half.max()), float(np.median(half))
        for limit in np.geomspace(usual, widest, WIDTHS) if usual > 0 else ():
            yield Change(np.maximum(1.0, half / limit), middle)
