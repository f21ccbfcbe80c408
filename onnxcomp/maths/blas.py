"""Linear algebra whose results do not depend on the number of threads.

With several threads OpenBLAS and MKL cut products and factorizations into other pieces, and the last bits of results
change; decisions that follow (which head goes, where a value is rounded) may change with them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxcomp.maths import Array

__all__ = ["cross_product", "one_thread"]

PANEL = 512  # columns of one piece of a product: fixed, so that the pieces are the same on every machine


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS and LAPACK use one thread inside; the runtime's own threads are not touched."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def cross_product(x: Array, y: Array) -> Array:
    """`X^T Y` in panels of fixed size, on all cores; of a matrix with itself only one half is computed."""
    c, d = x.shape[1], y.shape[1]
    if max(c, d) <= PANEL:
        return np.asarray(x.T @ y)
    out = np.empty((c, d), np.result_type(x, y))
    spans = [(i, j) for i in range(0, c, PANEL) for j in range(0, d, PANEL) if x is not y or i <= j]

    def panel(span: tuple[int, int]) -> None:
        i, j = span
        out[i : i + PANEL, j : j + PANEL] = x[:, i : i + PANEL].T @ y[:, j : j + PANEL]
        if x is y and i < j:
            out[j : j + PANEL, i : i + PANEL] = out[i : i + PANEL, j : j + PANEL].T

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(panel, spans))
    return out
