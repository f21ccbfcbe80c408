"""Let several query heads share one key and value head: multi-head to grouped-query or multi-query attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks import Attention, Linear, attentions
from onnxcomp.graph import Graph, Site
from onnxcomp.methods import shared_heads
from onnxcomp.methods.shared_heads import Shared
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, gram
from onnxcomp.target import Target

__all__ = ["GroupHeads"]


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Replace the keys and values of neighbouring heads by a mean, after bringing the heads onto each other.

    Means of key and value heads are Ainslie et al., GQA, 2023 (arXiv 2305.13245, section 2.1). Before the mean, each
    head is mapped towards the others (`maths.align`), values freely, keys as their rotary embedding allows; queries and
    the output projection map back. Without repair the maps are rotations; with it they span what the heads hold by
    a singular value decomposition (Yu et al., 2024, arXiv 2406.07056) that counts what queries and the output
    projection read, and then the output projections are fitted. Law: no fit raises its attention's squared error.
    """

    stage: ClassVar[Stage] = Stage.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"share": 1}
    example_error: ClassVar[float] = 0.6

    share: Annotated[int, Field(ge=1)] = 2
    """How many key and value heads become one; 1 changes nothing."""
    align: bool = True
    """Bring heads onto each other before the mean."""
    max_loss: Annotated[float, Field(ge=0, le=1)] = 1.0
    """An attention whose keys or values lose more than this share of their energy on calibration data stays."""
    repair: Literal["gauss-newton", "least-squares", "none"] = "least-squares"
    """What makes up for it: heads that span the old ones, and output projections fitted in order; or nothing."""

    @property
    def _spans(self) -> bool:
        return self.align and self.repair != "none"

    def planning(self) -> Pass | None:
        """Sizes depend on data only where an attention may stay for what it would lose."""
        return self if self.is_identity or self.max_loss == 1 else None

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every attention with several key and value heads."""
        return [a.site for a in attentions(g) if a.kv_heads > 1]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """Moments of keys, values and queries, or of what keys and values are made from."""
        if self.is_identity:
            return
        found = [a for a in attentions(g) if a.kv_heads > 1 and not self._blocked(g, a)]
        asked = (shared_heads.needs(a) if self._spans else (gram(x.source) for x in (a.k, a.v)) for a in found)
        yield from dict.fromkeys(n for each in asked for n in each)

    def run(self, g: Graph, env: Env) -> None:
        """Group the heads of each attention."""
        if self.is_identity:
            return
        uncut, cut = g.clone(), []
        for a in [a for a in attentions(g) if a.kv_heads > 1]:
            if why := self._blocked(g, a):
                g.decline(a.site, why)
            elif self._group(g, a, env):
                cut.append(a.o)
        g.forget_shapes()
        if self.repair != "none" and not env.dry:
            shared_heads.repair(g, uncut, env, cut, self.repair == "gauss-newton")

    def _blocked(self, g: Graph, a: Attention) -> str:
        if a.kv_heads % self.share:
            return f"its {a.kv_heads} key and value heads do not divide into groups of {self.share}"
        if a.past is not None or len(a.node.outputs) > 1:
            return "its keys and values are inputs or outputs of the model"
        if any(x.quantized or len(x.weight.uses()) > 1 for x in a.linears):
            return "a weight is quantized or shared with another layer"
        if a.node.inputs[2] is not a.v.output or shared_heads.key_path(a) is None or a.inner_norms:
            return "keys or values are moved between their projection and the attention"
        return ""

    def _group(self, g: Graph, a: Attention, env: Env) -> bool:
        """Share the heads of one attention, unless that loses too much."""
        keys, values = (self._shared(g, a, x, env) for x in (a.k, a.v))
        if max(keys.lost, values.lost) > self.max_loss:
            g.decline(a.site, f"the mean would lose {keys.lost:.1%} of its keys and {values.lost:.1%} of its values")
            return False
        shared_heads.share(g, a, keys, values, self.share)
        return True

    def _shared(self, g: Graph, a: Attention, x: Linear, env: Env) -> Shared:
        if env.dry:
            return shared_heads.plain(a, x)
        if self._spans:
            return shared_heads.spanned(g, a, x, self.share, env.stats)
        return shared_heads.turned(g, a, x, self.share, env.stats, self.align)
