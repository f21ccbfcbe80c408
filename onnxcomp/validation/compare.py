"""Two models on the same batches through one pipeline: drift of every output, and task metrics with intervals."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.datasets import Batch, Dataset, as_dataset, load_data
from onnxcomp.data.vocabulary import Renumbering, renumbering
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.storage import read
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph, interface
from onnxcomp.maths import Array
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.runtime.runner import Runner
from onnxcomp.runtime.segments import Walk
from onnxcomp.target import CPU, Target, find
from onnxcomp.validation import metrics as scoring
from onnxcomp.validation.metrics import Drift, DriftSums, Metric, MetricResult, Sums
from onnxcomp.validation.outputs import OutputLayout, View, output_rows
from onnxcomp.validation.retokenize import RemovedTokens, Retokenized, retokenize

__all__ = ["Drift", "MetricResult", "Reference", "Validation", "validate"]

_IN_MEMORY = 256 << 20  # bytes of original outputs kept in memory; the rest goes to disk


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """How far a candidate is from the original: `drift` of the first output, `outputs` of each, task `metrics`."""

    drift: Drift
    metrics: dict[str, MetricResult]
    samples: int
    outputs: dict[str, Drift] = field(default_factory=dict)
    data: str = ""
    random: bool = False
    notes: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """False when the candidate gives NaN or infinity where the original does not; every gate fails then."""
        return all(d.finite for d in self.outputs.values()) and self.drift.finite

    def values(self) -> dict[str, float]:
        """What was measured, by gate name; all NaN when the candidate's output is not finite."""
        values: dict[str, float] = {}
        for key, value in dataclasses.asdict(self.drift).items():
            if key not in ("finite", "rows") and value is not None:
                values[key.replace("_", "-")] = float(value)
        for m in self.metrics.values():
            if m.name in ("accuracy", "f1") or ":" in m.name:
                values[f"{m.name}-drop"] = m.reference - m.candidate
            if m.name == "perplexity" or ":" in m.name:
                values[f"{m.name}-rise"] = m.candidate / m.reference - 1 if m.reference else math.nan
        return values if self.finite else dict.fromkeys(values, math.nan)

    def json(self) -> dict[str, Any]:
        """Plain values; a number that is infinite (SQNR of equal outputs) or undefined becomes None."""
        return {
            "samples": self.samples,
            "data": self.data,
            "random": self.random,
            "notes": list(self.notes),
            "finite": self.finite,
            "values": _plain(self.values()),
            "outputs": {name: _plain(dataclasses.asdict(d)) for name, d in self.outputs.items()},
            "metrics": {name: _plain(dataclasses.asdict(m)) for name, m in self.metrics.items()},
        }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


# ---- running ---------------------------------------------------------------------------------------------------------


class _Kept:
    """Outputs of the original per batch: in memory while they are few, then as float32 files that are memory-mapped."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._batches: list[dict[str, Array | Path]] = []
        self._bytes = 0
        self._whole: _Kept | None = None  # whose files these are

    def append(self, outputs: Mapping[str, Array]) -> None:
        size = sum(a.size * 4 for a in outputs.values())
        if self._bytes + size <= _IN_MEMORY:
            self._bytes += size
            self._batches.append(dict(outputs))
            return
        self._batches.append({k: self._write(a, i) for i, (k, a) in enumerate(outputs.items())})

    def _folder(self) -> Path:
        if self._scratch is None:
            stack = contextlib.ExitStack()
            self._scratch = stack.enter_context(scratch_folder())
            weakref.finalize(self, stack.close)
        return self._scratch

    def _write(self, a: Array, index: int) -> Path:
        folder = self._folder()
        path = folder / f"original-{id(self):x}-{len(self._batches)}-{index}.npy"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, a, allow_pickle=False)
        except OSError as e:
            raise DataError(f"cannot keep the original's outputs in {folder}: {e}; use fewer samples") from e
        return path

    def __getitem__(self, i: int) -> dict[str, Array]:
        return {
            k: np.load(a, mmap_mode="r", allow_pickle=False) if isinstance(a, Path) else a
            for k, a in self._batches[i].items()
        }

    def __len__(self) -> int:
        return len(self._batches)

    def head(self, count: int) -> _Kept:
        """Those of the first batches; they stay on disk as long as these here."""
        few = copy.copy(self)
        few._batches, few._whole = self._batches[:count], self
        return few


def _digest(feeds: Mapping[str, Array]) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        h.update(f"{name}{feeds[name].dtype}{feeds[name].shape}".encode())
        h.update(np.ascontiguousarray(feeds[name]).tobytes())
    return h.digest()


class Reference:
    """The original model's answers on a dataset, computed once; any number of candidates is compared with them.

    `metrics` are computed besides the one that fits the data (accuracy with labels, perplexity for a causal language
    model). Raises `DataError` for empty data or labels that are missing, `ModelError` when the original gives NaN.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset | Iterable[Any] | str | Path,
        target: Target = CPU,
        *,
        metrics: Sequence[str] = (),
        scratch: Path | None = None,
        allow_code: bool = False,
    ) -> None:
        model = _parsed(model)
        graph = graph_of(model)
        self.data, self.target, self.view = as_dataset(data, graph), target, View.of(graph)
        self.metrics = [scoring.find(name, allow_code=allow_code) for name in dict.fromkeys(metrics)]
        self._graph, self._kept, self._scratch = graph, _Kept(scratch), scratch
        self._seen: list[bytes] = []
        self._fitting: list[Metric] = []
        self._types: dict[str, str] = {}
        self.samples = 0
        self._sums = self._run(model)

    def _run(self, model: Graph | Stored) -> Sums:
        names = [r.name for r in self.view.outputs]
        sums = Sums(self.metrics)
        with Runner(model, self.target, scratch=self._scratch) as session:
            self.inputs = session.inputs
            for batch, out in session.each(self.data, names):
                if not self._seen:
                    self._types = {k: a.dtype.name for k, a in out.items()}
                    self._fitting = self._guess(session, batch, out)
                    self.metrics += [m for m in self._fitting if m not in self.metrics]
                    sums = Sums(self.metrics)
                answers = {k: a.astype(np.float32, copy=False) for k, a in out.items()}
                self._sum(sums, batch, answers)
                self._kept.append(answers)
                self._seen.append(_digest(batch.feeds))
                self.samples += next(iter(batch.feeds.values())).shape[0]
        if not self._seen:
            raise DataError(f"the evaluation data '{self.data.name}' is empty")
        return sums

    def _sum(self, sums: Sums, batch: Batch, answers: Mapping[str, Array]) -> None:
        """Add the original's own answers to a batch to the sums of the metrics."""
        primary = self.view.outputs[0]
        for output in output_rows(primary, self.view, batch, answers, answers):
            if np.isnan(output.rows).any():
                raise ModelError(f"the original gives NaN in '{primary.name}', so nothing can be compared with it")
            sums.update(output)

    def head(self, n: int) -> Reference:
        """The answers to the first `n` samples, with the metric that fits the data; the original is not run again.

        Only whole batches are taken, but at least one: an answer may depend on the other samples of its batch.
        """
        few = copy.copy(self)
        few.data, count = self.data.leading(n)
        few._kept, few._seen, few.metrics = self._kept.head(count), self._seen[:count], list(self._fitting)
        few._sums, few.samples = Sums(few.metrics), 0
        for i, batch in enumerate(few.data):
            few._sum(few._sums, batch, few._kept[i])
            few.samples += next(iter(batch.feeds.values())).shape[0]
        return few

    def _guess(self, session: Runner, batch: Batch, out: Mapping[str, Array]) -> list[Metric]:
        """The task metric that fits: accuracy where labels fit, perplexity where no answer depends on later tokens."""
        first = self.view.outputs[0]
        output = next(output_rows(first, self.view, batch, out, out))
        labels, tokens = batch.labels, output.tokens
        if labels is not None and first.logits:
            fits = np.issubdtype(labels.dtype, np.integer) and (labels.ndim == 2) == output.per_token
            return [scoring.METRICS["accuracy"]] if fits and labels.max(initial=0) < output.rows.shape[1] else []
        if (
            tokens is None
            or not output.per_token
            or output.rows.shape[1] != self.view.vocabulary
            or tokens.shape[1] < 2
        ):
            return []
        return [scoring.METRICS["perplexity"]] if self._is_causal(session, batch, tokens, out[first.name]) else []

    def _is_causal(self, session: Runner, batch: Batch, tokens: Array, scores: Array) -> bool:
        """Whether another last token leaves all scores before it as they were; tried, since names do not tell."""
        visible = self.view.visible(batch.feeds)
        mask = np.ones(tokens.shape, bool) if visible is None else visible
        last = tokens.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        changed = tokens.copy()
        changed[np.arange(len(last)), last] = (changed[np.arange(len(last)), last] + 1) % (self.view.vocabulary or 1)
        name = self.view.outputs[0].name
        repeated = session.run({**batch.feeds, self.view.roles["tokens"]: changed}, [name])[name]
        before = mask & (np.arange(tokens.shape[1]) < last[:, None])
        moved = np.abs(repeated.astype(np.float32) - scores.astype(np.float32))[before].max(initial=0)
        return bool(before.any() and moved < 1e-4 * np.abs(scores[before]).max(initial=0))

    def against(self, candidate: Model, walk: Walk | None = None) -> Validation:
        """Run a candidate on the same batches; raises `ModelError` where its interface differs from the original's.

        Inputs and outputs that it says it no longer has are neither fed nor compared.
        With a `walk` over these batches it runs from where that stands.
        """
        model = _parsed(candidate)
        graph = graph_of(model)
        vocab = renumbering(graph)
        missing = interface.removed_ports(graph.model.metadata_props) - {self.view.outputs[0].name}
        layouts = [r for r in self.view.outputs if r.name not in missing]
        names, drifts = [r.name for r in layouts], {r.name: _drift(r, self.view) for r in layouts}
        sums, count = Sums(self.metrics), 0
        removed = None if vocab is None else RemovedTokens.of(self.data, vocab, self.view.roles)
        causal = any(m.name == "perplexity" for m in self.metrics)
        with Runner(model, self.target, scratch=self._scratch, walk=walk) as session:
            self._check_interface(session.inputs, session.outputs, missing)
            for count, (original, batch, outputs) in enumerate(self._each(session, names, vocab), 1):
                if count > len(self._kept) or _digest(original.feeds) != self._seen[count - 1]:
                    break
                reference = self._kept[count - 1]
                if vocab is not None:
                    reference = {k: vocab.columns(a) for k, a in reference.items()}
                self._check_outputs(reference, outputs)
                out = {k: a.astype(np.float32, copy=False) for k, a in outputs.items()}
                for layout in layouts:
                    for output in output_rows(layout, self.view, batch, out, reference):
                        drifts[layout.name].update(
                            output if removed is None else removed.agreeing(output, count - 1, causal)
                        )
                        if layout is self.view.outputs[0]:
                            sums.update(output)
            else:
                if count == len(self._kept):
                    done = {k: d.result() for k, d in drifts.items()}
                    if vocab is None or removed is None or not removed.share:
                        return self._result(done, sums)
                    more = Retokenized({}, len(removed.samples), "a part of the model was run")
                    if walk is None:
                        more = retokenize(session, self._graph, self.data, removed, vocab, self.metrics)
                    return self._result(done, sums, more, (more.note(removed, causal),))
        raise DataError(
            f"the data '{self.data.name}' gave other batches the second time; it must repeat itself exactly"
        )

    def _each(
        self, session: Runner, names: Sequence[str], words: Renumbering | None
    ) -> Iterator[tuple[Batch, Batch, dict[str, Array]]]:
        """Batches as they are, as a candidate takes them, and what it makes of them."""
        if words is None:
            return ((batch, batch, made) for batch, made in session.each(self.data, names))
        given = _Renumbered(self.data, words, self.view.roles)
        return ((own, *pair) for own, pair in zip(self.data, session.each(given, names), strict=False))

    def _result(
        self, drifts: dict[str, Drift], sums: Sums, more: Retokenized | None = None, notes: tuple[str, ...] = ()
    ) -> Validation:
        first = drifts[self.view.outputs[0].name]
        results = {}
        for m in self.metrics:
            reference, candidate = self._sums.of(m), sums.of(m)
            results[m.name] = scoring.bootstrap(
                m, reference, candidate if more is None else more.put(m, reference, candidate)
            )
        return Validation(first, results, self.samples, drifts, self.data.name, self.data.random, notes)

    def _check_interface(self, inputs: set[str], outputs: Sequence[str], without: Set[str]) -> None:
        if inputs | (self.inputs & without) != self.inputs:
            raise ModelError(f"the models differ in their inputs: {sorted(self.inputs)} and {sorted(inputs)}")
        if missing := [r.name for r in self.view.outputs if r.name not in {*outputs, *without}]:
            raise ModelError(f"the candidate has no output '{missing[0]}'; it has {', '.join(outputs)}")

    def _check_outputs(self, reference: Mapping[str, Array], out: Mapping[str, Array]) -> None:
        for name, a in out.items():
            if a.shape != reference[name].shape:
                raise ModelError(
                    f"output '{name}' is {reference[name].shape} in the original, {a.shape} in the candidate"
                )
            if a.dtype.name != self._types[name]:
                raise ModelError(
                    f"output '{name}' is {self._types[name]} in the original, {a.dtype.name} in the candidate"
                )


@dataclass(frozen=True)
class _Renumbered:
    """The same batches in the token ids of a reduced vocabulary."""

    data: Dataset
    words: Renumbering
    roles: Mapping[str, str]

    def __iter__(self) -> Iterator[Batch]:
        names = [self.roles["tokens"]] if "tokens" in self.roles else []
        return (Batch(self.words.feeds(b.feeds, names), b.labels) for b in self.data)


def _drift(reading: OutputLayout, view: View) -> DriftSums:
    features = not reading.logits and reading.tokens == 1 and "mask" in view.roles
    return DriftSums(logits=reading.logits, pooled=features)


def validate(
    reference: Model,
    candidate: Model,
    evaluation: Dataset | Iterable[Any] | str | Path,
    target: str | Target = CPU,
    metrics: Sequence[str] = (),
    *,
    samples: int | None = None,
    batch: int = 8,
    sequence: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
    scratch: Path | None = None,
) -> Validation:
    """Compare two models on a dataset, on batches, or on a data source as text; one session is alive at a time.

    `samples`, `batch`, `sequence` and `seed` are for a source. Options are called as on the command line; what its
    `--gate` does is `Gate([...]).judge(validation.values())`.
    """
    first, data = _parsed(reference), evaluation
    if isinstance(data, (str, Path)):
        graph = graph_of(first)
        folder = graph.path.parent if graph.path else None
        sizes: dict[str, Any] = {"batch": batch, "samples": samples, "sequence": sequence, "seed": seed}
        data = load_data(data, graph, folder, **sizes, allow_code=allow_code)
    original = Reference(first, data, find(target), metrics=metrics, scratch=scratch, allow_code=allow_code)
    return original.against(candidate)


def _parsed(model: Model) -> Graph | Stored:
    return model if isinstance(model, (Graph, Stored)) else read(model)
