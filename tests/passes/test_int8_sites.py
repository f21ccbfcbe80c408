"""`smooth-quant` and `split-outliers`: exact rewrites, chosen on rows left out, that int8 gains by; and `correct`."""

import numpy as np
import pytest

from onnxcomp import blocks
from onnxcomp.data.datasets import as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.graph import Graph
from onnxcomp.passes.correct import Correct
from onnxcomp.passes.lower import Lower
from onnxcomp.passes.qdq import Qdq
from onnxcomp.passes.smooth_quant import SmoothQuant
from onnxcomp.passes.split_outliers import SplitOutliers
from onnxcomp.runtime.sessions import Session, integer_check
from onnxcomp.stats import calibrate, shift
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


@pytest.mark.parametrize("build", BUILDS)
def test_one_behind_the_other_is_exact_and_nothing_is_left_to_do(build):
    g = planted(BUILDS[build]())
    passes = (SplitOutliers(min_size=1, channels=2, activated=2), SmoothQuant(min_size=1))
    result = run(g, *passes)
    assert [s.changed > 0 for s in result.report.steps] == [True, True]
    assert distance(result.model, g) < 1e-5
    assert [s.edits for s in run(result.model, *passes).report.steps] == [0, 0]


def test_gains_are_folded_where_that_is_exact_and_multiplied_elsewhere():
    for build, least in (("pre-norm", 0), ("gated", 0), ("post-norm", 1)):
        g = planted(BUILDS[build]())
        before = len(list(g.nodes("Mul")))
        folded = run(g, SmoothQuant(min_size=1, alpha=0.5, multiply=False)).model
        assert len(list(folded.nodes("Mul"))) == before
        both = run(g, SmoothQuant(min_size=1, alpha=0.5)).model
        assert len(list(both.nodes("Mul"))) >= before + least
        attention = next(iter(folded.nodes("Attention")))
        values = next(x for x in blocks.linears(folded) if x.output is attention.inputs[2])
        assert not np.array_equal(folded.array(values.weight), g.array(g.value(values.weight.name)))


def test_channels_split_off_keep_their_gain_where_heads_share_values():
    g = tiny.decoder()  # two query heads for each key-value head
    out = next(x for x in blocks.linears(g) if x.source.producer().op_type == "Attention")
    g.scale(out.weight, np.where(np.arange(32) == 5, 1e-3, 1.0), 0)
    values = next(x for x in blocks.linears(g) if x.output is out.source.producer().inputs[2])
    g.scale(values.weight, np.where(np.arange(16) == 5, 1e3, 1.0), -1)
    result = run(g, SplitOutliers(min_size=1, channels=1), SmoothQuant(min_size=1, alpha=0.5))
    assert distance(result.model, g) < 1e-5


def test_split_products_stay_float_and_the_others_are_integer():
    g = planted(BUILDS["post-norm"]())
    model = run(g, SplitOutliers(min_size=1, channels=2, activated=2), Qdq(min_size=1), Correct(), Lower()).model
    found = integer_check(model)
    assert (found.integer_products, found.ok) == (12, True)
    assert len(list(model.nodes("MatMul"))) >= 8
    widest = max(float(model.array(q.inputs[1])) for q in model.nodes("QuantizeLinear"))
    plain = run(g, Qdq(min_size=1)).model
    assert widest < 0.2 * max(float(plain.array(q.inputs[1])) for q in plain.nodes("QuantizeLinear"))


def test_nothing_is_split_where_no_channel_stands_out():
    g = tiny.linear(64, 48)
    even = as_dataset([{"x": np.random.default_rng(0).uniform(-1, 1, (8, 16, 64)).astype(np.float32)}], g)
    step = PassManager([SplitOutliers(min_size=1)]).run(g, even, even).report.steps[0]
    assert step.changed == 0
    assert {d.why for d in step.declined} == {"no few channels make its int8 outputs err"}


@pytest.mark.parametrize("bias", [True, False])
def test_corrected_biases_take_the_shift_of_the_means(bias):
    g = planted(tiny.encoder(bias=bias))
    result, plain = run(g, Qdq(min_size=1), Correct()), run(g, Qdq(min_size=1))
    assert result.report.steps[1].changed == 12
    names = [str(x.output.name) for x in blocks.linears(g)]
    if not bias:  # an addition follows, under another name
        return
    needs = [shift(n, n, other_of="original") for n in names]
    left, was = (calibrate.collect(r.model, needs, data(g), original=g) for r in (result, plain))
    for n in needs:
        assert np.abs(left[n]).max() < 0.05 * np.abs(was[n]).max()


def test_ranges_by_outputs_err_less_than_ranges_by_tensors():
    g = tiny.linear(64, 48)
    x = np.random.default_rng(0).standard_normal((8, 16, 64)).astype(np.float32)
    x[..., 7] *= FACTOR
    x[:, 0] *= FACTOR  # a token
    g.scale(g.value("linear.weight"), np.where(np.arange(64) == 7, 1 / FACTOR**2, 1.0), 0)
    given, plain = (
        as_dataset([{"x": x}], g),
        x[:, 1:] @ g.array(g.value("linear.weight")) + g.array(g.value("linear.bias")),
    )

    def error(clip):
        with Session(PassManager([Qdq(min_size=1, clip=clip)]).run(g, given, given).model) as s:
            return np.linalg.norm(s.run({"x": x[:, 1:]})["y"] - plain)

    assert error("output") < 0.2 * error("mse")
