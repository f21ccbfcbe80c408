"""Layers that share their weights: what fits weights to data does not fit them to inputs that the fit changes."""

import pytest

pytest.importorskip("onnxruntime")
from onnxcomp.data.datasets import Batch
from onnxcomp.engine import catalog
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests import tiny

LAYERS = 2


def shared() -> Graph:
    """An encoder all of whose layers are the first one."""
    g = tiny.encoder(LAYERS, seed=1)
    for name, v in list(g.model.graph.initializers.items()):
        if name.startswith("layers.") and not name.startswith("layers.0."):
            g.replace(v, g.value(f"layers.0.{name.split('.', 2)[2]}"))
    g.tidy()
    return g


def batches(g: Graph) -> list[Batch]:
    return [Batch(tiny.feeds(g, 4, 9, seed=i)) for i in range(2)]


def error(g: Graph, new: Graph, data) -> float:
    """Squared error of the output, relative to the output's square."""
    with Session(g) as a, Session(new) as b:
        pairs = [(next(iter(a.run(x.feeds).values())), next(iter(b.run(x.feeds).values()))) for x in data]
    return float(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((x**2).sum() for x, _ in pairs))


def run(g: Graph, data, name: str, **options):
    return PassManager([catalog.load(name)(**options)]).run(g, data)


@pytest.mark.parametrize(
    ("name", "options"),
    [("prune-heads", {}), ("prune-ffn", {"sequential": False}), ("prune-ffn", {"repair": "gauss-newton"})],
)
def test_a_weight_that_reads_what_it_gave_takes_the_bias_repair_alone(name, options):
    g, data = shared(), batches(shared())
    bias, fitted = (run(g, data, name, ratio=0.5, ranking="layer", **o).model for o in ({"repair": "bias"}, options))
    assert error(g, fitted, data) == pytest.approx(error(g, bias, data), rel=1e-4)


def test_it_is_said_which_weights_are_not_refitted():
    result = run(shared(), batches(shared()), "prune-ffn", ratio=0.5, ranking="layer")
    assert any("shared layers" in n.what for n in result.report.steps[0].noted)


@pytest.mark.parametrize("name", ["quantize-weights", "sparsify"])
def test_a_shared_weight_is_chosen_by_the_inputs_of_all_its_layers(name):
    g, data, options = shared(), batches(shared()), {"min_size": 1}
    more = {"bits": 3, "block": 16} if name == "quantize-weights" else {"ratio": 0.3}
    by_data = run(g, data, name, **options, **more).model
    blind = {"method": "nearest"} if name == "quantize-weights" else {"method": "magnitude", "repair": False}
    assert error(g, by_data, data) < error(g, run(g, data, name, **options, **more, **blind).model, data)
