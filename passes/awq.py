"""AWQ: channels with large inputs get larger weights, which blocks of few bits then round with less effect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.maths import Float64
from onnxcomp.methods.quantize.rescaling import Change, Rescaling

__all__ = ["Awq"]

POWERS = np.arange(0.05, 1.0, 0.05)  # of the mean magnitude, as in the paper; 0 is no change
FAINTEST = 1e-4  # of a gain: a channel that is zero on all rows would have none


@dataclass(frozen=True)
class Awq(Rescaling):
    """Divide each channel of an input by a power of its mean magnitude, multiply the weights by it (Lin et al., 2023).

    arXiv 2306.00978: `s = mean|x|^a`, the power `a` by the error of the outputs under blockwise rounding on left-out
    rows. Clipping of weight ranges is part of the rounding itself, in `quantize-weights`.
    """

    bits: Literal[8, 4, 3, 2] = 4
    """Bits of the weights by whose rounding it is judged."""
    block: Literal[0, 16, 32, 64, 128, 256] = 32
    """In-channels that share a scale there; 0 is one scale per out-channel."""
    inputs: Literal[0, 4, 8] = 0
    """Bits of the inputs there; 0 leaves them float."""

    def proposals(self, rows: Float64, *, shifts: bool) -> Iterable[Change]:
        """One for each power; gains are centred about 1."""
        size = np.abs(rows).mean(axis=0)
        for power in POWERS:
            gain = np.maximum(size, np.finfo(np.float64).tiny) ** power
            gain = np.maximum(gain / max(float(gain.max()), np.finfo(np.float64).tiny), FAINTEST)
            yield Change(gain / np.sqrt(gain.max() * gain.min()), np.zeros_like(gain))
