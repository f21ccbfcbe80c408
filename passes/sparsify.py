"""Sparsify: weights become zero, the others are refitted; shapes do not change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import sparse
from onnxcomp.maths.sparse import Pattern
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.methods.sparse_storage import compact
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import Need, gram, norm2
from onnxcomp.target import Target

__all__ = ["Sparsify"]

ROUNDS = 64  # of swaps in a channel permutation: more keep more of the weights and cost time


@dataclass(frozen=True)
class Sparsify(SequentialPass):
    """Zero weights: anywhere, all but N of every M in-channels, or in blocks.

    Wanda is Sun et al., 2023 (arXiv 2306.11695), SparseGPT Frantar and Alistarh, 2023 (arXiv 2301.00774).
    No kernel of ONNX Runtime skips zeros; TensorRT uses 2:4 in fp16, bf16 and int8. The report says so.
    """

    stage: ClassVar[Stage] = Stage.SPARSIFY
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example: ClassVar[Mapping[str, Any]] = {"min_size": 1, "ratio": 0.1, "head": True}

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of zeros; 0 changes nothing. An N:M pattern decides its own share."""
    pattern: Annotated[str, Field(pattern=r"^(unstructured|\d+:\d+|block \d+x\d+)$")] = "unstructured"
    """Where zeros may lie: unstructured, N:M such as 2:4, or block RxC such as block 16x1."""
    method: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    """What decides: the weight's size, its size times its input's norm, or what the output loses."""
    repair: bool = True
    """Refit the other weights on the data to compensate the zeros (sparsegpt always does)."""
    permute: bool = False
    """Order feed-forward channels so that an N:M pattern keeps more."""
    compact: bool = False
    """Store mask and values instead of zeros; quantizing afterwards does not find these weights."""
    head: bool = False
    """Also the product that makes the model's output."""
    skip: tuple[str, ...] = ()
    """Patterns of node or weight names that stay dense."""
    min_size: Annotated[int, Field(ge=0)] = 1024
    """Weights with fewer elements stay dense."""

    @property
    def wants_data(self) -> bool:
        """Whether scores or repair need calibration."""
        return self.method != "magnitude" or self.repair

    def advice(self, target: Target) -> Iterable[str]:
        """What the target makes of zeros."""
        if self.is_identity or self.pattern in target.sparse:
            return
        used = f"only {', '.join(target.sparse)} is used there" if target.sparse else "its kernels multiply them all"
        file = "" if self.compact else ", and the file keeps its size without compact: true"
        yield (
            f"sparsify: zeros ({self.pattern}) make nothing faster on '{target.name}', {used}{file}; "
            "cut structure to gain speed: prune-ffn, prune-heads, drop-layers"
        )

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every linear with a float weight."""
        return [x.site for x in blocks.linears(g) if not x.quantized]

    def site_needs(self, g: Graph, site: Site, target: Target) -> Iterable[Need]:
        """The Gram matrix of the linear's input, or its channels' norms, also of others that share its weight."""
        x = self._linear(g, site)
        if self._refusal(g, x) or not self.wants_data:
            return ()
        need = norm2 if self.method == "wanda" and not self.repair else gram
        return dict.fromkeys(need(y.source) for y in blocks.linears(g) if y.weight is x.weight)

    def run(self, g: Graph, env: Env) -> None:
        """Permute if asked, zero site by site, then store compactly if asked."""
        if self.is_identity:
            return
        if self.permute and Pattern.parse(self.pattern).kind == "n:m":
            self._permute(g, env)
        super().run(g, env)
        if self.compact:
            compact(g, [x.weight for x in blocks.linears(g)])

    def edit(self, g: Graph, site: Site, env: Env) -> None:
        """Zero one weight; one that several linears share is zeroed for all of their inputs."""
        x = self._linear(g, site)
        if why := self._refusal(g, x):
            if not (x.name in g.touched and "already" in why):
                g.decline(site, why)
            return
        stored = g.array(x.weight)
        found = [np.asarray(env.stats[n]) for n in self.site_needs(g, site, env.target)]
        power = 1 if not found or found[0].ndim == 2 else 2  # norms add up as squares
        inputs = np.asarray(sum(a**power for a in found)) ** (1 / power) if len(found) > 1 else next(iter(found), None)
        weight = stored.T if x.transposed else stored
        pattern = Pattern.parse(self.pattern)
        new = sparse.zeroed(weight, pattern, self.ratio, self.method, inputs, self.repair).astype(stored.dtype)
        g.put(x.weight, np.ascontiguousarray(new.T) if x.transposed else new)

    def _permute(self, g: Graph, env: Env) -> None:
        """Reorder the hidden channels of feed-forward parts, which changes only the groups of the pattern."""
        pattern = Pattern.parse(self.pattern)
        for mlp in blocks.mlps(g):
            constants = [v for x in mlp.linears for v in (x.weight, x.bias) if v is not None]
            if mlp.inner or any(len(list(v.uses())) > 1 for v in constants) or pattern.refuses(*mlp.down.sizes):
                continue  # used or changed elsewhere too: the channels keep their order
            down = mlp.down
            weight = np.abs(g.array(down.weight))
            new = sparse.order(weight.T if down.transposed else weight, pattern, ROUNDS, env.rng)
            g.put(down.weight, np.take(g.array(down.weight), new, axis=int(down.transposed)))
            for x in mlp.linears[:-1]:
                g.put(x.weight, np.take(g.array(x.weight), new, axis=1 - int(x.transposed)))
                if x.bias is not None:
                    g.put(x.bias, np.take(g.array(x.bias), new, axis=-1))

    def _refusal(self, g: Graph, x: Linear) -> str:
        """Why a linear stays as it is, empty if it does not."""
        pattern, (k, n) = Pattern.parse(self.pattern), x.sizes
        if (hit := skipped(self.skip, x.name, str(x.weight.name))) is not None:
            return f"skipped by the pattern '{hit}'"
        if k * n < self.min_size:
            return f"its {k}x{n} weight is smaller than min_size={self.min_size}"
        end = blocks.head(g)
        if not self.head and end is not None and end.node is x.node:
            return "it makes the model's output; say head: true to include it"
        if why := pattern.refuses(k, n):
            return why
        weight = g.array(x.weight)
        return "it already has these zeros" if pattern.holds(weight.T if x.transposed else weight, self.ratio) else ""

    @staticmethod
    def _linear(g: Graph, site: Site) -> Linear:
        return next(x for x in blocks.linears(g) if x.name == site.name)
