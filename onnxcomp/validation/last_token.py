"""Models that give the scores of the last token alone, compared with others on that token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.validation.metrics import Metric

__all__ = ["NOTE", "fitting", "gives_last", "shortened"]

FITTING = ("agreement", "cosine")  # metrics of two models' scores, whatever tokens they are of
NEEDED = (
    "it needs the logits of all tokens, and '{}' gives those of the last one; "
    "read texts token by token with --through-caches"
)
NOTE = "'{}' of the result is of the last token alone, so only that one was compared, and perplexity was not measured"


def gives_last(before: Graph, after: Graph, name: str) -> bool:
    """Whether a model gives an output for the last token alone that another gives for all."""
    shapes = [next((v.shape for v in g.outputs if v.name == name), None) for g in (before, after)]
    if any(s is None or len(s) != 3 for s in shapes):
        return False
    old, new = (s[1] for s in shapes if s is not None)
    return new == 1 and old != 1


def fitting(metrics: Sequence[Metric], asked: Sequence[Metric], name: str) -> list[Metric]:
    """The metrics that scores of last tokens allow; raises `DataError` where another one was asked for."""
    if other := [m.name for m in asked if m.name not in FITTING]:
        raise DataError(f"metric '{other[0]}': {NEEDED.format(name)}")
    return [m for m in metrics if m.name in FITTING]


def shortened(made: Mapping[str, Array], name: str) -> dict[str, Array]:
    """Outputs of which one is cut to its last token."""
    return {k: a[:, -1:] if k == name else a for k, a in made.items()}
