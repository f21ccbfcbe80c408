"""The block-by-block walk: where a graph is cut, and that going in segments gives what one run gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import blocks, stats
from onnxcomp.data.datasets import Batch, as_dataset
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.pipeline import Edit
from onnxcomp.runtime import segments
from onnxcomp.runtime.segments import Layout, Stage, Walk, signature
from onnxcomp.stats.calibrate import Collector, collect
from onnxcomp.target import CPU
from onnxcomp.validation.compare import Reference
from onnxcomp.validation.variants import Variants
from tests import tiny


def data(g: Graph, count: int = 4) -> Any:
    return as_dataset([Batch(tiny.feeds(g, 2, 5 + i, seed=i, padding="right")) for i in range(count)], g)


def inputs(g: Graph) -> list[str]:
    return list(dict.fromkeys(str(x.source.name) for x in blocks.linears(g)))


def cross_model(layers: int = 6) -> Graph:
    """An encoder whose result is read by every layer of a decoder: two values cross there."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", 16]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="cross"), ir_version=10))
    b = tiny.Build(g, np.random.default_rng(0), 16, 1, 1, 16, True, "canonical")
    encoded: ir.Value = x
    for i in range(layers):
        encoded = g.op("Add", encoded, b.linear(g.op("Tanh", b.linear(encoded, f"e{i}", 16, 16)), f"f{i}", 16, 16))
    y = g.op("Tanh", encoded)
    for i in range(layers):
        seen = g.op("Add", b.linear(encoded, f"c{i}", 16, 16), b.linear(y, f"s{i}", 16, 16))
        y = g.op("Add", y, b.linear(g.op("Tanh", seen), f"d{i}", 16, 16))
    return tiny.finish(g, y, "y", ["batch", "sequence", 16])


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder], ids=["encoder", "decoder"])
@pytest.mark.parametrize("spelled", ["canonical", "dynamo"])
def test_a_transformer_is_cut_at_its_hidden_states(build: Any, spelled: Any) -> None:
    g = build(layers=4, spelled=spelled)
    found = Layout(g).cuts
    assert all(len(c.values) == 1 for c in found)
    assert [c.place for c in found] == sorted({c.place for c in found})
    # At least one cut before each attention and each feed-forward part but the first.
    assert len(found) >= 2 * 4 - 1


def test_looking_at_values_makes_nothing_cross() -> None:
    g = tiny.decoder(layers=4)
    crossing = [c.values for c in Layout(g).cuts]
    for (name,) in crossing:  # nodes stand at the end of the graph, where the values were long done with
        g.op("Sqrt", g.op("Abs", g.value(name)), name=f"look_at_{name}")
    seen = Layout(g)
    assert [c.values for c in seen.cuts] == crossing
    for i, (name,) in enumerate(crossing[1:], 1):
        start = seen.before([f"look_at_{name}_out"])
        assert start is not None
        assert start.values in crossing[i - 1 : i + 1]


def test_values_that_many_layers_read_cross_too() -> None:
    g = cross_model()
    found = Layout(g).cuts
    assert {len(c.values) for c in found} == {1, 2}
    needs = [stats.mean(v) for v in inputs(g)]
    whole, cut = collect(g, needs, data(g)), collect(g, needs, data(g), memory=20_000)
    for n in needs:
        np.testing.assert_allclose(cut[n], whole[n], rtol=1e-4, atol=1e-5)


def test_a_graph_with_bodies_is_not_cut() -> None:
    g = tiny.mlp()
    body = ir.Graph([], [], nodes=[], name="body")
    g.nodes("Gelu").__next__().attributes["then"] = ir.AttrGraph("then", body)
    assert Layout(g).cuts == []


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder], ids=["encoder", "decoder"])
def test_segment_by_segment_equals_one_run(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g, changed = build(layers=4), build(layers=4)
    changed.put(blocks.linears(changed)[1].weight, changed.array(blocks.linears(changed)[1].weight) * np.float32(0.5))
    names = inputs(g)
    needs = [make(v) for v in names for make in (stats.gram, stats.norm2, stats.histogram)]
    needs += [stats.cosine(v, v, other_of="original") for v in names]
    needs += [stats.cross_gram(a, b) for a, b in itertools.pairwise(names)]
    whole = collect(changed, needs, data(g), original=g)
    parts: list[int] = []
    real = segments.segment
    monkeypatch.setattr(segments, "segment", lambda *a: parts.append((p := real(*a)).model.graph.num_nodes()) or p)
    cut = collect(changed, needs, data(g), original=g, memory=100_000, scratch=tmp_path)
    assert len(parts) > 6
    assert max(parts) < 0.7 * g.model.graph.num_nodes()
    for n in needs:
        if n.stat.kind == "histogram":
            assert np.abs(whole[n] - cut[n]).sum() <= 0.002 * whole[n].sum()
        else:
            np.testing.assert_allclose(cut[n], whole[n], rtol=1e-4, atol=1e-4 * np.abs(whole[n]).max())
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".npy" and p.stat().st_size > 10**6]


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder], ids=["encoder", "decoder"])
def test_a_sequential_collector_sees_every_edit_and_runs_each_part_once(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = build(layers=6)
    held = data(g)
    collector = Collector(held, CPU, sequential=True)
    ran: list[int] = []
    real = segments.segment
    monkeypatch.setattr(segments, "segment", lambda *a: ran.append((p := real(*a)).model.graph.num_nodes()) or p)
    rng = np.random.default_rng(0)
    for i, name in enumerate([str(x.name) for x in blocks.linears(g)]):
        linear = next(x for x in blocks.linears(g) if x.name == name)
        need = stats.gram(linear.source)
        want = collect(g.clone(), [need], held)[need] if i % 5 == 0 else None
        ran.clear()
        got = collector.collect(g, [need])[need]
        if want is not None:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
            assert sum(ran) < 0.5 * g.model.graph.num_nodes()
        noise = rng.standard_normal(linear.sizes).astype(np.float32) * np.float32(0.02)
        g.put(linear.weight, g.array(linear.weight) + noise)


def test_an_edit_behind_the_walk_sends_it_back() -> None:
    g = tiny.decoder(layers=4)
    held = data(g)
    collector = Collector(held, CPU, sequential=True)
    last, first = blocks.linears(g)[-2], blocks.linears(g)[0]
    need = stats.gram(last.source)
    before = collector.collect(g, [need])[need]
    g.put(first.weight, g.array(first.weight) * np.float32(2))
    after = collector.collect(g, [need])[need]
    want = collect(g, [need], held)[need]
    assert not np.allclose(before, after, rtol=1e-3)
    np.testing.assert_allclose(after, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_signature_tells_edits_before_a_value_from_edits_behind_it() -> None:
    g = tiny.encoder()
    first, last = blocks.linears(g)[0], blocks.linears(g)[-1]
    name = str(last.source.name)
    before = signature(g, [name])
    g.put(last.weight, g.array(last.weight) * np.float32(2))
    assert signature(g, [name]) == before
    g.set_attr(next(g.nodes("Gelu")), approximate="tanh")
    changed = signature(g, [name])
    assert changed != before
    g.put(first.weight, g.array(first.weight) * np.float32(2))
    assert signature(g, [name]) != changed


def test_carried_values_go_to_files_and_are_removed(tmp_path: Path) -> None:
    g = tiny.decoder(layers=3)
    w = Walk(CPU, 64, tmp_path)
    layout, batches = Layout(g), [b.feeds for b in data(g)]
    w.seek(g, layout, [str(blocks.linears(g)[-1].source.name)], lambda: iter(batches))
    assert w.cut is not None
    assert len(w.store) == len(batches) == len(list(tmp_path.glob("*.npy")))
    w.reset()
    assert not list(tmp_path.iterdir())


def test_a_large_model_is_compared_block_by_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    g, other = tiny.decoder(layers=3), tiny.decoder(layers=3)
    other.put(blocks.linears(other)[4].weight, other.array(blocks.linears(other)[4].weight) * np.float32(0.9))
    want = Reference(g, data(g)).against(other).json()
    made: list[int] = []
    real = segments.segment
    monkeypatch.setattr(segments, "segment", lambda *a: made.append((p := real(*a)).model.graph.num_nodes()) or p)
    monkeypatch.setattr("onnxcomp.runtime.payload.PREPACK_BELOW", 1)
    monkeypatch.setattr("onnxcomp.runtime.runner.MEMORY", 40_000)
    got = Reference(g, data(g), scratch=tmp_path).against(other).json()
    assert len(made) > 6
    assert max(made) < 0.7 * g.model.graph.num_nodes()
    assert got["metrics"].keys() == want["metrics"].keys()
    for key, value in want["values"].items():
        assert got["values"][key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    made.clear()
    Reference(storage.save(g, tmp_path / "saved"), data(g)).against(storage.save(other, tmp_path / "other"))
    assert len(made) > 6


def test_changed_weights_of_a_large_model_live_in_files(tmp_path: Path) -> None:
    g = tiny.encoder(hidden=512, ffn=1024, layers=1)
    path = tiny.external(g, tmp_path)
    loaded = storage.load(path)
    loaded.spool = tmp_path / "spool"
    linear = blocks.linears(loaded)[-1]
    loaded.put(linear.weight, loaded.array(linear.weight) * np.float32(2))
    tensor = loaded.tensor(blocks.linears(loaded)[-1].weight)
    assert tensor is not None
    assert isinstance(tensor.numpy(), np.memmap)
    twice = tiny.encoder(hidden=512, ffn=1024, layers=1)
    twice.put(blocks.linears(twice)[-1].weight, twice.array(blocks.linears(twice)[-1].weight) * np.float32(2))
    batch = tiny.feeds(g)
    from onnxcomp.runtime.sessions import Session

    saved = storage.load(storage.save(loaded, tmp_path / "out"))
    for model in (loaded, loaded.clone(), saved):
        with Session(model, prepack=False) as a, Session(twice, prepack=False) as b:
            np.testing.assert_array_equal(*(next(iter(s.run(batch).values())) for s in (a, b)))


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder], ids=["encoder", "decoder"])
def test_variants_share_the_walk_and_score_as_if_each_ran_alone(build: Any, tmp_path: Path) -> None:
    g = build(layers=4)
    reference = Reference(g, data(g))
    downs = [str(m.down.weight.name) for m in blocks.mlps(g)]
    first = str(next(x for x in blocks.linears(g)).weight.name)

    def scaled(name: str) -> Edit:
        return lambda v: v.put(v.value(name), v.array(v.value(name)) * np.float32(0.5)) and None

    edits = [scaled(n) for n in (downs[2], downs[0], first, downs[3], downs[2])]
    variants = Variants(reference, CPU, 1 << 28, tmp_path)
    found = variants.compare(g, edits, lambda v: v.values()["rel-l2"])
    alone = []
    for edit in edits:
        copy = g.clone()
        edit(copy)
        alone.append(reference.against(copy).values()["rel-l2"])
    np.testing.assert_allclose(found, alone, rtol=1e-4)
    assert len(set(np.round(alone, 6))) == 4
    assert variants.walk.cut is not None
    assert variants.walk.cut.place > Layout(g).count / 2  # it stands before the last layer's weight
    scaled(first)(g)  # an edit before it: what was carried is stale
    again = variants.compare(g, edits[:1], lambda v: v.values()["rel-l2"])[0]
    edits[0](g)
    assert again == pytest.approx(reference.against(g).values()["rel-l2"], rel=1e-4)


def test_variants_of_a_large_model_run_in_segments_and_leave_the_walk_where_it_stands(tmp_path, monkeypatch) -> None:
    g = tiny.encoder(layers=4)
    reference = Reference(g, data(g))
    alone = g.clone()
    down = str(blocks.mlps(g)[1].down.weight.name)
    alone.put(alone.value(down), alone.array(alone.value(down)) * np.float32(0.5))
    want = reference.against(alone).values()["rel-l2"]
    g.spool = tmp_path / "weights"
    stages: list[int] = []
    made = Stage.__init__
    monkeypatch.setattr(Stage, "__init__", lambda self, *a, **k: stages.append(1) or made(self, *a, **k))
    variants = Variants(reference, CPU, 1 << 12, tmp_path)

    def halved(v: Graph) -> None:
        v.put(v.value(down), v.array(v.value(down)) * np.float32(0.5))

    for _ in range(2):
        (found,) = variants.compare(g, [halved], lambda v: v.values()["rel-l2"])
        assert found == pytest.approx(want, rel=1e-4)
        assert variants.walk.cut is not None
        assert len(variants.walk.store) == len(list(data(g)))  # what it carries is still there for the next variant
    assert len(stages) > 6  # the budget holds one layer at most
