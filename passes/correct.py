"""Bias correction: biases of quantized linears take what quantization did to the means of their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnxcomp import blocks
from onnxcomp.graph import Graph, Site
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.readers import shift_bias
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import shift
from onnxcomp.target import Target

__all__ = ["Correct"]


@dataclass(frozen=True)
class Correct(SequentialPass):
    """Add `mean(y of the original) - mean(y)` to the bias of each quantized linear, in the order of the graph.

    Each on the model corrected so far, so that errors of the layers before count as well (arXiv 1906.04721, section
    4.2, with the means of data). Once, behind the last quantizer.
    """

    stage: ClassVar[Stage] = Stage.CORRECT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"skip": ("*",)}

    skip: tuple[str, ...] = ()
    """Patterns of node or weight names whose biases stay."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Quantized linears."""
        return [x.site for x in blocks.linears(g, tied=True) if x.quantized]

    def edit(self, g: Graph, site: Site, env: Env) -> None:
        """Shift one bias, created where there is none."""
        x = next(x for x in blocks.linears(g, tied=True) if x.name == site.name)
        name = str(x.output.name)
        hit = skipped(self.skip, x.name, str(x.weight.name))
        if hit is not None or not has(env.original, name):
            missing = f"the original has no value '{name}' to compare with"
            g.decline(site, missing if hit is None else f"skipped by the pattern '{hit}'")
            return
        need = shift(x.output, name, other_of="original")
        by = np.asarray(env.collect(g, [need])[need], np.float64)
        if not by.any():
            g.decline(site, "its means are those of the original")
            return
        shift_bias(g, x, by)
