"""Two model files on one data source, judged by gates: what `onnxcomp validate` does."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxcomp.blocks.stored_parts import stored_parts
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import Dataset
from onnxcomp.engine.asked import check_asked
from onnxcomp.engine.by_layer import by_layer as values_of
from onnxcomp.engine.host import host_of
from onnxcomp.engine.pair_judge import PairJudge
from onnxcomp.engine.repeat import settings_words
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.files import storage
from onnxcomp.files.atomic import replacing
from onnxcomp.files.stored import Stored
from onnxcomp.reports import layer_tables
from onnxcomp.reports.json_report import finite, quality
from onnxcomp.reports.outcome import DataUsed, Report, Size
from onnxcomp.runtime.integer import counted, saturating
from onnxcomp.target import Target
from onnxcomp.validation.compare import validate
from onnxcomp.validation.gates import Gate, Verdict
from onnxcomp.validation.greedy import Greedy, greedy
from onnxcomp.validation.results import Validation

__all__ = ["Compared", "compare"]


@dataclass(frozen=True)
class Compared:
    """A comparison as a report without steps: a validation with the verdicts of the gates."""

    report: Report
    validation: Validation
    layers: dict[str, Any] | None = None
    greedy: Greedy | None = None

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """What the gates say."""
        return self.report.verdicts

    def json(self) -> dict[str, Any]:
        """Plain values."""
        whole = {**self.validation.json(), "verdicts": [dataclasses.asdict(v) for v in self.verdicts]}
        whole |= {"by_layer": self.layers} if self.layers is not None else {}
        whole |= {"greedy": dataclasses.asdict(self.greedy)} if self.greedy is not None else {}
        plain: dict[str, Any] = finite(whole)
        return plain

    def headline(self) -> str:
        """Metrics and drift in one line, and below it what must be known to read them."""
        return "\n".join([", ".join(quality(self.validation)), *self.validation.notes])

    @property
    def refused(self) -> str:
        """What a gate refuses, empty if nothing."""
        return "; ".join(str(v) for v in self.verdicts if not v.passed)


def compare(
    reference: Path,
    candidate: Path,
    settings: Settings,
    *,
    metrics: Sequence[str] = (),
    gates: Sequence[str] = (),
    graph: str | None = None,
    through_caches: int = 0,
    generate: Mapping[str, int] | None = None,
    by_layer: bool = False,
    node_data: Path | None = None,
) -> Compared:
    """Run both models on the settings' evaluation data and judge the candidate; metrics of gates are computed too.

    `by_layer` compares them value by value as well; `node_data` is a file for that, as model-explorer reads it.
    """
    _check_node_data(node_data)
    gate = Gate(gates)
    if gate.wants_latency:
        raise RecipeError("validate times nothing, so it cannot judge a latency gate: drop it, or see onnxcomp bench")
    command = _command(
        reference, candidate, settings, metrics, gates, graph, through_caches, generate, by_layer=by_layer
    )
    report = Report(kind="validate", command=command, models=(str(reference), str(candidate)))
    judge = PairJudge.of(reference, candidate) if graph is None else None
    if judge is not None:
        if by_layer or node_data is not None:
            raise RecipeError("--by-layer and --node-data are of one graph: name it with --graph")
        v, size = judge.judge(settings, gate, metrics, through_caches, generate)
        return _compared(report, gate, _told(v, settings.target, *judge.result), size)
    if gate.generated:
        raise RecipeError(f"gate '{gate.generated[0]}' is on texts that encoder-decoders write about their sources")
    first, second = (storage.read(storage.one_graph(x, graph)) for x in (reference, candidate))
    check_asked(first.graph, gate, ())
    data = settings.dataset(settings.evaluation, first.graph, first.path.parent)
    assert data is not None, "there is nothing to judge on"
    wanted = list(dict.fromkeys([*metrics, *gate.metrics]))
    aim, code = settings.target, settings.allow_code
    v = validate(first, second, data, aim, wanted, through_caches=through_caches, allow_code=code)
    v = _told(v, settings.target, second.path)
    text = None if generate is None else _greedy(first, second, data, generate, settings.target)
    v = v if text is None else dataclasses.replace(v, notes=(*v.notes, str(text)))
    layers = None
    if by_layer or node_data is not None:
        layers = layer_tables.layer_json(values_of(first.graph, second.graph, data, host_of(settings.target)[0]))
    if node_data is not None:
        _write(node_data, layer_tables.node_data(layers or {}, second.graph))
    size = Size(first.nbytes, second.nbytes, stored_parts(second.graph), stored_parts(first.graph))
    return _compared(report, gate, v, size, layers, text)


def _compared(
    report: Report, gate: Gate, v: Validation, size: Size, layers: Any = None, text: Greedy | None = None
) -> Compared:
    """The comparison with the verdicts of the gates; `size` is that of both models."""
    report = dataclasses.replace(
        report,
        validation=v,
        verdicts=[*gate.judge(v.values()), *gate.judge({"size": size.ratio}, files=True)],
        size=size,
        evaluation=DataUsed(v.data, v.samples),
        warnings=list(v.notes),
        by_layer=layers,
    )
    return Compared(report, v, layers, text)


def _told(v: Validation, target: Target, *files: Path) -> Validation:
    """The comparison with a note where sums of the candidate's products can saturate on this CPU."""
    if not target.quantized.saturates or not (broken := [w for f in files for w in saturating(storage.load(f).model)]):
        return v
    can = "on this CPU sums of their products can saturate at 16 bits, and these figures show it"
    return dataclasses.replace(v, notes=(*v.notes, f"{counted(broken)} int8: {can}"))


def _greedy(first: Stored, second: Stored, data: Dataset, asked: Mapping[str, int], target: Target) -> Greedy:
    if asked.keys() - {"prompt", "new"} or min(asked.values()) < 1:
        raise RecipeError("--generate takes prompt=TOKENS,new=TOKENS")
    return greedy(first, second, data, prompt=asked.get("prompt", 16), new=asked.get("new", 32), target=target)


def _command(
    reference: Path,
    candidate: Path,
    s: Settings,
    metrics: Sequence[str],
    gates: Sequence[str],
    graph: str | None,
    through_caches: int,
    generate: Mapping[str, int] | None,
    *,
    by_layer: bool,
) -> str:
    """What does the comparison again."""
    words = ["onnxcomp", "validate", str(reference), str(candidate), "--eval", str(s.evaluation)]
    options = {"--metric": metrics, "--gate": gates, "--graph": [graph] if graph else ()}
    options |= {"--generate": [open_axes.label(generate)] if generate else ()}
    options |= {"--through-caches": [str(through_caches)] if through_caches else ()}
    words += [w for option, values in options.items() for value in values for w in (option, value)]
    words += settings_words(s) + (["--by-layer"] if by_layer else [])
    return shlex.join(words)


def _check_node_data(path: Path | None) -> None:
    """Refuse a file that would take the place of something else than node data."""
    if path is not None and path.exists() and not (path.suffix == ".json" and '"gradient"' in _text(path)):
        raise OnnxcompError(f"--node-data {path}: is there and is no node data, so it is not replaced")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _write(path: Path, data: dict[str, Any]) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", "utf-8")
    except OSError as e:
        raise OnnxcompError(f"{path}: cannot be written: {e.strerror or e}") from e
