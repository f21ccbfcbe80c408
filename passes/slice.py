"""Slice: express the residual stream in its principal components and keep the first ones (SliceGPT)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks.linears import NormSite
from onnxcomp.blocks.stream import Stream, basis_values, streams
from onnxcomp.graph import Graph, Site
from onnxcomp.methods import principal_components
from onnxcomp.methods.repair import sequential
from onnxcomp.methods.repair.correspondence import has
from onnxcomp.methods.repair.sequential import Part
from onnxcomp.methods.repair.stream_projection import duals
from onnxcomp.methods.rotate_stream import rotate
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Slice"]


@dataclass(frozen=True)
class Slice(Pass):
    """Rotate the residual stream to its principal components, remove the last ones (Ashkboos et al., SliceGPT, 2024).

    arXiv 2401.15024, section 3. For pre-norm models: an RMSNorm without gain commutes with a rotation, a LayerNorm
    becomes one when the subtraction of the mean is folded into the weights that write to the stream.
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
    repair: Literal["gauss-newton", "block-tune", "least-squares", "none"] = "least-squares"
    """Refit the linears that read the stream or add to it to the uncut model (the logits by `gauss-newton` only).

    Weights that write to the stream are then projected obliquely, so that the weights which read it lose least.
    """

    @property
    def fits(self) -> bool:
        """Where what is left is refitted."""
        return not self.is_identity and self.repair != "none"

    @property
    def wants_data(self) -> bool:
        """Principal components are those of the calibration data."""
        return not self.is_identity

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every norm over the last axis."""
        return [_site(n) for s in streams(g) for n in s.norms]

    def run(self, g: Graph, env: Env) -> None:
        """Choose a width for every stream, rotate and cut it, and repair the linears around it."""
        if self.is_identity:
            return
        uncut, targets, readers = g.clone(), dict[str, Part](), set[ir.Node]()
        for first in [_site(s.norms[0]).name for s in streams(g)]:  # found anew: a cut replaces values of other streams
            stream = next(s for s in streams(g) if _site(s.norms[0]).name == first)
            width = self._width(stream, env.target)
            if why := self._refusal(g, stream, width, env.target):
                for norm in stream.norms:
                    g.decline(_site(norm), why)
                continue
            targets |= self._cut(g, stream, width, env)
            readers |= {node for norm in stream.norms for node in norm.readers}
        g.sweep()  # the uncut stream's sums still consume what the new ones do
        if self._repairs(env) and targets:
            self._repair(g, uncut, env, targets, readers)

    def _multiple(self, target: Target) -> int:
        return self.multiple or target.width_multiple

    def _width(self, stream: Stream, target: Target) -> int:
        """The width that is kept: the nearest multiple, at least one."""
        multiple = self._multiple(target)
        return max(multiple, int((1 - self.ratio) * stream.width / multiple + 0.5) * multiple)

    def _refusal(self, g: Graph, stream: Stream, width: int, target: Target) -> str:
        """Why a stream cannot be cut to a width, empty if it can."""
        if stream.why:
            return stream.why
        if g.opset < 23:
            return "RMSNormalization needs opset 23: run canonicalize first"
        if width < stream.width:
            return ""
        return (
            f"{stream.width} channels less {self.ratio:.0%}, in multiples of {self._multiple(target)}, is all of them"
        )

    def _cut(self, g: Graph, stream: Stream, width: int, env: Env) -> dict[str, Part]:
        """Carry a stream in `width` coordinates; by the name of each new value, what it represents of the old one.

        Values are read through their basis `Q` `[d, width]` and, where repair is on, written through its dual.
        """
        bases, leader = principal_components.bases(g, stream, width, env, self.basis == "shared"), basis_values(stream)
        written = duals(g, stream, bases) if self._repairs(env) else bases
        parts = {str(v.name): Part(str(v.name), written[leader[v]], stream.kind == "layer") for v in stream.values}
        new = rotate(g, stream, *({v: of[leader[v]] for v in stream.values} for of in (bases, written)))
        g.sort()
        return {str(new[name].name): part for name, part in parts.items()}

    def _repair(self, g: Graph, uncut: Graph, env: Env, targets: dict[str, Part], readers: set[ir.Node]) -> None:
        """Refit, one after another, the linears that read the stream and those that add to it."""
        linears = [x for x in blocks.linears(g) if x.node in readers and not x.output.is_graph_output()]
        fitted = [x for x in linears if has(uncut, str(x.output.name)) and not sequential.unfit_reason(g, x)]
        sequential.refit_in_order(g, uncut, env, map(sequential.reader_of, fitted), targets, self.repair)

    def _repairs(self, env: Env) -> bool:
        return self.repair != "none" and not env.dry


def _site(norm: NormSite) -> Site:
    return Site(norm.name, (norm.name, *(str(u.name) for u in norm.readers)), "norm")
