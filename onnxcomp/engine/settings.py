"""How a job runs, as one value that goes from the command line and the library's calls down to the manager."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.data.arguments import MOST_THREADS, shapes_of, whole
from onnxcomp.data.datasets import as_dataset, load_data
from onnxcomp.data.pairs import columns_of
from onnxcomp.engine.encoded import encoded
from onnxcomp.errors import RecipeError
from onnxcomp.runtime.encoder_source import pair_with
from onnxcomp.target import CPU, Target, resolved

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset
    from onnxcomp.graph import Graph

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a model will run, on which data it is made and judged, and within which limits; what is done a recipe says.

    `samples`, `sequence` (tokens per sample) and `memory` (bytes) are upper limits; without `measure` nothing is timed;
    `budget` (seconds) is how long measuring may take, choosing forms half of it at most (by default the benchmark takes
    as long as the passes); `threads` are those of what is timed, 0 leaves them to the runtime; `choices` is a file that
    `onnxcomp tune` wrote; `allow_code` lets data sources of the form module:function run; `html` writes the report as a
    page as well; `bisect` names the pass and the site that broke a gate.
    """

    target: Target = CPU
    calibration: Any = None
    evaluation: Any = None
    samples: int | None = None
    batch: int = 8
    sequence: int | None = None
    text_column: str | None = None
    label_column: str | None = None
    shapes: tuple[Mapping[str, int], ...] = ()
    memory: int | None = None
    measure: bool = True
    budget: float | None = None
    threads: int = 0
    cache: Path | None = None
    choices: Path | None = None
    allow_code: bool = False
    seed: int = 0
    html: bool = True
    bisect: bool = False

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        if self.budget is not None and not (isinstance(self.budget, (int, float)) and 0 < self.budget < math.inf):
            raise RecipeError(f"the time for measuring must be more than 0 s, not {str(self.budget)[:80]} s")
        put("threads", whole("threads", self.threads, 0, MOST_THREADS))
        put("target", resolved(self.target))
        put("shapes", shapes_of(self.shapes))
        for name in ("samples", "batch", "sequence", "memory"):
            put(name, whole(name, getattr(self, name), 1))
        put("seed", whole("seed", self.seed, 0))

    def dataset(self, source: Any, graph: Graph, folder: Path, encoder: Path | None = None) -> Dataset | None:
        """The data behind a source given as text, path or batches; None where nothing is given.

        `folder` holds the model's tokenizer or image processor. That of a decoder behind an encoder are pairs, which a
        result reads behind the `encoder` that was made of the one beside it. Raises `DataError`.
        """
        if source is None or (isinstance(source, (tuple, list)) and not source):
            return None
        if not isinstance(source, (str, Path)):
            return as_dataset(source, graph)
        text_column, pair = self.text_column, pair_with(graph.path)
        if pair is not None and graph.path == pair.decoder:
            found = encoded(source, pair, self, encoder)
            if found is not None:
                return found
        elif pair is not None:
            text_column = columns_of(text_column)[0]
        return load_data(
            source,
            graph,
            folder,
            batch=self.batch,
            samples=self.samples,
            sequence=self.sequence,
            text_column=text_column,
            label_column=self.label_column,
            allow_code=self.allow_code,
            seed=self.seed,
        )
