"""Slice: the residual stream in the basis of its principal components, and only the first of them kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks.linears import NormSite
from onnxcomp.blocks.stream import Stream, basis_values, streams
from onnxcomp.graph import Graph, Site
from onnxcomp.maths import Float64
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.sequential import Part
from onnxcomp.methods.repair.stream_projection import duals
from onnxcomp.methods.rotate_stream import basis, rotate
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import gram
from onnxcomp.target import Target

__all__ = ["Slice"]


@dataclass(frozen=True)
class Slice(Pass):
    """Rotate the residual stream to its principal components and cut the last ones (SliceGPT, arXiv 2401.15024).

    For pre-norm models: RMSNorm commutes with rotations, LayerNorm becomes one when the mean is folded into writers.
    """

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example: ClassVar[Mapping[str, Any]] = {"ratio": 0.04, "multiple": 1}
    example_error: ClassVar[float] = 0.5
    plans: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the stream's width to cut; 0 changes nothing."""
    basis: Literal["norm", "shared"] = "norm"
    """A basis for every norm, with a small product on each skip between two, or one for the whole stream."""
    multiple: Annotated[int, Field(ge=0)] = 0
    """Widths are multiples of this; 0 takes the target's width multiple."""
    repair: Literal["gauss-newton", "least-squares", "none"] = "least-squares"
    """What reads the stream and what is added to it, fitted to the uncut model (outputs by `gauss-newton` alone).

    What is written is then projected so that readers' weights hear least of the loss (see `onnxcomp.projections`).
    """

    @property
    def wants_data(self) -> bool:
        """Principal components are those of the calibration data."""
        return not self.is_identity

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every norm over the last axis."""
        return [_site(n) for s in streams(g) for n in s.norms]

    def run(self, g: Graph, env: Env) -> None:
        """Find the bases of every stream on the data, rotate and cut it, and repair what is around it."""
        if self.is_identity:
            return
        uncut, cut, readers = g.clone(), dict[str, Part](), set[ir.Node]()
        multiple = self.multiple or env.target.width_multiple
        for number in range(len(streams(g))):
            stream = streams(g)[number]
            width = max(multiple, int((1 - self.ratio) * stream.width / multiple + 0.5) * multiple)
            why = stream.why
            if not why and g.opset < 23:
                why = "RMSNormalization needs opset 23: run canonicalize first"
            if not why and width >= stream.width:
                why = f"{stream.width} channels less {self.ratio:.0%}, in multiples of {multiple}, is all of them"
            if why:
                for norm in stream.norms:
                    g.decline(_site(norm), why)
                continue
            bases, chosen = self._bases(g, stream, width, env), basis_values(stream)
            written = duals(g, stream, bases) if self._repairs(env) else bases
            parts = {str(v.name): Part(str(v.name), written[chosen[v]], stream.kind == "layer") for v in stream.values}
            made = rotate(g, stream, *({v: of[chosen[v]] for v in stream.values} for of in (bases, written)))
            cut |= {str(made[name].name): part for name, part in parts.items()}
            readers |= {node for norm in stream.norms for node in norm.readers}
            g.model.graph.sort()
        g.sweep()  # the uncut stream's sums still read what is added now
        if self._repairs(env) and cut:
            held = [x for x in blocks.linears(g) if x.node in readers and not x.output.is_graph_output()]
            found = [x for x in held if has(uncut, str(x.output.name)) and not sequential.unfit(g, x)]
            sequential.in_order(g, uncut, env, map(sequential.alone, found), cut, self.repair == "gauss-newton")

    def _repairs(self, env: Env) -> bool:
        return self.repair != "none" and not env.dry

    def _bases(self, g: Graph, stream: Stream, width: int, env: Env) -> dict[ir.Value, ir.TensorProtocol]:
        """The first principal components `[d, width]` of what each norm makes of its input, by the norm's input."""
        inputs = dict.fromkeys(n.input for n in stream.norms)
        if env.dry:
            one = basis(g, np.eye(stream.width, width))
            return {v: one if self.basis == "shared" else basis(g, np.eye(stream.width, width)) for v in inputs}
        probe = g.clone()
        seen = _probes(probe, stream.norms)
        stats = env.collect(probe, [gram(v) for v in seen.values()])
        moments = {v: gram(seen[str(v.name)]) for v in inputs}  # read one by one: together they may not fit in memory
        if self.basis == "norm":
            return {v: basis(g, _components(stats[m], width)) for v, m in moments.items()}
        total = np.zeros((stream.width, stream.width))
        for m in moments.values():
            total += stats[m] / max(float(np.trace(stats[m])), 1e-30)
        return dict.fromkeys(moments, basis(g, _components(total, width)))


def _site(norm: NormSite) -> Site:
    return Site(norm.name, (norm.name, *(str(u.name) for u in norm.readers)), "norm")


def _probes(probe: Graph, norms: Sequence[NormSite]) -> dict[str, ir.Value]:
    """The norms' results before gain and bias, as extra values, by the name of what they read."""
    found: dict[str, ir.Value] = {}
    for norm in norms:
        name = str(norm.input.name)
        if name not in found:
            unit = np.ones_like(probe.array(probe.value(str(norm.gain.name))))
            epsilon = norm.node.attributes.get_float("epsilon", 1e-5)
            found[name] = probe.op(norm.node.op_type, probe.value(name), unit, axis=-1, epsilon=epsilon, name="probe")
    return found


def _components(moments: Float64, width: int) -> Float64:
    """The eigenvectors of the `width` largest eigenvalues, the sign of each such that its largest entry is positive."""
    vectors = np.linalg.eigh((moments + moments.T) / 2)[1][:, : -width - 1 : -1]
    top = vectors[np.abs(vectors).argmax(axis=0), np.arange(width)]
    return np.ascontiguousarray(vectors * np.where(top < 0, -1.0, 1.0))
