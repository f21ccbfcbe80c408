"""A cut model equals the masked model: what the group names is exactly what carries the removed units."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")


from onnxcomp import blocks, coupling
from onnxcomp.errors import ModelError
from onnxcomp.graph import Graph
from onnxcomp.runtime import Session
from onnxcomp.structure import canonicalize
from tests import tiny, zoo


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


def outputs(g: Graph) -> np.ndarray:
    feeds = {
        n: np.minimum(x, 39) if x.dtype == np.int64 else x for n, x in tiny.feeds(g, 2, 7, padding="right").items()
    }
    with Session(g) as s:
        return next(iter(s.run(feeds).values()))


def silence(g: Graph, linear: blocks.Linear, rows: np.ndarray) -> None:
    """Zero the rows of a weight: what arrives there adds nothing."""
    w = g.array(linear.weight).copy()
    w[rows] = 0
    g.put(linear.weight, w)


def assert_equal(a: np.ndarray, b: np.ndarray) -> None:
    assert np.max(np.abs(a - b)) <= 2e-6 * np.max(np.abs(a))


@pytest.mark.parametrize("name", ZOO)
def test_cut_heads_equal_silenced_heads(name):
    masked, cut = ZOO[name](), ZOO[name]()
    for g in (masked, cut):
        attention = blocks.attentions(g)[1]
        group = coupling.heads_of(g, attention)
        gone = np.arange(1, group.units, 2)
        if g is cut:
            g.take(group, np.setdiff1d(np.arange(group.units), gone))
            g.verify()
        else:
            width = attention.o.sizes[0] // group.units
            silence(g, attention.o, (gone[:, None] * width + np.arange(width)).ravel())
    kept = blocks.attentions(cut)
    assert kept[1].kv_heads == (blocks.attentions(masked)[1].kv_heads + 1) // 2
    assert kept[0].heads == blocks.attentions(masked)[0].heads
    assert_equal(outputs(masked), outputs(cut))


@pytest.mark.parametrize("name", ZOO)
def test_cut_channels_equal_silenced_channels(name):
    masked, cut = ZOO[name](), ZOO[name]()
    gone = np.array([0, 3, 4, 11])
    for g in (masked, cut):
        mlp = blocks.mlps(g)[0]
        group = coupling.ffn_of(g, mlp)
        assert group.units == mlp.width
        if g is cut:
            g.take(group, np.setdiff1d(np.arange(group.units), gone))
            g.verify()
        else:
            silence(g, mlp.down, gone)
    assert blocks.mlps(cut)[0].width == blocks.mlps(masked)[0].width - 4
    assert_equal(outputs(masked), outputs(cut))


def test_keeping_every_unit_is_no_edit():
    g = tiny.decoder()
    group = coupling.heads_of(g, blocks.attentions(g)[0])
    g.take(group, np.arange(group.units))
    assert g.edits == 0


def test_a_shared_weight_cannot_be_cut():
    g = tiny.encoder(layers=2)
    first, second = blocks.mlps(g)
    g.set_input(second.up.node, 1, first.up.weight)
    with pytest.raises(ModelError, match="shared"):
        coupling.ffn_of(g, blocks.mlps(g)[0])


def test_a_quantized_linear_cannot_be_cut():
    g = tiny.mlp()
    (mlp,) = blocks.mlps(g)
    w = g.op("DequantizeLinear", np.ones(mlp.down.sizes, np.int8), np.array(0.1, np.float32))
    g.set_input(mlp.down.node, 1, w)
    with pytest.raises(ModelError, match="before quantizing"):
        coupling.ffn_of(g, blocks.mlps(g)[0])
