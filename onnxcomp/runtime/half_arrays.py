"""Arrays of bfloat16, which ONNX Runtime computes with but neither takes from numpy nor gives to it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxcomp.maths import Array

__all__ = ["as_array", "as_value", "run"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def run(ort: Any, session: Any, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    """The named outputs of a session, where inputs or outputs may be bfloat16."""
    if all(a.dtype != BFLOAT16 for a in feeds.values()) and all(
        o.type != "tensor(bfloat16)" for o in session.get_outputs() if o.name in names
    ):
        arrays: list[Array] = session.run(names, dict(feeds))
        return arrays
    values = session.run_with_ort_values(names, {n: as_value(ort, a) for n, a in feeds.items()})
    return [as_array(v) for v in values]


def as_value(ort: Any, a: Array) -> Any:
    """An array in the runtime's memory."""
    a = np.ascontiguousarray(a)
    if a.dtype != BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy(a)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a.view(np.uint16), ir.DataType.BFLOAT16.value)


def as_array(value: Any) -> Array:
    """A copy of a value's elements."""
    if value.data_type() != "tensor(bfloat16)":
        a: Array = value.numpy()
        return a
    shape = tuple(value.shape())
    size = math.prod(shape)
    words: Any = (ctypes.c_uint16 * size).from_address(value.data_ptr()) if size else []
    bits: Array = np.array(words, np.uint16).view(BFLOAT16).reshape(shape)
    return bits
