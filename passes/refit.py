"""Refit: layers that write to the residual stream, and norms, are fitted to the original's values there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
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
    any_place: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"outputs": False, "norms": False, "scales": False}

    outputs: bool = True
    """Fit the linears that write to the residual stream, with their biases, by least squares."""
    norms: bool = True
    """Fit the gain (and bias) of every norm, channel by channel (behind a quantizer: norm tweaking)."""
    scales: bool = False
    """Behind a quantizer: fit the scales of weights that are codes (and biases) to the original's outputs there."""
    damp: Annotated[float, Field(ge=0)] = 0.01
    """Damping towards the current weights, relative to the mean of the inputs' squares."""

    @property
    def fits(self) -> bool:
        """Layers and norms, to the original."""
        return not self.is_identity

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Linears that are added to the stream, and norms."""
        writers = [x.site for x in blocks.linears(g) if residual_add(x) is not None and not x.quantized]
        coded = [_with_codes(x) for x in blocks.linears(g) if x.quantized]
        norms = [n.site for n in blocks.norms(g)]
        return [
            *(writers if self.outputs else ()),
            *(norms if self.norms else ()),
            *(coded if self.scales else ()),
        ]

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
            x = next(x for x in blocks.linears(g) if x.name == site.name)
            why = self._scales(g, x, env) if x.quantized else self._linear(g, x, env)
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
        return self._channels(g, env, n.output, n.gain, n.bias)

    def _scales(self, g: Graph, x: Linear, env: Env) -> str:
        """Fit the scales of a weight `[K, N]`, `[N]` or `[blocks, N]`; why not, empty if they were."""
        made = x.dequantize
        scale = made.inputs[1] if made is not None else None
        if scale is None or x.transposed or not scale.shape or scale.shape[-1] != x.sizes[1]:
            return "its scales are not one (or one per block) for each out-channel"
        if len(list(x.weight.uses())) > 1:
            return "its weight is shared, so it cannot be fitted for one place"
        return self._channels(g, env, x.output, scale, x.bias)

    @staticmethod
    def _channels(g: Graph, env: Env, v: ir.Value, gain: ir.Value, bias: ir.Value | None) -> str:
        """Fit what multiplies the channels of a value, and its bias, to the original's; why not, empty if they were."""
        target = counterpart(g, env.original, v)
        if not has(env.original, target):
            return f"the original has no value '{target}' to fit to"
        if any(len(list(c.uses())) > 1 for c in (gain, bias) if c is not None):
            return "its gain is shared, so it cannot be fitted for one place"
        needs: dict[str, Need] = {"norm": norm2(v), "cross": cross_gram(v, target, other_of="original")}
        if bias is not None:
            needs |= {"mean": mean(v), "var": var(v), "mean original": mean(target, of="original")}
        stats = env.collect(g, needs.values())
        got = {k: stats[need] for k, need in needs.items()}
        here, there = got["cross"].shape
        if here != there:
            return f"'{target}' was {there} wide in the original, and is {here} now"
        means = None if bias is None else _means(got, got["mean original"])
        a, c = affine.scale(got["norm"] ** 2, np.diag(got["cross"]), means)
        for held, shift in ((gain, 0.0), (bias, c)):
            if held is not None:
                old = g.array(held)
                g.put(held, (old.reshape(-1, len(a)) * a + shift).reshape(old.shape).astype(old.dtype))
        return ""


def _with_codes(x: Linear) -> Site:
    """The place of a linear with that of its scales."""
    made = x.dequantize
    return dataclasses.replace(x.site, nodes=(*x.site.nodes, *([str(made.name)] if made is not None else [])))


def _means(got: Mapping[str, Any], target: Any) -> Means:
    return Means(got["mean"], target, affine.count(got["norm"], got["mean"], got["var"]))
