"""A model's answers on data: by one session, or block by block where the model is too large for that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from onnxcomp.data.inputs import Batch
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import Model, graph_of, prepacks
from onnxcomp.runtime.sessions import Session
from onnxcomp.runtime.stretches import Layout, Stage, Walk
from onnxcomp.target import Target

__all__ = ["Runner"]

MEMORY = 2 << 30  # bytes; an eighth for the weights of one stretch, another for what is carried between two


class Runner:
    """Runs a model on batches, for use in a `with` statement; errors are those of a session.

    A model whose weights are not worth prepacking (1 GiB and more) runs in stretches over all batches, each with its
    own weights only; what is carried between them goes to files of `scratch` once it is large. With a `walk` the model
    runs from where that stands, on the very batches it has walked; the walk itself stays there.
    """

    def __init__(self, model: Model, target: Target, *, scratch: Path | None = None, walk: Walk | None = None) -> None:
        self.session: Session | None = None
        self._walk = walk
        if walk is None and prepacks(model, None):
            self.session = Session(model, target)
            self.inputs = {p.name for p in self.session.inputs}
            self.outputs = self.session.outputs
            return
        self._graph = graph_of(model)
        self._layout, self._target, self._scratch = Layout(self._graph), target, scratch
        self.inputs = {str(v.name) for v in self._graph.inputs}
        self.outputs = [str(v.name) for v in self._graph.outputs]

    def each(self, data: Iterable[Batch], names: Sequence[str]) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """Every batch with its outputs; in stretches the data is walked several times before the first one comes."""
        if self.session is not None:
            for batch in data:
                yield batch, self.session.run(batch.feeds, names)
            return
        if self._walk is not None and prepacks(self._graph, None):
            with Stage(self._walk, self._graph, names) as stage:
                for batch in data:
                    yield batch, stage.run(batch.feeds)
            return
        walk = Walk(self._target, MEMORY, self._scratch) if self._walk is None else self._walk.fork()
        try:
            walk.seek(self._graph, self._layout, names, lambda: (b.feeds for b in data))
            with Stage(walk, self._graph, names) as stage:
                for batch in data:
                    yield batch, stage.run(batch.feeds)
        finally:
            walk.reset()

    def run(self, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs of one batch."""
        if self.session is not None:
            return self.session.run(feeds, names)
        batch = Batch(dict(feeds))
        return next(out for _, out in self.each([batch], self.outputs if names is None else names))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.session is not None:
            self.session.close()
