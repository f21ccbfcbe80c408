"""Random but valid inputs of given shapes: ids within the vocabulary, masks of ones, positions behind the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxcomp.data.inputs import TensorSpec, roles
from onnxcomp.errors import DataError
from onnxcomp.machine import size_text
from onnxcomp.maths import Array

__all__ = ["LIMIT", "random_feeds"]

LIMIT = 4 * 10**9  # bytes of one random input


def random_feeds(
    inputs: Sequence[TensorSpec],
    dims: Mapping[str, tuple[int, ...]],
    rows: Mapping[str, int],
    rng: Callable[[str], np.random.Generator],
) -> dict[str, Array]:
    """Every input of its shape in `dims`; ids stay below `rows`, other integers are zero; `rng` by input name.

    Raises `DataError` where they would not fit into `LIMIT` bytes: a model may declare any size.
    """
    for s in inputs:
        if math.prod(dims[s.name]) * max(8, s.dtype.itemsize) > LIMIT:  # made of numbers of 8 bytes
            raise DataError(f"random: input '{s.name}' of shape {list(dims[s.name])} needs over {size_text(LIMIT)}")
    role = {name: r.removeprefix("decoder_") for r, name in roles(inputs).items()}
    past = next((dims[s.name][s.cache] for s in inputs if s.cache is not None), 0)
    return {s.name: _value(s, dims[s.name], role.get(s.name, ""), rows.get(s.name), past, rng) for s in inputs}


def _value(
    s: TensorSpec,
    shape: tuple[int, ...],
    kind: str,
    rows: int | None,
    past: int,
    rng: Callable[[str], np.random.Generator],
) -> Array:
    if s.flag:
        return np.full(shape, past > 0)
    if kind.endswith("mask") or s.dtype.kind == "b":
        return np.ones(shape, s.dtype)
    if kind == "positions":
        return np.broadcast_to(past + np.arange(shape[-1]), shape).astype(s.dtype)
    if s.integer and kind != "types" and (kind == "tokens" or rows):
        return rng(s.name).integers(0, rows or 2, shape).astype(s.dtype)
    if s.integer:
        return np.zeros(shape, s.dtype)
    return rng(s.name).standard_normal(shape, np.float32).astype(s.dtype)
