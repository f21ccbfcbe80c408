"""Low rank: a linear becomes two thin ones, with the least error on the calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Array, Float64, lowrank
from onnxcomp.maths.lowrank import Factors
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, gram, norm2
from onnxcomp.target import Target

__all__ = ["LowRank"]

SIDES = ("left", "right")


@dataclass(frozen=True)
class LowRank(Pass):
    """Replace `W [K, N]` by `A [K, r]` and `B [r, N]` where `r (K + N) < K N`."""

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1, "multiple": 1, "margin": 1.0, "ratio": 0.05}
    example_error: ClassVar[float] = 0.9
    plans: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the linears' weights to save; 0 changes nothing."""
    method: Literal["svd-llm", "asvd", "svd"] = "svd-llm"
    """What counts as loss: the output on the data, the weights scaled by their inputs' size, or the weights alone."""
    allocation: Literal["energy", "uniform"] = "energy"
    """Ranks where they keep most of a layer's output, or the same share everywhere."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Power of the inputs' root mean square in asvd."""
    repair: bool = True
    """Fit the second factor to the data by least squares (svd-llm's factors already are the least-squares solution)."""
    multiple: Annotated[int, Field(ge=0)] = 0
    """Ranks are multiples of this; 0 takes the target's width multiple."""
    margin: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Largest rank as a share of the break-even K N / (K + N); above it a linear is not factored."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that are not factored."""
    min_size: Annotated[int, Field(ge=0)] = 65536
    """Weights with fewer elements are not factored."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in blocks.linears(g) if not x.quantized]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """The Gram matrix of each distinct input, or only its channels' norms."""
        chosen = [] if self.is_identity else [x for group in self._groups(g.clone()) for x in group]
        if self.method == "svd-llm" or self.repair:
            return dict.fromkeys(gram(x.source) for x in chosen)
        return dict.fromkeys(norm2(x.source) for x in chosen) if self.method == "asvd" else ()

    def run(self, g: Graph, env: Env) -> None:
        """Factor every weight, allocate the ranks, and replace the linears."""
        groups = [] if self.is_identity else self._groups(g)
        if not groups:
            return
        multiple = self.multiple or env.target.width_multiple
        spectra = [self._factors(g, group, env, i) for i, group in enumerate(groups)]
        sizes = [group[0].sizes for group in groups]
        ranks = lowrank.share(spectra, sizes, self.ratio, multiple, self.allocation, self.margin)
        for i, (group, rank, (k, n)) in enumerate(zip(groups, ranks, sizes, strict=True)):
            if rank:
                left, right = (np.load(_file(env, i, s), mmap_mode="r", allow_pickle=False) for s in SIDES)
                self._replace(g, group, Factors(left, right, spectra[i]), rank, env)
                continue
            most = f"{self.margin * lowrank.break_even(k, n):.0f}, where {k}x{n} stops paying (margin {self.margin})"
            for x in group:
                g.decline(x.site, f"the rank it needs is over {most}")

    def _groups(self, g: Graph) -> list[list[Linear]]:
        """Linears by weight, the ones that share one together; those not eligible are declined."""
        groups: dict[tuple[str, bool], list[Linear]] = {}
        linears = blocks.linears(g)
        nodes = {x.node for x in linears}
        for x in linears:
            k, n = x.sizes
            hit = skipped(self.skip, x.name, str(x.weight.name))
            if x.quantized:
                continue
            if hit is not None:
                g.decline(x.site, f"skipped by the pattern '{hit}'")
            elif k * n < self.min_size:
                g.decline(x.site, f"its {k}x{n} weight is smaller than min_size={self.min_size}: nothing to gain")
            elif any(u not in nodes for u, _ in x.weight.uses()):
                g.decline(x.site, f"its weight '{x.weight.name}' is read elsewhere too, so cutting it saves nothing")
            else:
                groups.setdefault((str(x.weight.name), x.transposed), []).append(x)
        return list(groups.values())

    def _metric(self, group: Sequence[Linear], env: Env, full: bool) -> Array | None:
        """The metric of the method, or with `full` the Gram matrix: `[K, K]`, its diagonal `[K]` or None."""
        if self.method == "svd-llm" or full:
            first, *rest = (env.stats[gram(x.source)] for x in group)
            return np.asarray(sum(rest, first))
        if self.method == "svd":
            return None
        if self.repair:
            return np.asarray(sum(np.diag(env.stats[gram(x.source)]) for x in group)) ** self.alpha
        return np.asarray(sum(env.stats[norm2(x.source)] ** 2 for x in group)) ** self.alpha

    def _factors(self, g: Graph, group: Sequence[Linear], env: Env, number: int) -> Float64:
        """The squared singular values; all factors up to break-even are written to scratch files."""
        x, (k, n) = group[0], group[0].sizes
        weight, most = g.array(x.weight), int(self.margin * lowrank.break_even(k, n)) + 1
        if env.dry:
            f = lowrank.blank(k, n, most)
        else:
            f = lowrank.factor(weight.T if x.transposed else weight, most, self._metric(group, env, False))
        for side, a in zip(SIDES, (f.left, f.right), strict=True):
            np.save(_file(env, number, side), a.astype(np.float32), allow_pickle=False)
        return f.energies

    def _replace(self, g: Graph, group: Sequence[Linear], factors: Factors, rank: int, env: Env) -> None:
        """Replace the linears of one weight by two each, the second factor refitted where that is asked for."""
        x, weight = group[0], g.array(group[0].weight)
        left, right = factors.cut(rank)
        if self.repair and self.method != "svd-llm" and not env.dry:
            inputs = np.asarray(self._metric(group, env, True))
            right = lowrank.refit(inputs, weight.T if x.transposed else weight, left, right)
        a = g.constant(left.astype(weight.dtype), f"{x.weight.name}_left")
        b = g.constant(right.astype(weight.dtype), f"{x.weight.name}_right")
        for y in group:
            thin = g.op("MatMul", y.input, a, name=f"{y.name}_left")
            wide = g.op("MatMul", thin, b, name=f"{y.name}_right", like=y.node.outputs[0])
            if y.node.op_type == "Gemm" and y.bias is not None:
                wide = g.op("Add", wide, y.bias, name=f"{y.name}_bias", like=y.output)
            g.replace(y.node.outputs[0], wide)


def _file(env: Env, number: int, side: str) -> Path:
    return env.scratch / f"low-rank-{number}-{side}.npy"
