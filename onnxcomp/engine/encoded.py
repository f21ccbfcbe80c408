"""What an encoder makes of sources, for the decoder beside it to be fitted to and judged on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.data.datasets import Dataset
from onnxcomp.data.input_check import InputCheck
from onnxcomp.data.inputs import Batch, TensorSpec, completed, roles, specs, vocabulary
from onnxcomp.data.pairs import TARGET, Pairs, open_pairs
from onnxcomp.engine.host import host_of
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.runtime.encoder_source import Pair, cross_caches
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

if TYPE_CHECKING:
    from onnxcomp.engine.settings import Settings
    from onnxcomp.graph import Graph

__all__ = ["Encoded", "encoded", "is_cross"]

ONE_THREAD = 1  # products of other numbers of threads add in another order, and statistics must repeat themselves


class Encoded:
    """The decoder's inputs of each pair, by the encoder; `result` is the file of what was made of it."""

    def __init__(
        self, given: Pairs, encoder: Path, decoder: Sequence[TensorSpec], target: Target, result: Path | None = None
    ) -> None:
        self.name, self.random, self.notes = given.name, given.random, given.notes
        self.given, self.encoder, self.decoder, self.target, self.result = given, encoder, decoder, target, result
        self._behind: Encoded | None = None  # with its session, which is opened once

    def content(self) -> str:
        """Hash of the encoder, and of its result."""
        return " ".join(storage.fingerprint(f) for f in (self.encoder, self.result) if f is not None)

    def of_result(self) -> Encoded:
        """The same pairs behind the encoder's result."""
        if self.result is None:
            return self
        self._behind = self._behind or Encoded(self.given, self.result, self.decoder, self.target)
        return self._behind

    def __len__(self) -> int:
        return len(self.given)

    def key(self, index: int) -> object:
        """As those of the pairs."""
        return self.given.key(index)

    def rows(self, indices: Sequence[int]) -> Batch:
        """The decoder's tokens with the cross caches and the mask of the encoder's states."""
        batch = self.given.rows(indices)
        if (tokens := batch.feeds.get(TARGET)) is None:
            raise DataError(f"{self.name}: has no array '{TARGET}', the tokens that the decoder reads")
        fed = self._checked(Batch({k: a for k, a in batch.feeds.items() if k != TARGET}), indices[0]).feeds
        made = cross_caches(fed, self._session.run(fed), roles(self._inputs))
        taken = {s.name for s in self.decoder}
        whole, _ = completed({n: a for n, a in made.items() if n in taken} | {"input_ids": tokens}, self.decoder)
        return Batch(whole)

    @functools.cached_property
    def _session(self) -> Session:
        return Session(storage.read(self.encoder), host_of(self.target)[0], threads=ONE_THREAD)

    @functools.cached_property
    def _graph(self) -> Graph:
        return storage.read(self.encoder).graph

    @functools.cached_property
    def _inputs(self) -> list[TensorSpec]:
        return specs(self._graph)

    @functools.cached_property
    def _checked(self) -> InputCheck:
        return InputCheck(self._inputs, vocabulary(self._graph), self.name)


def encoded(source: str | Path, pair: Pair, settings: Settings, result: Path | None = None) -> Dataset | None:
    """The decoder's data of pairs; None for arrays that are no pairs, such as all inputs of the decoder.

    Raises `DataError` where targets are missing, or what the encoder or the decoder cannot read.
    """
    encoder, decoder = (storage.read(f).graph for f in (pair.encoder, pair.decoder))
    pairs = open_pairs(
        str(source), encoder, decoder, pair.encoder.parent, samples=settings.samples, sequence=settings.sequence,
        text_column=settings.text_column, allow_code=settings.allow_code, seed=settings.seed,
    )  # fmt: skip
    if pairs.targets is None and any(
        str(v.name) in pairs.rows([0]).feeds for v in decoder.inputs if is_cross(str(v.name))
    ):
        return None
    made = Encoded(pairs, pair.encoder, specs(decoder), settings.target, result)
    data = Dataset(made, settings.batch, InputCheck(specs(decoder), vocabulary(decoder), made.name))
    return (data if settings.samples is None else data.spread(settings.samples)).checked()


def is_cross(name: str) -> bool:
    """Whether a text names a cache of the encoder's states."""
    return ".encoder." in name
