"""Two model files on one data source, judged by gates: what `onnxcomp validate` does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.data.datasets import load_data
from onnxcomp.files.storage import file_bytes, load, one_graph
from onnxcomp.reports.json_report import finite, quality
from onnxcomp.target import find
from onnxcomp.validation.compare import Validation, validate
from onnxcomp.validation.gates import Gate, Verdict

if TYPE_CHECKING:
    from onnxcomp.data.datasets import Dataset
    from onnxcomp.graph import Graph

__all__ = ["Asked", "Compared", "DataChoice", "compare"]


@dataclass(frozen=True)
class DataChoice:
    """A data source with how much of it is used."""

    source: str
    samples: int | None = None
    batch: int = 8
    sequence: int | None = None
    seed: int = 0
    allow_code: bool = False

    def open(self, graph: Graph, folder: Path) -> Dataset:
        """The dataset for a model with its tokenizer or image processor in `folder`; raises `DataError`."""
        return load_data(
            self.source,
            graph,
            folder,
            batch=self.batch,
            samples=self.samples,
            sequence=self.sequence,
            allow_code=self.allow_code,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Compared:
    """A validation with the verdicts of the gates."""

    validation: Validation
    verdicts: tuple[Verdict, ...]

    def json(self) -> dict[str, Any]:
        """Plain values."""
        whole = {**self.validation.json(), "verdicts": [dataclasses.asdict(v) for v in self.verdicts]}
        plain: dict[str, Any] = finite(whole)
        return plain

    def headline(self) -> str:
        """Metrics and drift in one line, and below it what must be known to read them."""
        return "\n".join([", ".join(quality(self.validation)), *self.validation.notes])

    @property
    def refused(self) -> str:
        """What a gate refuses, empty if nothing."""
        return "; ".join(str(v) for v in self.verdicts if not v.passed)


@dataclass(frozen=True)
class Asked:
    """What is asked of the comparison; metrics that gates name are computed as well."""

    metrics: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    target: str = "cpu"
    graph: str | None = None


def compare(reference: Path, candidate: Path, data: DataChoice, asked: Asked) -> Compared:
    """Run both models on the data and judge the candidate."""
    gate = Gate(asked.gates)
    first, second = one_graph(reference, asked.graph), one_graph(candidate, asked.graph)
    dataset = data.open(load(first), first.parent)
    wanted = list(dict.fromkeys([*asked.metrics, *gate.metrics]))
    v = validate(first, second, dataset, find(asked.target), wanted, allow_code=data.allow_code)
    sizes = {"size": file_bytes(second) / max(1, file_bytes(first))}
    return Compared(v, (*gate.judge(v.values()), *gate.judge(sizes, files=True)))
