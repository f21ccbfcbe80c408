"""Rotate: turn the residual stream and the values of each head, so that no channel is an outlier (QuaRot)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks.linears import NormSite
from onnxcomp.blocks.stream import Stream, streams
from onnxcomp.graph import Graph, Site
from onnxcomp.maths.trial_rounding import TrialRounding
from onnxcomp.methods.quantize import rotations
from onnxcomp.methods.quantize.rotations import Choice, Search
from onnxcomp.methods.rotate_stream import is_free
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.target import Target

__all__ = ["Rotate"]


@dataclass(frozen=True)
class Rotate(Pass):
    """Fold random rotations into the weights, after which no channel stands out (Ashkboos et al., QuaRot, 2024).

    arXiv 2404.00456: R1 turns the residual stream of pre-norm models (LayerNorm becomes RMSNorm), R2 the values of each
    head. Of several draws the one under which rounding errs least on left-out rows is taken, if it errs less at all.
    """

    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    plans: ClassVar[bool] = True

    stream: bool = True
    """R1: turn the residual stream; a head that shares the embedding table gets a copy of it."""
    values: bool = True
    """R2: turn the values of each head."""
    online: bool = False
    """R4: turn the inputs of second feed-forward linears as well, which costs a product at run time."""
    bits: Literal[8, 4, 3, 2] = 8
    """Bits of the weights by whose rounding rotations are judged."""
    block: Literal[0, 16, 32, 64, 128, 256] = 0
    """In-channels that share a scale there; 0 is one scale per out-channel."""
    inputs: Literal[0, 4, 8] = 8
    """Bits of the inputs there; 0 leaves them float."""
    seeds: Annotated[int, Field(ge=1)] = 8
    """Rotations that are drawn and judged."""
    least: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the rounding error that the median of the drawn rotations must take away, or else nothing is turned."""
    always: bool = False
    """Turn whether or not that much goes."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every norm of a stream, every attention, and second feed-forward linears where they are asked for."""
        if self.stream:
            yield from (_site(n) for s in streams(g) for n in s.norms)
        if self.values:
            yield from (a.site for a in blocks.attentions(g))
        if self.online:
            yield from (m.down.site for m in blocks.mlps(g))

    @property
    def wants_data(self) -> bool:
        """Rotations are chosen by the data."""
        return True

    def run(self, g: Graph, env: Env) -> None:
        """Turn the streams, then the values of each head, then what is asked for at run time."""
        if env.dry:
            return
        search = Search(env, TrialRounding(self.bits, self.block, self.inputs), self.seeds)
        for number in range(len(streams(g)) if self.stream else 0):  # found anew: turning one replaces its values
            self._turn(g, streams(g)[number], search)
        for a in blocks.attentions(g) if self.values else ():
            why = rotations.values_refusal(a)
            if not why and not (why := self._judged(g, a.site, choice := search.values(g, a))):
                rotations.rotate_values(g, a, choice.rotation)
            if why:
                g.decline(a.site, why)
        for m in blocks.mlps(g) if self.online else ():
            why = "" if is_free(m.down) else "its weight is quantized or shared"
            if not why and not (why := self._judged(g, m.down.site, choice := search.inputs(g, m.down))):
                rotations.rotate_inputs(g, m.down, choice.rotation)
            if why:
                g.decline(m.down.site, why)

    def _turn(self, g: Graph, stream: Stream, search: Search) -> None:
        why = stream.why or ("RMSNormalization needs opset 23: run canonicalize first" if g.opset < 23 else "")
        if not why:
            choice = search.stream(g, stream)
            if not (why := self._judged(g, _site(stream.norms[0]), choice)):
                return rotations.turn_stream(g, stream, choice.rotation)
        for norm in stream.norms:
            g.decline(_site(norm), why)
        return None

    def _judged(self, g: Graph, site: Site, choice: Choice) -> str:
        """Why a rotation is not taken, empty if it is."""
        if choice.usual > 1 - self.least and not self.always:
            return f"rounding errs {choice.usual:.2f} times as much under a usual rotation: more than 1 - {self.least}"
        g.note(site, f"rounding errs {choice.share:.2f} times as much as without rotation")
        return ""


def _site(norm: NormSite) -> Site:
    return Site(norm.name, (norm.name, *(str(u.name) for u in norm.readers)), "norm")
