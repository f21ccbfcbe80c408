"""Time to the first token, and of each further one: decoders in turns, in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.benchmarking.benchmark import PAUSE, model_of, row, warnings
from onnxcomp.benchmarking.results import LEAST, BenchReport, Block, Rounds
from onnxcomp.benchmarking.worker import Child
from onnxcomp.data import open_axes
from onnxcomp.data.arguments import whole
from onnxcomp.data.inputs import completed, roles, specs, word_count
from onnxcomp.data.texts import longest
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.files.atomic import scratch_folder
from onnxcomp.files.stored import Stored
from onnxcomp.graph import Graph
from onnxcomp.machine import machine
from onnxcomp.maths import Array
from onnxcomp.runtime.encoder_source import pair_of
from onnxcomp.target import CPU, Target, find

__all__ = ["bench_generation"]

Progress = Callable[[str, int, int], None]


def bench_generation(
    models: Sequence[str | Path | Stored],
    target: str | Target = CPU,
    *,
    prompt: int = 128,
    new: int = 64,
    runs: int | None = None,
    threads: int = 0,
    graph: str | None = None,
    watch: Progress | None = None,
) -> BenchReport:
    """Time decoders against the first one: reading a prompt of random tokens, and every token behind it.

    An encoder-decoder reads the prompt with its encoder, and its decoder makes the first token of that.

    The report has two rows for each model, as for two shapes: the prompt with the first token, and one further token
    (the median of `new`). `runs` rounds, at least six. Raises `ModelError` for a model that is no decoder, `DataError`
    for more tokens than one of them takes.
    """
    count = max(whole("runs", runs, 1) or LEAST, LEAST)
    prompt, new = whole("prompt", prompt, 1) or 1, max(whole("new", new, 2) or 2, 2)
    texts = [_Text.of(m, graph) for m in models]
    if not texts:
        raise ModelError("there is no model to benchmark")
    for t in texts:
        t.check(prompt, new)
    loaded = [t.model for t in texts]
    report = BenchReport(machine=machine(), models=[m.name for m in loaded])
    aim, labels = find(target), (f"prompt={prompt}", f"next token of {new}, prompt={prompt}")
    with scratch_folder() as folder, contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(m.name)) for m in loaded]
        facts = []
        for i, (child, t) in enumerate(zip(children, texts, strict=True)):
            child.ask("ready", target=dataclasses.asdict(aim))
            fields = {**t.fields(folder / str(i), prompt), "threads": threads}
            facts.append(child.ask("decoder", target=dataclasses.asdict(aim), **fields))
        reading, going_on = _interleaved(children, facts, new, count, watch)
    report.machine["runtime"] = facts[0]["runtime"]
    for label, rounds in zip(labels, (reading, going_on), strict=True):
        report.rounds[label] = rounds
        report.warnings += warnings(rounds, label)
        for i, m in enumerate(loaded):
            tokens = 1 if rounds is going_on else None if texts[i].unprompted else prompt
            report.rows.append(row(m, label, rounds, i, facts[i], 1, tokens))
    report.warnings += [
        f"{m.name}: has no caches, so it reads all tokens again for each new one"
        for m, f in zip(loaded, facts, strict=True)
        if not f["cached"]
    ]
    for t in texts:
        report.warnings += [f"{t.model.name}: reads {t.unprompted}, not a prompt of tokens"] if t.unprompted else []
    return report


@dataclasses.dataclass(frozen=True)
class _Text:
    """A decoder of a benchmark, and the encoder that it is behind, if any, which reads the prompt then."""

    model: Any
    encoder: Stored | None = None

    @classmethod
    def of(cls, model: str | Path | Stored, graph: str | None) -> _Text:
        pair = pair_of(Path(model)) if graph is None and not isinstance(model, Stored) else None
        if pair is None or not pair.fits():
            return cls(model_of(model, graph))
        encoder, decoder = (storage.read(f) for f in pair)
        named = dataclasses.replace(model_of(decoder, None), name=str(model), size=encoder.nbytes + decoder.nbytes)
        return cls(named, encoder)

    @property
    def unprompted(self) -> str:
        """What an encoder reads in place of a text, such as sound of a fixed length; empty for a text."""
        inputs = [] if self.encoder is None else specs(self.encoder.graph)
        return "" if self.encoder is None or "tokens" in roles(inputs) else inputs[0].name

    def check(self, prompt: int, new: int) -> None:
        """Raise `DataError` for more tokens than the model takes."""
        readers = [(self.model.graph, prompt + new)]
        if self.encoder is not None:
            readers = [(self.model.graph, 1 + new), (self.encoder.graph, prompt)]
        for g, count in readers:
            most = longest(g, self.model.path.parent)
            if most is not None and count > most:
                raise DataError(f"{self.model.name}: takes at most {most} tokens, {prompt} + {new} were asked for")

    def fields(self, file: Path, prompt: int) -> dict[str, str]:
        """What a worker is told: files of the graphs, and of what is read, which is written to `file`."""
        told = {"model": str(self.model.path.resolve())}
        if self.encoder is None:
            np.save(told.setdefault("prompt", f"{file}.npy"), _tokens(self.model.graph, prompt))
            return told
        g, inputs = self.encoder.graph, specs(self.encoder.graph)
        fed = open_axes.feeds_for(g, {"batch": 1}) if self.unprompted else {"input_ids": _tokens(g, prompt)}
        whole: dict[str, Any] = completed(dict(fed), inputs)[0]
        np.savez(told.setdefault("prompt", f"{file}.npz"), **whole)
        return told | {"encoder": str(self.encoder.path.resolve())}


def _tokens(graph: Graph, count: int) -> Array:
    """A random prompt `[1, count]` of words that the model has."""
    return np.random.default_rng(0).integers(0, word_count(graph), (1, count))


def _interleaved(
    children: Sequence[Child], facts: list[dict[str, Any]], new: int, count: int, watch: Progress | None
) -> tuple[Rounds, Rounds]:
    """Rounds A B, B A, A B ... of one text each; facts take the largest memory."""
    reading, going_on = list[tuple[Block, ...]](), list[tuple[Block, ...]]()
    for n in range(count):
        if watch:
            watch("measuring generation, rounds", n, count)
        replies: dict[int, dict[str, Any]] = {}
        order = list(range(len(children)))
        for i in order if n % 2 == 0 else reversed(order):
            time.sleep(PAUSE)
            replies[i] = children[i].ask("generate", new=new)
            facts[i]["peak_mib"] = replies[i]["peak_mib"]
        reading.append(tuple(Block((replies[i]["first"],), replies[i]["foreign"]) for i in order))
        going_on.append(tuple(Block(tuple(replies[i]["others"]), replies[i]["foreign"]) for i in order))
    return Rounds(tuple(reading)), Rounds(tuple(going_on))
