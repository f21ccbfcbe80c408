"""Refit: layers that write to the residual stream, and norms, are fitted to what the original gave there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Linear, NormSite
from onnxcomp.branches import joins
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import refit
from onnxcomp.maths.refit import Means
from onnxcomp.pipeline import Env, Fidelity, SequentialPass, Stage
from onnxcomp.stats import Need, cross_gram, gram, mean, norm2, var
from onnxcomp.target import Target

__all__ = ["Refit"]


@dataclass(frozen=True)
class Refit(SequentialPass):
    """Re-fit what is left after cuts to the original, in closed form, layer after layer on the model as it is by then.

    A layer's target is the original's residual stream behind it less what the stream carries already, so that it makes
    up for the errors before it as well.
    """

    stage: ClassVar[Stage] = Stage.REFIT
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    outputs: bool = True
    """Fit the linears that write to the residual stream, with their biases, by least squares."""
    norms: bool = True
    """Fit the gain (and bias) of every norm, channel by channel."""
    damp: Annotated[float, Field(ge=0)] = 0.01
    """Pull towards the weights as they are, relative to the mean of the inputs' squares."""

    @property
    def is_identity(self) -> bool:
        """Whether nothing is to be fitted."""
        return not self.outputs and not self.norms

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Linears that are added to the stream, and norms."""
        writers = [x.site for x in blocks.linears(g) if joins(x) is not None and not x.quantized]
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
        add = joins(x)
        assert add is not None
        out = add.outputs[0]
        skip = next(v for v in add.inputs if v is not x.output)
        held = [v for v in (x.weight, x.bias) if v is not None]
        if skip is None or not _has(env.original, out):
            return f"the original has no value '{out.name}' to fit to"
        if any(len(list(v.uses())) > 1 for v in held):
            return "its weights are shared, so they cannot be fitted for one place"
        xs, there, here = x.source, (out, "original"), (skip, "current")
        needs: dict[str, Need] = {
            "gram": gram(xs),
            "there": cross_gram(xs, out, other_of="original"),
            "here": cross_gram(xs, skip),
        }
        if x.bias is not None:
            needs |= {"mean": mean(xs), "var": var(xs), "norm": norm2(xs)}
            needs |= {f"mean {of}": mean(v, of=of) for v, of in (there, here)}  # type: ignore[arg-type]
        stats = env.collect(g, needs.values())
        got = {k: stats[n] for k, n in needs.items()}
        stored = g.array(x.weight)
        weight = stored.T if x.transposed else stored
        means = None if x.bias is None else _means(got, got["mean original"] - got["mean current"])
        w, b = refit.linear(got["gram"], got["there"] - got["here"], weight, self.damp, means)
        g.put(x.weight, np.ascontiguousarray(w.T if x.transposed else w).astype(stored.dtype))
        if x.bias is not None and b is not None:
            old = g.array(x.bias)
            g.put(x.bias, b.reshape(old.shape).astype(old.dtype))
        return ""

    def _norm(self, g: Graph, n: NormSite, env: Env) -> str:
        """Fit a norm; why not, empty if it was."""
        v = n.output
        if not _has(env.original, v):
            return f"the original has no value '{v.name}' to fit to"
        if any(len(list(c.uses())) > 1 for c in (n.gain, n.bias) if c is not None):
            return "its gain is shared, so it cannot be fitted for one place"
        needs: dict[str, Need] = {"norm": norm2(v), "cross": cross_gram(v, v, other_of="original")}
        if n.bias is not None:
            needs |= {"mean": mean(v), "var": var(v), "mean original": mean(v, of="original")}
        stats = env.collect(g, needs.values())
        got = {k: stats[need] for k, need in needs.items()}
        means = None if n.bias is None else _means(got, got["mean original"])
        a, c = refit.scale(got["norm"] ** 2, np.diag(got["cross"]), means)
        for held, new in ((n.gain, a), (n.bias, a)):
            if held is not None:
                old = g.array(held)
                shift = c if held is n.bias else 0.0
                g.put(held, (old.reshape(-1) * new + shift).reshape(old.shape).astype(old.dtype))
        return ""


def _has(original: Graph, v: ir.Value) -> bool:
    try:
        return not original.is_constant(original.value(str(v.name)))
    except ModelError:
        return False


def _means(got: Mapping[str, Any], target: Any) -> Means:
    return Means(got["mean"], target, refit.count(got["norm"], got["mean"], got["var"]))
