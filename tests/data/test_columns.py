"""Lines and columns of JSONL as people have them, and ids of models that compare them with a range."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.data.datasets import load_data
from onnxcomp.data.inputs import id_ranges, vocabulary
from onnxcomp.engine.recipe import Recipe
from onnxcomp.errors import DataError
from tests import tiny
from tests.data.test_data import TEXT, folder_with_tokenizer, model_of


def lines(path: Path, *rows: dict, end: str = "\n") -> Path:
    path.write_bytes(end.join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    return path


@pytest.fixture
def home(tmp_path):
    return folder_with_tokenizer(tmp_path / "m", config={"label2id": {"no": 0, "yes": 1}})


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_valid_line_is_one_sample_whatever_is_in_it(home, tmp_path, inside, end):
    src = lines(tmp_path / "x.jsonl", {"text": f"a {inside} b"}, {"text": "c"}, end=end)
    assert len(load_data(src, model_of(*TEXT), home)) == 2


def test_columns_can_be_named(home, tmp_path):
    rows = [{"sentence": "a b", "other": "c", "gold": "yes"}, {"sentence": "d", "other": "e", "gold": "no"}]
    src, graph = lines(tmp_path / "x.jsonl", *rows), model_of(*TEXT)
    (one,) = load_data(src, graph, home, text_column="sentence", label_column="gold")
    assert one.feeds["input_ids"].tolist() == [[1, 5, 6, 2], [1, 8, 2, 0]]
    assert one.labels.tolist() == [1, 0]
    (pair,) = load_data(src, graph, home, text_column="sentence, other")
    assert pair.feeds["input_ids"].tolist() == [[1, 5, 6, 2, 7, 2], [1, 8, 2, 9, 2, 0]]
    assert pair.labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "line 1: needs a string 'text'; it has 'sentence', 'n': name the column with"),
        ({"text_column": "sentense"}, "needs a string 'sentense'; it has 'sentence', 'n'"),
        ({"text_column": "n"}, "line 1: 'n' must be a string, it is 3"),
        ({"text_column": "sentence,n"}, "'n' must be a string"),
        ({"text_column": "sentence", "label_column": "gold"}, "has no label 'gold'; it has 'sentence', 'n'"),
    ],
)
def test_a_column_that_is_not_there_is_told_with_those_that_are(home, tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        load_data(lines(tmp_path / "x.jsonl", {"sentence": "a", "n": 3}), model_of(*TEXT), home, **columns)


def test_a_recipe_names_columns():
    recipe = Recipe.from_yaml("{passes: [cleanup], data: {text_column: sentence, label_column: gold}}")
    assert (recipe.data.text_column, recipe.data.label_column) == ("sentence", "gold")


@pytest.mark.parametrize("op", ["Equal", "OneHot"])
def test_ids_that_are_compared_with_a_range_are_drawn_from_it(op):
    g = model_of(("bytes", ir.DataType.INT32, ["batch", 6]))
    x = g.op("Unsqueeze", g.inputs[0], np.array([2]))
    if op == "Equal":
        y = g.op("Cast", g.op("Equal", x, np.arange(257, dtype=np.int32)[None, None]), to=1)
    else:
        y = g.op("OneHot", g.inputs[0], np.array(257), np.array([0, 1], np.float32), axis=-1)
    g = tiny.finish(g, y, "y", ["batch", 6, 257])
    assert (id_ranges(g), vocabulary(g)) == ({"bytes": 257}, {})
    (batch,) = load_data("random", g, None, samples=8)
    assert batch.feeds["bytes"].max() > 200
