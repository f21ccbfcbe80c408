"""Two models on the same batches through one pipeline: drift of every output, and task metrics with intervals."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.data.arguments import texts_of
from onnxcomp.data.datasets import Batch, Dataset, as_dataset, load_data
from onnxcomp.data.narrowed import KEPT, has_caches, narrowed, suited, without_caches
from onnxcomp.data.vocabulary import Renumbering, between
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files.storage import read
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph, interface
from onnxcomp.maths import Array
from onnxcomp.runtime import trial
from onnxcomp.runtime.payload import Model, graph_of
from onnxcomp.runtime.runner import Runner
from onnxcomp.runtime.segments import Walk
from onnxcomp.target import CPU, Target, find
from onnxcomp.validation import last_token
from onnxcomp.validation import metrics as scoring
from onnxcomp.validation.drift import DriftSums, MatchSums
from onnxcomp.validation.flat import SHAPES, flattened
from onnxcomp.validation.kept import KeptAnswers, digest
from onnxcomp.validation.metrics import Metric, Sums
from onnxcomp.validation.outputs import OutputLayout, View, as_float, declared_otherwise, output_rows
from onnxcomp.validation.results import Validation
from onnxcomp.validation.retokenize import RemovedTokens, Retokenized, retokenize

__all__ = ["Reference", "Validation", "validate"]


class Reference:
    """The original model's answers on a dataset, computed once; any number of candidates is compared with them.

    `metrics` are computed besides the one that fits the data (accuracy with labels, perplexity for a causal language
    model). With `pieces` both read texts so many tokens at a time, behind their caches. Raises `DataError` for empty
    data or labels that are missing, `ModelError` when the original gives NaN.
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
        pieces: int = 0,
    ) -> None:
        model, self._pieces = _parsed(model), pieces
        graph = graph_of(model)
        self.data, self.target, self.view = as_dataset(data, graph), target, View.of(graph)
        self.metrics = [scoring.find(name, allow_code=allow_code) for name in dict.fromkeys(metrics)]
        self._graph, self._kept, self._scratch = graph, KeptAnswers(scratch), scratch
        self._model, self._asked, self._bare = model, list(self.metrics), list[Reference]()
        self._seen: list[bytes] = []
        self._fitting: list[Metric] = []
        self._types: dict[str, str] = {}
        self._notes: tuple[str, ...] = ()
        self.samples = 0
        self._sums = self._run(model)

    def _run(self, model: Graph | Stored) -> Sums:
        names = [r.name for r in self.view.outputs]
        sums = Sums(self.metrics)
        with Runner(model, self.target, scratch=self._scratch, pieces=self._pieces) as session:
            self.inputs = session.inputs
            for batch, made in session.each(self.data, names):
                out = flattened(made, self.view.flat)
                if not self._seen:
                    self._settle(out, batch)
                    self._fitting = self._guess(session, batch, out)
                    self.metrics += [m for m in self._fitting if m not in self.metrics]
                    sums = Sums(self.metrics)
                answers = {k: as_float(a) for k, a in out.items()}
                self._sum(sums, batch, answers)
                self._kept.append(answers)
                self._seen.append(digest(batch.feeds))
                self.samples += batch.size
        if not self._seen:
            raise DataError(f"the evaluation data '{self.data.name}' is empty")
        return sums

    def _settle(self, made: Mapping[str, Array], batch: Batch) -> None:
        """Take the types of the outputs from the first ones made; raises `DataError` where no metric can read them."""
        self.view = self.view.with_types(made)
        self._types = {k: a.dtype.name for k, a in made.items()}
        self._notes = tuple(declared_otherwise(self._graph, made))
        self._find_scored(made, batch)
        read = {"accuracy"} if self.view.labelled else set()
        unread = [m.name for m in self.metrics if m.name in scoring.METRICS and m.name not in read]
        if unread and not self.view.scored.floating:
            what = f"'{self.view.scored.name}' is {self._types[self.view.scored.name]}"
            raise DataError(f"metric '{unread[0]}' needs an output of floating-point scores, but {what}")

    def _find_scored(self, made: Mapping[str, Array], batch: Batch) -> None:
        """Find the output that labels, or else next words, are for; raises `DataError` where none can be it."""
        labels, asked = batch.labels, [m.name for m in self.metrics]
        if labels is None or "perplexity" in asked:
            self.view = replace(self.view, worded=self.view.of_words(made))
            return
        if not np.issubdtype(labels.dtype, np.integer) or labels.ndim > 2:
            return
        if not any(b.labels is not None and (b.labels >= 0).any() for b in self.data):
            if needing := [x for x in asked if x in ("accuracy", "f1")]:
                raise DataError(f"metric '{needing[0]}': no label of the data counts, all are below 0")
            self._notes += ("no label of the data counts, all are below 0, so answers were not judged by labels",)
            return
        found = self.view.answering(labels, made, batch.feeds)
        if len(found) > 1:  # a later batch may hold larger labels
            most = max((b.labels for b in self.data if b.labels is not None), key=lambda x: int(x.max(initial=0)))
            top = np.full_like(labels, most.max(initial=0))
            found = self.view.answering(top, made, batch.feeds) or found
        if {*asked} & (scoring.METRICS.keys() - {"accuracy"}):  # these read scores
            kinds = {r.name: r.floating for r in self.view.outputs}
            found = [name for name in found if kinds[name]]
        if found:
            self.view = replace(self.view, labelled=found[0])
        elif needing := [x for x in asked if x in ("accuracy", "f1")]:
            scored = self.view.scored
            if scored.tokens is not None and scored.tokens == made[scored.name].ndim - 1:
                raise DataError(
                    f"metric '{needing[0]}': no output gives scores of classes or a label for each sample; "
                    f"'{scored.name}' has a score for each token"
                )

    def _sum(self, sums: Sums, batch: Batch, answers: Mapping[str, Array]) -> None:
        """Add the original's own answers to a batch to the sums of the metrics."""
        scored = self.view.scored
        for output in output_rows(scored, self.view, batch, answers, answers):
            if scored.floating and np.isnan(output.rows).any():
                raise ModelError(f"the original gives NaN in '{scored.name}', so nothing can be compared with it")
            sums.update(output)

    def head(self, n: int) -> Reference:
        """The answers to the first `n` samples, with the metric that fits the data; the original is not run again.

        Only whole batches are taken, but at least one: an answer may depend on the other samples of its batch.
        """
        few = copy.copy(self)
        few.data, count = self.data.leading(n)
        few._kept, few._seen, few.metrics = self._kept.head(count), self._seen[:count], list(self._fitting)
        few._sums, few.samples, few._asked, few._bare = Sums(few.metrics), 0, [], []
        for i, batch in enumerate(few.data):
            few._sum(few._sums, batch, few._kept[i])
            few.samples += batch.size
        return few

    def suiting(self, graph: Graph) -> Reference:
        """These answers, or those to the same data without caches where the graph's caches lost heads."""
        if not has_caches(self.data, narrowed(self._graph.inputs, graph.inputs)):
            return self
        if not self._bare:
            data, scratch = without_caches(self.data, self._graph), self._scratch and self._scratch / "without-caches"
            bare = Reference(
                self._model, data, self.target, metrics=[m.name for m in self._asked], scratch=scratch, allow_code=True
            )
            bare._notes += ("heads of caches were cut, so the models were compared on the data without its caches",)
            self._bare.append(bare)
        return self._bare[0]

    def _guess(self, session: Runner, batch: Batch, out: Mapping[str, Array]) -> list[Metric]:
        """The task metric that fits: accuracy where labels fit, perplexity where no answer depends on later tokens."""
        first = self.view.scored
        output = next(output_rows(first, self.view, batch, out, out))
        labels, tokens = batch.labels, output.tokens
        if labels is not None and (first.logits or self.view.labelled):
            return [scoring.METRICS["accuracy"]] if self.view.labelled else []
        if (
            tokens is None
            or first.tokens is None  # scores of the last token alone
            or not output.per_token
            or output.rows.shape[1] != self.view.vocabulary
            or tokens.shape[1] < 2
        ):
            return []
        return [scoring.METRICS["perplexity"]] if self._is_causal(session, batch, tokens, out[first.name]) else []

    def _is_causal(self, session: Runner, batch: Batch, tokens: Array, scores: Array) -> bool:
        """Whether another last token leaves all scores before it as they were; tried, since names do not tell."""
        visible = self.view.visible(batch.feeds, self.view.scored.side)
        mask = np.ones(tokens.shape, bool) if visible is None else visible
        last = tokens.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
        changed = tokens.copy()
        changed[np.arange(len(last)), last] = (changed[np.arange(len(last)), last] + 1) % (self.view.vocabulary or 1)
        name, fed = self.view.scored.name, self.view.tokens(self.view.scored)
        repeated = session.run({**batch.feeds, fed: changed}, [name])[name]
        before = mask & (np.arange(tokens.shape[1]) < last[:, None])
        moved = np.abs(repeated.astype(np.float32) - scores.astype(np.float32))[before].max(initial=0)
        return bool(before.any() and moved < 1e-4 * np.abs(scores[before]).max(initial=0))

    def against(self, candidate: Model, walk: Walk | None = None, *, optimized: bool = True) -> Validation:
        """Run a candidate on the same batches; raises `ModelError` where its interface differs from the original's.

        Inputs and outputs that it says it no longer has are neither fed nor compared. With a `walk` over these batches
        it runs from where that stands; if not `optimized`, without the runtime's own optimizations.
        """
        graph = graph_of(model := _parsed(candidate))
        if (suiting := self.suiting(graph)) is not self:
            return suiting.against(model, walk, optimized=optimized)
        vocab = between(self._graph, graph)
        missing = self._missing(graph)
        layouts = [r for r in self.view.outputs if r.name not in missing]
        names, drifts = [r.name for r in layouts], {r.name: _drift(r, self.view) for r in layouts}
        short, metrics = self._of_last(graph)
        sums, count = Sums(metrics), 0
        removed = None if vocab is None else RemovedTokens.of(self.data, vocab, self.view.roles)
        causal = any(m.name == "perplexity" for m in metrics)
        how: dict[str, Any] = {"walk": walk, "optimized": optimized, "pieces": self._pieces}
        with Runner(model, self.target, scratch=self._scratch, **how) as session:
            self._check_interface(session.inputs, session.outputs, missing)
            for count, (original, batch, outputs) in enumerate(self._each(session, names, vocab, graph, walk), 1):
                if count > len(self._kept) or digest(original.feeds) != self._seen[count - 1]:
                    break
                reference = self._answers(count - 1, vocab, short)
                outputs = flattened(outputs, self.view.flat)
                self._check_outputs(reference, outputs)
                out = {k: as_float(a) for k, a in outputs.items()}
                for layout in layouts:
                    for output in output_rows(layout, self.view, batch, out, reference):
                        drifts[layout.name].update(
                            output if removed is None else removed.agreeing(output, count - 1, causal)
                        )
                        if layout is self.view.scored:
                            sums.update(output)
            else:
                if count == len(self._kept):
                    if vocab is None or removed is None or not removed.share:
                        return self._result(drifts, sums)
                    more = Retokenized({}, len(removed.samples), "a part of the model was run")
                    if walk is None:
                        more = retokenize(session, self._graph, self.view, self.data, removed, vocab, self.metrics)
                    return self._result(drifts, sums, more, (more.note(removed, causal),))
        raise DataError(
            f"the data '{self.data.name}' gave other batches the second time; it must repeat itself exactly"
        )

    def _of_last(self, graph: Graph) -> tuple[bool, list[Metric]]:
        """Whether a candidate scores the last token only, and the metrics that can be read of it."""
        scored = self.view.scored.name
        if self._pieces or not last_token.gives_last(self._graph, graph, scored):
            return False, self.metrics
        return True, last_token.fitting(self.metrics, self._asked, scored)

    def _answers(self, batch: int, words: Renumbering | None, short: bool) -> Mapping[str, Array]:
        """The original's answers to a batch, as a candidate of other words, or of the last token only, gives them."""
        kept = self._kept[batch]
        if words is not None:
            kept = {k: words.columns(a) for k, a in kept.items()}
        return last_token.shortened(kept, self.view.scored.name) if short else kept

    def _missing(self, graph: Graph) -> frozenset[str]:
        """Inputs and outputs that a candidate no longer has, and caches that it returns where their heads were cut."""
        there = {str(v.name) for v in (*graph.inputs, *graph.outputs)}  # metadata may claim what is not so
        ranks = {len(x.sizes) for x in narrowed(self._graph.inputs, graph.inputs).values()}
        other = {str(v.name) for v in graph.outputs if ranks and (v.shape is None or len(v.shape) in ranks)}
        other |= {str(v.name) for v in graph.outputs if v.shape is not None and KEPT in map(_name_of, v.shape)}
        return (interface.removed_ports(graph.model.metadata_props) - there | other) - {self.view.scored.name}

    def _each(
        self, session: Runner, names: Sequence[str], words: Renumbering | None, graph: Graph, walk: Walk | None
    ) -> Iterator[tuple[Batch, Batch, dict[str, Array]]]:
        """Batches as they are, as a candidate takes them, and what it makes of them."""
        data = suited(self.data if walk is not None else self.data.of_result(), self._graph, graph)
        if words is None and data is self.data:
            return ((batch, batch, made) for batch, made in session.each(self.data, names))
        given = data if words is None else _Renumbered(data, words, self.view.roles)
        return ((own, *pair) for own, pair in zip(self.data, session.each(given, names), strict=False))

    def _result(
        self,
        found: Mapping[str, DriftSums | MatchSums],
        sums: Sums,
        more: Retokenized | None = None,
        notes: tuple[str, ...] = (),
    ) -> Validation:
        drifts = {k: d.result() for k, d in found.items()}
        by_sample = {k: d.by_sample() for k, d in found.items()}
        results = {}
        for m in sums.metrics:
            reference, candidate = self._sums.of(m), sums.of(m)
            results[m.name] = scoring.bootstrap(
                m, reference, candidate if more is None else more.put(m, reference, candidate)
            )
        short = (last_token.NOTE.format(self.view.scored.name),) if len(sums.metrics) < len(self.metrics) else ()
        notes = (*self._notes, *notes, *short)
        if "accuracy" in results and results["accuracy"].reference == 0:
            notes = (*notes, f"the original gives no label right: the labels may not be for '{self.view.scored.name}'")
        if lacking := [r.name for r in self.view.outputs if r.name not in drifts]:
            notes = (
                *notes,
                f"outputs that the result lacks, or gives in another size, are not compared: {', '.join(lacking)}",
            )
        undefined = [name for name, d in drifts.items() if d.undefined]
        if undefined:
            notes = (*notes, f"entries that are NaN in the original are not compared: {', '.join(undefined)}")
        if self.view.uncompared:
            notes = (*notes, f"outputs that are maps are not compared: {', '.join(self.view.uncompared)}")
        scored, data = self.view.scored.name, self.data
        return Validation(
            drifts, results, self.samples, data.name, data.random, notes, scored, self.view.uncompared, by_sample
        )

    def _check_interface(self, inputs: set[str], outputs: Sequence[str], without: Set[str]) -> None:
        if inputs | (self.inputs & without) != self.inputs:
            raise ModelError(f"the models differ in their inputs: {sorted(self.inputs)} and {sorted(inputs)}")
        if missing := [r.name for r in self.view.outputs if r.name not in {*outputs, *without}]:
            raise ModelError(f"the candidate has no output '{missing[0]}'; it has {', '.join(outputs)}")

    def _check_outputs(self, reference: Mapping[str, Array], out: Mapping[str, Array]) -> None:
        for name, a in sorted(out.items(), key=lambda item: not item[0].endswith(SHAPES)):
            if name.endswith(SHAPES) and not np.array_equal(a, reference[name]):
                raise ModelError(
                    f"the elements of output '{name.removesuffix(SHAPES)}' have other numbers or shapes than in the "
                    f"original: {a.tolist()}, not {reference[name].tolist()} (how many; rank and sizes of each)"
                )
            if a.shape != reference[name].shape:
                raise ModelError(
                    f"output '{name}' is {reference[name].shape} in the original, {a.shape} in the candidate"
                )
            if a.dtype.name != self._types[name] and a.size:
                raise ModelError(
                    f"output '{name}' is {self._types[name]} in the original, {a.dtype.name} in the candidate"
                )


@dataclass(frozen=True)
class _Renumbered:
    """The same batches in the token ids of a reduced vocabulary."""

    data: Iterable[Batch]
    words: Renumbering
    roles: Mapping[str, str]

    def __iter__(self) -> Iterator[Batch]:
        names = [self.roles["tokens"]] if "tokens" in self.roles else []
        return (Batch(self.words.feeds(b.feeds, names), b.labels) for b in self.data)


def _drift(reading: OutputLayout, view: View) -> DriftSums | MatchSums:
    if not reading.floating:
        return MatchSums()
    return DriftSums(logits=reading.logits, pooled=view.pools(reading))


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
    text_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    through_caches: int = 0,
    allow_code: bool = False,
    scratch: Path | None = None,
) -> Validation:
    """Compare two models on a dataset, on batches, or on a data source as text; one session is alive at a time.

    `samples`, `batch`, `sequence` and `seed` are for a source. `through_caches` lets decoders read texts so many tokens
    at a time, behind their own keys and values (0: all at once), which judges the caches as well. Options are called as
    on the command line; what its `--gate` does is `Gate([...]).judge(validation.values())`.
    """
    first, data, metrics = _parsed(reference), evaluation, texts_of("metrics", metrics, "accuracy")
    if isinstance(data, (str, Path)):
        graph = graph_of(first)
        folder = graph.path.parent if graph.path else None
        sizes: dict[str, Any] = {"batch": batch, "samples": samples, "sequence": sequence, "seed": seed}
        sizes |= {"text_column": text_column, "label_column": label_column}
        data = load_data(data, graph, folder, **sizes, allow_code=allow_code)
    data = as_dataset(data, graph_of(first))
    for m in (first, second := _parsed(candidate)):
        if isinstance(m, Stored):
            trial.prove(m, next(iter(suited(data.of_result(), graph_of(first), m.graph))).feeds, find(target))
    options: dict[str, Any] = {"metrics": metrics, "scratch": scratch, "allow_code": allow_code}
    original = Reference(first, data, find(target), **options, pieces=through_caches)
    return original.against(second)


def _parsed(model: Model) -> Graph | Stored:
    return model if isinstance(model, (Graph, Stored)) else read(model)


def _name_of(axis: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(axis, int) else axis.value
