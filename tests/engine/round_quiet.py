"""Fewer bits for weights that read quiet channels: a pass as a stranger writes it, in one file and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import Env, Fidelity, Graph, Linear, Need, Pass, Site, Stage, Target, blocks
from onnxcomp.stats import Accumulator, Per, Stat, Statistic, finite, name_of, no_rows

__all__ = ["RoundQuiet"]


class FourthPowers:
    """Sums of fourth powers over rows: `[C]`, float64."""

    def __init__(self) -> None:
        self.count, self.sum = 0, np.zeros(0)

    def update(self, x: np.ndarray, extra: np.ndarray | None = None) -> None:
        if len(x):
            self._add(len(x), (x.astype(np.float64) ** 4).sum(axis=0))

    def _add(self, count: int, powers: np.ndarray) -> None:
        finite(powers)
        self.sum = self.sum + powers if self.count else powers
        self.count += count

    def merge(self, other: Self) -> None:
        if other.count:
            self._add(other.count, other.sum)

    def result(self) -> np.ndarray:
        if not self.count:
            raise no_rows()
        return self.sum / self.count


class Fourth(Statistic):
    """Fourth root of the mean fourth power, per channel: loud where a channel has outliers."""

    kind: ClassVar[str] = "fourth"
    per: ClassVar[tuple[Per, ...]] = ("channel",)

    @classmethod
    def accumulator(cls, stat: Stat) -> Accumulator:
        return FourthPowers()

    @classmethod
    def finish(cls, stat: Stat, result: np.ndarray) -> np.ndarray:
        return np.sqrt(np.sqrt(result))


def fourth(v: ir.Value) -> Need:
    """Loudness of a value's channels: `[C]`."""
    return Need(name_of(v), Stat("fourth", "channel"))


@dataclass(frozen=True)
class RoundQuiet(Pass):
    """Round the weights that read the quietest channels of each linear, and show the largest output as one more."""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_interface: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"share": 0.0}
    example_error: ClassVar[float] = 0.1

    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the channels that are quiet."""
    steps: Annotated[int, Field(ge=2)] = 64
    """How many values the largest weight has on each side of zero."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in self._linears(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """How loud the channels are that each reads."""
        return [] if self.is_identity else [fourth(x.source) for x in self._linears(g)]

    def run(self, g: Graph, env: Env) -> None:
        """Round in place, then add the output."""
        for x in [] if self.is_identity else self._linears(g):
            loud = env.stats[fourth(x.source)]  # [inputs]
            quiet = np.argsort(loud, kind="stable")[: int(self.share * len(loud))]
            if not quiet.size:
                g.decline(x.site, "reads too few channels")
                continue
            stored = g.array(x.weight)
            weight = stored.T.copy() if x.transposed else stored.copy()  # [inputs, outputs]
            step = np.abs(weight).max() / self.steps
            weight[quiet] = np.round(weight[quiet] / step) * step
            g.put(x.weight, weight.T if x.transposed else weight)
        if g.edits:
            self._show(g)

    def _show(self, g: Graph) -> None:
        peak = g.op("ReduceMax", g.op("Abs", g.outputs[0]), keepdims=0, name="peak")
        peak.name, peak.type, peak.shape = "peak", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        g.model.graph.outputs.append(peak)

    @staticmethod
    def _linears(g: Graph) -> list[Linear]:
        return [x for x in blocks.linears(g) if not x.quantized]
