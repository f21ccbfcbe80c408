"""Numbers that decide which rows a sample draws, the same however the data is batched."""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array

__all__ = ["mix", "row_keys"]


def mix(x: Array) -> Array:
    """Scatter 64-bit integers (splitmix64), so that the smallest of them are a fair draw."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def row_keys(x: Array) -> Array:
    """Keys from the content of the rows, for values whose rows belong to no sample: `[R]`, uint64."""
    words = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    odd = mix(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return mix((mix(words) * odd).sum(axis=1, dtype=np.uint64))
