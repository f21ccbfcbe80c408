"""Prune experts: remove the experts that a router chooses least often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp import blocks
from onnxcomp.blocks import Experts
from onnxcomp.graph import Graph, Site
from onnxcomp.methods import expert_cuts
from onnxcomp.methods.skip_patterns import skipped
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.stats import Need, counts
from onnxcomp.target import Target

__all__ = ["PruneExperts"]


@dataclass(frozen=True)
class PruneExperts(Pass):
    """Remove the experts of every mixture that the calibration data uses least, with their scores in the router.

    Usage is how often a token is sent to an expert. The result is the model in which the removed experts are never
    chosen; a token that would have gone to one goes to the next best. At least as many stay as each token is sent to.
    """

    stage: ClassVar[Stage] = Stage.WIDTH
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    changes_sizes: ClassVar[bool] = True
    identity: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}
    example_error: ClassVar[float] = 0.9

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the experts of each mixture to remove, rounded down."""
    multiple_of: Annotated[int, Field(ge=1)] = 1
    """The number of experts that stay is rounded up to a multiple, as devices that share them need it."""
    skip: tuple[str, ...] = ()
    """Patterns of names of routers whose experts all stay."""

    def sites(self, g: Graph, target: Target) -> Iterable[Site]:
        """Every mixture of experts."""
        return [e.site for e in blocks.experts(g)]

    def needs(self, g: Graph, target: Target) -> Iterable[Need]:
        """How often each expert is chosen."""
        return [] if self.is_identity else [_usage(e) for e in blocks.experts(g)]

    def run(self, g: Graph, env: Env) -> None:
        """Remove the least used experts of each mixture, or decline it with the reason."""
        if self.is_identity:
            return
        plans: list[tuple[Experts, np.ndarray]] = []
        for e in blocks.experts(g):
            staying = self._staying(e)
            if why := self._refusal(g, e, staying):
                g.decline(e.site, why)
                continue
            used = np.zeros(e.count) if env.dry else np.asarray(env.stats[_usage(e)])
            plans.append((e, np.sort(np.argsort(-used, kind="stable")[:staying])))
        for e, keep in plans:
            expert_cuts.remove(g, e, keep)
            g.note(e.site, f"{e.count} > {keep.size} experts")

    def _staying(self, e: Experts) -> int:
        count = e.count - int(self.ratio * e.count)
        return max(e.chosen, -(-count // self.multiple_of) * self.multiple_of)

    def _refusal(self, g: Graph, e: Experts, staying: int) -> str:
        """Why a mixture keeps all its experts, empty if it does not."""
        if (pattern := skipped(self.skip, e.name)) is not None:
            return f"skipped by the pattern '{pattern}'"
        if staying >= e.count:
            return (
                f"all {e.count} experts stay: a token is sent to {e.chosen}, and a share of {self.ratio:g} is asked for"
            )
        return expert_cuts.refusal(g, e)


def _usage(e: Experts) -> Need:
    return counts(e.numbers, e.count)
