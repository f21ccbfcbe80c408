"""Activations and their derivatives, element by element, in the type of what is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onnxcomp.maths import Array

__all__ = ["DERIVED", "Derived"]

Derived = Callable[[Array], tuple[Array, Array]]  # value and derivative


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _erf(x: Array) -> Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(np.sign(x) * (1 - poly * np.exp(-x * x)))


def _swish(beta: float) -> Derived:
    def swish(x: Array) -> tuple[Array, Array]:
        s = _sigmoid(beta * x)
        return x * s, s * (1 + beta * x * (1 - s))

    return swish


def _gelu(x: Array) -> tuple[Array, Array]:
    cdf = 0.5 * (1 + _erf(x * 0.5**0.5))
    return x * cdf, cdf + x * np.exp(-0.5 * x * x) * (0.5 / np.pi) ** 0.5


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    c = (2 / np.pi) ** 0.5
    t = np.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _relu(x: Array) -> tuple[Array, Array]:
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def _relu2(x: Array) -> tuple[Array, Array]:
    r = np.maximum(x, 0)
    return r * r, 2 * r


def _tanh(x: Array) -> tuple[Array, Array]:
    t = np.tanh(x)
    return t, 1 - t * t


def _sigmoids(x: Array) -> tuple[Array, Array]:
    s = _sigmoid(x)
    return s, s * (1 - s)


DERIVED: dict[str, Derived] = {
    "gelu": _gelu,
    "gelu-tanh": _gelu_tanh,
    "quick-gelu": _swish(1.702),
    "relu": _relu,
    "relu2": _relu2,
    "sigmoid": _sigmoids,
    "silu": _swish(1.0),
    "tanh": _tanh,
}
"""By the name that `blocks.Mlp.activation` has for it."""
