"""Laws of files that nobody has checked: one clear error, soon, without a pickle, a pipe or all of the memory."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.data import untrusted, vocabulary
from onnxcomp.data.datasets import load_data
from onnxcomp.data.untrusted import guarded, read_npz
from onnxcomp.data.vocabulary import Renumbering
from onnxcomp.errors import DataError, ModelError
from onnxcomp.files import storage
from onnxcomp.graph.interface import REMOVED_PORTS, removed_ports
from onnxcomp.validation.compare import validate
from tests import tiny


def npz(path: Path, *, packing: int = zipfile.ZIP_DEFLATED, header: bytes | None = None, content: bytes = b"") -> Path:
    """An npz of one array `x`, or of one member with this header."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((2, 3), np.float32))
    whole = buffer.getvalue() if header is None else _with_header(header) + content
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("x.npy", whole)
    return path


def _with_header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


HEADERS = {
    "claims": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4096)}\n",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}\n",
    "pickle": b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
    "code": b"{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,)}\n",
    "deep": b"(" * 2000 + b")" * 2000,
    "cut": b"{'descr': '<f4', 'fortr",
    "type": b"{'descr': 'what', 'fortran_order': False, 'shape': (1,)}\n",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_is_not_believed(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError, match=r"d\.npz"):
        read_npz(npz(tmp_path / "d.npz", header=HEADERS[header], content=b"\0" * 16))


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_what_numpy_writes_is_unpacked(tmp_path: Path, packing: int) -> None:
    with pytest.raises(DataError, match="packed in a way that numpy does not write"):
        read_npz(npz(tmp_path / "d.npz", packing=packing))


def test_every_damaged_byte_is_an_array_or_one_clear_error(tmp_path: Path) -> None:
    """As the fuzzed files of the issue: encryption flags, unknown packings, broken checks, false sizes."""
    path = tmp_path / "d.npz"
    np.savez(path, x=np.arange(6, dtype=np.float32), labels=np.arange(6))
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_npz(path)
        except DataError:
            refused += 1
    assert refused > 50


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untrusted, "_room", lambda: 1 << 20)
    np.savez_compressed(tmp_path / "d.npz", x=np.zeros(1 << 20, np.uint8))
    assert (tmp_path / "d.npz").stat().st_size < 4096
    with pytest.raises(DataError, match="unpacks to more than"):
        read_npz(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["d.npz", "d.jsonl", "d.txt"])
def test_a_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    storage.save(tiny.encoder(layers=1), tmp_path)
    (tmp_path / "tokenizer.json").write_text(_tokenizer())
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="is not a plain file"):
        load_data(str(tmp_path / name), storage.load(tmp_path), tmp_path)


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models

    text: str = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()
    return text


_TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "Z", "type_id": 0}}], "pair": []}
TOKENIZERS = {
    "template": {"post_processor": {**_TEMPLATE, "special_tokens": {}}},
    "id": {"added_tokens": [{"id": 1 << 60, "content": "a", "special": True}]},
    "vocabulary": {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "b"}},
    "regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    "truncation": {"truncation": {"max_length": 2, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}},
}


def said(path: Path) -> str:
    """What loading says of it; nothing where it is fine."""
    try:
        load_data(str(path), storage.load(path.parent), path.parent)
    except DataError as e:
        return str(e)
    return ""


@pytest.mark.parametrize("change", TOKENIZERS)
def test_a_damaged_tokenizer_is_one_clear_error(tmp_path: Path, change: str) -> None:
    storage.save(tiny.encoder(layers=1), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(_tokenizer()) | TOKENIZERS[change]))
    (tmp_path / "d.txt").write_text("a a a a\n")
    assert "token" in (said(tmp_path / "d.txt") or "a token")


def test_panics_of_rust_are_errors_of_ours_and_interrupts_are_not() -> None:
    class PanicException(BaseException):
        """As pyo3 makes it: no `Exception`."""

    with pytest.raises(DataError, match="tokenizer: called"), guarded("tokenizer"):
        raise PanicException("called\nunwrap")
    with pytest.raises(KeyboardInterrupt), guarded("tokenizer"):
        raise KeyboardInterrupt
    with pytest.raises(ModelError), guarded("tokenizer"):
        raise ModelError("of ours")


@pytest.mark.parametrize("where", ["config.json", "d.jsonl", "tokenizer_config.json"])
def test_deeply_nested_json_is_one_clear_error(tmp_path: Path, where: str) -> None:
    storage.save(tiny.encoder(layers=1), tmp_path)
    (tmp_path / "tokenizer.json").write_text(_tokenizer())
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / where).write_text("[" * 100_000)
    with pytest.raises(DataError, match=where):
        load_data(str(tmp_path / "d.jsonl"), storage.load(tmp_path), tmp_path)


CONFIGS: list[dict[str, Any]] = [{"vocab_size": x} for x in ("x", -5, 1 << 70, True)]
CONFIGS += [{"max_position_embeddings": [1]}, {"image_size": {}}, {"vocab_size": 1.5}]


@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_of_a_configuration_are_checked(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"config\.json: '{next(iter(config))}' is .* not a whole number"):
        untrusted.whole_number(config, next(iter(config)), 1, str(tmp_path / "config.json"))
    storage.save(tiny.encoder(layers=1), tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"label2id": [1], "architectures": 3, "pad_token_id": "x"})
    )
    (tmp_path / "tokenizer.json").write_text(_tokenizer())
    (tmp_path / "d.jsonl").write_text('{"text": "a", "label": "b"}\n')
    assert "config.json" in said(tmp_path / "d.jsonl") or "files beside the model" in said(tmp_path / "d.jsonl")


def test_random_data_larger_than_memory_is_refused(tmp_path: Path) -> None:
    storage.save(tiny.linear(), tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="needs over 4"):
        load_data("random", storage.load(tmp_path), tmp_path, samples=1 << 30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


# ---- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[", "[[1]]", "7", '{"a": 1}', "[" * 100_000, "", '"x"'])
def test_damaged_metadata_removes_nothing(text: str) -> None:
    assert removed_ports({REMOVED_PORTS: text}) == frozenset()


def test_an_output_that_is_there_is_compared_whatever_metadata_claims(tmp_path: Path) -> None:
    a, b = tiny.linear(), tiny.linear()
    (weight, *_) = [
        v for v in b.model.graph.initializers.values() if v.const_value is not None and v.const_value.size > 1
    ]
    b.put(weight, -b.array(weight))
    b.model.metadata_props[REMOVED_PORTS] = json.dumps([str(v.name) for v in b.outputs])
    found = validate(
        storage.read(storage.save(a, tmp_path / "a")), storage.read(storage.save(b, tmp_path / "b")), "random"
    )
    assert found.values()["sqnr"] < 10


@pytest.mark.parametrize(
    "text",
    ["", "5", "5;0", "5;0;", "5;0;9", "5;0;3-1", "5;0;0-99999999999", "999999999;0;0-9", "5;9;0-3", "5;0;0,0", "a;b;c"],
)  # fmt: skip
def test_a_damaged_renumbering_is_one_clear_error(text: str) -> None:
    g = tiny.encoder(layers=1)
    g.model.metadata_props[vocabulary.KEY] = text
    with pytest.raises(ModelError, match=r"metadata 'onnxcomp\.token_ids' is damaged"):
        vocabulary.renumbering(g)


def test_renumberings_are_read_as_written() -> None:
    words = Renumbering(np.array([0, 1, 2, 7, 9]), 12, 3)
    back = Renumbering.parse(words.text())
    assert (back.kept.tolist(), back.size, back.unknown) == ([0, 1, 2, 7, 9], 12, 3)
