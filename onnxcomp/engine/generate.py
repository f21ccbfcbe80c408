"""Text from a prompt, piece by piece, with the time that it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arguments import path_of
from onnxcomp.data.arrays import read_json
from onnxcomp.data.inputs import word_count
from onnxcomp.data.texts import longest, tokenizer_beside
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.files.stored import Stored
from onnxcomp.maths import Array
from onnxcomp.maths.sampling import Sampling
from onnxcomp.runtime.encoder_source import barred, begins_with, ends_of, pair_of
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.runtime.speculation import LOOKAHEAD, Drafted, speculated
from onnxcomp.target import CPU, Target

__all__ = ["Generation", "generate"]

ALONE = 9  # tokens that tell the speed without a draft, the first of which is not timed
UNFINISHED = "\ufffd"  # what a tokenizer shows for the first bytes of a character


@dataclass(frozen=True)
class Generation:
    """What was generated: `tokens` and their `text`, seconds to the first token and for all others.

    `ended` tells that the model ended the text itself; `cached` that it remembers earlier tokens; `cache_bytes` by how
    much memory in the end. With a draft, how many tokens it `proposed` and how many of them were `accepted`, and the
    tokens a second of the model without it, measured on the tokens behind the text.
    """

    prompt: str
    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool
    cached: bool
    cache_bytes: int
    first_seconds: float
    other_seconds: float
    proposed: int = 0
    accepted: int = 0
    alone_per_second: float | None = None

    @property
    def per_second(self) -> float | None:
        """Tokens a second behind the first; None where there are none."""
        count = len(self.tokens) - 1
        return count / self.other_seconds if count > 0 and self.other_seconds > 0 else None


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int = 0,
    graph: str | None = None,
    target: Target = CPU,
    draft: str | Path | None = None,
    lookahead: int = LOOKAHEAD,
    tell: Callable[[str], None] | None = None,
) -> Generation:
    """Go on from a prompt with a decoder and the tokenizer beside it; `tell` gets pieces of text as they come.

    An encoder-decoder writes about the prompt: a text, or a file that its encoder reads (an image or an `.npz`).
    At temperature 0 the likeliest token is taken, else one is drawn. A `draft`, a smaller model of the same words,
    proposes `lookahead` tokens at once, which changes nothing but the speed. Raises `ModelError` for a model that is no
    decoder or a draft of other words, `DataError` for a prompt without tokens or as long as the model can read.
    """
    if max_new < 1 or lookahead < 1:
        raise DataError(f"max_new is {max_new} and lookahead {lookahead}; both are at least one")
    sampling, start = Sampling(temperature, top_k, top_p, seed), _start(model, prompt, graph, target, threads)
    ids, tok, limit = start.tokens, start.tokenizer, longest(start.stored.graph, start.path.parent)
    if limit is not None and len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens; the model reads at most {limit}, new ones included")
    most, found, text = max_new if limit is None else min(max_new, limit - len(ids)), list[int](), ""
    clock, first, alone, told = time.perf_counter(), 0.0, None, Drafted()
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(Decoder(start.stored, target, threads=threads, given=start.given))
        if draft is not None:
            _can_judge(decoder)
        helper = None if draft is None else stack.enter_context(_draft(draft, start, most, target, threads))
        began = time.perf_counter()
        for new in _tokens(decoder, helper, start, most, sampling, lookahead, told):
            clock = time.perf_counter()
            first = first or clock - began
            found.append(new)
            whole = str(tok.decode(found))
            if tell is not None and not whole.endswith(UNFINISHED) and len(whole) > len(text):
                tell(whole[len(text) :])
                text = whole
        cached, nbytes = decoder.cached, decoder.cache_bytes
        if helper is not None:
            helper.close()  # threads of an idle session would disturb what is timed
            alone = _speed_alone(decoder, found[-1], len(ids) + len(found), limit)
    whole = str(tok.decode(found))
    if tell is not None and len(whole) > len(text):
        tell(whole[len(text) :])
    return Generation(
        prompt, whole, tuple(start.read), tuple(found), found[-1] in start.ends, cached, nbytes, first,
        clock - began - first, told.proposed, told.accepted, alone,
    )  # fmt: skip


@dataclass(frozen=True)
class _Start:
    """A decoder with what it begins with: its first `tokens`, those that were `read` of the prompt, those that end it.

    `given` is what an encoder made of the prompt, `barred` what its configuration forbids.
    """

    path: Path
    stored: Stored
    tokenizer: Any
    tokens: list[int]
    read: list[int]
    ends: tuple[int, ...]
    given: dict[str, Array] = field(default_factory=dict)
    barred: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))


def _start(model: str | Path, prompt: str, graph: str | None, target: Target, threads: int) -> _Start:
    source = path_of("model", model) or Path()
    pair = pair_of(source) if graph is None else None
    if pair is None:
        path = storage.one_graph(source, graph)
        tok, ids = _read_prompt(path.parent, prompt)
        if not ids:
            raise DataError("the prompt has no tokens; give at least one word")
        return _Start(path, storage.read(path), tok, ids, ids, ends_of(source if source.is_dir() else path.parent))
    tok, ids = _read_prompt(source, prompt)
    told = [read_json(source / name) for name in ("config.json", "generation_config.json")]
    stored = storage.read(pair.decoder)
    takes = {str(v.name) for v in stored.graph.inputs}
    given = {n: a for n, a in pair.read(prompt, ids, target, threads).items() if n in takes}
    tokens, barring = begins_with(told[0], told[1], source), barred(told[1])
    return _Start(pair.decoder, stored, tok, tokens, ids, ends_of(source), given, barring)


def _read_prompt(folder: Path, prompt: str) -> tuple[Any, list[int]]:
    """The tokenizer beside a model, and the tokens of a prompt."""
    tok = tokenizer_beside(folder)
    return tok, [int(x) for x in tok.encode(prompt).ids]


def _can_judge(decoder: Decoder) -> None:
    """Raise `ModelError` for a model that can judge no draft."""
    if decoder.last_only:
        raise ModelError(
            f"{decoder.name}: gives logits of the last token only; to judge a draft takes those of several"
        )
    if decoder.slides:
        raise ModelError(f"{decoder.name}: its caches slide, so tokens of a draft that is wrong cannot be taken back")


def _draft(draft: str | Path, start: _Start, most: int, target: Target, threads: int) -> Decoder:
    """The draft, opened; raises `ModelError` where it has other words than the model, or reads too few tokens."""
    graph, path = start.stored.graph, start.path
    if start.given:
        raise ModelError(f"{path}: reads what an encoder made, which a draft does not; drafts are for decoders alone")
    file = storage.one_graph(path_of("draft", draft) or Path(), None)
    stored = storage.read(file)
    read, need = longest(stored.graph, file.parent), len(start.tokens) + most
    if read is not None and read < need:
        raise ModelError(f"{file}: reads at most {read} tokens, {need} are needed; ask for fewer with --max-new")
    counts = [word_count(g) for g in (graph, stored.graph)]
    readers = [p.parent / "tokenizer.json" for p in (path, file)]
    if counts[0] != counts[1] or (readers[1].is_file() and readers[0].read_bytes() != readers[1].read_bytes()):
        raise ModelError(f"{file}: has other words than {path}, so it cannot propose tokens for it")
    return Decoder(stored, target, threads=threads)


def _tokens(
    decoder: Decoder, draft: Decoder | None, start: _Start, most: int, how: Sampling, lookahead: int, told: Drafted
) -> Iterator[int]:
    ids, ends = np.array([start.tokens]), start.ends
    if draft is None:
        return (int(x[0]) for x in generated(decoder, ids, most, how, ends=ends, barred=start.barred))
    return speculated(decoder, draft, ids[0], most, how, ends=ends, lookahead=lookahead, told=told)


def _speed_alone(decoder: Decoder, last: int, read: int, limit: int | None) -> float | None:
    """Tokens a second of single ones behind a text; None where the model can read no more."""
    count = ALONE if limit is None else min(ALONE, limit - read)
    if count < 2:
        return None
    decoder.read(np.array([[last]]))
    began = time.perf_counter()
    for _ in range(count - 1):
        decoder.read(np.array([[last]]))
    return (count - 1) / (time.perf_counter() - began)
