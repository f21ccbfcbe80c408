"""What only a CUDA device can show; skipped with the reason elsewhere."""

import pytest

from onnxcomp.benchmarking.benchmark import bench
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.compress import optimize
from onnxcomp.errors import TargetError
from onnxcomp.files.storage import save
from onnxcomp.runtime.sessions import Session, check_target
from onnxcomp.target import CUDA
from onnxcomp.validation.compare import validate
from tests import tiny

try:
    check_target(CUDA)
except TargetError as e:
    pytest.skip(f"no CUDA device here: {e}", allow_module_level=True)


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder])
def test_cuda_agrees_with_the_cpu(build):
    g = build()
    feeds = tiny.feeds(g, 2, 9, padding="right")
    with Session(g, CUDA) as s:
        assert s.provider == "CUDAExecutionProvider"
        on_cuda = s.run(feeds)
    data = as_dataset([feeds], g)
    assert set(on_cuda) == {v.name for v in g.outputs}
    assert validate(g, g, data, CUDA).drift.sqnr > 80


def test_optimize_and_bench_run_on_the_device(tmp_path):
    source = save(tiny.encoder(spelled="dynamo"), tmp_path / "model")
    optimize(source, tmp_path / "fast", target="cuda")
    rows = bench([source, tmp_path / "fast" / "model.onnx"], CUDA, [{"batch": 2, "sequence": 16}], runs=4).rows
    assert {r.provider for r in rows} == {"CUDAExecutionProvider"}
