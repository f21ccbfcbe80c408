"""Low-rank error correction: a thin float product beside each quantized linear gives back what rounding took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import lowrank
from onnxcomp.maths.solve import least_squares
from onnxcomp.methods.repair.readers import dequantized
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import cross_gram, gram
from onnxcomp.target import Target

__all__ = ["LowRankCorrection"]

PULL = 0.1  # towards the original's weights, relative to the mean of the inputs' squares: little data must not decide


@dataclass(frozen=True)
class LowRankCorrection(SequentialPass):
    """Add `x A B` of rank `r` to each quantized linear: the best for the outputs of the original, given the inputs.

    LQER and EoRA (arXiv 2402.02446, 2410.21271), in the metric of the inputs: with `H = X~^T X~` and `C = X~^T X`,
    `A B` is the part of `(H + l I)^-1 (C + l I) W - Q` that `H` gives most weight. In the order of the graph.
    """

    stage: ClassVar[Stage] = Stage.CORRECT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"rank": 0}

    rank: Annotated[int, Field(ge=0)] = 8
    """Rank of the corrections; 0 changes nothing."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that get none."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Quantized linears."""
        return [] if self.is_identity else [x.site for x in blocks.linears(g) if x.quantized]

    def edit(self, g: Graph, site: Site, env: Env) -> None:
        """Add one product."""
        x = next(x for x in blocks.linears(g) if x.name == site.name)
        there = next((o for o in blocks.linears(env.original) if o.output.name == x.output.name), None)
        if why := self._refusal(x, there):
            g.decline(site, why)
            return
        assert there is not None
        assert x.dequantize is not None
        needs = gram(x.source), cross_gram(x.source, there.source, other_of="original")
        stats = env.collect(g, needs)
        squares, cross = (np.asarray(stats[n], np.float64) for n in needs)
        stored = env.original.array(there.weight)
        w = np.asarray(stored.T if there.transposed else stored, np.float64)
        goal = least_squares(squares, cross @ w, PULL, start=w).weights
        factors = lowrank.factor(goal - dequantized(g, x.dequantize), self.rank, metric=squares)
        dtype = x.source.dtype.numpy() if x.source.dtype is not None else np.dtype(np.float32)
        a, b = (f.astype(dtype) for f in factors.cut(self.rank))
        low = g.op("MatMul", x.source, a, name=f"{x.name}_error_in")
        low = g.op("MatMul", low, b, name=f"{x.name}_error_out", like=x.output)
        g.replace(x.output, g.op("Add", x.output, low, name=f"{x.name}_corrected", like=x.output))
        kept = 1 - factors.loss(self.rank) / max(factors.loss(0), np.finfo(np.float64).tiny)
        g.note(site, f"{kept:.0%} of the squared error, {(a.nbytes + b.nbytes) / 1e3:.1f} kB")

    def _refusal(self, x: Linear, there: Linear | None) -> str:
        """Why a linear gets no correction, empty if it does."""
        if (hit := skipped(self.skip, x.name, str(x.weight.name))) is not None:
            return f"skipped by the pattern '{hit}'"
        if there is None or there.sizes != x.sizes or there.quantized:
            return f"the original has no float linear of its size that makes '{x.output.name}'"
        if x.transposed:
            return "its weight is stored transposed, as a table"
        k, n = x.sizes
        return f"rank {self.rank} is no less work than its {k}x{n} weight" if self.rank >= k * n / (k + n) else ""
