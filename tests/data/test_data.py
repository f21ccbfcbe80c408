"""Laws of data: the same samples whatever the batch size, every fault one message, one preparation for every model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.data import arrays
from onnxcomp.data.datasets import Batch, Dataset, as_dataset, load_data, overlap, roles, specs
from onnxcomp.data.inputs import vocabulary
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from tests import hand, tiny


@pytest.fixture(scope="module")
def model() -> Graph:
    return tiny.encoder(layers=1)


def model_of(*inputs: tuple[str, ir.DataType, list[int | str]]) -> Graph:
    """A model that only takes inputs."""
    values = [ir.Value(name=n, type=ir.TensorType(t), shape=ir.Shape(s)) for n, t, s in inputs]
    return Graph(ir.Model(ir.Graph(values, [], nodes=[], opset_imports={"": 23}), ir_version=10))


INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
VISION = [("pixel_values", FLOAT, ["batch", 3, 4, 6])]


def tokens(n: int, length: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (n, length))


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def rows_of(d: Dataset, name: str = "input_ids") -> list[list[int]]:
    return [row.tolist() for b in d for row in b.feeds[name]]


# ---- what a model takes ----------------------------------------------------------------------------------------------


def test_specs_roles_and_vocabulary(model: Graph) -> None:
    assert [(s.name, s.dtype.name, s.shape) for s in specs(model)] == [
        ("input_ids", "int64", ("batch", "sequence")),
        ("attention_mask", "int64", ("batch", "sequence")),
    ]
    assert roles(specs(model)) == {"tokens": "input_ids", "mask": "attention_mask"}
    assert vocabulary(model) == {"input_ids": 50}
    other = model_of(
        *VISION, ("position_ids", INT, ["b", "s"]), ("token_type_ids", INT, ["b", "s"]), ("ids", INT, ["b", "s"])
    )
    assert roles(specs(other)) == {
        "pixels": "pixel_values",
        "positions": "position_ids",
        "types": "token_type_ids",
        "tokens": "ids",
    }


# ---- batches ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 4), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 4), min_size=5, max_size=5),
    batch=st.integers(1, 9),
    holdout=st.integers(2, 6),
)
def test_nothing_depends_on_the_batch_size(lengths: list[int], sizes: list[int], batch: int, holdout: int) -> None:
    """Row 6 of pains.md, at its source: samples, split and fingerprint are the same for every batch size."""
    graph = model_of(("input_ids", INT, ["batch", "sequence"]))
    given_batches = [{"input_ids": tokens(n, k, seed=i)} for i, (k, n) in enumerate(zip(lengths, sizes, strict=False))]
    data = as_dataset(given_batches, graph)
    other = data.rebatch(batch)
    flat = [row.tolist() for b in given_batches for row in b["input_ids"]]
    assert rows_of(data) == rows_of(other) == flat
    assert rows_of(data) == flat, "a second walk gives the same samples"
    assert all(b.size <= batch for b in other)
    assert data.fingerprint() == other.fingerprint()
    assert len(data) == len(flat)
    if len(data) >= holdout:
        one, two = data.split(holdout)
        three, four = other.split(holdout)
        assert rows_of(one) == rows_of(three)
        assert rows_of(two) == rows_of(four) == flat[holdout - 1 :: holdout]
        assert len(one) + len(two) == len(data)
        assert one.fingerprint() != data.fingerprint()


def test_split_refuses_what_is_too_small(model: Graph) -> None:
    with pytest.raises(DataError, match=r"4 samples are too few.*evaluation="):
        as_dataset({"input_ids": tokens(4)}, model).split()


def test_overlap_counts_equal_samples_not_labels(model: Graph) -> None:
    ids = tokens(6)
    a = as_dataset({"input_ids": ids[:4], "labels": np.arange(4)}, model)
    b = as_dataset([Batch({"input_ids": ids[3:]}, np.array([7, 8, 9]))], model)
    assert overlap(a, b) == 1
    assert overlap(a, a) == 4
    assert a.fingerprint() != as_dataset({"input_ids": ids[:4]}, model).fingerprint()


def test_head_and_spread_choose_samples(model: Graph) -> None:
    data = as_dataset({"input_ids": tokens(10)}, model)
    assert rows_of(data.head(3)) == rows_of(data)[:3]
    assert rows_of(data.spread(5)) == rows_of(data)[::2]
    assert len(data.spread(99)) == 10


def test_python_callers_may_bring_many_things(model: Graph) -> None:
    ids = tokens(6)
    wanted = rows_of(as_dataset({"input_ids": ids}, model))

    def generator() -> Iterator[dict[str, np.ndarray]]:
        yield {"input_ids": ids[:2]}
        yield {"input_ids": ids[2:]}

    for x in (generator(), list(generator()), [Batch({"input_ids": ids})], [({"input_ids": ids}, np.arange(6))]):
        assert rows_of(as_dataset(x, model)) == wanted
    data = as_dataset(generator(), model)
    assert as_dataset(data, model) is data
    for x in (7, [3], [{}]):
        with pytest.raises(DataError):
            as_dataset(x, model)


def test_an_endless_generator_is_refused_with_advice(model: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "LIMIT", 10_000)

    def endless() -> Iterator[dict[str, np.ndarray]]:
        while True:
            yield {"input_ids": tokens(8)}

    with pytest.raises(DataError, match=r"read only once.*folder of \.npz"):
        as_dataset(endless(), model)


# ---- checks ----------------------------------------------------------------------------------------------------------

INF = np.array([[1.0, np.inf]], np.float32)
ONE, TWO = model_of(("x", FLOAT, ["n", 2])), model_of(("x", FLOAT, ["n"]), ("y", FLOAT, ["n"]))
WHOLE, HALF = model_of(("x", INT, ["n", 1])), model_of(("x", ir.DataType.FLOAT16, ["n", 1]))
SHORT = model_of(("x", ir.DataType.INT32, ["n", 1]))
NAMED = model_of(("x", FLOAT, ["n", "m"]), ("y", FLOAT, ["n", "m"]))
BAD: dict[str, tuple[Graph, dict[str, Any], str]] = {
    "missing": (TWO, {"x": np.ones(1)}, "'y' is missing"),
    "misspelt": (ONE, {"X": np.ones((1, 2))}, "'x' is missing; it has 'X' instead"),
    "nan": (ONE, {"x": np.array([[1, 2], [np.nan, 3]])}, "'x', sample 1: holds NaN or inf"),
    "inf": (ONE, {"x": INF}, "holds NaN or infinity"),
    "overflow": (HALF, {"x": np.array([[1e6]])}, "does not fit the model's float16"),
    "float-to-int": (WHOLE, {"x": np.ones((1, 1))}, "has type float64, the model takes int64"),
    "too-big": (SHORT, {"x": np.array([[1 << 40]])}, "1099511627776 of type int64"),
    "text": (ONE, {"x": np.array([["a", "b"]])}, "has type <U1"),
    "rank": (ONE, {"x": np.ones((1, 2, 1))}, r"rank 3 \(1, 2, 1\), the model takes float32\[n, 2\]"),
    "static": (ONE, {"x": np.ones((1, 3))}, "axis 1 is 3"),
    "empty": (NAMED, {"x": np.ones((1, 0)), "y": np.ones((1, 0))}, "is empty"),
    "none": (ONE, {"x": np.ones((0, 2))}, "holds no samples"),
    "rows": (TWO, {"x": np.ones(2), "y": np.ones(3)}, "first axes differ"),
    "axes": (NAMED, {"x": np.ones((2, 3)), "y": np.ones((2, 4))}, "axis 'm' is 3 in 'x' but 4 in 'y'"),
    "labels": (ONE, {"x": np.ones((2, 2)), "labels": np.ones(3)}, "first axes differ"),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_data_is_one_message(tmp_path: Path, how: str) -> None:
    """Row 42 of pains.md: source, input and sample are named, before any model runs."""
    graph, arrays, why = BAD[how]
    file = npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=why) as e:
        load_data(file, graph, None)
    assert "bad.npz" in str(e.value)


def test_an_id_outside_the_vocabulary_names_the_sample(tmp_path: Path, model: Graph) -> None:
    ids = tokens(20)
    ids[13, 2] = 50
    with pytest.raises(DataError, match=r"ids\.npz: input 'input_ids', sample 13: id 50 is outside 0 to 49"):
        load_data(npz(tmp_path / "ids.npz", input_ids=ids), model, None, batch=3)


def test_safe_casts_are_made_and_extras_are_noted(tmp_path: Path, model: Graph) -> None:
    file = npz(
        tmp_path / "a.npz", input_ids=tokens(3).astype(np.int16), attention_mask=np.ones((3, 5), bool), junk=np.ones(3)
    )
    data = load_data(file, model, None)
    (batch,) = data
    assert {a.dtype for a in batch.feeds.values()} == {np.dtype(np.int64)}
    assert list(batch.feeds) == ["input_ids", "attention_mask"]
    assert data.notes == ["array 'junk' is no input of the model and was ignored"]


def test_tokens_imply_mask_types_and_positions() -> None:
    kinds = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    graph = model_of(*((n, ir.DataType.INT32, ["batch", "sequence"]) for n in kinds))
    data = as_dataset({"input_ids": tokens(2, 4)}, graph)
    (batch,) = data
    assert {n: a.tolist()[0] for n, a in batch.feeds.items() if n != "input_ids"} == {
        "attention_mask": [1, 1, 1, 1],
        "token_type_ids": [0, 0, 0, 0],
        "position_ids": [0, 1, 2, 3],
    }
    assert len(data.notes) == 3
    assert {a.dtype for a in batch.feeds.values()} == {np.dtype(np.int32)}


def test_scalar_inputs_belong_to_every_batch() -> None:
    graph = model_of(("x", FLOAT, ["n", 2]), ("scale", FLOAT, []))
    data = as_dataset({"x": np.ones((5, 2)), "scale": np.float32(3)}, graph, batch=2).rebatch(2)
    assert [(b.size, float(b.feeds["scale"])) for b in data] == [(2, 3.0), (2, 3.0), (1, 3.0)]


# ---- npz, functions, random ------------------------------------------------------------------------------------------


def test_npz_folders_join_and_group_by_shape(tmp_path: Path, model: Graph) -> None:
    npz(tmp_path / "b.npz", input_ids=tokens(3, 4), labels=np.arange(3))
    npz(tmp_path / "a.npz", input_ids=tokens(2, 4), labels=np.arange(2))
    npz(tmp_path / "c.npz", input_ids=tokens(2, 6), labels=np.arange(2))
    data = load_data(tmp_path, model, None, batch=4)
    assert [b.feeds["input_ids"].shape for b in data] == [(4, 4), (1, 4), (2, 6)]
    assert [b.labels.tolist() for b in data if b.labels is not None] == [[0, 1, 0, 1], [2], [0, 1]]
    assert len(load_data(tmp_path, model, None, samples=3)) == 3


@pytest.mark.parametrize("content", [b"", b"PK garbage", b"\x93NUMPY"])
def test_broken_npz(tmp_path: Path, model: Graph, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: cannot be read as \.npz"):
        load_data(tmp_path / "x.npz", model, None)


def test_pickles_are_never_opened(tmp_path: Path, model: Graph) -> None:
    file = npz(tmp_path / "p.npz", input_ids=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="pickle"):
        load_data(file, model, None)


def test_functions_run_only_when_allowed(tmp_path: Path, model: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_batches.py").write_text(
        "import numpy as np\ndef batches():\n    for i in range(3):\n        yield {'input_ids': np.full((2, 4), i)}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="allow_code=True"):
        load_data("my_batches:batches", model, None)
    assert "my_batches" not in sys.modules
    data = load_data("my_batches:batches", model, None, allow_code=True)
    assert [r[0] for r in rows_of(data)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match="cannot be found"):
        load_data("my_batches:nothing", model, None, allow_code=True)


def test_random_is_marked_and_fits(model: Graph) -> None:
    data = load_data("random", model, None, samples=9, batch=4, seed=1)
    assert data.random
    assert [b.feeds["input_ids"].shape for b in data] == [(4, 32), (4, 32), (1, 32)]
    assert all(b.feeds["attention_mask"].all() for b in data)
    assert max(max(r) for r in rows_of(data)) > 25
    assert data.fingerprint() == load_data("random", model, None, samples=9, seed=1).fingerprint()
    assert data.fingerprint() != load_data("random", model, None, samples=9, seed=2).fingerprint()
    assert load_data("random", model, None, sequence=7).head(1).rebatch(1)._rows([0]).feeds["input_ids"].shape == (1, 7)


def test_static_models_get_whole_batches() -> None:
    graph = model_of(("x", FLOAT, [4, 2]))
    data = load_data("random", graph, None, samples=10)
    assert [b.size for b in data] == [4, 4]
    assert data.notes == ["2 samples were left out: the model takes batches of exactly 4"]


def test_unknown_sources_say_what_is_possible(tmp_path: Path, model: Graph) -> None:
    (tmp_path / "x.csv").write_text("1")
    for src, why in (
        ("nowhere", "the word random"),
        (str(tmp_path / "x.csv"), r"'\.csv'"),
        (str(tmp_path), "no images|images need"),
    ):
        with pytest.raises(DataError, match=why):
            load_data(src, model, None)


# ---- text ------------------------------------------------------------------------------------------------------------


def folder_with_tokenizer(
    path: Path, start: bool = False, config: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """A word-level tokenizer: `[PAD]` 0, `[CLS]` 1, `[SEP]` 2, then the letters a to t; newline is a word too."""
    pytest.importorskip("tokenizers")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "\n", *"abcdefghijklmnopqrst"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tok.pre_tokenizer = (
        pre_tokenizers.Split(Regex(" "), "removed") if not start else pre_tokenizers.Split(Regex("."), "isolated")
    )
    if start:
        tok.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    else:
        tok.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    path.mkdir(exist_ok=True)
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", **settings}))
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


TEXT = [("input_ids", INT, ["batch", "sequence"]), ("attention_mask", INT, ["batch", "sequence"])]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(r) if not isinstance(r, str) else r for r in rows) + "\n")
    return path


def test_jsonl_pairs_labels_and_padding(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m", config={"label2id": {"no": 0, "yes": 1}})
    graph = model_of(*TEXT, ("token_type_ids", INT, ["batch", "sequence"]))
    src = jsonl(tmp_path / "x.jsonl", {"text": "a b", "text_pair": "c", "label": "yes"}, {"text": "d", "label": "no"})
    (batch,) = load_data(src, graph, home)
    assert batch.feeds["input_ids"].tolist() == [[1, 5, 6, 2, 7, 2], [1, 8, 2, 0, 0, 0]]
    assert batch.feeds["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.feeds["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]


def test_left_padding_and_positions(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m", padding_side="left")
    graph = model_of(*TEXT, ("position_ids", INT, ["batch", "sequence"]))
    (batch,) = load_data(jsonl(tmp_path / "x.jsonl", {"text": "a b c"}, {"text": "d"}), graph, home)
    assert batch.feeds["input_ids"].tolist()[1] == [0, 0, 1, 8, 2]
    assert batch.feeds["attention_mask"].tolist()[1] == [0, 0, 1, 1, 1]
    assert batch.feeds["position_ids"].tolist()[1] == [0, 0, 0, 1, 2]


def test_without_a_mask_only_equal_lengths_share_a_batch(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m")
    src = jsonl(tmp_path / "x.jsonl", *({"text": t} for t in ("a b", "c d", "e", "f g")))
    data = load_data(src, model_of(TEXT[0]), home)
    assert [b.feeds["input_ids"].shape for b in data] == [(2, 4), (1, 3), (1, 4)]


@pytest.mark.parametrize(
    ("config", "settings", "asked", "length"),
    [
        ({}, {}, None, 12),
        ({}, {"model_max_length": 6}, None, 6),
        ({"max_position_embeddings": 8}, {"model_max_length": int(1e30)}, None, 8),
        ({"max_position_embeddings": 8, "model_type": "roberta", "pad_token_id": 1}, {}, None, 6),
        ({"max_position_embeddings": 8}, {}, 5, 5),
    ],
)
def test_texts_are_cut_where_the_model_ends(
    tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], asked: int | None, length: int
) -> None:
    home = folder_with_tokenizer(tmp_path / "m", config=config, **settings)
    src = jsonl(tmp_path / "x.jsonl", {"text": "a b c d e f g h i j"}, {"text": "a"})
    data = load_data(src, model_of(*TEXT), home, sequence=asked)
    (batch,) = data
    assert batch.feeds["input_ids"].shape == (2, length)
    assert data.notes == ([] if length == 12 else [f"1 of 2 texts were cut to {length} tokens"])


def test_a_static_length_is_filled(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m")
    graph = model_of(("input_ids", INT, ["batch", 7]), ("attention_mask", INT, ["batch", 7]))
    (batch,) = load_data(jsonl(tmp_path / "x.jsonl", {"text": "a"}), graph, home)
    assert batch.feeds["input_ids"].tolist() == [[1, 5, 2, 0, 0, 0, 0]]


def test_lines_are_samples_but_one_stream_for_causal_models(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m", start=True, config={"architectures": ["LlamaForCausalLM"]})
    (tmp_path / "x.txt").write_text("abcd\n\nef\nghij\n")
    data = load_data(tmp_path / "x.txt", model_of(*TEXT), home, sequence=4)
    stream = [5, 6, 7, 8, 4, 9, 10, 4, 11, 12, 13, 14, 4]
    assert rows_of(data) == [[1, *stream[i : i + 3]] for i in (0, 3, 6, 9)]
    assert data.notes == ["the last 1 tokens of the stream were left out (samples of 4)"]
    (home / "config.json").write_text("{}")
    assert [len(r) for r in rows_of(load_data(tmp_path / "x.txt", model_of(*TEXT), home, batch=1))] == [5, 3, 5]


TEXT_FAULTS = {
    "not-json": ("{", "line 1: is not JSON"),
    "null": ({"text": None}, "line 1: 'text' must be a string, it is null"),
    "half": ({"text": "a\ud800"}, "line 1: 'text' holds half of a character"),
    "half-pair": ({"text": "a", "text_pair": "\udfff"}, "line 1: 'text_pair' holds half of a character"),
    "no-text": ({"txt": "a"}, "line 1: needs a string 'text'; it has 'txt': name the column with"),
    "list": ([1], "needs an object"),
    "pair": ({"text": "a", "text_pair": 3}, "'text_pair' must be a string"),
    "name": ({"text": "a", "label": "maybe"}, r"'maybe' is not in the model's config\.json \(none\)"),
    "label": ({"text": "a", "label": {"x": 1}}, "a label is a number"),
}


@pytest.mark.parametrize("how", TEXT_FAULTS)
def test_bad_lines_are_named(tmp_path: Path, how: str) -> None:
    row, why = TEXT_FAULTS[how]
    home = folder_with_tokenizer(tmp_path / "m")
    with pytest.raises(DataError, match=why):
        load_data(jsonl(tmp_path / "x.jsonl", row), model_of(*TEXT), home)


def test_text_needs_a_tokenizer_and_a_token_input(tmp_path: Path) -> None:
    home = folder_with_tokenizer(tmp_path / "m", config={"max_position_embeddings": 8})
    src = jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": "b", "label": 1})
    with pytest.raises(DataError, match="sample 0 has no label while others"):
        load_data(src, model_of(*TEXT), home)
    src = jsonl(tmp_path / "x.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"needs a tokenizer\.json beside the model in"):
        load_data(src, model_of(*TEXT), tmp_path)
    with pytest.raises(DataError, match="this one takes 'pixel_values'"):
        load_data(src, model_of(*VISION), home)
    with pytest.raises(DataError, match="the model takes 1 to 8"):
        load_data(src, model_of(*TEXT), home, sequence=9)
    (home / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_data(src, model_of(*TEXT), home)
    jsonl(tmp_path / "x.jsonl", "")
    with pytest.raises(DataError):
        load_data(src, model_of(*TEXT), folder_with_tokenizer(tmp_path / "m"))


# ---- images ----------------------------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int], value: int, mode: str = "RGB") -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, value if mode == "L" else (value, value, 0)).save(path)


def test_classes_take_turns_and_give_labels(tmp_path: Path) -> None:
    for label, count in (("cat", 3), ("ant", 1)):
        for i in range(count):
            picture(tmp_path / label / f"{i}.png", (6, 4), 10 * i)
    data = load_data(tmp_path, model_of(*VISION), None)
    (batch,) = data
    assert batch.feeds["pixel_values"].shape == (4, 3, 4, 6)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 1, 1]
    assert float(batch.feeds["pixel_values"][2, 0, 0, 0]) == pytest.approx(10 / 255)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text(json.dumps({"label2id": {"ant": 5, "cat": 2}}))
    (batch,) = load_data(tmp_path, model_of(*VISION), home)
    assert batch.labels is not None
    assert batch.labels.tolist() == [5, 2, 2, 2]


def test_the_processor_beside_the_model_is_followed(tmp_path: Path) -> None:
    """Row 39 of pains.md: one preparation for baseline and result, that of the checkpoint."""
    picture(tmp_path / "x" / "a.png", (12, 8), 100)
    settings = {
        "do_resize": True, "size": {"shortest_edge": 4}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 4, "width": 4}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    graph = model_of(("pixel_values", FLOAT, ["batch", 3, 4, 4]))
    (batch,) = load_data(tmp_path / "x", graph, tmp_path)
    a = batch.feeds["pixel_values"]
    assert a.shape == (1, 3, 4, 4)
    assert batch.labels is None
    assert a[0, :, 1, 1].tolist() == pytest.approx([(100 / 255 - 0.5) / 0.5, (100 / 255 - 0.5) / 0.25, -1.0])


def test_grey_images_and_wrong_ones(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png", (5, 5), 255, "L")
    graph = model_of(("pixel_values", FLOAT, ["batch", 1, 5, 5]))
    (batch,) = load_data(tmp_path / "x", graph, None)
    assert batch.feeds["pixel_values"].min() == 1.0
    (tmp_path / "x" / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image"):
        load_data(tmp_path / "x", graph, None)
    picture(tmp_path / "x" / "sub" / "a.png", (5, 5), 255)
    with pytest.raises(DataError, match="both directly and in class folders"):
        load_data(tmp_path / "x", graph, None)


def test_our_preparation_is_that_of_transformers(tmp_path: Path) -> None:
    """Compared with ViT's own processor on a photograph-like image."""
    image = pytest.importorskip("PIL.Image")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    pixels = (np.cumsum(rng.standard_normal((40, 56, 3)), axis=1) * 8 + 128).clip(0, 255).astype(np.uint8)
    (tmp_path / "x").mkdir()
    image.fromarray(pixels).save(tmp_path / "x" / "a.png")
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    processor.save_pretrained(tmp_path)
    (batch,) = load_data(tmp_path / "x", model_of(("pixel_values", FLOAT, ["batch", 3, 24, 24])), tmp_path)
    theirs = np.asarray(processor(image.fromarray(pixels), return_tensors="np")["pixel_values"])
    assert np.abs(batch.feeds["pixel_values"] - theirs).max() < 0.03


def test_a_model_of_fixed_batch_gets_whole_batches_only() -> None:
    g = tiny.encoder(batch=2, sequence=7)
    everything = as_dataset([tiny.feeds(g, seed=i) for i in range(8)], g)
    for part in (everything, *everything.split(), everything.head(5)):
        assert {b.feeds["input_ids"].shape for b in part} == {(2, 7)}
    assert [len(x) for x in everything.split()] == [14, 2]
    assert [b.size for b in everything.singly(4)] == [2]


def test_other_models_get_samples_one_by_one(model: Graph) -> None:
    data = as_dataset({"input_ids": tokens(10)}, model)
    assert [b.size for b in data.singly(4)] == [1] * 4
    assert rows_of(data.singly(5)) == rows_of(data)[::2]


@pytest.mark.parametrize(("fixed", "samples", "found"), [(2, 1, 2), (3, None, 30), (64, None, 64), (3, 7, 6)])
def test_random_data_fills_the_batches_of_a_fixed_size(fixed: int, samples: int | None, found: int) -> None:
    g = hand.graph(x=(fixed, 4))
    g = tiny.finish(g, g.op("Relu", g.model.graph.inputs[0]), "y", [fixed, 4])
    data = load_data("random", g, None, samples=samples)
    assert len(data) == found
    assert {b.size for b in data} == {fixed}


def test_samples_are_found_again_where_the_batch_is_fixed() -> None:
    g = tiny.encoder(batch=2, sequence=7)
    one, two = (as_dataset([tiny.feeds(g, seed=i) for i in seeds], g) for seeds in ((0, 1, 2), (2, 3)))
    assert overlap(one, two) == 2
    assert overlap(one, as_dataset([tiny.feeds(g, seed=9)], g)) == 0
    assert one.fingerprint() != two.fingerprint()


def test_whole_batches_are_held_out_where_the_batch_is_fixed() -> None:
    g = hand.graph(x=(4, 3))
    g = tiny.finish(g, g.op("Relu", g.model.graph.inputs[0]), "y", [4, 3])
    kept, held = load_data("random", g, None, samples=12).split()
    assert ([b.size for b in kept], [b.size for b in held]) == ([4, 4], [4])
    with pytest.raises(DataError, match="too few"):
        load_data("random", g, None, samples=4).split()
    with pytest.raises(DataError, match="fewer than the 4 samples of the model's fixed batch"):
        as_dataset({"x": np.ones((3, 3), np.float32)}, g)
