"""RepQ: the channels of a norm's output get one common range, so that one scale does what one per channel would."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxcomp.maths import Float64
from onnxcomp.methods.quantize.rescaling import Change, Rescaling

__all__ = ["Reparametrize"]

FAINTEST = 1e-4  # of a channel's width, as a share of the mean: a constant channel would get none


@dataclass(frozen=True)
class Reparametrize(Rescaling):
    """Fold one range per channel into the norm before linears, and leave one for all (Li et al., RepQ-ViT, 2023).

    arXiv 2212.08254: with scales `s` and zero points `z` of the channels and their means `s~`, `z~`, the linears read
    `(x + s (z - z~)) / (s / s~)`, whose codes are those of a quantizer per channel. Kept where the outputs err less.
    """

    def proposals(self, rows: Float64, *, shifts: bool) -> Iterable[Change]:
        """Equal ranges; equal largest magnitudes where nothing can be shifted."""
        low, high = rows.min(axis=0), rows.max(axis=0)
        width = high - low if shifts else np.maximum(high, -low)
        mean = float(width.mean())
        if mean <= 0:
            return
        width = np.maximum(width, FAINTEST * mean)
        share = -low / width  # where zero lies in the range of a channel, 0 to 1 unless it lies outside
        yield Change(width / mean, low + width * share.mean() if shifts else np.zeros_like(low))
