"""Samples that no fit reads: how many, for which passes, and what their error beside the evaluation's says."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.engine.left_out import differs, other_kinds
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.graph import Graph
from onnxcomp.reports import tables
from onnxcomp.reports.json_report import headline
from onnxcomp.stats import mean
from tests import tiny


def batches(g: Graph, tokens: range, count: int, first: int = 0) -> list[Batch]:
    """Batches of eight samples whose tokens are of one part of the vocabulary."""
    made = []
    for i in range(count):
        rng = np.random.default_rng(first + i)
        feeds = tiny.feeds(g, 8, 9, seed=i)
        ids = rng.integers(tokens.start, tokens.stop, (8, 9))
        made.append(Batch({k: ids if k == "input_ids" else a for k, a in feeds.items()}))
    return made


def report(calibration: range, evaluation: range, options: str = "repair: least-squares", count: int = 4):
    g = tiny.encoder(layers=2)
    cut = parse_pass(f"prune-ffn: {{ratio: 0.5, ranking: layer, {options}}}")
    data = as_dataset(batches(g, calibration, count), g)
    return PassManager([cut]).run(g, data, batches(g, evaluation, 3, first=100)).report


def test_other_text_than_the_calibration_data_is_said() -> None:
    found = report(range(2, 12), range(20, 50), count=16)
    said = found.step("prune-ffn").drift["left_out"]
    assert said["samples"] == 16
    assert said["other_kind"]
    (note,) = [w for w in found.warnings if "of another kind" in w]
    shown = [tables.level_text(said["metric"], said[k]) for k in ("evaluation", "left_out")]
    assert all(x in note for x in shown)
    assert "'augment: true'" in note
    assert "{} (left-out calibration {})".format(*shown) in str(list(tables.steps(found.steps).columns[6].cells))


def test_text_of_the_same_kind_is_not() -> None:
    found = report(range(2, 50), range(2, 50), count=16)
    assert not found.step("prune-ffn").drift["left_out"]["other_kind"]
    assert not any("of another kind" in w for w in found.warnings)


def test_copies_with_other_tokens_help_on_other_text_and_are_said() -> None:
    """Also on samples that no fit has read: these are as they were, without copies."""
    plain, copied = (report(range(2, 12), range(20, 50), f"augment: {a}", count=16) for a in ("false", "true"))
    before, after = (r.step("prune-ffn").drift["left_out"] for r in (plain, copied))
    assert after["evaluation"] > before["evaluation"] + 1  # decibels
    assert after["samples"] == before["samples"]
    said = [n.what for n in copied.step("prune-ffn").noted if n.site == "prune-ffn"]
    assert said == ["chosen and fitted by 1008 tokens of data and 4 copies with 30% of them replaced"]
    assert not any("copies" in n.what for n in plain.step("prune-ffn").noted)
    assert not any("augment" in w for w in copied.warnings)


@pytest.mark.parametrize(("options", "count"), [("repair: bias", 4), ("repair: least-squares", 1)])
def test_nothing_is_left_out_of_what_fits_nothing_or_has_few_samples(options: str, count: int) -> None:
    assert "left_out" not in report(range(2, 50), range(2, 50), options, count).step("prune-ffn").drift


def test_few_samples_are_said_and_a_headline_on_random_data_says_so() -> None:
    g = tiny.encoder(layers=2)
    few = [Batch(tiny.feeds(g, 1, 9, seed=i)) for i in range(3)]
    found = PassManager([parse_pass("prune-ffn: {ratio: 0.5, ranking: layer}")]).run(g, few).report
    assert "3 calibration samples: what prune-ffn chose" in " ".join(found.warnings)
    assert "dB on random data" in headline(found)
    many = report(range(2, 50), range(2, 50))
    assert not any("calibration sample" in w for w in many.warnings)
    assert "random" not in headline(many)


@pytest.mark.parametrize("augment", [False, True])
def test_a_fit_reads_no_left_out_sample(monkeypatch: pytest.MonkeyPatch, augment: bool) -> None:
    """Nor does anything judge on copies: what no fit has read is as it was given."""
    g, read = tiny.encoder(layers=1), {}
    cut = dataclasses.replace(parse_pass("prune-ffn: {ratio: 0.5, ranking: layer}"), augment=augment)
    data = as_dataset(batches(g, range(2, 50), 4), g)

    def run(self, graph: Graph, env) -> None:
        name = str(graph.inputs[0].name)
        first = next(iter(graph.nodes("Gather"))).outputs[0]
        for key, world in (("fitted", env), ("unseen", env.unseen())):
            read[key] = world.collect(graph, [mean(first)])[mean(first)], name
        original(self, graph, env)

    original = type(cut).run
    monkeypatch.setattr(type(cut), "run", run)
    PassManager([cut]).run(g, data, batches(g, range(2, 50), 1))
    fitted, unseen = data.split(8)
    table = g.array(next(iter(g.nodes("Gather"))).inputs[0])
    for key, part in (("fitted", fitted), ("unseen", unseen)):
        rows = np.concatenate([table[b.feeds["input_ids"]].reshape(-1, table.shape[1]) for b in part])
        same = np.allclose(read[key][0], rows.mean(axis=0), atol=1e-5)
        assert same is not (augment and key == "fitted")
    assert dataclasses.replace(cut, repair="none").fits is False


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("samples", [16, 64])
def test_differences_within_noise_are_none(spread: float, samples: int) -> None:
    """Errors of which a few samples have most, as divergences have them: halves of one set do not differ."""
    rng = np.random.default_rng(0)
    alike = [differs(rng.lognormal(0, spread, samples), rng.lognormal(0, spread, 64)) for _ in range(200)]
    assert sum(alike) <= 5  # two are expected of a test that is wrong in one of a hundred


def test_differences_beyond_noise_are_some() -> None:
    rng = np.random.default_rng(0)
    other = [differs(rng.lognormal(0, 1.0, 64), 10 * rng.lognormal(0, 1.0, 64)) for _ in range(50)]
    assert sum(other) >= 49
    one = np.ones(64)
    assert differs(one, 2 * one)
    assert not differs(one, 1.4 * one)
    assert not differs(one[:15], 2 * one)
    assert not differs(0 * one, one)
    assert other_kinds([]) == []
