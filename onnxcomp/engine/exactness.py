"""How far an exact pass may move outputs: rounding noise, and what the rounding of lossy passes before it makes of it.

Every output is judged by itself. Where one moves further than float noise usually does, the original's own noise is
measured: how far it is from itself at another optimization level of the runtime, from its copy in a wider type, and
from one whose vectors moved in their last bit, which tells what kernels that round their inputs make of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.analysis.element_types import narrowest_float
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Pass
from onnxcomp.reports.outcome import Step
from onnxcomp.runtime.nudged_twin import nudged
from onnxcomp.runtime.payload import prepacks
from onnxcomp.runtime.wide_twin import in_wider
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.results import Validation

__all__ = ["Exactness"]

# An exact pass may only add float noise, by element type: 80 dB is a relative error of 1e-4, far above fp32 noise, far
# below a change. One rounding to fp16 is 71 dB, one to bf16 53 dB; 21 dB allow a hundred of them on the way.
EXACT_FLOOR_DB = {ir.DataType.FLOAT: 80.0, ir.DataType.FLOAT16: 50.0, ir.DataType.BFLOAT16: 32.0}
# Of integer outputs, such as the best class, one entry in a thousand may lie so near a tie that noise decides it.
EXACT_MATCH_DB = 30.0
# An original in a half type rounds at every operation: another order of operations moves it as much as rounding did.
HALF_TYPE_DB = 6.0
# Two orders of operations differ by the noise of both; 10 dB allows one of them three times the other's amplitude.
MARGIN_DB = 10.0


@dataclass
class Exactness:
    """Judges exact passes against an original, whose noise is measured when it is first asked for."""

    original: Graph
    few: Reference
    noise: Mapping[str, float] | None = None

    def moved(self, now: Validation, done: Iterable[tuple[Pass, Step]], before: Callable[[], Validation]) -> str:
        """What an exact pass moved, empty if nothing; `before` is the comparison of the graph before that pass.

        Behind quantizers float noise moves values over rounding edges, layer by layer, until outputs differ by as much
        as quantization itself moves them; what must stay there is the distance to the original.
        """
        rounding = [p.rounding_db for p, step in done if step.fidelity == "lossy" and step.changed]
        earlier = before() if rounding else None
        dtype = narrowest_float(self.original)
        lost = max([*rounding, HALF_TYPE_DB if dtype is not ir.DataType.FLOAT else 0.0])
        for name, d in now.outputs.items():
            floor = EXACT_FLOOR_DB[dtype] if d.exact_match is None else EXACT_MATCH_DB
            if earlier is not None and name in earlier.outputs:
                floor = min(floor, earlier.outputs[name].decibels - lost)
            if d.decibels >= floor:
                continue
            floor = min(floor, self._own_noise().get(name, math.inf) - MARGIN_DB)
            if not d.decibels >= floor:
                what = f"{d.decibels:.1f} dB" if d.exact_match is None else f"{d.exact_match:.2%} of its entries equal"
                return f"left '{name}' {what} from the original, {floor:.1f} dB was the floor"
        return ""

    def covers(self, whole: Reference) -> bool:
        """Whether what is judged here is all there is: the same samples and metrics."""
        return self.few.samples == whole.samples and self.few.metrics == whole.metrics

    def _own_noise(self) -> Mapping[str, float]:
        """How far the original is from itself, by output: the largest of these distances, decibels."""
        if self.noise is None:
            found: dict[str, float] = {}
            wide = in_wider(self.original) if prepacks(self.original, None) else None
            for other, optimized in ((self.original, False), (wide, True), (nudged(self.original), True)):
                if other is None:
                    continue
                try:
                    outputs = self.few.against(other, optimized=optimized).outputs
                except OnnxcompError:
                    continue  # no kernels for it
                for name, d in outputs.items():
                    if not math.isnan(d.decibels):
                        found[name] = min(found.get(name, math.inf), d.decibels)
            self.noise = found
        return self.noise
