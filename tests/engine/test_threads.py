"""The same bytes whatever the number of threads: of linear algebra, and of the runtime that collects statistics."""

import numpy as np
import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.maths.blas import PANEL, cross_product, one_thread
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.low_rank import LowRank
from onnxcomp.passes.prune_ffn import PruneFfn
from onnxcomp.passes.prune_heads import PruneHeads
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.runtime import sessions
from tests import tiny

# Wide enough for OpenBLAS to use a second thread in factorizations (measured: from 192 on).
WIDE = {"layers": 1, "hidden": 192, "heads": 4, "ffn": 256}
CASES = {
    "prune-heads": [PruneHeads(ratio=0.25, ranking="layer")],
    "prune-ffn": [PruneFfn(ratio=0.25, ranking="layer", multiple_of=1), Qdq()],
    "quantize-weights": [QuantizeWeights(min_size=1)],
    "low-rank": [LowRank(ratio=0.3, min_size=0, multiple=8)],
}


def made(passes, threads: int, monkeypatch) -> bytes:
    g = tiny.encoder(**WIDE)
    data = [tiny.feeds(g, 4, 16, seed=i, padding="right") for i in range(6)]
    monkeypatch.setattr(sessions, "THREADS", threads)
    with threadpool_limits(limits=threads, user_api="blas"):
        result = PassManager([Canonicalize(), *passes]).run(g, as_dataset(data, g))
    return ir.to_proto(result.model.model).SerializeToString(deterministic=True)


@pytest.mark.parametrize("case", CASES)
def test_passes_that_fit_on_data_give_the_same_bytes(case, monkeypatch):
    assert made(CASES[case], 1, monkeypatch) == made(CASES[case], 2, monkeypatch)


def test_linear_algebra_runs_on_one_thread_inside():
    np.ones((2, 2)) @ np.ones((2, 2))
    with threadpool_limits(limits=2, user_api="blas"), one_thread():
        inside = [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]
    assert set(inside) <= {1}


@pytest.mark.parametrize("width", [PANEL, PANEL + 70])
def test_products_in_panels_are_products(width):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((50, n)).astype(np.float32) for n in (width, 40))
    np.testing.assert_allclose(cross_product(x, x), x.T @ x, atol=2e-4)
    np.testing.assert_allclose(cross_product(x, y), x.T @ y, atol=2e-4)
    assert np.array_equal(cross_product(x, x), cross_product(x, x).T)
