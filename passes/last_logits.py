"""Logits of the last token alone, which is all that generation reads: the head's product of a prompt is for one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxcomp.graph import Graph
from onnxcomp.lowering import last_token
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage

__all__ = ["LastLogits"]


@dataclass(frozen=True)
class LastLogits(Pass):
    """Compute the logits of the last token of each sample only, `[batch, 1, words]`; padding stands on the left.

    Put it before `lower`. Perplexity needs the logits of all tokens: of such a model it is measured token by token
    (`validate --through-caches 1`), and the last logits are compared otherwise.
    """

    stage: ClassVar[Stage] = Stage.LOWER
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    changes_interface: ClassVar[bool] = True

    def run(self, g: Graph, env: Env) -> None:
        """Select the last token before the product of the head."""
        if why := last_token.keep_last(g):
            g.decline("logits", why)
        else:
            g.note("logits", "those of the last token of each sample")
        g.sort()
