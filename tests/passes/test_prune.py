"""One budget over heads, channels and whole parts: it is met, spent where it loses least, and repaired."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import blocks
from onnxcomp.blocks.branches import branches
from onnxcomp.coupling.sizes import macs
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import RecipeError
from onnxcomp.graph import Graph
from tests import tiny

QUIET = 1e-3  # what a part's outputs are multiplied with


def quieted(g: Graph, *parts: str) -> Graph:
    """Parts, as `attention 0` or `mlp 1`, whose outputs hardly count."""
    for part in parts:
        kind, number = part.split()
        found = [a.o for a in blocks.attentions(g)] if kind == "attention" else [m.down for m in blocks.mlps(g)]
        for v in (found[int(number)].weight, found[int(number)].bias):
            if v is not None:
                g.put(v, (g.array(v) * QUIET).astype(np.float32))
    return g


def pruned(g: Graph, **options):
    data = as_dataset([Batch(tiny.feeds(g, 4, 9, seed=i, padding="right")) for i in range(6)], g)
    return PassManager([catalog.load("prune")(multiple_of=1, **options)]).run(g, data)


def parts(g: Graph) -> list[str]:
    return [f"{b.kind} {b.layer}" for b in branches(g)]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parts_that_hardly_count_are_left_out_whole_and_nothing_else_is_lost(norm):
    g = quieted(tiny.encoder(layers=3, norm=norm), "attention 0", "mlp 1")
    result = pruned(g, macs=0.667, floor=4)  # two parts are a third; with four units left of one, it is less
    assert macs(result.model) <= 0.667 * macs(g)
    gone = {b.name for b in branches(g)} - {b.name for b in branches(result.model)}
    assert gone == {blocks.attentions(g)[0].name, blocks.mlps(g)[1].name}
    assert result.report.validation.values()["rel-l2"] < 0.02


def test_without_layers_something_stays_of_every_part():
    g = quieted(tiny.encoder(layers=3, norm="pre"), "attention 0", "mlp 1")
    result = pruned(g, macs=0.75, layers=False).model
    assert parts(result) == parts(g)
    assert macs(result) <= 0.75 * macs(g)
    assert blocks.mlps(result)[1].width < min(blocks.mlps(result)[i].width for i in (0, 2))


def test_heads_and_channels_share_one_budget():
    """Where attentions hardly count, heads go and channels stay; and the other way round."""
    few_heads = quieted(tiny.encoder(layers=2, norm="pre", heads=4), "attention 0", "attention 1")
    few_channels = quieted(tiny.encoder(layers=2, norm="pre", heads=4), "mlp 0", "mlp 1")
    for g, kept, cut in ((few_heads, mlp_width, head_count), (few_channels, head_count, mlp_width)):
        result = pruned(g, macs=0.85, layers=False).model
        assert kept(result) == kept(g)
        assert cut(result) < cut(g)


def head_count(g: Graph) -> int:
    return sum(a.heads for a in blocks.attentions(g))


def mlp_width(g: Graph) -> int:
    return sum(m.width for m in blocks.mlps(g))


def test_a_decoder_loses_the_caches_of_attentions_that_are_left_out():
    g = quieted(tiny.decoder(layers=3), "attention 1", "mlp 1")
    result = pruned(g, macs=0.69)
    assert macs(result.model) <= 0.69 * macs(g)
    assert parts(result.model) == [*parts(g)[:2], "attention 1", "mlp 1"]


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(RecipeError, match=r"prune: macs=0\.01 cannot be reached: with all heads, channels and parts"):
        pruned(tiny.encoder(layers=2, classes=3), macs=0.01, layers=False)


def test_at_its_identity_nothing_is_edited():
    g = tiny.encoder(layers=2)
    assert pruned(g, ratio=0.0).report.steps[-1].edits == 0
    assert pruned(g, macs=1.0).report.steps[-1].edits == 0
