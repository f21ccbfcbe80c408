"""An encoder-decoder beside its original on pairs: both graphs as one model, and the texts that they write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxcomp.blocks.stored_parts import stored_parts
from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.pair_texts import references, written
from onnxcomp.engine.settings import Settings
from onnxcomp.engine.whole import both_sizes, check_caches, check_gates
from onnxcomp.errors import ModelError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.stored import Stored
from onnxcomp.reports.outcome import Size
from onnxcomp.runtime.encoder_source import Pair, pair_of
from onnxcomp.validation.compare import validate
from onnxcomp.validation.gates import Gate
from onnxcomp.validation.metrics import MetricResult
from onnxcomp.validation.results import Validation, together
from onnxcomp.validation.written_texts import scores

__all__ = ["PairJudge"]

NEW = 64  # tokens of a text at most, where nobody says


@dataclasses.dataclass(frozen=True)
class PairJudge:
    """The encoder-decoders of two folders."""

    original: Pair
    result: Pair

    @classmethod
    def of(cls, reference: Path, candidate: Path) -> PairJudge | None:
        """None where neither folder holds an encoder and a decoder; raises `ModelError` where only one does."""
        first, second = (pair if (pair := pair_of(p)) and pair.fits() else None for p in (reference, candidate))
        if first is not None and second is not None:
            return cls(first, second)
        if first is None and second is None:
            return None
        path = reference if first is None else candidate
        raise ModelError(f"{path}: holds no encoder and decoder, as the other model does; --graph names one")

    def judge(
        self, settings: Settings, gate: Gate, metrics: Sequence[str], pieces: int, generate: Mapping[str, int] | None
    ) -> tuple[Validation, Size]:
        """What is measured of both graphs, behind each model's own encoder, and their sizes.

        Raises `RecipeError` for gates on what is not measured.
        """
        encoders, decoders = ([storage.read(f) for f in pair] for pair in self._files())
        check_gates(gate, encoders[0].graph, decoders[0].graph)
        check_caches(encoders[1].graph, decoders[1].graph)
        if gate.generated and generate is None:
            raise RecipeError(f"gate '{gate.generated[0]}' is on generated texts: add --generate new={NEW}")
        new = _asked(generate)
        wanted = list(dict.fromkeys([*metrics, *gate.metrics]))
        sources, pairs = (self._data(settings, s, wanted=x) for s, x in ((encoders[0], False), (decoders[0], True)))
        aim, code = settings.target, settings.allow_code
        first = validate(encoders[0], encoders[1], sources, aim, allow_code=code)
        second = validate(decoders[0], decoders[1], pairs, aim, wanted, through_caches=pieces, allow_code=code)
        both = together(first, second)
        if new is not None:
            both = dataclasses.replace(both, metrics={**both.metrics, **self._texts(pairs, settings, new)})
        size = both_sizes(*(_size(*x) for x in (encoders, decoders)))
        assert size is not None, "both sizes are known"
        return both, size

    def _files(self) -> list[tuple[Path, Path]]:
        return [(self.original.encoder, self.result.encoder), (self.original.decoder, self.result.decoder)]

    def _data(self, settings: Settings, model: Stored, *, wanted: bool) -> Dataset:
        encoder = self.result.encoder if wanted else None
        data = settings.dataset(settings.evaluation, model.graph, model.path.parent, encoder)
        assert data is not None, "there is nothing to judge on"
        return data

    def _texts(self, pairs: Dataset, settings: Settings, new: int) -> dict[str, MetricResult]:
        target = settings.target
        original = written(self.original.decoder, pairs, new, target)
        result = written(self.result.decoder, pairs.of_result(), new, target)
        return scores(original, result, references(pairs, self.original.decoder.parent))


def _asked(generate: Mapping[str, int] | None) -> int | None:
    if generate is None:
        return None
    if generate.keys() - {"new"} or generate.get("new", NEW) < 1:
        raise RecipeError("--generate takes new=TOKENS for an encoder-decoder, whose prompts are the sources")
    return generate.get("new", NEW)


def _size(first: Stored, second: Stored) -> Size:
    return Size(first.nbytes, second.nbytes, stored_parts(second.graph), stored_parts(first.graph))
