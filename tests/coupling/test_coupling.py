"""A cut model equals the masked model: what the group names is exactly what carries the removed units."""

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")


from onnxcomp import blocks, coupling
from onnxcomp.canonical import canonicalize
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from tests import cuts, hand, tiny, zoo


def exported(name: str) -> Graph:
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    return g


ZOO = {
    "encoder": tiny.encoder,
    "encoder without bias": lambda: tiny.encoder(norm="pre", bias=False),
    "decoder grouped": tiny.decoder,
    "decoder with one key head each": lambda: tiny.decoder(kv_heads=4, bias=True),
    "exported bert": lambda: exported("bert.dynamo-sdpa-18"),
    "exported gpt2": lambda: exported("gpt2.dynamo-sdpa-18"),
    "exported qwen3": lambda: exported("qwen3.dynamo-sdpa-18"),
    "exported vit": lambda: exported("vit.dynamo-sdpa-18"),
}


def feeds(g: Graph) -> dict[str, np.ndarray]:
    made = tiny.feeds(g, 2, 7, padding="right")
    return {n: np.minimum(x, 39) if x.dtype == np.int64 else x for n, x in made.items()}


@pytest.mark.parametrize("whole", [True, False], ids=["key heads", "query heads"])
@pytest.mark.parametrize("name", ZOO)
def test_cut_heads_equal_silenced_heads(name, whole):
    g = ZOO[name]()
    attention = blocks.attentions(g)[1]
    group = coupling.Coupling(g).heads(attention, whole=whole)
    parts = np.array(group.parts or [0] * group.units)
    gone = np.concatenate([np.flatnonzero(parts == p)[::2] for p in np.unique(parts)])
    done = cuts.check(g, group, np.sort(gone), feeds(g))
    kept = blocks.attentions(done)
    repeat = attention.heads // attention.kv_heads
    assert kept[1].heads == attention.heads - gone.size * (repeat if whole else 1)
    assert kept[1].kv_heads == attention.kv_heads - (gone.size if whole or repeat == 1 else 0)
    assert kept[0].heads == blocks.attentions(g)[0].heads


@pytest.mark.parametrize("name", ZOO)
def test_cut_channels_equal_silenced_channels(name):
    g = ZOO[name]()
    group = coupling.Coupling(g).channels(blocks.mlps(g)[0].down.node)
    assert group.units == blocks.mlps(g)[0].width
    done = cuts.check(g, group, np.array([0, 3, 4, 11]), feeds(g))
    assert blocks.mlps(done)[0].width == blocks.mlps(g)[0].width - 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_narrower_residual_equals_one_of_zeros(tied):
    g = tiny.decoder(tied=tied)
    for node in g.nodes("RMSNormalization"):
        g.set_attr(node, epsilon=0.01)  # large enough to be seen
    (table,) = (n for n in g.nodes("Gather") if len(n.inputs[0].shape) == 2)
    group = coupling.couple(g, table.inputs[0], 1)
    assert group.units == 32
    assert len(group.norms) == 5
    done = cuts.check(g, group, np.array([1, 5, 6, 30]), feeds(g))
    assert blocks.attentions(done)[0].q.sizes[0] == 28
    assert sum(v.const_value.size for v in done.model.graph.initializers.values()) < sum(
        v.const_value.size for v in g.model.graph.initializers.values()
    )


def test_a_residual_that_is_layer_normalized_is_not_narrowed():
    g = tiny.encoder(classes=3)
    (table, *_) = (n for n in g.nodes("Gather") if len(n.inputs[0].shape) == 2)
    before = ir.to_proto(g.model).SerializeToString(deterministic=True)
    with pytest.raises(ModelError, match=r"takes mean and variance over that axis .*by way of"):
        coupling.couple(g, table.inputs[0], 1)
    assert ir.to_proto(g.model).SerializeToString(deterministic=True) == before
    assert g.edits == 0


def test_query_heads_go_in_equal_numbers():
    g = tiny.decoder()
    group = coupling.Coupling(g).heads(blocks.attentions(g)[0], whole=False)
    assert group.parts == (0, 0, 1, 1)
    with pytest.raises(ModelError, match="equally many"):
        g.take(group, np.array([0, 1, 2]))
    assert g.edits == 0


def test_keeping_every_unit_is_no_edit():
    g = tiny.decoder()
    group = coupling.Coupling(g).heads(blocks.attentions(g)[0])
    g.take(group, np.arange(group.units))
    assert g.edits == 0


def test_layers_that_share_weights_are_cut_together():
    g = tiny.encoder(layers=2)
    first, second = blocks.mlps(g)
    for a, b in zip(first.linears, second.linears, strict=True):
        g.set_input(b.node, 1, a.weight)
    group = coupling.Coupling(g).channels(blocks.mlps(g)[0].down.node)
    done = cuts.check(g, group, np.array([2, 9]), feeds(g))
    assert {m.width for m in blocks.mlps(done)} == {first.width - 2}


def test_an_equal_bias_of_two_layers_is_cut_for_one():
    g = tiny.encoder(layers=2)
    first, second = blocks.mlps(g)
    g.set_input(second.up.add, 1, first.up.bias)
    done = cuts.check(g, coupling.Coupling(g).channels(first.down.node), np.array([2, 9]), feeds(g))
    assert [m.width for m in blocks.mlps(done)] == [first.width - 2, second.width]


@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
def test_scales_of_a_quantized_weight_follow(scales):
    g = tiny.mlp(ffn=16)
    (mlp,) = blocks.mlps(g)
    rng = np.random.default_rng(0)
    for linear in mlp.linears:
        k, n = linear.sizes
        shape, options = {"tensor": ((), {}), "channel": ((n,), {"axis": 1}), "block": ((k // 4, n), {"axis": 0})}[
            scales
        ]
        if scales == "block":
            options["block_size"] = 4
        q = rng.integers(-127, 128, (k, n)).astype(np.int8)
        w = g.op("DequantizeLinear", q, rng.uniform(0.001, 0.01, shape).astype(np.float32), **options)
        g.set_input(linear.node, 1, w)
    g.sort()
    group = coupling.Coupling(g).channels(blocks.mlps(g)[0].down.node)
    assert group.units == (4 if scales == "block" else 16)
    cuts.check(g, group, np.array([0, 2]), feeds(g))


def test_the_weights_of_a_model_with_external_data_are_cut_alike(tmp_path):
    from onnxcomp.files import storage

    g = tiny.decoder()
    loaded = storage.load(tiny.external(g, tmp_path))
    results = [cuts.cut(m, coupling.Coupling(m).heads(blocks.attentions(m)[0]), [0]) for m in (g, loaded)]
    cuts.assert_same(*results, feeds(g), tolerance=0)


def read_twice() -> Graph:
    """A feed-forward part of eight channels of which another linear reads the first three, which score least."""
    g = hand.graph(x=["tokens", 4])
    up = hand.weight(4, 8) * np.where(np.arange(8) < 3, np.float32(1e-3), np.float32(1))
    wide = g.op("Relu", g.op("MatMul", g.inputs[0], up), name="wide")
    half = g.op(
        "MatMul", g.op("Slice", wide, hand.i64(0), hand.i64(3), hand.i64(1)), hand.weight(3, 4) * np.float32(0.1)
    )
    down = hand.weight(8, 4) * np.where(np.arange(8) < 3, np.float32(1e-3), np.float32(1))[:, None]
    g = tiny.finish(g, g.op("Add", g.op("MatMul", wide, down), half), "y", ["tokens", 4])
    canonicalize(g)
    return g


def test_a_cut_that_leaves_nothing_of_a_value_is_refused():
    """What reads some channels may shrink, but not all of them may go."""
    g = read_twice()
    group, edits = coupling.couple(g, g.node("wide").outputs[0]), g.edits
    with pytest.raises(ModelError, match=r"axis \d of '.*' nothing would be left: all its 3 positions"):
        g.take(group, np.arange(3, 8))
    assert g.edits == edits
    cuts.check(g, group, [0, 1, 5], {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)})


def test_a_pass_leaves_such_a_place_as_it_is_and_says_why():
    g = read_twice()
    p = catalog.load("prune-ffn")(ratio=3 / 8, score="magnitude", repair="none", ranking="layer", multiple_of=1)
    result = PassManager([p], allow_unchanged=True).run(g)
    assert [d.why.partition(" nothing")[2] for d in result.report.steps[0].declined] == [
        " would be left: all its 3 positions belong to what is cut"
    ]
    assert [x.sizes for x in blocks.linears(result.model)] == [x.sizes for x in blocks.linears(g)]
