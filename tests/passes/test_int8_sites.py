"""`smooth-quant` and `split-outliers`: exact rewrites, chosen on rows left out, that int8 gains by; and `correct`."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.smooth_quant import SmoothQuant
from onnxcomp.passes.split_outliers import SplitOutliers
from onnxcomp.runtime.sessions import Session
from tests import tiny

BUILDS = {
    "post-norm": lambda: tiny.encoder(),
    "pre-norm": lambda: tiny.encoder(norm="pre", bias=False),
    "gated": lambda: tiny.decoder(),
}
FACTOR = 60.0


def planted(g: Graph) -> Graph:
    """The model with two channels of every norm's output `FACTOR` times as large, the linears' rows as much less."""
    by = np.ones(32)
    by[[3, 5]] = FACTOR
    for norm in blocks.norms(g):
        for v in (norm.gain, norm.bias):
            if v is not None:
                g.scale(v, by, -1)
        for x in blocks.linears(g):
            if x.source is norm.output:
                g.scale(x.weight, 1 / by, 0)
    g.edits = 0
    return g


def data(g: Graph, seeds=range(6)):
    return as_dataset([tiny.feeds(g, 4, 9, seed=i) for i in seeds], g)


def run(g: Graph, *passes):
    return PassManager(passes, allow_unchanged=True).run(g, data(g), data(g, range(50, 53)))


def outputs(g: Graph) -> list[np.ndarray]:
    with Session(g) as s:
        return [s.run(b.feeds)[s.outputs[0]].astype(np.float64) for b in data(g, range(100, 104))]


def distance(a: Graph, b: Graph) -> float:
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs)))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "p", [SmoothQuant(min_size=1, alpha=0.5), SplitOutliers(min_size=1, channels=2, activated=2)], ids=lambda p: p.name
)
def test_the_rewrite_is_exact_and_int8_gains(build, p):
    g = planted(BUILDS[build]())
    result = run(g, p)
    assert result.report.steps[0].changed > 0
    assert distance(result.model, g) < 1e-5
    plain, better = (run(x, Qdq(min_size=1)).model for x in (g, result.model))
    assert distance(better, g) < 0.5 * distance(plain, g)
