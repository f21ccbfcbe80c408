"""Fits on 60, 200 and 1,000 short texts, judged on others: more is no worse, and 60 no worse than fitting nothing."""

import numpy as np
import pytest

from onnxcomp.data.datasets import Dataset, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import Recipe
from onnxcomp.graph import Graph
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime.sessions import Session
from tests import tiny

TEXTS = (60, 200, 1000)
LENGTH = 12  # tokens of a text; a fifth is left out: 60 have 576 rows for 64 and 256 channels, 1,000 need no copies
SAME = 1.05  # errors nearer than this, relative, are noise of the calibration set
PLAIN = {
    "int4": QuantizeWeights(min_size=1, method="nearest"),
    "int8-accurate": Qdq(min_size=1),
    "int8-smooth": Qdq(min_size=1),
}


def texts(g: Graph, count: int, seed: int) -> Dataset:
    """Texts whose words are as frequent as those of languages are, one word in `1 / rank`."""
    rng, names = np.random.default_rng(seed), [v.name for v in g.inputs]
    shares = 1 / np.arange(1, 200)
    ids = rng.choice(len(shares), (count, LENGTH), p=shares / shares.sum()).astype(np.int64)
    return as_dataset([{n: ids if "ids" in n else np.ones_like(ids) for n in names}], g)


def errors(g: Graph, graphs: list[Graph]) -> list[float]:
    """Relative errors of the outputs on texts that nothing was fitted to."""

    def outputs(x: Graph) -> np.ndarray:
        with Session(x) as s:
            return np.asarray(s.run(next(iter(texts(g, 100, 9))).feeds)[s.outputs[0]], np.float64)

    want = outputs(g)
    return [float(np.linalg.norm(outputs(x) - want) / np.linalg.norm(want)) for x in graphs]


@pytest.mark.parametrize("preset", PLAIN)
def test_fits_gain_by_data_and_lose_nothing_by_little(preset):
    g = tiny.encoder(hidden=64, ffn=256, layers=1, vocabulary=200)
    passes = [p for p in Recipe.preset(preset).passes if p.name not in ("canonicalize", "cleanup", "lower")]
    results = [PassManager(passes, allow_unchanged=True).run(g, texts(g, n, 0)) for n in TEXTS]
    plain = PassManager([PLAIN[preset]]).run(g, texts(g, TEXTS[0], 0))
    *fitted, unfitted = errors(g, [r.model for r in (*results, plain)])
    assert fitted[0] <= SAME * unfitted
    assert fitted[1] <= SAME * fitted[0]
    assert fitted[2] <= SAME * fitted[1]
    said = ["tokens of data are few" in str(n) for r in results for s in r.report.steps for n in s.noted]
    assert said.count(True) == (0 if preset == "int8-accurate" else 2)
