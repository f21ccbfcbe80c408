"""The card and the manifest of a result folder; they appear in the same moment as the result."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from onnxcomp.engine.job import Job
from onnxcomp.errors import ModelError
from onnxcomp.pipeline import Fidelity, Stage
from onnxcomp.reports.card import CARD, card
from onnxcomp.reports.manifest import MANIFEST, Entry, Made, Manifest, read
from onnxcomp.reports.outcome import Result

__all__ = ["Evidence"]

CUTTING = frozenset((Stage.DEPTH, Stage.WIDTH, Stage.ATTENTION, Stage.TOKENS, Stage.SPARSIFY))
KEPT = "{} is not as onnxcomp wrote it, so it stays as it is; move it away to get a card of the result"


class Evidence:
    """What is said of results, by graph name, in `folder`; a card only where the folder `source` made all of it.

    A manifest is written for a whole folder, and where there is one already. Raises `ModelError` at once where one
    would take the place of a file that is none; a card that somebody else wrote, or changed, stays.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], source: Path | None) -> None:
        self.folder, self.names, self.source = folder, names, source
        self.made, self.card = dict[str, Made](), ""
        kept = source is not None and self._keeps_card(self._known())
        self.notes = [KEPT.format(folder / CARD)] if kept else []

    def tell(self, jobs: Mapping[str, Job], results: Mapping[str, Result], staging: Path) -> None:
        """Take down what the results say of themselves."""
        for name, result in results.items():
            if (x := result.report.origin) is not None:
                self.made[self.names[name]] = Made(x.files, x.recipe_hash, x.target)
        if self.source is not None:
            quantized = not any(_cuts(job, results[name]) for name, job in jobs.items())
            files = {self.names[name]: r for name, r in results.items()}
            self.card = card(files, self.source, staging, quantized=quantized)

    def seal(self, staging: Path, gone: Set[str]) -> None:
        """Stage card and manifest, when no other run changes the folder any more, which `gone` files leave."""
        known, lost = self._known(), set(gone)
        if self.source is None and known is None:
            return
        if self._keeps_card(known):
            lost.add(CARD)
        elif self.card:
            (staging / CARD).write_text(self.card, "utf-8")
        manifest = (known or Manifest()).followed(staging, lost, self.folder, self.made)
        (staging / MANIFEST).write_text(manifest.text(), "utf-8")

    def _known(self) -> Manifest | None:
        """The manifest of earlier results; where only a file is added to a folder, one that cannot be read is none."""
        try:
            return read(self.folder)
        except ModelError as e:
            if self.source is None:
                return None
            raise ModelError(f"{e}; it is not replaced: move it away, or choose another folder") from e

    def _keeps_card(self, known: Manifest | None) -> bool:
        """Whether there is a card that is not as onnxcomp wrote it."""
        there = self.folder / CARD
        if not there.is_file():
            return False
        return known is None or known.files.get(CARD) != Entry.of(there)


def _cuts(job: Job, result: Result) -> bool:
    """Whether anything but bits was lost: a pass that cuts, zeroes or skips changed something."""
    changed = {s.name for s in result.report.steps if s.changed}
    passes = [p for p in job.recipe.passes if p.name in changed and p.fidelity is Fidelity.LOSSY]
    return any(p.stage in CUTTING or p.companions(result.model) is not None for p in passes)
