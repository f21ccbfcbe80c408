"""Let several query heads share one key and value head: multi-head to grouped-query or multi-query attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from onnxcomp.blocks import Attention, Linear, attentions
from onnxcomp.graph import Graph, Site
from onnxcomp.methods import shared_heads
from onnxcomp.methods.shared_heads import Alignment
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, gram
from onnxcomp.target import Target

__all__ = ["GroupHeads"]


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Replace the key and value heads of each group by their mean, after aligning the heads.

    Means of key and value heads are Ainslie et al., GQA, 2023 (arXiv 2305.13245, section 2.1). Before the mean, each
    head is mapped towards the others, values freely, keys as their rotary embedding allows; queries and the output
    projection apply the inverse maps. Without repair the maps are rotations. With repair they are low-rank factors of
    the heads by a singular value decomposition (Yu et al., 2024, arXiv 2406.07056), weighted by the queries and the
    output projection, and the output projections are then refitted. Law: no fit raises its attention's squared error.
    """

    stage: ClassVar[Stage] = Stage.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"share": 1}
    example_error: ClassVar[float] = 0.6

    share: Annotated[int, Field(ge=1)] = 2
    """How many key and value heads become one; 1 changes nothing."""
    align: bool = True
    """Align the heads before the mean."""
    max_loss: Annotated[float, Field(ge=0, le=1)] = 1.0
    """An attention whose keys or values would lose more than this share of their energy on calibration data is kept."""
    repair: Literal["gauss-newton", "block-tune", "least-squares", "none"] = "least-squares"
    """How it is compensated: low-rank factors instead of rotations, output projections refitted; none: no repair."""

    @property
    def fits(self) -> bool:
        """Where what is left is refitted."""
        return not self.is_identity and self.repair != "none"

    @property
    def _factorizes(self) -> bool:
        return self.align and self.repair != "none"

    def planning(self) -> Pass | None:
        """Sizes depend on data only where `max_loss` may keep an attention as it is."""
        return self if self.is_identity or self.max_loss == 1 else None

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every attention with several key and value heads."""
        return [a.site for a in attentions(g) if a.kv_heads > 1]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """Moments of keys, values and queries, or of the inputs of the key and value projections."""
        if self.is_identity:
            return
        eligible = [a for a in attentions(g) if a.kv_heads > 1 and not self._refusal(g, a)]
        needs = (shared_heads.needs(a) if self._factorizes else (gram(x.source) for x in (a.k, a.v)) for a in eligible)
        yield from dict.fromkeys(n for each in needs for n in each)

    def run(self, g: Graph, env: Env) -> None:
        """Align and average the heads of each attention, then refit the output projections of those that changed."""
        if self.is_identity:
            return
        uncut, changed = g.clone(), []
        for a in [a for a in attentions(g) if a.kv_heads > 1]:
            if why := self._refusal(g, a):
                g.decline(a.site, why)
                continue
            keys, values = (self._alignment(g, a, x, env) for x in (a.k, a.v))
            if max(keys.loss, values.loss) > self.max_loss:
                g.decline(
                    a.site, f"the mean would lose {keys.loss:.1%} of its keys and {values.loss:.1%} of its values"
                )
                continue
            shared_heads.average(g, a, keys, values, self.share)
            changed.append(a.o)
        g.forget_shapes()
        if self.repair != "none" and not env.dry:
            shared_heads.repair(g, uncut, env, changed, self.repair)

    def _refusal(self, g: Graph, a: Attention) -> str:
        """Why an attention keeps its heads, empty if they can be grouped."""
        if a.kv_heads % self.share:
            return f"its {a.kv_heads} key and value heads do not divide into groups of {self.share}"
        if why := shared_heads.cache_stays(a):
            return why
        if any(x.quantized or len(x.weight.uses()) > 1 for x in a.linears):
            return "a weight is quantized or shared with another layer"
        if a.node.inputs[2] is not a.v.output or shared_heads.key_path(a) is None or a.inner_norms:
            return "keys or values are moved between their projection and the attention"
        if a.inner:
            return f"'{a.inner[0].name}' ({a.inner[0].op_type}) lies between a projection and the attention"
        return ""

    def _alignment(self, g: Graph, a: Attention, x: Linear, env: Env) -> Alignment:
        """How the heads of one key or value projection are mapped before their mean."""
        if env.dry or not self.align:
            return shared_heads.unaligned(g, a, x, self.share, None if env.dry else env.stats)
        if self._factorizes:
            return shared_heads.factorized(g, a, x, self.share, env.stats)
        return shared_heads.rotated(g, a, x, self.share, env.stats)
