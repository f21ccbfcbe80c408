"""How far an exact pass may move outputs: float noise, and what the rounding of lossy passes before it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnxcomp.analysis.element_types import in_half
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step

__all__ = ["floor_db"]

# An exact pass may only add float noise: 80 dB is a relative error of 1e-4, far above fp32 noise, far below a change.
EXACT_FLOOR_DB = 80.0
# An original in a half type rounds at every operation: another order of operations moves it as much as rounding did.
HALF_TYPE_DB = 6.0


def floor_db(original: Graph, done: Iterable[tuple[Pass, Step]], before: Callable[[], float]) -> float:
    """The SQNR against the original that an exact pass must leave, decibels.

    Behind quantizers float noise moves values over rounding edges, layer by layer, until outputs differ by as much as
    quantization itself moves them; what must stay there is the distance to the original, `before` the pass.
    """
    rounding = [p.rounding_db for p, step in done if step.fidelity == "lossy" and step.changed]
    if not rounding:
        return EXACT_FLOOR_DB
    return before() - max([*rounding, HALF_TYPE_DB if in_half(original) else 0.0])
