"""A quarter of the heads and of the feed-forward channels of every architecture, on the graphs kept for recognition."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp import catalog, coupling
from onnxcomp.coupling.sizes import macs, parameters
from onnxcomp.graph import Graph
from onnxcomp.manager import PassManager
from onnxcomp.pipeline import Pass
from onnxcomp.pruning import Place
from onnxcomp.structure import canonicalize
from onnxcomp.target import CPU
from tests import cuts, zoo

FP32 = {name: a for name, (a, s) in zoo.kept().items() if s.dtype == "fp32"}
ONE = {name.partition(".")[0]: name for name in FP32}  # one graph of each architecture
# Where no head of an architecture can be cut, with the limit.
UNCUT = {"deberta-v2": "merges it with another axis"}  # its position scores have batch and heads in one axis


def model(name: str) -> Graph:
    g = Graph(zoo.load_graph(name))
    canonicalize(g)
    return Graph(g.model)  # what recognition declined is not this test's matter


def planned(p: Pass, g: Graph) -> tuple[list[Place], list[np.ndarray]]:
    """The places and what stays of each."""
    places = p.places(coupling.Coupling(g))
    return places, p._amounts(g, places, [p._scores(g, x, None) for x in places], CPU)


@pytest.mark.parametrize("architecture", ONE)
def test_a_quarter_goes_as_predicted_and_equals_the_masked_model(architecture):
    g, a = model(ONE[architecture]), FP32[ONE[architecture]]
    wanted = {v.name for v in g.inputs}
    feeds = [{k: v for k, v in zoo.feeds(a, *f).items() if k in wanted} for f in ((2, 12, "right"), (3, 17, "left"))]
    for name in ("prune-heads", "prune-ffn"):
        p = catalog.load(name)(ratio=0.25, score="magnitude", repair="none", multiple_of=1)
        work = g.clone()
        places, keeps = planned(p, work)
        if name == "prune-heads" and architecture in UNCUT:
            assert work.declined
            assert all(UNCUT[architecture] in d.why for d in work.declined)
            continue
        assert places, [d.why for d in work.declined]
        mask = g
        for place, keep in zip(places, keeps, strict=True):
            mask = cuts.masked(mask, place.group, np.setdiff1d(np.arange(place.group.units), keep))
        result = PassManager([p]).run(g)
        step = result.report.steps[0]
        assert step.changed == step.eligible, [f"{d.site}: {d.why}" for d in step.declined]
        predicted = [(x.group, keep) for x, keep in zip(places, keeps, strict=True)]
        assert parameters(result.model) == parameters(g, predicted) < parameters(g)
        assert macs(result.model) == macs(g, predicted) < macs(g)
        cuts.assert_same(mask, result.model, *feeds)


ALIKE = ["bert", "llama", "vit"]


@pytest.mark.parametrize("architecture", ALIKE)
def test_exports_of_one_model_are_cut_alike(architecture):
    """Different exporters of one model give the same numbers after the same cut."""
    names = [n for n in FP32 if n.partition(".")[0] == architecture][:3]
    assert len(names) > 1
    found = []
    for name in names:
        g, a = model(name), FP32[name]
        for p in ("prune-heads", "prune-ffn"):
            g = PassManager([catalog.load(p)(score="magnitude", repair="none", multiple_of=1)]).run(g).model
        wanted = {v.name for v in g.inputs}
        (y,) = cuts.run(g, {k: v for k, v in zoo.feeds(a, 2, 12).items() if k in wanted}).values()
        found.append(y)
    for y in found[1:]:
        assert np.max(np.abs(y - found[0])) <= 5e-6 * np.max(np.abs(y))
