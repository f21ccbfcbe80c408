"""Text from a prompt, piece by piece, with the time that it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcomp.data.arguments import path_of
from onnxcomp.data.arrays import read_json
from onnxcomp.data.texts import longest, tokenizer
from onnxcomp.data.untrusted import plain_file
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.maths.sampling import Sampling
from onnxcomp.runtime.generation import Decoder, generated
from onnxcomp.target import CPU, Target

__all__ = ["Generation", "generate"]

UNFINISHED = "\ufffd"  # what a tokenizer shows for the first bytes of a character


@dataclass(frozen=True)
class Generation:
    """What was generated: `tokens` and their `text`, seconds to the first token and for all others.

    `ended` tells that the model ended the text itself; `cached` that it remembers earlier tokens; `cache_bytes` by how
    much memory in the end.
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
    tell: Callable[[str], None] | None = None,
) -> Generation:
    """Go on from a prompt with a decoder and the tokenizer beside it; `tell` gets pieces of text as they come.

    At temperature 0 the likeliest token is taken, else one is drawn. Raises `ModelError` for a model that is no
    decoder, `DataError` for a prompt without tokens or as long as the model can read.
    """
    if max_new < 1:
        raise DataError(f"max_new is {max_new}; at least one token is generated")
    sampling = Sampling(temperature, top_k, top_p, seed)
    path = storage.one_graph(path_of("model", model) or Path(), graph)
    file = path.parent / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{path.parent}: has no tokenizer.json, which reads the prompt")
    plain_file(file)
    tok = tokenizer(file.read_text("utf-8"))
    ids = [int(x) for x in tok.encode(prompt).ids]
    if not ids:
        raise DataError("the prompt has no tokens; give at least one word")
    stored = storage.read(path)
    limit = longest(stored.graph, path.parent)
    if limit is not None and len(ids) >= limit:
        raise DataError(f"the prompt has {len(ids)} tokens; the model reads at most {limit}, new ones included")
    most = max_new if limit is None else min(max_new, limit - len(ids))
    ends, found, text = _ends(path.parent), list[int](), ""
    clock, first = time.perf_counter(), 0.0
    with Decoder(stored, target, threads=threads) as decoder:
        began = time.perf_counter()
        for new in generated(decoder, np.array([ids]), most, sampling, ends=ends):
            clock = time.perf_counter()
            first = first or clock - began
            found.append(int(new[0]))
            whole = str(tok.decode(found))
            if tell is not None and not whole.endswith(UNFINISHED) and len(whole) > len(text):
                tell(whole[len(text) :])
                text = whole
        cached, nbytes = decoder.cached, decoder.cache_bytes
    whole = str(tok.decode(found))
    if tell is not None and len(whole) > len(text):
        tell(whole[len(text) :])
    ended = found[-1] in ends
    return Generation(prompt, whole, tuple(ids), tuple(found), ended, cached, nbytes, first, clock - began - first)


def _ends(folder: Path) -> tuple[int, ...]:
    """The tokens that end a text, of the configurations beside a model."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        given = read_json(file).get("eos_token_id") if file.is_file() else None
        if given is not None:
            return tuple(int(x) for x in (given if isinstance(given, list) else [given]) if isinstance(x, int))
    return ()
