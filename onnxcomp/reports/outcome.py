"""What came of a pipeline: steps, verdicts, measurements, and the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.blocks.stored_parts import StoredPart
from onnxcomp.files.storage import save
from onnxcomp.graph import Covered, Declined, Graph, Noted
from onnxcomp.lowering.choices import Choice
from onnxcomp.validation.gates import Verdict
from onnxcomp.version import REPORT_SCHEMA, __version__

if TYPE_CHECKING:
    from onnxcomp.benchmarking.benchmark import BenchReport, Ratio
    from onnxcomp.runtime.placement import Placement
    from onnxcomp.runtime.sessions import IntegerCheck
    from onnxcomp.validation.results import Validation

__all__ = [
    "Culprit",
    "DataUsed",
    "LayerMap",
    "Lowering",
    "Origin",
    "Plan",
    "Remedy",
    "Report",
    "Result",
    "Rung",
    "Size",
    "Step",
    "StreamError",
    "Suspect",
]


@dataclass
class Step:
    """What one pass did: sites eligible and changed, what it declined and why, sizes, drift from the original.

    `choosing` is the part of `seconds` that went into choosing among forms, by the clock or from what is remembered.
    """

    name: str
    spec: str
    fidelity: str
    eligible: int = 0
    changed: int = 0
    edits: int = 0
    declined: list[Declined] = field(default_factory=list)
    nodes: tuple[int, int] = (0, 0)
    nbytes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    choosing: float = 0.0
    peak_mib: float = 0.0
    drift: dict[str, Any] | None = None
    rolled_back: str = ""
    cached: bool = False
    choices: list[Choice] = field(default_factory=list)
    noted: list[Noted] = field(default_factory=list)
    covered: list[Covered] = field(default_factory=list)

    def roll_back(self, why: str) -> None:
        """Say that the pass left nothing behind: no edits, sizes as before; its drift stays, as the reason."""
        self.rolled_back, self.changed, self.edits = why, 0, 0
        self.nodes, self.nbytes = (self.nodes[0],) * 2, (self.nbytes[0],) * 2
        self.declined, self.noted, self.choices, self.covered = [], [], [], []


@dataclass(frozen=True)
class DataUsed:
    """A dataset: its source and how many samples were used."""

    name: str
    samples: int


@dataclass(frozen=True)
class Origin:
    """What the result was made of and by what; hashes are SHA-256 in hex, those of the source's `files` by name.

    `passes` are the names of the recipe's, in one line.
    """

    source: str
    source_hash: str
    job_hash: str
    recipe: str
    recipe_name: str
    recipe_hash: str
    advice: str
    target: str
    seed: int
    files: Mapping[str, str] = field(default_factory=dict)
    passes: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """What a written model says of itself; viewers show it."""
        return {
            "onnxcomp.passes": self.passes,
            "onnxcomp.version": __version__,
            "onnxcomp.source": self.source_hash,
            "onnxcomp.recipe": self.recipe_hash,
            "onnxcomp.target": self.target,
            "onnxcomp.schema": str(REPORT_SCHEMA),
        }


@dataclass(frozen=True)
class Size:
    """Bytes on disk, external data included; `parts` are those of the result's constants, `before` the original's."""

    original: int
    result: int
    parts: tuple[StoredPart, ...] = ()
    before: tuple[StoredPart, ...] = ()

    @property
    def ratio(self) -> float:
        """The result's share of the original's size."""
        return self.result / max(1, self.original)


@dataclass(frozen=True)
class Lowering:
    """Which model was kept, `lowered` or `unlowered`, and why; `ratios` by shape are above 1 where lowering paid."""

    kept: str
    why: str
    ratios: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class Remedy:
    """What a refused pass should leave alone: sites with their share of the error, each changed alone, the worst first.

    `measured` of `sites` sites were ranked, and the worst `tried` left alone, with these `verdicts`; `skip` are the
    patterns for that where the gates pass then, `recipe` is the recipe with them, as a file's text.
    """

    name: str
    shares: tuple[tuple[str, float], ...]
    measured: int
    sites: int
    tried: int
    skip: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    recipe: str = ""


@dataclass(frozen=True)
class Suspect:
    """A site whose result differs though its inputs do not: where it is, by how much (relative), what it reaches.

    `outstanding` is how many times the usual error of its kind that is: 0 where it is noise, infinite where most of its
    kind are exact.
    """

    site: str
    place: str
    error: float
    outstanding: float
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Culprit:
    """The pass behind which gates began to fail, what they said then, and its sites, the worst first."""

    name: str
    spec: str
    verdicts: tuple[str, ...]
    suspects: tuple[Suspect, ...]
    why: str = ""


@dataclass(frozen=True)
class StreamError:
    """The residual stream behind a part of a layer: its value's name and relative L2 error, None if not measured."""

    part: str
    value: str
    error: float | None


@dataclass(frozen=True)
class LayerMap:
    """A layer of the original with what became of it: pairs are before and after, zeros where it is gone.

    `weights` counts its linears in the result by the element type of what is stored.
    """

    index: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    width: tuple[int, int]
    weights: Mapping[str, int]
    stream: tuple[StreamError, ...]


@dataclass(frozen=True)
class Rung:
    """What one recipe of a ladder gave: its passes, the drift of its result, bytes, seconds, and why it was refused.

    Bytes are those of the file, or of the graph where it was refused before it was written, None where a pass refused.
    """

    name: str
    spec: str
    values: Mapping[str, float]
    nbytes: int | None
    seconds: float
    refused: str = ""


@dataclass(frozen=True)
class Plan:
    """What a dry run predicts of original and result: parameters, multiplications per token, and bytes of the files.

    `needs_data` names the passes whose effect needs data to be predicted.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    nbytes: tuple[int, int]
    needs_data: tuple[str, ...] = ()


@dataclass
class Report:
    """All that was done, declined and measured; `json_report` writes it as versioned JSON, `tables` for people.

    `kind` is compress, validate or bench, `command` what does it again, `models` are those compared, the original
    first; `refused` is what checks other than gates refused; `stream_note` says why layers have no error of the stream.
    """

    steps: list[Step] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    validation: Validation | None = None
    integer: IntegerCheck | None = None
    warnings: list[str] = field(default_factory=list)
    benchmark: BenchReport | None = None
    placement: Placement | None = None
    calibration: DataUsed | None = None
    evaluation: DataUsed | None = None
    origin: Origin | None = None
    size: Size | None = None
    lowering: Lowering | None = None
    plan: Plan | None = None
    remedy: Remedy | None = None
    culprit: Culprit | None = None
    rungs: list[Rung] = field(default_factory=list)
    layers: tuple[LayerMap, ...] = ()
    stream_note: str = ""
    by_layer: Any = None  # as `layer_tables.layer_json` gives it
    kind: str = "compress"
    command: str = ""
    models: tuple[str, ...] = ()
    refused: list[str] = field(default_factory=list)

    @property
    def metadata(self) -> dict[str, str]:
        """What a written model says of itself; nothing where no job made it."""
        return {} if self.origin is None else self.origin.metadata

    def step(self, name: str) -> Step:
        """The last step of that pass; raises `KeyError`."""
        for s in reversed(self.steps):
            if s.name == name:
                return s
        raise KeyError(name)


@dataclass
class Result:
    """The compressed model with its report, and what it was before lowering, where that changed it.

    `exact` is the original as the exact passes before any lossy one left it, `cut` the model as the last pass that
    changes sizes did. `config` are the entries of a
    configuration beside the model that the result has otherwise, such as head counts; `path` is the file it was
    published in. `unlowered_validation` is how far the model before lowering is from the original. `whole` is the
    report of a model of several graphs, which that of its last one carries.
    """

    model: Graph
    report: Report
    unlowered: Graph | None = None
    exact: Graph | None = None
    config: dict[str, int] = field(default_factory=dict)
    path: Path | None = None
    unlowered_validation: Validation | None = None
    cut: Graph | None = None
    whole: Report | None = None

    def save(self, out: str | Path) -> Path:
        """Write the model atomically; returns its path."""
        return save(self.model, Path(out), metadata=self.report.metadata)
