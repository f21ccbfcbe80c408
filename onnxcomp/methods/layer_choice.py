"""Which branches of a residual stream are dropped: the candidates, their scores, and names that survive edits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from onnxcomp.blocks.branches import Branch
from onnxcomp.stats import Need, cosine

__all__ = ["Choice", "similarity", "stable_name"]


@dataclass
class Choice:
    """The branches that may still be dropped, their scores, and why others are kept although they were candidates."""

    candidates: set[str]
    scores: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def take_lowest(self) -> str:
        """Take out the candidate of lowest score."""
        name = min(self.candidates, key=lambda n: self.scores[n])
        self.candidates.remove(name)
        return name

    def keep(self, names: Iterable[str], why: str) -> None:
        """Let some be no candidates any more, with the reason."""
        self.kept |= dict.fromkeys(names, why)
        self.candidates -= set(self.kept)


def similarity(b: Branch) -> Need:
    """The mean over tokens of the cosine between the residual stream before and after a branch."""
    assert b.entry is not None
    assert b.exit is not None
    return cosine(b.entry, b.exit)


def stable_name(branch: str) -> str:
    """The name of a branch without the number of its layer, which changes when others are dropped."""
    return branch.split(" (")[0]
