"""What values of a cut model stand for: behind a gap that left-out layers leave, it is what came after them."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.blocks.branches import layer_branches, residual_sum
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.methods.repair.correspondence import counterpart, reference_value
from onnxcomp.methods.repair.dropped_layers import leave_out
from onnxcomp.passes.drop_layers import DropLayers
from onnxcomp.passes.prune_ffn import PruneFfn
from onnxcomp.passes.prune_heads import PruneHeads
from onnxcomp.passes.refit import Refit
from onnxcomp.runtime.sessions import Session
from tests import tiny


def pre():
    return tiny.encoder(layers=3, norm="pre")


def ends(g):
    return [residual_sum(x).end for layer in blocks.layers(g) for x in (layer.attention.o, layer.mlp.down)]


def without(g, *layers):
    cut = g.clone()
    for i in sorted(layers, reverse=True):
        leave_out(cut, layer_branches(cut)[i])
    return cut


def test_every_value_of_an_uncut_model_stands_for_itself():
    for g in (pre(), tiny.encoder(layers=3), tiny.decoder(layers=3)):
        values = [o for node in g.nodes() for o in node.outputs]
        assert [counterpart(g, g.clone(), v) for v in values] == [v.name for v in values]


@pytest.mark.parametrize(("layers", "behind"), [([1], 3), ([1, 2], 5), ([2], 5)])
def test_the_sum_before_a_gap_stands_for_that_behind_it(layers, behind):
    g = tiny.encoder(layers=4, norm="pre")
    cut = without(g, *layers)
    was, left = ends(g), ends(cut)
    before = 2 * layers[0] - 1
    assert left[before].name == was[before].name
    for i, v in enumerate(left):
        want = was[behind] if i == before else g.value(v.name)
        assert counterpart(cut, g, v) == want.name
        assert reference_value(g, cut, v) == (g, want.name)


def test_a_sum_is_compared_behind_a_norm_only_where_that_is_the_same():
    g = tiny.encoder(layers=3)
    cut, was = without(g, 1), ends(g)
    before = ends(cut)[1]
    here, there = (blocks.layers(m)[i].norms[-1] for m, i in ((cut, 0), (g, 1)))
    assert counterpart(cut, g, here.output) == there.output.name
    assert counterpart(cut, g, before) == before.name
    for old, new in ((here.gain, there.gain), (here.bias, there.bias)):
        cut.put(old, g.array(new), users=[here.node])
    assert counterpart(cut, g, before) == was[3].name


def test_readers_that_do_not_agree_leave_a_value_to_stand_for_itself():
    g = pre()
    cut = without(g, 1)
    end = ends(cut)[1]
    other = g.value(ends(g)[1].name)  # in the original, one of its readers reads what is before the gap
    node = next(u for u, _ in end.uses() if "Normalization" in u.op_type)
    g.set_input(g.node(node.name), 0, other)
    assert counterpart(cut, g, end) == end.name


def test_another_width_is_compared_with_the_model_before_the_cut():
    g, wide = tiny.encoder(layers=2, norm="pre", hidden=16), tiny.encoder(layers=2, norm="pre", hidden=32)
    for v in ends(g):
        assert reference_value(wide, g, v) == (g, v.name)


def still(g):
    """Let the second layer add a constant, and half of the heads and channels of the others nothing."""
    for i, layer in enumerate(blocks.layers(g)):
        o, down = layer.attention.o, layer.mlp.down
        for x in (o, down):
            w = g.array(x.weight).copy()
            w[: len(w) if i == 1 else len(w) // 2] = 0
            g.put(x.weight, w)


AFTER = {
    "refit": Refit(),
    "prune-ffn": PruneFfn(ratio=0.5),
    "prune-ffn whole": PruneFfn(ratio=0.5, repair="gauss-newton"),
    "prune-heads": PruneHeads(ratio=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("after", AFTER)
def test_later_passes_do_not_undo_the_repair_of_a_gap(after):
    g = pre()
    still(g)
    data = as_dataset([Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(8)], g)
    gap, none = DropLayers(ratio=0.34), DropLayers(ratio=0.34, repair="none")
    feeds = tiny.feeds(g, 4, 9, seed=99)

    def run(model):
        with Session(model) as s:
            return next(iter(s.run(feeds).values()))

    plain, closed, both = (
        PassManager(passes, allow_unchanged=True).run(g, data, data).model
        for passes in ([none], [gap], [gap, AFTER[after]])
    )
    want = run(g)
    apart = [float(np.square(run(m) - want).sum()) for m in (plain, closed, both)]
    assert len(blocks.layers(both)) == 2
    assert apart[1] < 1e-7 * apart[0]
    assert apart[2] < 1e-5 * apart[0]
