"""Tuning of one part of a layer by Adam: gradients, the law on unseen rows, and equal results whatever the threads."""

import numpy as np
import pytest
import torch

from onnxcomp.maths import block_tune
from onnxcomp.maths.block_tune import Affine, Block, Norm, Rows, tune
from onnxcomp.maths.newton_mlp import Ffn

KINDS = ("gelu", "relu", "silu")


def block(rng: np.random.Generator, kind: str, gated: bool, norm: str, scaled: bool) -> Block:
    """A block of width 6 in float64: `linear` or an activation, with a norm behind it or none."""
    d, n = 5, 6
    part: Affine | Ffn = Affine(rng.normal(size=(d, n)))
    if kind != "linear":
        gate = rng.normal(size=(d, 7)) if gated else None
        part = Ffn(rng.normal(size=(d, 7)), gate, rng.normal(size=(8, n)), kind, tail=True)
    bias = rng.normal(size=n) if norm == "layer" else None
    tuned = None if norm == "none" else Norm(1 + 0.2 * rng.normal(size=n), bias, 1e-5, centred=norm == "layer")
    return Block(part, rng.normal(size=n) if scaled else None, tuned)


def rows(rng: np.random.Generator, count: int = 40) -> Rows:
    return Rows(rng.normal(size=(count, 5)), rng.normal(size=(count, 6)), rng.normal(size=(count, 6)))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize(("kind", "gated"), [("linear", False), *((k, g) for k in KINDS for g in (False, True))])
def test_gradients_are_finite_differences(kind: str, gated: bool, norm: str, scaled: bool) -> None:
    rng = np.random.default_rng(0)
    b, r = block(rng, kind, gated, norm, scaled), rows(rng)
    for i, gradient in enumerate(b.gradients(r)):
        along = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(b.weights)
            moved[i] = moved[i] + step * along
            ends.append(b.having(moved).error(r))
        slope = (ends[0] - ends[1]) / 2e-5
        assert 2 * float((gradient * along).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_is_torchs(centred: bool) -> None:
    rng = np.random.default_rng(1)
    s, gain, bias = rng.normal(size=(9, 6)), rng.normal(size=6), rng.normal(size=6) if centred else None
    norm = Norm(gain, bias, 1e-5, centred)
    if centred:
        want = torch.nn.functional.layer_norm(*map(torch.from_numpy, (s,)), (6,), *map(torch.from_numpy, (gain, bias)))
    else:
        want = torch.nn.functional.rms_norm(torch.from_numpy(s), (6,), torch.from_numpy(gain), 1e-5)
    np.testing.assert_allclose(norm.scaled(norm.normalized(s)[0]), want.numpy(), atol=1e-12)


@pytest.mark.parametrize(("kind", "norm"), [("linear", "layer"), ("gelu", "none"), ("silu", "rms")])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_on_unseen_rows_falls_or_nothing_changes(seed: int, kind: str, norm: str) -> None:
    rng = np.random.default_rng(seed)
    start, fitted, unseen = block(rng, kind, False, norm, False), rows(rng), rows(rng, 20)
    found = tune(start, fitted, unseen)
    assert found.before == pytest.approx(start.error(unseen))
    assert found.after == pytest.approx(found.part.error(unseen))
    assert found.after < found.before if found.part is not start else found.after == found.before


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_weights_before_the_activation_and_gains_are_found_again(gated: bool, norm: str) -> None:
    rng = np.random.default_rng(4)
    true = block(rng, "silu", gated, norm, False)
    start = true.having([w * (1 + 0.1 * rng.normal(size=w.shape)) for w in true.weights])
    data = []
    for count in (3000, 300):
        r = rows(rng, count)
        s = r.rest + true.added(r.x)
        data.append(Rows(r.x, r.rest, s if true.norm is None else true.norm.scaled(true.norm.normalized(s)[0])))
    found = tune(start, *data)
    assert found.after < 0.05 * found.before


def test_what_gives_its_target_stays() -> None:
    rng = np.random.default_rng(2)
    start, r = block(rng, "gelu", True, "none", False), rows(rng)
    exact = Rows(r.x, r.rest, r.rest + start.added(r.x))
    assert tune(start, exact, exact).part is start


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    start, fitted, unseen = block(rng, "gelu", False, "layer", False), rows(rng, 900), rows(rng, 50)
    start = start.having([w.astype(np.float32) for w in start.weights])
    fitted = Rows(*(a.astype(np.float32) for a in (fitted.x, fitted.rest, fitted.y)))
    found = []
    monkeypatch.setattr(block_tune, "STEPS", 30)
    for count in (1, 3):
        monkeypatch.setattr(block_tune.os, "cpu_count", lambda count=count: count)
        found.append(tune(start, fitted, unseen).part.weights)
    for a, b in zip(*found, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
