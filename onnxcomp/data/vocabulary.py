"""A reduced vocabulary: which tokens must be kept, their new ids, and tokenizer and configuration files to match."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["KEY", "STEP", "Renumbering", "between", "closure", "renumbering", "rewrite", "rounded", "tokenizers"]

KEY = "onnxcomp.token_ids"  # metadata of a model with a reduced vocabulary: `Renumbering.text`
STEP = "onnxcomp.token_ids.step"  # the same, from the ids of the model that it was last made of
LARGEST = 1 << 24  # tokens of a vocabulary; the largest of today have a quarter of a million
UNREADABLE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # binary duplicates of tokenizer.json
LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class Renumbering:
    """The `kept` ids, ascending, of `size` original ones: `kept[i]` gets the new id `i`, removed ones get `unknown`."""

    kept: Array
    size: int
    unknown: int

    def ids(self, old: Array) -> Array:
        """New ids of original ones, of any shape and integer type."""
        table = np.full(self.size, self.unknown, np.int64)
        table[self.kept] = np.arange(len(self.kept))
        return np.asarray(table[np.clip(old, 0, self.size - 1)].astype(old.dtype))

    def columns(self, a: Array) -> Array:
        """The kept columns of an output over the original vocabulary (last axis); any other output unchanged."""
        return np.asarray(a[..., self.kept]) if a.ndim and a.shape[-1] == self.size else a

    def feeds(self, feeds: Mapping[str, Array], names: Iterable[str]) -> dict[str, Array]:
        """Feeds with new ids in the named inputs."""
        chosen = set(names)
        return {k: self.ids(v) if k in chosen else v for k, v in feeds.items()}

    def text(self) -> str:
        """As metadata: `size;unknown;0-99,105,...`."""
        breaks = np.flatnonzero(np.diff(self.kept) != 1) + 1
        runs = [(r[0], r[-1]) for r in np.split(self.kept, breaks)]
        return f"{self.size};{self.unknown};" + ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)

    @classmethod
    def parse(cls, text: str) -> Renumbering:
        """The inverse of `text`; raises `ValueError` for what no `text` gives."""
        match = re.fullmatch(r"(\d{1,9});(\d{1,9});(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)", text)
        if match is None:
            raise ValueError("it is not 'size;unknown;0-99,105'")
        size, unknown = int(match[1]), int(match[2])
        ends = [(int(r.split("-")[0]), int(r.split("-")[-1])) for r in match[3].split(",")]
        flat = [x for a, b in ends for x in ((a,) if a == b else (a, b))]
        if size > LARGEST or flat != sorted(set(flat)) or flat[-1] >= size:
            raise ValueError(f"its ids are not ascending numbers below {min(size, LARGEST)}")
        kept = np.concatenate([np.arange(a, b + 1) for a, b in ends])
        if unknown >= len(kept):
            raise ValueError(f"removed tokens get the id {unknown} of {len(kept)}")
        return cls(kept, size, unknown)

    def after(self, earlier: Renumbering | None) -> Renumbering:
        """The composition with an earlier renumbering, in ids of the first model."""
        return self if earlier is None else Renumbering(earlier.kept[self.kept], earlier.size, self.unknown)


def between(original: Graph, result: Graph) -> Renumbering | None:
    """The renumbering from the ids of a model, which may be reduced already, to those of what was made of it.

    None where they are the same; raises `ModelError` where the result has tokens that the model has not.
    """
    first, last = renumbering(original), renumbering(result)
    if first is None or last is None or np.array_equal(first.kept, last.kept):
        return last if first is None else None
    if not np.isin(last.kept, first.kept).all():
        raise ModelError("the vocabularies of the models were reduced to different tokens")
    return Renumbering(np.searchsorted(first.kept, last.kept), len(first.kept), last.unknown)


def renumbering(g: Graph, key: str = KEY) -> Renumbering | None:
    """The renumbering recorded in a model's metadata, None where its vocabulary was not reduced."""
    text = g.model.metadata_props.get(key)
    if text is None:
        return None
    try:
        return Renumbering.parse(text)
    except ValueError as e:
        raise ModelError(f"{g.path or 'the model'}: its metadata '{key}' is damaged: {e}") from e


# ---- what must stay --------------------------------------------------------------------------------------------------


def closure(folder: Path | None, used: Array, size: int) -> tuple[Array, int]:
    """Ids to keep so that texts of `used` tokens are tokenized as before (bool `[size]` both), and the id for others.

    Also kept: special and added tokens, single characters and bytes, the parts of byte-pair merges, ids that
    configuration files name. Raises `ModelError` without a readable `tokenizer.json` beside the model.
    """
    tokenizer = _json(folder, "tokenizer.json")
    if tokenizer is None:
        raise ModelError("there is no tokenizer.json beside the model, so its tokens cannot be renumbered with it")
    keep, model = used.copy(), tokenizer.get("model", {})
    pieces = _pieces(model)
    extra = {t["content"]: t["id"] for t in tokenizer.get("added_tokens", [])}
    named = {i for name in ("config.json", "generation_config.json") for i in _named_ids(_json(folder, name) or {})}
    alphabet = {i for token, i in pieces.items() if _is_character(token, model)}
    unknown = model.get("unk_id") if model.get("type") == "Unigram" else {**pieces, **extra}.get(model.get("unk_token"))
    for i in {*extra.values(), *named, *alphabet, *([] if unknown is None else [unknown])}:
        if 0 <= i < size:
            keep[i] = True
    for a, b in reversed(_merges(model)):
        if keep[pieces.get(a + b.removeprefix(str(model.get("continuing_subword_prefix") or "")), 0)]:
            keep[[pieces[a], pieces[b]]] = True
    stand_in = unknown if unknown is not None else next(iter(sorted(extra.values())), int(np.argmax(keep)))
    return keep, stand_in


def _json(folder: Path | None, name: str) -> Any:
    path = folder / name if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelError(f"{path}: cannot be read as JSON: {e}") from e


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    """Token to id of a tokenizer's model, whether it has a dictionary (BPE, WordPiece) or a list (Unigram)."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        return vocab
    if isinstance(vocab, list):
        return {piece[0]: i for i, piece in enumerate(vocab)}
    raise ModelError(f"tokenizer.json: a model of type '{model.get('type')}' has no vocabulary that can be reduced")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or [])
    return [(a, b) for a, b in pairs]


def _is_character(token: str, model: Mapping[str, Any]) -> bool:
    """Whether a token is one character or byte, with or without a prefix or suffix for its place in a word."""
    bare = token.removeprefix(str(model.get("continuing_subword_prefix") or "")).removeprefix("▁")
    bare = bare.removesuffix(str(model.get("end_of_word_suffix") or ""))
    return len(bare) <= 1 or (bare.startswith("<0x") and bare.endswith(">"))


def _named_ids(x: Any) -> Iterator[int]:
    """Every token id in a configuration, at any depth."""
    if isinstance(x, dict):
        for key, value in x.items():
            if isinstance(key, str) and (key.endswith("_token_id") or key in LISTS_OF_IDS):
                yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
            else:
                yield from _named_ids(value)


# ---- files -----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, words: Renumbering) -> list[str]:
    """Renumber the tokenizer and configuration files of a result, in place; returns the names of files removed."""
    new = {int(old): i for i, old in enumerate(words.kept)}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _edit(folder, name, lambda x: _settings(x, new, words.size))
    _edit(folder, "tokenizer.json", lambda x: _tokenizer(x, new))
    _edit(folder, "added_tokens.json", lambda x: {t: new[i] for t, i in x.items() if i in new})
    _edit(folder, "vocab.json", lambda x: {t: new[i] for t, i in x.items() if i in new})
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
        (folder / "vocab.txt").write_text("\n".join(t for i, t in enumerate(lines) if i in new or t == ""), "utf-8")
    _merges_file(folder)
    removed = [name for name in UNREADABLE if (folder / name).is_file()]
    for name in removed:
        (folder / name).unlink()
    return removed


def tokenizers(folder: Path | None, words: Renumbering) -> tuple[str, str]:
    """The original's tokenizer.json, and what `rewrite` makes of it; raises `ModelError` where there is none."""
    content = _json(folder, "tokenizer.json")
    if content is None:
        raise ModelError("there is no tokenizer.json beside the model")
    new = {int(old): i for i, old in enumerate(words.kept)}
    return json.dumps(content), json.dumps(_tokenizer(content, new))


def _edit(folder: Path, name: str, change: Any) -> None:
    content = _json(folder, name)
    if content is not None:
        (folder / name).write_text(json.dumps(change(content), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _merges_file(folder: Path) -> None:
    """Remove merges whose result was removed from merges.txt."""
    vocab, path = _json(folder, "vocab.json"), folder / "merges.txt"
    if vocab is None or not path.is_file():
        return
    lines = path.read_text("utf-8").split("\n")
    kept = [x for x in lines if x.startswith("#version") or not x.strip() or _merged(x) in vocab]
    path.write_text("\n".join(kept), "utf-8")


def _merged(line: str) -> str:
    return line.replace(" ", "", 1)


def _settings(x: Any, new: Mapping[int, int], size: int) -> Any:
    """A configuration with new ids and vocabulary size, at any depth."""
    if isinstance(x, list):
        return [_settings(v, new, size) for v in x]
    if not isinstance(x, dict):
        return x
    out = {}
    for key, value in x.items():
        if key.endswith("_token_id") or key in LISTS_OF_IDS:
            out[key] = _new_ids(value, new)
        elif key == "vocab_size" and value == size:
            out[key] = len(new)
        elif key == "added_tokens_decoder":
            out[key] = {str(new[int(i)]): v for i, v in value.items() if int(i) in new}
        else:
            out[key] = _settings(value, new, size)
    return out


def _new_ids(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new[i] for i in value if i in new]
    return new.get(value, value) if isinstance(value, int) else value


def _tokenizer(x: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The content of tokenizer.json with the kept tokens only, in their new ids."""
    model = dict(x["model"])
    kept = {t for t, i in _pieces(model).items() if i in new}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items() if i in new}
    else:
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in new]
    prefix = str(model.get("continuing_subword_prefix") or "")
    if model.get("merges"):
        pairs = zip(model["merges"], _merges(model), strict=True)
        model["merges"] = [m for m, (a, b) in pairs if {a, b, a + b.removeprefix(prefix)} <= kept]
    if model.get("unk_id") is not None:
        model["unk_id"] = new[model["unk_id"]]
    added = [{**t, "id": new[t["id"]]} for t in x.get("added_tokens", []) if t["id"] in new]
    padding = x.get("padding")
    if padding and padding.get("pad_id") in new:
        padding = {**padding, "pad_id": new[padding["pad_id"]]}
    rest = {"model": model, "added_tokens": added, "padding": padding}
    return {**x, **rest, "post_processor": _processor(x.get("post_processor"), new)}


def _processor(x: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids: `ids` of a template, `[token, id]` pairs of the BERT and RoBERTa kinds."""
    if isinstance(x, list):
        return [_processor(v, new) for v in x]
    if not isinstance(x, dict):
        return x
    out = {}
    for key, value in x.items():
        if key == "ids":
            out[key] = _new_ids(value, new)
        elif key in ("sep", "cls") and isinstance(value, list):
            out[key] = [value[0], new.get(value[1], value[1])]
        else:
            out[key] = _processor(value, new)
    return out


def rounded(keep: Array, multiple: int, order: Sequence[int] | Array) -> Array:
    """Keep more tokens, in the given order, until their number is a multiple."""
    keep = keep.copy()
    for i in order:
        if keep.sum() % multiple == 0:
            break
        keep[i] = True
    return keep
