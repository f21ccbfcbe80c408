"""Whether weights are fitted on copies of a calibration set with some tokens replaced at random."""

from __future__ import annotations

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.replaced_tokens import replaced, token_count
from onnxcomp.graph import Graph

__all__ = ["COPIES", "ENOUGH", "SHARE", "augmented", "widened"]

# With fewer tokens than this fits follow the data they see: on MiniLM with 867 tokens four copies with 30 % of the
# tokens replaced gave more than fifteen times as much text of another kind.
ENOUGH = 8192
COPIES = 4
SHARE = 0.3
# Of more text one copy is enough against words that it lacks, with more of its words replaced.
WIDE_SHARE = 0.5


def augmented(data: Dataset, g: Graph, asked: bool | None, name: str) -> Dataset:
    """Calibration data with copies of its texts where that is `asked`, or by default where it has few tokens.

    A pass of that `name` notes it; data that is not of token ids stays as it is.
    """
    count = None if asked is False or data.random else token_count(data, g)
    if count is None or (asked is None and count >= ENOUGH):
        return data
    _note(g, name, f"{count} tokens of data are few: fitted on {COPIES} copies more with {SHARE:.0%} of them replaced")
    return replaced(data, g, COPIES, SHARE)


def widened(data: Dataset, g: Graph, name: str) -> Dataset:
    """Calibration data with copies of its texts for models that will see other words than these.

    A pass of that `name` notes it; data that is not of token ids stays as it is.
    """
    count = None if data.random else token_count(data, g)
    if count is None:
        return data
    copies, share = (1, WIDE_SHARE) if count >= ENOUGH else (COPIES, SHARE)
    _note(g, name, f"chosen and fitted by {count} tokens of data and {copies} copies with {share:.0%} of them replaced")
    return replaced(data, g, copies, share)


def _note(g: Graph, name: str, what: str) -> None:
    """Once, however often a pass collects."""
    if not any((n.site, n.what) == (name, what) for n in g.noted):
        g.note(name, what)
