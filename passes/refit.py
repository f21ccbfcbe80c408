"""Refit: layers that write to the residual stream, and norms, are fitted to the original's values there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear, NormSite
from onnxcomp.blocks.branches import residual_add, residual_sum
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import affine
from onnxcomp.maths.affine import Means
from onnxcomp.methods.repair.correspondence import counterpart, has
from onnxcomp.methods.repair.sequential import refit_to_stream, unfit_reason
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import Need, cross_gram, mean, norm2, var
from onnxcomp.target import Target

__all__ = ["Refit"]


@dataclass(frozen=True)
class Refit(SequentialPass):
    """Refit a cut model to the original in closed form, layer after layer, each on the model refitted so far.

    A layer's target is the original's residual stream after it (where layers after it were dropped, after those) less
    what the stream carries already, so that it compensates the errors before it as well.
    """

    stage: ClassVar[Stage] = Stage.REFIT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    identity: ClassVar[Mapping[str, Any]] = {"outputs": False, "norms": False}

    outputs: bool = True
    """Fit the linears that write to the residual stream, with their biases, by least squares."""
    norms: bool = True
    """Fit the gain (and bias) of every norm, channel by channel."""
    damp: Annotated[float, Field(ge=0)] = 0.01
    """Damping towards the current weights, relative to the mean of the inputs' squares."""

    @property
    def fits(self) -> bool:
        """Layers and norms, to the original."""
        return not self.is_identity

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Linears that are added to the stream, and norms."""
        writers = [x.site for x in blocks.linears(g) if residual_add(x) is not None and not x.quantized]
        return [*(writers if self.outputs else ()), *((n.site for n in blocks.norms(g)) if self.norms else ())]

    def run(self, g: Graph, env: Env) -> None:
        """Decline what cannot be compared with the original, fit the rest in order."""
        if not self.is_identity:
            super().run(g, env)

    def edit(self, g: Graph, site: Site, env: Env) -> None:
        """Fit one linear or one norm."""
        before = g.edits
        if site.kind == "norm":
            why = self._norm(g, next(n for n in blocks.norms(g) if n.name == site.name), env)
        else:
            why = self._linear(g, next(x for x in blocks.linears(g) if x.name == site.name), env)
        if why or g.edits == before:
            g.decline(site, why or "it gives what the original gave")

    def _linear(self, g: Graph, x: Linear, env: Env) -> str:
        """Fit a linear; why not, empty if it was."""
        joined = residual_sum(x)
        assert joined is not None
        target = counterpart(g, env.original, joined.end)
        if not has(env.original, target):
            return f"the original has no value '{target}' to fit to"
        if why := unfit_reason(g, x):
            return why
        try:
            refit_to_stream(g, env.original, env, x, target, self.damp)
        except ModelError as e:
            return str(e)
        return ""

    def _norm(self, g: Graph, n: NormSite, env: Env) -> str:
        """Fit a norm; why not, empty if it was."""
        v = n.output
        target = counterpart(g, env.original, v)
        if not has(env.original, target):
            return f"the original has no value '{target}' to fit to"
        if any(len(list(c.uses())) > 1 for c in (n.gain, n.bias) if c is not None):
            return "its gain is shared, so it cannot be fitted for one place"
        needs: dict[str, Need] = {"norm": norm2(v), "cross": cross_gram(v, target, other_of="original")}
        if n.bias is not None:
            needs |= {"mean": mean(v), "var": var(v), "mean original": mean(target, of="original")}
        stats = env.collect(g, needs.values())
        got = {k: stats[need] for k, need in needs.items()}
        here, there = got["cross"].shape
        if here != there:
            return f"'{target}' was {there} wide in the original, and is {here} now"
        means = None if n.bias is None else _means(got, got["mean original"])
        a, c = affine.scale(got["norm"] ** 2, np.diag(got["cross"]), means)
        for held, new in ((n.gain, a), (n.bias, a)):
            if held is not None:
                old = g.array(held)
                shift = c if held is n.bias else 0.0
                g.put(held, (old.reshape(-1) * new + shift).reshape(old.shape).astype(old.dtype))
        return ""


def _means(got: Mapping[str, Any], target: Any) -> Means:
    return Means(got["mean"], target, affine.count(got["norm"], got["mean"], got["var"]))
