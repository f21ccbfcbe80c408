"""Orthogonal matrices that spread outliers over all channels: Hadamard matrices, or random ones where there are none.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. There is one of size `2^k` (Sylvester), of `q + 1` for a
prime `q = 3 mod 4` and of `2 (q + 1)` for a prime `q = 1 mod 4` (Paley 1933), and of twice each size: 12, 20, 28, 36,
40 and what real models have, 384 = 32 x 12, 1280 = 64 x 20, 3584 = 128 x 28, 2304 = 64 x 36.
"""

from __future__ import annotations

import numpy as np

from onnxcomp.maths import Array, Float64

__all__ = ["hadamard", "is_rotation", "random_rotation"]

ORTHOGONAL = 4e-3  # what rounding of its entries to half types may leave of a row's length and of angles


def hadamard(n: int) -> Float64 | None:
    """A Hadamard matrix `[n, n]` of entries 1 and -1, or None where none of this kind is known here."""
    base, doublings = n, 0
    while True:
        core = _paley(base)
        if core is not None:
            return np.asarray(np.kron(sylvester(doublings), core))
        if base % 2:
            return None
        base, doublings = base // 2, doublings + 1


def random_rotation(n: int, rng: np.random.Generator) -> Float64:
    """An orthogonal matrix `[n, n]`: a Hadamard matrix with random signs of rows, else the Q of a Gaussian matrix."""
    h = hadamard(n)
    if h is not None:
        return np.asarray(rng.choice([-1.0, 1.0], size=n)[:, None] * h / np.sqrt(n))
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))  # signs that make it uniform (Haar)


def is_rotation(w: Array) -> bool:
    """Whether a matrix is orthogonal to float16's precision, or is so behind the subtraction of the mean.

    Rows of trained weights fail at their first two, so that little of a large model is read.
    """
    if w.ndim != 2 or w.shape[0] != w.shape[1] or len(w) < 2:
        return False
    d = len(w)
    lengths = (np.asarray(w[:2], np.float64) ** 2).sum(axis=1)
    taken = next((m for m in (0.0, 1 / d) if np.allclose(lengths, 1 - m, rtol=0, atol=ORTHOGONAL)), None)
    if taken is None:
        return False
    whole = np.asarray(w, np.float64)
    return bool(np.allclose(whole @ whole.T, np.eye(d) - taken, rtol=0, atol=ORTHOGONAL))


def sylvester(k: int) -> Float64:
    """The Hadamard matrix `[2^k, 2^k]` that doubling makes of `[[1]]`."""
    h: Float64 = np.ones((1, 1))
    for _ in range(k):
        h = np.asarray(np.kron([[1.0, 1.0], [1.0, -1.0]], h), np.float64)
    return h


def _paley(n: int) -> Float64 | None:
    """Hadamard matrices that are not made by doubling: of size 1, and Paley's two constructions."""
    if n == 1:
        return np.ones((1, 1))
    if n % 4:
        return None
    if _is_prime(n - 1):  # n is divisible by 4, so n - 1 = 3 mod 4
        q = _residues(n - 1)
        bordered = np.block([[np.zeros((1, 1)), np.ones((1, n - 1))], [-np.ones((n - 1, 1)), q]])
        return np.asarray(np.eye(n) + bordered)
    prime = n // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        q = _residues(prime)
        bordered = np.block([[np.zeros((1, 1)), np.ones((1, prime))], [np.ones((prime, 1)), q]])
        twice = np.kron(bordered, [[1.0, 1.0], [1.0, -1.0]])
        return np.asarray(twice + np.kron(np.eye(prime + 1), [[1.0, -1.0], [-1.0, -1.0]]))
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _residues(prime: int) -> Float64:
    """Jacobsthal's matrix `[p, p]`: whether `i - j` is a square modulo the prime (1), none (-1), or zero."""
    character = np.full(prime, -1.0)
    character[np.unique(np.arange(prime) ** 2 % prime)] = 1.0
    character[0] = 0.0
    index = np.arange(prime)
    return np.asarray(character[(index[:, None] - index[None]) % prime])
