"""Smoothing: gains move from the channels of linears' inputs to their weights, so that int8 rounds both well."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array, Float64, int8_error
from onnxcomp.methods.quantize import gains, linears
from onnxcomp.methods.quantize.gains import Place
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, absmax, sample
from onnxcomp.target import Target

__all__ = ["SmoothQuant"]

ROWS = 512  # of an input, on which exponents are compared: 256 for each half
SAME = 1e-3  # relative to one: gains nearer than this are what rounding left of those that are there already
FREE, PAID = 0.99, 0.6  # error left, relative, below which a gain is taken: where it is folded, and where it is a Mul


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divide the channels of the linears' inputs by `s`, and multiply the rows of the weights: `x W = (x / s)(s W)`.

    `s_j = max|x_j|^a / max|W_j|^(1 - a)` (SmoothQuant, arXiv 2211.10438). The exponent of each input is the one whose
    int8 outputs err least, on rows that `max|x|` was not taken of.
    """

    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """The exponent of every input; by default the best of `alphas` for each, or none where that is better."""
    alphas: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
    """The exponents that are tried, from the middle on."""
    multiply: bool = True
    """Multiply values whose gains cannot be folded into what makes them, where two fifths of the error go."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay as they are."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Linears with fewer weights stay as they are, since quantizers leave them in float."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in linears.quantizable(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The largest magnitude of every channel of the inputs, and rows of them."""
        for place in self._places(g.clone()):
            yield from (absmax(place.source, "channel"), sample(place.source, ROWS))

    def run(self, g: Graph, env: Env) -> None:
        """From the last input on: what is folded into a linear is there when its own input is smoothed."""
        for place in reversed(self._places(g)):
            why = gains.unfit(place)
            if not why and place.fold is None and not self.multiply:
                why = "its gains would have to be multiplied at run time"
            by = None if why else self._gains(g, env, place)
            if by is not None and np.abs(place.keep(by, 1.0) - 1).max() > SAME:
                gains.divide(g, place, by)
                continue
            for x in place.readers:
                g.decline(x.site, why or "its int8 outputs err least as they are")

    def _places(self, g: Graph) -> list[Place]:
        return gains.places(g, linears.chosen(g, self.skip, self.min_size))

    def _gains(self, g: Graph, env: Env, place: Place) -> Float64 | None:
        """The divisor of every channel `[K]`, None where none pays."""
        weights = [g.array(x.weight) for x in place.readers]
        large = np.max([np.abs(w).max(axis=1) for w in weights], axis=0)
        seen = env.stats[absmax(place.source, "channel")]
        if self.alpha is not None:
            return int8_error.equalizing(seen, large, self.alpha, place.units)
        rows, some = env.stats[sample(place.source, ROWS)], [int8_error.thinned(w) for w in weights]
        limited = env.target.quantized.saturates

        def error(alpha: float) -> float:
            def change(fitted: Array) -> tuple[Float64, Array]:
                s = int8_error.equalizing(np.abs(fitted).max(axis=0), large, alpha, place.units)
                return s, np.zeros(0, np.int64)

            return int8_error.left_out_error(rows, some, change, limited=limited)

        plain = int8_error.left_out_error(rows, some, limited=limited)
        best, least = _least(error, sorted(self.alphas))
        if not least < plain * (PAID if place.fold is None else FREE):
            return None
        g.note(place.readers[0].site, f"alpha {best}, int8 error {least / plain:.2f} of what it was")
        return int8_error.equalizing(seen, large, best, place.units)


def _least(error: Callable[[float], float], alphas: Sequence[float]) -> tuple[float, float]:
    """The exponent of least error with that, from the middle one on towards the side that errs less."""
    errors, at = dict[float, float](), len(alphas) // 2
    while True:
        near = alphas[max(at - 1, 0) : at + 2]
        errors.update((a, error(a)) for a in near if a not in errors)
        best = min(near, key=lambda a: errors[a])
        if best == alphas[at]:
            return best, errors[best]
        at = alphas.index(best)
