"""Outputs that are sequences or optional as arrays: all elements one after another, and the shapes of these."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from onnxcomp.maths import Array

__all__ = ["SHAPES", "flattened"]

SHAPES = " (shapes)"  # behind the name of an output: what its elements' shapes are called
ABSENT = -1  # in place of the number of elements: an optional value that is not there


def flattened(outputs: Mapping[str, Any], names: Collection[str]) -> dict[str, Array]:
    """Outputs with those of these names as one axis, beside a list of the number, ranks and sizes of their elements.

    An output of maps is left out, since nothing says how far two of them are apart.
    """
    made: dict[str, Array] = {}
    for name, value in outputs.items():
        if name not in names and isinstance(value, np.ndarray):
            made[name] = value
            continue
        parts = [value] if isinstance(value, np.ndarray) else list(value or ())
        if all(isinstance(a, np.ndarray) for a in parts):
            made[name] = np.concatenate([a.reshape(-1) for a in parts]) if parts else np.zeros(0, np.float32)
            sizes = [n for a in parts for n in (a.ndim, *a.shape)]
            made[name + SHAPES] = np.array([ABSENT if value is None else len(parts), *sizes], np.int64)
    return made
