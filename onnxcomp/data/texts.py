"""Text samples: lines or JSON objects, tokenized by the tokenizer.json beside the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.data.arrays import read_json
from onnxcomp.data.inputs import Batch, TensorSpec, roles, specs, vocabulary
from onnxcomp.data.untrusted import guarded, plain_file
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["Columns", "Text", "longest", "open_text", "tokenizer", "tokenizer_beside"]

DEFAULT_LENGTH = 512  # tokens a text is truncated to where no length is asked for
UNLIMITED = 1_000_000  # transformers writes a number far above it (1e30) where a tokenizer has no limit
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")  # position 0 is pad_token_id + 1


@dataclass(frozen=True)
class Padding:
    """How short texts are padded: to the longest of a batch, or to `length` where the model's axis is static."""

    token: int
    kind: int
    left: bool
    length: int | None
    start: int = 0  # what a decoder behind an encoder begins with

    def fill(self, rows: Sequence[Array], value: int) -> Array:
        """Rows of different length as one array `[samples, tokens]` (int64)."""
        width = self.length or max(len(r) for r in rows)
        out = np.full((len(rows), width), value, np.int64)
        for line, r in zip(out, rows, strict=True):
            start = width - len(r) if self.left else 0
            line[start : start + len(r)] = r
        return out


class Text:
    """Tokenized samples, padded per batch; without a mask input only texts of equal length share a batch."""

    random = False

    def __init__(
        self,
        name: str,
        inputs: Sequence[TensorSpec],
        ids: list[Array],
        types: list[Array],
        labels: Array | None,
        pad: Padding,
    ) -> None:
        self.name, self.notes, self.texts = name, list[str](), list[str]()
        self.inputs, self.role = inputs, roles(inputs)
        self.ids, self.types, self.labels, self.pad = ids, types, labels, pad
        if "tokens" not in self.role:
            raise DataError(f"{name}: text needs a model with a token input; this one takes {_names(inputs)}")
        if pad.length is not None and "mask" not in self.role and any(len(r) != pad.length for r in ids):
            raise DataError(
                f"{name}: the model takes exactly {pad.length} tokens and no mask, so every text must have as many"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def key(self, index: int) -> object:
        """Texts of any length share a batch; without a mask, which hides padding, only those of equal length."""
        return None if "mask" in self.role else len(self.ids[index])

    def rows(self, indices: Sequence[int]) -> Batch:
        """The texts of these indices with the mask, types and positions that the model takes."""
        ids = [self.ids[i] for i in indices]
        mask = self.pad.fill([np.ones_like(r) for r in ids], 0)
        arrays = {
            "tokens": self.pad.fill(ids, self.pad.token),
            "mask": mask,
            "types": self.pad.fill([self.types[i] for i in indices], self.pad.kind),
            "positions": np.maximum(np.cumsum(mask, 1) - 1, 0),
        }
        if "decoder_tokens" in self.role:  # the same text, shifted by the token that it begins with
            shifted = [np.concatenate([[self.pad.start], r[:-1]]) for r in ids]
            arrays["decoder_tokens"] = self.pad.fill(shifted, self.pad.token)
            arrays |= {f"decoder_{kind}": arrays[kind] for kind in ("mask", "positions")}
        feeds = {self.role[r]: a for r, a in arrays.items() if r in self.role}
        return Batch(feeds, None if self.labels is None else self.labels[list(indices)])


@dataclass(frozen=True)
class Columns:
    """The fields of a line of JSONL that hold the text (of two fields the pair, `a,b`) and the label.

    `option` is what names a field that is missing.
    """

    text: str | None = None
    label: str | None = None
    option: str = "--text-column"

    def read(self, row: Mapping[str, Any], where: str) -> tuple[str, str | None, Any]:
        """Text, second text and label of a line; raises `DataError` where there are none."""
        names = [x.strip() for x in self.text.split(",")] if self.text else ["text", "text_pair"]
        texts = [row.get(n) for n in names]
        has = f"it has {', '.join(map(repr, row)) or 'none'}"
        if names[0] in row and not isinstance(texts[0], str):
            raise DataError(f"{where}: '{names[0]}' must be a string, it is {json.dumps(texts[0])[:40]}")
        if not isinstance(texts[0], str):
            raise DataError(f"{where}: needs a string '{names[0]}'; {has}: name the column with {self.option}")
        if len(texts) > 1 and not (isinstance(texts[1], str) or (texts[1] is None and not self.text)):
            raise DataError(f"{where}: '{names[1]}' must be a string; {has}")
        for name, text in zip(names, texts, strict=False):
            if text is not None and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise DataError(f"{where}: '{name}' holds half of a character, one of \\ud800 to \\udfff alone")
        if self.label is not None and self.label not in row:
            raise DataError(f"{where}: has no label '{self.label}'; {has}")
        label = row[self.label] if self.label is not None else row.get("label", row.get("labels"))
        return texts[0], texts[1] if len(texts) > 1 else None, label


def open_text(
    path: Path, graph: Graph, folder: Path | None, sequence: int | None, columns: Columns | None = None
) -> Text:
    """Samples of a `.jsonl` file (`text`, `text_pair`, `label`, or the columns given) or a `.txt` file.

    A line of `.txt` is a sample; for a causal language model all lines are one stream, split every `sequence` tokens.
    """
    inputs = specs(graph)
    tokenizer = _tokenizer(folder, path)
    config = read_json(folder / "config.json") if folder else {}
    settings = read_json(folder / "tokenizer_config.json") if folder else {}
    pad = _padding(tokenizer, settings, config, inputs)
    limit = _limit(path, graph, tokenizer, settings, config, sequence)
    tokenizer.no_padding()
    if path.suffix == ".txt":
        lines = [x for x in _lines(path) if x.strip()]
        if not lines:
            raise DataError(f"{path}: holds no text")
        if _causal(graph, config):
            return _stream(path, lines, tokenizer, inputs, sequence or min(limit, DEFAULT_LENGTH), pad)
        return _encode(
            path, [(x, None) for x in lines], None, tokenizer, inputs, sequence or min(limit, DEFAULT_LENGTH), pad
        )
    pairs, labels = _jsonl(path, config, columns or Columns())
    return _encode(path, pairs, labels, tokenizer, inputs, sequence or min(limit, DEFAULT_LENGTH), pad)


def _names(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(s.name) for s in inputs) or "nothing"


def _tokenizer(folder: Path | None, path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise DataError(f"{path}: text needs the tokenizers package: pip install 'onnxcomp[text]'") from e
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.is_file():
        raise DataError(f"{path}: text needs a tokenizer.json beside the model{f' in {folder}' if folder else ''}")
    plain_file(file)
    with guarded(f"{file}: cannot be read as a tokenizer"):
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))


def _lines(path: Path) -> list[str]:
    plain_file(path)
    with guarded(f"{path}: cannot be read as UTF-8 text"):
        return path.read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")


def _padding(
    tok: Tokenizer, settings: Mapping[str, Any], config: Mapping[str, Any], inputs: Sequence[TensorSpec]
) -> Padding:
    padding = tok.padding or {}
    entry = settings.get("pad_token")
    pad_token = entry.get("content") if isinstance(entry, dict) else entry
    token_id = tok.token_to_id(pad_token) if isinstance(pad_token, str) else None
    pad_id = next(
        (x for x in (token_id, padding.get("pad_id"), config.get("pad_token_id"), 0) if isinstance(x, int)), 0
    )
    side = settings.get("padding_side") or padding.get("direction") or "right"
    tokens = next((s for s in inputs if s.name == roles(inputs).get("tokens")), None)
    static = tokens.shape[1] if tokens is not None and isinstance(tokens.shape[1], int) else None
    start = config.get("decoder_start_token_id")
    kind = int(settings.get("pad_token_type_id") or 0)
    return Padding(pad_id, kind, side == "left", static, start if isinstance(start, int) else pad_id)


def _limit(
    path: Path,
    graph: Graph,
    tok: Tokenizer,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    sequence: int | None,
) -> int:
    """The most tokens the model, its tokenizer and its configuration allow; `sequence` must not ask for more."""
    hard = _limits(graph, config)
    soft = (settings.get("model_max_length"), (tok.truncation or {}).get("max_length"))
    if sequence is not None and (sequence < 1 or any(sequence > x for x in hard)):
        raise DataError(
            f"{path}: a sequence of {sequence} tokens was asked for, the model takes 1 to {min(hard, default=0)}"
        )
    return min([x for x in (*hard, *soft) if isinstance(x, int) and 0 < x < UNLIMITED], default=DEFAULT_LENGTH)


def _limits(graph: Graph, config: Mapping[str, Any]) -> list[int]:
    """Numbers of tokens beyond which the model cannot run: its number of positions, the size of a static axis."""
    table = vocabulary(graph).get(roles(specs(graph)).get("positions", ""))
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(most, int) and config.get("model_type") in OFFSET_POSITIONS:
        most -= int(config.get("pad_token_id") or 0) + 1
    static = next((s.shape[1] for s in specs(graph) if s.integer and len(s.shape) == 2), None)
    return [x for x in (table, most, static) if isinstance(x, int) and x > 0]


def longest(graph: Graph, folder: Path | None) -> int | None:
    """The most tokens that a model can run on; None where neither it nor its configuration says."""
    return min(_limits(graph, read_json(folder / "config.json") if folder else {}), default=None)


def tokenizer(content: str) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json, without padding and truncation; raises `DataError`."""
    with guarded("the tokenizer cannot be read"):
        from tokenizers import Tokenizer

        tok = Tokenizer.from_str(content)
    tok.no_padding()
    tok.no_truncation()
    return tok


def tokenizer_beside(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder; raises `DataError` where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder}: has no tokenizer.json, which reads and writes the text")
    plain_file(file)
    return tokenizer(file.read_text("utf-8"))


def _causal(graph: Graph, config: Mapping[str, Any]) -> bool:
    task = graph.model.metadata_props.get("task", "")
    names = " ".join(map(str, config.get("architectures") or []))
    return task == "text-generation" or (not task and ("ForCausalLM" in names or "LMHeadModel" in names))


def _jsonl(
    path: Path, config: Mapping[str, Any], columns: Columns
) -> tuple[list[tuple[str, str | None]], Array | None]:
    pairs: list[tuple[str, str | None]] = []
    labels: list[Any] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}, line {number}: is not JSON: {e}") from e
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: needs an object with a string 'text'")
        first, second, label = columns.read(row, where)
        pairs.append((first, second))
        labels.append(_label(label, config, where))
    if not pairs:
        raise DataError(f"{path}: holds no samples")
    if all(x is None for x in labels):
        return pairs, None
    if any(x is None for x in labels):
        raise DataError(f"{path}: sample {labels.index(None)} has no label while others have one")
    try:
        return pairs, np.array(labels)
    except ValueError as e:
        raise DataError(f"{path}: the labels differ in shape: {e}") from e


def _label(raw: Any, config: Mapping[str, Any], where: str) -> Any:
    """A label as a number or list of numbers; a name is looked up in `label2id` of the model's configuration."""
    if isinstance(raw, str):
        known = config.get("label2id") or {}
        if raw not in known:
            raise DataError(
                f"{where}: label '{raw}' is not in the model's config.json ({', '.join(map(str, known)) or 'none'})"
            )
        return int(known[raw])
    if raw is None or isinstance(raw, (int, float)):
        return raw
    if isinstance(raw, list) and all(isinstance(x, (int, float)) for x in raw):
        return raw
    raise DataError(f"{where}: a label is a number, a name of config.json or a list of numbers")


def _encode(
    path: Path,
    pairs: Sequence[tuple[str, str | None]],
    labels: Array | None,
    tok: Tokenizer,
    inputs: Sequence[TensorSpec],
    limit: int,
    pad: Padding,
) -> Text:
    with guarded(f"{path}: the tokenizer failed"):
        tok.enable_truncation(limit)
        encodings: list[Encoding] = tok.encode_batch([a if b is None else (a, b) for a, b in pairs])
    for n, one in enumerate(encodings):
        if not one.ids:
            raise DataError(f"{path}: sample {n} has no tokens")
    ids = [np.array(x.ids, np.int64) for x in encodings]
    text = Text(str(path), inputs, ids, [np.array(x.type_ids, np.int64) for x in encodings], labels, pad)
    text.texts = [a for a, _ in pairs]
    if cut := sum(bool(x.overflowing) for x in encodings):
        text.notes.append(f"{cut} of {len(encodings)} texts were cut to {limit} tokens")
    return text


def _stream(
    path: Path, lines: Sequence[str], tok: Tokenizer, inputs: Sequence[TensorSpec], length: int, pad: Padding
) -> Text:
    """All lines as one stream of tokens in samples of `length`, each after the tokenizer's start token, if any."""
    with guarded(f"{path}: the tokenizer failed"):
        tok.no_truncation()
        start = tok.encode("").ids[:1]
        encodings = tok.encode_batch([f"{x}\n" for x in lines], add_special_tokens=False)
    stream = np.array([i for e in encodings for i in e.ids], np.int64)
    room = length - len(start)
    if room < 1 or stream.size == 0:
        raise DataError(f"{path}: no token stream of {length} tokens can be made from it")
    count = max(stream.size // room, 1)
    head = np.array(start, np.int64)
    ids = [np.concatenate([head, stream[i * room : (i + 1) * room]]) for i in range(count)]
    text = Text(str(path), inputs, ids, [np.zeros_like(r) for r in ids], None, pad)
    if remainder := stream.size - sum(len(r) - len(start) for r in ids):
        text.notes.append(f"the last {remainder} tokens of the stream were left out (samples of {length})")
    return text
