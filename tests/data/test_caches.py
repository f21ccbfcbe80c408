"""Models that take key-value caches, states or the tokens of two sides: what their inputs are, and data for them."""

import gzip
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import as_dataset, load_data, roles, specs
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.prune_heads import PruneHeads
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation.compare import Reference
from tests import tiny
from tests.data.test_data import folder_with_tokenizer, model_of

GRAPHS = Path(__file__).parents[1] / "graphs"
INT, FLOAT, BOOL = ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.BOOL

# How consumers call a layer's keys and values, their axis of tokens, and the axis of the mask.
NAMINGS = {
    "optimum": (
        ("past_key_values.{}.key", "past_key_values.{}.value"),
        "past_sequence_length",
        "past_sequence_length + sequence_length",
    ),
    "genai": (("past_key_values.{}.key", "past_key_values.{}.value"), "past_sequence_length", "total_sequence_length"),
    "transformers": (
        ("input.past_key_values.layers.{}.keys", "input.past_key_values.layers.{}.values"),
        "s44",
        "s12 + s44",
    ),
    "own": (("k_before_{}", "v_before_{}"), "?", "?"),
}
GRAPH_OF = {"llama": "llama-cache.legacy-eager-17", "gpt2": "gpt2-cache.dynamo-sdpa-20"}


def graph(name: str) -> Graph:
    proto = onnx.load_from_string(gzip.decompress((GRAPHS / f"{GRAPH_OF.get(name, name)}.onnx.gz").read_bytes()))
    return Graph(ir.from_proto(proto))


def named(naming: str, name: str = "llama") -> Graph:
    """A decoder of two layers with caches, its inputs and their axes as a consumer calls them."""
    g = graph(name)
    pair, past, total = NAMINGS[naming]

    def axes(v: ir.Value, *dims: int | str) -> None:
        v.shape = ir.Shape([None if d == "?" else d for d in dims])

    sequence = "s12" if naming == "transformers" else "sequence_length"
    for v in g.inputs:
        if v.name == "input_ids":
            axes(v, "batch_size", sequence)
        elif v.name == "attention_mask":
            axes(v, "batch_size", total)
        else:
            i = int(v.name.removeprefix("past_"))
            axes(v, "batch_size", v.shape[1], past, v.shape[3])
            v.name = pair[i % 2].format(i // 2)
    for v in g.outputs:
        v.shape = None if v.name != "logits" else v.shape
    return Graph(g.model)


def caches(g: Graph) -> list[str]:
    return [s.name for s in specs(g) if s.cache is not None]


# ---- what inputs are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH_OF)
@pytest.mark.parametrize("naming", NAMINGS)
def test_caches_are_found_by_structure(naming, name):
    g = named(naming, name)
    assert roles(specs(g)) == {"tokens": "input_ids", "mask": "attention_mask"}
    assert {s.name: s.cache for s in specs(g)} == {
        s.name: None if s.name in ("input_ids", "attention_mask") else 2 for s in specs(g)
    }


def test_a_picture_beside_another_is_no_cache():
    g = model_of(("left", FLOAT, ["b", 3, "h", "w"]), ("right", FLOAT, ["b", 3, "h", "w"]))
    g = tiny.finish(g, g.op("Concat", *g.inputs, axis=1), "y", ["b", 6, "h", "w"])
    assert caches(g) == []
    assert roles(specs(g)) == {"pixels": "left"}


@pytest.mark.parametrize(
    ("op", "at", "domain"),
    [("GroupQueryAttention", 3, "com.microsoft"), ("Attention", 4, ""), ("MultiHeadAttention", 6, "com.microsoft")],
)
def test_caches_of_fused_attentions(op, at, domain):
    g = model_of(("x", FLOAT, ["b", "s", 8]), ("k", FLOAT, ["b", 2, "t", 4]), ("v", FLOAT, ["b", 2, "t", 4]))
    x, k, v = g.inputs
    out = g.op(op, x, x, x, *[None] * (at - 3), k, v, domain=domain, outputs=3)
    assert caches(tiny.finish(g, out, "y", ["b", "s", 8])) == ["k", "v"]


def merged() -> Graph:
    """One decoder step as merged exports write it: an If on use_cache_branch whose branches differ in the past."""
    g = model_of(
        ("input_ids", INT, ["batch", "s"]),
        ("past_key_values.0.key", FLOAT, ["batch", 2, "past", 4]),
        ("use_cache_branch", BOOL, [1]),
    )
    ids, past, flag = g.inputs
    table = g.constant(np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32), "table")
    key = g.op("Reshape", g.op("Gather", table, ids), np.array([0, 0, 2, 4]))
    key = g.op("Transpose", key, perm=[0, 2, 1, 3])
    key.type = past.type

    def branch(op, inputs, **attributes):
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name, node.outputs[0].type = f"{op}_out", past.type
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=op)

    branches = {"then_branch": branch("Concat", [past, key], axis=2), "else_branch": branch("Identity", [key])}
    present = g.op("If", flag, **branches)
    present.type = past.type
    return tiny.finish(g, present, "present.0.key", ["batch", 2, "t", 4])


def test_a_merged_decoder_is_run_in_the_branch_that_fits():
    g = merged()
    assert caches(g) == ["past_key_values.0.key"]
    ids = np.arange(12).reshape(4, 3)
    (empty,) = as_dataset({"input_ids": ids}, g)
    assert empty.feeds["use_cache_branch"].tolist() == [False]
    assert empty.feeds["past_key_values.0.key"].shape == (4, 2, 0, 4)
    (full,) = as_dataset({"input_ids": ids, "past_key_values.0.key": np.ones((4, 2, 5, 4), np.float32)}, g)
    assert full.feeds["use_cache_branch"].tolist() == [True]
    with Session(g) as session:
        lengths = [session.run(b.feeds)["present.0.key"].shape[2] for b in (empty, full)]
    assert lengths == [3, 8]


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPH_OF)
@pytest.mark.parametrize("naming", NAMINGS)
def test_random_data_fits_together(naming, name):
    g = named(naming, name)
    (batch,) = load_data("random", g, None, samples=3, sequence=6)
    assert batch.size == 3
    assert batch.feeds["input_ids"].shape == (3, 6)
    assert batch.feeds["attention_mask"].shape == (3, 9)
    assert {batch.feeds[n].shape[2] for n in caches(g)} == {3}
    with Session(g) as session:
        assert session.run(batch.feeds)["logits"].shape[:2] == (3, 6)


@pytest.mark.parametrize("naming", NAMINGS)
def test_shapes_by_parts(naming):
    g = named(naming)
    dims = open_axes.shapes_of(g, {"batch": 2, "sequence": 3, "past": 4})
    assert (dims["input_ids"], dims["attention_mask"]) == ((2, 3), (2, 7))
    assert {dims[n] for n in caches(g)} == {(2, 2, 4, 4)}
    assert open_axes.shapes_of(g, {"batch": 2, "sequence": 3})["attention_mask"] == (2, 3)
    assert open_axes.default_shapes(g) == [
        {"batch": 1, "sequence": 128, "past": 0},
        {"batch": 1, "sequence": 1, "past": 128},
    ]
    feeds = open_axes.feeds_for(g, {"batch": 2, "sequence": 1, "past": 4})
    with Session(g) as session:
        assert session.run(feeds)["logits"].shape[:2] == (2, 1)


def test_shapes_that_do_not_fit_together_are_refused():
    g = named("genai")
    with pytest.raises(DataError, match="9 entries does not fit 4 tokens in the cache and 3 new ones"):
        open_axes.shapes_of(g, {"batch": 1, "sequence": 3, "past": 4, "total_sequence_length": 9})
    with pytest.raises(DataError, match="'sequence' must be at least 1, not 0"):
        open_axes.shapes_of(g, {"batch": 1, "sequence": 0})


def test_positions_count_on_behind_the_cache():
    g = model_of(
        ("input_ids", INT, ["b", "s"]),
        ("position_ids", INT, ["b", "s"]),
        ("attention_mask", INT, ["b", "t"]),
        ("past_key_values.0.key", FLOAT, ["b", 2, "p", 4]),
    )
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    past = np.zeros((2, 2, 3, 4), np.float32)
    (given,) = as_dataset({"input_ids": [[5, 6], [7, 8]], "attention_mask": mask, "past_key_values.0.key": past}, g)
    assert given.feeds["position_ids"].tolist() == [[2, 3], [3, 4]]
    (drawn,) = load_data("random", g, None, samples=1, sequence=4)
    assert drawn.feeds["position_ids"].tolist() == [[2, 3, 4, 5]]


def test_a_mask_of_another_length_is_told():
    g = named("optimum")
    feeds, first = open_axes.feeds_for(g, {"batch": 1, "sequence": 4, "past": 3}), caches(g)[0]
    with pytest.raises(DataError, match="5 entries for 3 tokens in the cache and 4 new ones"):
        as_dataset(feeds | {"attention_mask": np.ones((1, 5), np.int64)}, g)
    with pytest.raises(DataError, match="tokens in the cache"):
        as_dataset(feeds | {first: feeds[first][:, :, :2]}, g)


def text(folder: Path) -> Path:
    path = folder / "text.jsonl"
    path.write_text("\n".join(f'{{"text": "{t}"}}' for t in ("a b c d", "b a", "e f g", "h i j k l", "m n o p", "q r")))
    return path


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_fed_with_empty_caches(tmp_path, side):
    g = named("optimum")
    home = folder_with_tokenizer(tmp_path / "m", padding_side=side)
    data = load_data(text(tmp_path), g, home, batch=2)
    first = next(iter(data))
    assert first.feeds["attention_mask"].shape == first.feeds["input_ids"].shape
    assert {first.feeds[n].shape for n in caches(g)} == {(2, 2, 0, 4)}
    assert "caches are not in the data: they were fed empty" in data.notes
    assert Reference(g, data).metrics[0].name == "perplexity"


# ---- two sides -------------------------------------------------------------------------------------------------------


def sides(name: str) -> tuple[Graph, dict[str, np.ndarray]]:
    g, rng = graph(name), np.random.default_rng(0)
    feeds = {"input_ids": rng.integers(1, 30, (6, 8)), "decoder_input_ids": rng.integers(1, 30, (6, 6))}
    return g, feeds | {"attention_mask": np.ones((6, 8), np.int64)}


@pytest.mark.parametrize("name", ["t5.dynamo-eager-19", "bart.dynamo-sdpa-17"])
def test_sides_of_different_length_are_judged(name):
    g, feeds = sides(name)
    role = roles(specs(g))
    assert (role["tokens"], role["decoder_tokens"]) == ("input_ids", "decoder_input_ids")
    feeds["attention_mask"][:, 5:] = 0  # of the encoder: the decoder's rows are all compared
    reference = Reference(g, as_dataset(feeds, g))
    assert reference.view.scored.side == "decoder_"
    drift = reference.against(g)
    assert drift.values()["sqnr"] > 100
    assert open_axes.shapes_of(g, {"batch": 2, "sequence": 7})["decoder_input_ids"] == (2, 7)
    assert open_axes.shapes_of(g, {"batch": 2, "sequence": 7, "decoder_sequence": 3})["decoder_input_ids"] == (2, 3)


def test_text_feeds_both_sides(tmp_path):
    g, _ = sides("t5.dynamo-eager-19")
    home = folder_with_tokenizer(tmp_path / "m", config={"decoder_start_token_id": 1})
    batch = next(iter(load_data(text(tmp_path), g, home, batch=1)))
    assert batch.feeds["decoder_input_ids"].tolist() == [[1, *batch.feeds["input_ids"][0, :-1]]]


def test_a_decoder_alone_takes_states_of_the_encoder():
    g = graph("whisper-decoder.dynamo-sdpa-20")
    assert open_axes.shapes_of(g, {"sequence": 5})["encoder_hidden_states"] == (1, 5, 16)
    assert open_axes.shapes_of(g, {"sequence": 5, "encoder_sequence": 9})["encoder_hidden_states"] == (1, 9, 16)


# ---- the whole way ---------------------------------------------------------------------------------------------------

# Each is a few seconds; what differs between the namings is tested above.
INT8 = ["canonicalize", {"qdq": {"min_size": 1}}, "lower"]
DYNAMIC = ["canonicalize", {"dynamic-quant": {"min_size": 1}}, "lower"]
PRUNED = ["canonicalize", {"prune-ffn": {"multiple_of": 1}}]


@pytest.mark.parametrize(
    ("source", "passes"), [("optimum", INT8), ("transformers", PRUNED), ("t5.dynamo-eager-19", DYNAMIC)]
)
def test_through_compress_and_validate(tmp_path, source, passes):
    if source in NAMINGS:
        g = named(source)
        feeds = open_axes.feeds_for(g, {"batch": 6, "sequence": 5, "past": 3})
    else:
        g, feeds = sides(source)
    (tmp_path / "m").mkdir()
    storage.save(g, tmp_path / "m" / "model.onnx")
    np.savez(tmp_path / "data.npz", **feeds)
    data = tmp_path / "data.npz"
    result = oc.compress(tmp_path / "m", tmp_path / "out", passes=passes, calibration=data, measure=False)
    assert all(s.changed for s in result.report.steps)
    validation = oc.validate(tmp_path / "m" / "model.onnx", tmp_path / "out" / "model.onnx", data)
    assert validation.values()["sqnr"] > (20 if passes != PRUNED else -5)
    assert len(validation.outputs) == len(g.outputs)


def test_cut_heads_of_a_cache_are_judged_with_empty_caches():
    g = named("optimum", "gpt2")
    for v in g.outputs:
        v.shape = v.shape if v.name == "logits" else ir.Shape(["batch_size", 4, None, 4])
    rng, g = np.random.default_rng(0), Graph(g.model)
    batches = [
        {"input_ids": rng.integers(1, 30, (4, 7)), "attention_mask": np.ones((4, 7), np.int64)} for _ in range(3)
    ]
    passes = [Canonicalize(), PruneHeads(ratio=0.5, ranking="layer", score="magnitude", repair="none")]
    result = PassManager(passes).run(g, batches)
    assert {s.shape[1] for s in specs(result.model) if s.cache is not None} == {2}
    validation = result.report.validation
    assert list(validation.outputs) == ["logits"]
    assert any("another size" in note for note in validation.notes)
    full = [b | open_axes.feeds_for(g, {"batch": 4, "sequence": 7, "past": 2}) for b in batches]
    bare = [{k: x[k][:, -7:] if x[k].ndim == 2 else x[k][:, :, :0] for k in x} for x in full]
    judged = Reference(g, full).against(result.model)
    assert judged.outputs == Reference(g, bare).against(result.model).outputs
    assert any("without its caches" in note for note in judged.notes)
    assert Reference(g, full).head(4).against(result.model).outputs.keys() == {"logits"}


@pytest.mark.parametrize(
    "options",
    [{"uniform": True}, {"ranking": "sensitivity"}, {"ranking": "layer", "score": "magnitude", "repair": "none"}],
)
def test_heads_are_cut_on_data_with_filled_caches(options):
    """Statistics, trial cuts and the comparison see filled caches until heads of them are cut, then none."""
    g = named("optimum", "gpt2")
    for v in g.outputs:
        v.shape = v.shape if v.name == "logits" else ir.Shape(["batch_size", 4, None, 4])
    g = Graph(g.model)
    data = load_data("random", g, None, samples=12, sequence=6)
    assert next(iter(data)).feeds["past_key_values.0.key"].shape[2] == 3
    passes = [Canonicalize(), PruneHeads(ratio=0.5, **options), catalog.load("prune-ffn")(ratio=0.25, multiple_of=1)]
    result = PassManager(passes).run(g, data)
    assert any("without its caches" in note for note in result.report.validation.notes)
    assert list(result.report.validation.outputs) == ["logits"]
    assert {s.shape[1] for s in specs(result.model) if s.cache is not None} < {1, 2, 3}
