"""Bias correction: biases of quantized linears take what quantization did to the means of their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.readers import shift_bias
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import shift
from onnxcomp.target import Target

__all__ = ["Correct"]


@dataclass(frozen=True)
class Correct(Pass):
    """Add `mean(y of the original) - mean(y)` to the bias of each quantized linear, in the order of the graph.

    Each on the model corrected so far, so that errors of the layers before count as well (arXiv 1906.04721, section
    4.2, with the means of data). Once, behind the last quantizer.
    """

    stage: ClassVar[Stage] = Stage.CORRECT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}
    mends: ClassVar[bool] = True

    skip: tuple[str, ...] = ()
    """Patterns of node or weight names whose biases stay."""

    @property
    def wants_data(self) -> bool:
        """Means are of data."""
        return True

    @property
    def is_identity(self) -> bool:
        """Whether everything is skipped."""
        return "*" in self.skip

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Quantized linears."""
        return [x.site for x in _quantized(g)]

    def run(self, g: Graph, env: Env) -> None:
        """Shift the biases of the linears of one input after the other."""
        g.sort()
        for group in blocks.siblings(_quantized(g)):
            kept = []
            for x in group:
                if why := self._unfit(x, env.original):
                    g.decline(x.site, why)
                else:
                    kept.append(x)
            _correct(g, env, kept)

    def _unfit(self, x: Linear, original: Graph) -> str:
        """Why a bias stays, empty if it moves."""
        if (hit := skipped(self.skip, x.name, str(x.weight.name))) is not None:
            return f"skipped by the pattern '{hit}'"
        return "" if _known(x, original) is not None else f"the original has no value '{x.output.name}'"


def _quantized(g: Graph) -> list[Linear]:
    return [x for x in blocks.linears(g, tied=True) if x.quantized]


def _known(x: Linear, original: Graph) -> ir.Value | None:
    """The output of a linear that the original has too: products in a half model are cast back behind it."""
    v: ir.Value = x.output
    while not has(original, str(v.name)):
        users = [node for node, _ in v.uses()]
        if len(users) != 1 or users[0].op_type not in ("Cast", "Add"):
            return None
        v = users[0].outputs[0]
    return v


def _correct(g: Graph, env: Env, group: Sequence[Linear]) -> None:
    """Shift the biases of linears that read one value, created where there are none."""
    values = {x.name: _known(x, env.original) for x in group}
    needs = {name: shift(v, str(v.name), other_of="original") for name, v in values.items() if v is not None}
    stats = env.collect(g, needs.values())
    for x in group:
        by = np.asarray(stats[needs[x.name]], np.float64)
        if by.any():
            shift_bias(g, x, by)
        else:
            g.decline(x.site, "its means are those of the original")
