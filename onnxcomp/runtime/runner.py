"""The outputs of a model on batches: through one session, or segment by segment where its weights are large."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from onnxcomp.data.inputs import Batch
from onnxcomp.machine import MEMORY
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import Model, graph_of, prepacks
from onnxcomp.runtime.pieces import Pieces
from onnxcomp.runtime.segments import Layout, Stage, Walk
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import Target

__all__ = ["Runner"]


class Runner:
    """Runs a model on batches, for use in a `with` statement; errors are those of a session.

    A model with 1 GiB of weights and more (`payload.PREPACK_BELOW`) runs in segments, each over all batches with only
    its own weights in memory; values carried between segments go to files in `scratch` once they are large. With a
    `walk` the model runs from the cut where the walk stands, on the same batches; the walk is not moved. A session that
    is not `optimized` runs the graph as it is, without the runtime's own optimizations. A decoder reads texts in
    `pieces` of so many tokens, behind its own caches, in one session.
    """

    def __init__(
        self,
        model: Model,
        target: Target,
        *,
        scratch: Path | None = None,
        walk: Walk | None = None,
        optimized: bool = True,
        pieces: int = 0,
    ) -> None:
        self.session: Session | None = None
        self._walk = walk
        self._pieces = Pieces(graph_of(model), pieces) if pieces else None
        if walk is None and (prepacks(model, None) or pieces):
            self.session = Session(model, target, optimized=optimized)
            self.inputs = {p.name for p in self.session.inputs}
            self.outputs = self.session.outputs
            return
        self._graph = graph_of(model)
        self._layout, self._target, self._scratch = Layout(self._graph), target, scratch
        self.inputs = {str(v.name) for v in self._graph.inputs}
        self.outputs = [str(v.name) for v in self._graph.outputs]

    def each(self, data: Iterable[Batch], names: Sequence[str]) -> Iterator[tuple[Batch, dict[str, Array]]]:
        """Every batch with its named outputs; in segments, all but the last one run before the first batch is given."""
        if self.session is not None:
            for batch in data:
                yield batch, self.run(batch.feeds, names)
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
        if self.session is not None and self._pieces is not None:
            return self._pieces.run(self.session, feeds, self.outputs if names is None else names)
        if self.session is not None:
            return self.session.run(feeds, names)
        batch = Batch(dict(feeds))
        return next(out for _, out in self.each([batch], self.outputs if names is None else names))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.session is not None:
            self.session.close()
