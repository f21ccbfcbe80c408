"""Collecting statistics: right, independent of batch size and order, without padding, within memory, cached."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import stats
from onnxcomp.data.datasets import Batch, Dataset, as_dataset
from onnxcomp.errors import DataError, ModelError, OnnxcompError
from onnxcomp.graph import Graph
from onnxcomp.runtime import segments
from onnxcomp.runtime.sessions import Session
from onnxcomp.stats import Need, Stats, calibrate
from onnxcomp.stats.calibrate import collect
from tests import tiny


def inputs(g: Graph) -> list[str]:
    """The distinct inputs of the linears."""
    return list(dict.fromkeys(str(n.inputs[0].name) for n in g.nodes("MatMul") if g.is_constant(n.inputs[1])))


def samples(n: int, seed: int = 0, longest: int = 9) -> list[dict[str, np.ndarray]]:
    """Single sentences of different lengths, not padded."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, n)
    return [{"input_ids": rng.integers(0, 50, (1, k)), "attention_mask": np.ones((1, k), np.int64)} for k in lengths]


def padded(group: list[dict[str, np.ndarray]]) -> Batch:
    longest = max(s["input_ids"].shape[1] for s in group)
    return Batch(
        {
            k: np.concatenate([np.pad(s[k], ((0, 0), (0, longest - s[k].shape[1]))) for s in group])
            for k in ("input_ids", "attention_mask")
        }
    )


class Batches:
    """The least a dataset has to be."""

    random = False
    name = "batches"

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.walks = 0

    def __iter__(self) -> Any:
        self.walks += 1
        return iter(self.batches)

    def __len__(self) -> int:
        return sum(b.size for b in self.batches)

    def fingerprint(self) -> str:
        return str([(k, a.tolist()) for b in self.batches for k, a in b.feeds.items()])


def dataset(group: list[dict[str, np.ndarray]], batch: int = 1) -> Any:
    return Batches([padded(group[i : i + batch]) for i in range(0, len(group), batch)])


def every(names: list[str]) -> list[Need]:
    return [
        make(v, *per)
        for v in names
        for make, per in [
            *(
                (m, (p,))
                for m in (stats.absmax, stats.minmax, stats.mean, stats.var, stats.norm2)
                for p in ("tensor", "channel")
            ),
            (stats.gram, ()),
            (stats.histogram, ()),
            (stats.sample, (6,)),
        ]
    ]


def close(a: Stats, b: Stats) -> None:
    """Equal to the noise of float32 inference."""
    assert set(a) == set(b)
    for need in a:
        if need.stat.kind == "histogram":  # a value at the edge of a bin may fall on its other side
            assert a[need].sum() == b[need].sum()
            assert np.abs(a[need] - b[need]).sum() <= 0.002 * a[need].sum()
        elif need.stat.kind in ("var", "gram"):
            assert np.allclose(a[need], b[need], rtol=1e-4, atol=1e-5 * np.abs(a[need]).max()), need
        else:
            assert np.allclose(a[need], b[need], rtol=1e-4, atol=1e-5), need


def test_statistics_are_those_of_the_activations() -> None:
    g = tiny.encoder()
    data = dataset(samples(6), 1)
    names = inputs(g)
    found = collect(g, every(names), data)
    with Session(g, taps=names) as s:
        runs = [s.run(b.feeds) for b in data]
    for name in names:
        x = np.concatenate([r[name].reshape(-1, r[name].shape[-1]) for r in runs])
        wide = x.astype(np.float64)
        assert found[stats.absmax(name)] == np.abs(x).max()
        assert np.array_equal(found[stats.minmax(name, "channel")], np.stack([x.min(axis=0), x.max(axis=0)]))
        assert np.allclose(found[stats.mean(name)], wide.mean(axis=0), rtol=1e-9, atol=1e-9)
        assert np.allclose(found[stats.var(name, "tensor")], wide.var(), rtol=1e-9)
        assert np.allclose(found[stats.norm2(name)], np.linalg.norm(wide, axis=0), rtol=1e-9)
        assert np.allclose(found[stats.gram(name)], wide.T @ wide, rtol=1e-4, atol=1e-4)
        assert found[stats.histogram(name)].sum() == x.size
        kept = found[stats.sample(name, 6)]
        assert len(kept) == 6
        assert all((x == row).all(axis=1).any() for row in kept)


@pytest.mark.parametrize("build", [tiny.encoder, tiny.decoder], ids=["encoder", "decoder"])
def test_nothing_depends_on_batch_size_order_or_padding(build: Any) -> None:
    """Pains row 6: entropy scales changed when only the batch size changed. Row 5: shapes vary between batches."""
    g = build()
    group = samples(12)
    needs = every(inputs(g))
    alone = collect(g, needs, dataset(group, 1))
    close(alone, collect(g, needs, dataset(group, 4)))
    close(alone, collect(g, needs, dataset(group, 12)))
    close(alone, collect(g, needs, dataset([group[i] for i in np.random.default_rng(1).permutation(12)], 5)))


def test_padding_counts_where_there_is_no_mask() -> None:
    g = tiny.mlp()
    x = np.ones((2, 3, 8), np.float32)
    found = collect(g, [stats.histogram("x"), stats.mean("x")], as_dataset({"x": x}, g))
    assert found[stats.histogram("x")].sum() == x.size
    assert np.array_equal(found[stats.mean("x")], np.ones(8))


def test_flattened_and_per_head_values_lose_their_padding_too() -> None:
    g = tiny.encoder()
    name = inputs(g)[0]
    v = g.value(name)
    flat = g.op("Reshape", v, np.array([-1, 32], np.int64))
    heads = g.op("Transpose", g.op("Reshape", v, np.array([0, 0, 4, 8], np.int64)), perm=[0, 2, 1, 3])
    for extra in (flat, heads):
        g.model.graph.outputs.append(g.op("Identity", extra))
    data = dataset(samples(5), 5)
    needs = [stats.histogram(v) for v in (name, str(flat.name), str(heads.name))]
    found = collect(g, needs, data)
    real = int(sum(b.feeds["attention_mask"].sum() for b in data)) * 32
    assert [int(found[n].sum()) for n in needs] == [real] * 3
    assert np.array_equal(found[needs[0]], found[needs[2]])


def test_pairs_within_and_between_graphs() -> None:
    g, changed = tiny.encoder(), tiny.encoder()
    name, other = inputs(g)[1], inputs(g)[3]
    weight = next(n for n in changed.nodes("MatMul")).inputs[1]
    assert weight is not None
    changed.put(weight, changed.array(weight) * np.float32(0.5))
    data = dataset(samples(6), 3)
    pair = stats.cross_gram(name, other)
    across = stats.cross_gram(other, other, other_of="original")
    needs = [pair, across, stats.cosine(name, name), stats.cosine(other, other, other_of="original")]
    needs += [stats.gram(name, of="original"), stats.gram(name)]
    found = collect(changed, needs, data, original=g)
    ours, theirs = [], []
    with Session(changed, taps=[name, other]) as s, Session(g, taps=[name, other]) as t:
        for b in data:
            real = b.feeds["attention_mask"] != 0
            ours.append({k: a[real].astype(np.float64) for k, a in s.run(b.feeds, [name, other]).items()})
            theirs.append({k: a[real].astype(np.float64) for k, a in t.run(b.feeds, [name, other]).items()})
    x, y = (np.concatenate([o[k] for o in ours]) for k in (name, other))
    z = np.concatenate([o[other] for o in theirs])
    assert np.allclose(found[pair], x.T @ y, atol=1e-4)
    assert np.allclose(found[across], y.T @ z, atol=1e-4)
    assert np.isclose(found[needs[2]], 1.0)
    cosines = (y * z).sum(axis=1) / np.linalg.norm(y, axis=1) / np.linalg.norm(z, axis=1)
    assert np.isclose(found[needs[3]], cosines.mean())
    assert found[needs[3]] < 0.999
    with pytest.raises(OnnxcompError, match="of the original model, which was not given"):
        collect(changed, [across], data)


def test_a_small_budget_gives_the_same_in_more_walks(tmp_path: Path) -> None:
    g = tiny.encoder()
    needs = every(inputs(g))
    roomy, tight = dataset(samples(8), 8), dataset(samples(8), 8)
    whole = collect(g, needs, roomy)
    seen: list[tuple[int, int]] = []
    small = collect(g, needs, tight, memory=300_000, scratch=tmp_path, watch=lambda *s: seen.append(s))
    close(whole, small)
    assert roomy.walks == 2  # one look at the first batch, one walk
    assert tight.walks > 4
    assert seen[-1][0] == seen[-1][1] > 8
    assert [a for a, _ in seen] == sorted(a for a, _ in seen)


def test_large_results_live_in_files(tmp_path: Path) -> None:
    g = tiny.linear(512, 4, bias=False)
    data = as_dataset({"x": np.random.default_rng(0).standard_normal((3, 2, 512)).astype(np.float32)}, g)
    held = collect(g, [stats.gram("x")], data)[stats.gram("x")]
    mapped = collect(g, [stats.gram("x")], data, memory=1_000_000, scratch=tmp_path)[stats.gram("x")]
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, held)


def test_large_batches_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = tiny.encoder()
    sizes: list[int] = []
    run = Session.run

    def spy(self: Session, feeds: Any, outputs: Any = None) -> Any:
        sizes.append(len(feeds["input_ids"]))
        return run(self, feeds, outputs)

    monkeypatch.setattr(Session, "run", spy)
    collect(g, [stats.absmax(inputs(g)[0])], dataset(samples(16, longest=9), 16), memory=10_000)
    assert sum(sizes) % 16 == 0  # once for every segment of the graph
    assert max(sizes) < 16
    fixed = tiny.encoder(batch=4)
    sizes.clear()
    collect(fixed, [stats.absmax(inputs(fixed)[0])], dataset(samples(4), 4), memory=10_000)
    assert set(sizes) == {4}


def test_only_the_needed_part_of_the_graph_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = tiny.encoder(layers=4)
    parts: list[int] = []
    real = segments.segment
    monkeypatch.setattr(segments, "segment", lambda *a: parts.append((p := real(*a)).model.graph.num_nodes()) or p)
    nodes, edits = g.model.graph.num_nodes(), g.edits
    found = collect(g, [stats.absmax(inputs(g)[0])], dataset(samples(3)))
    assert max(parts) < nodes / 4
    assert (g.model.graph.num_nodes(), g.edits, len(g.outputs)) == (nodes, edits, 1)
    fed = collect(g, [stats.minmax("input_ids")], dataset(samples(3)))
    assert len(parts) == 1
    assert fed[stats.minmax("input_ids")].dtype == np.float32
    assert len(found) == 1


def test_needs_of_one_value_share_its_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = calibrate.accumulator
    monkeypatch.setattr(calibrate, "accumulator", lambda stat: made.append(stat) or real(stat))
    g = tiny.mlp()
    needs = [stats.absmax("x"), stats.minmax("x"), stats.absmax("x"), stats.mean("x"), stats.var("x"), stats.norm2("x")]
    found = collect(g, needs, as_dataset({"x": np.ones((2, 3, 8), np.float32)}, g))
    assert len(made) == 2
    assert len(found) == 5


def test_float16_models_are_counted_as_float32() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["n", 4]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10))
    y = g.op("Add", x, np.ones(4, np.float16))
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["n", 4])
    g.model.graph.outputs.append(y)
    data = Batches([Batch({"x": np.full((2, 4), 60000, np.float16)})] * 3)
    found = collect(g, [stats.norm2("x"), stats.gram("y")], data)
    assert np.allclose(found[stats.norm2("x")], 60000 * np.sqrt(6), rtol=1e-3)
    assert np.isfinite(found[stats.gram("y")]).all()


# ---- cache ---------------------------------------------------------------------------------------------------------


def test_cache_answers_only_the_same_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = tiny.encoder()
    needs = every(inputs(g)[:2])
    group = samples(4)
    first = collect(g, needs, dataset(group), cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    walked = dataset(group)
    second = collect(tiny.encoder(), needs, walked, cache=tmp_path)
    assert walked.walks == 0
    assert all(np.array_equal(first[n], second[n]) for n in needs)
    last = inputs(g)[-1]
    tail = next(n for n in g.nodes("MatMul") if n.inputs[0] is not None and n.inputs[0].name == last).inputs[1]
    assert tail is not None
    g.put(tail, g.array(tail) * np.float32(2))  # behind every value that is asked for
    walked = dataset(group)
    collect(g, needs, walked, cache=tmp_path)
    assert walked.walks == 0
    for model, asked, data in [
        (tiny.encoder(seed=1), needs, dataset(group)),
        (tiny.encoder(), needs[1:], dataset(group)),
        (tiny.encoder(), needs, dataset(group[1:])),
    ]:
        before = len(list(tmp_path.iterdir()))
        collect(model, asked, data, cache=tmp_path)
        assert data.walks > 0
        assert len(list(tmp_path.iterdir())) == before + 1
    entry.write_bytes(entry.read_bytes()[:100])
    again = dataset(group)
    assert np.array_equal(collect(tiny.encoder(), needs, again, cache=tmp_path)[needs[0]], first[needs[0]])
    assert again.walks > 0


def test_cache_never_unpickles(tmp_path: Path) -> None:
    g = tiny.mlp()
    data = as_dataset({"x": np.ones((2, 3, 8), np.float32)}, g)
    collect(g, [stats.absmax("x")], data, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    with entry.open("wb") as f:
        np.savez(f, s0=np.array([print], dtype=object))
    assert collect(g, [stats.absmax("x")], data, cache=tmp_path)[stats.absmax("x")] == 1.0


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_empty_data_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        collect(tiny.encoder(), [stats.absmax("input_ids")], Batches([]))
    assert len(collect(tiny.encoder(), [], Batches([]))) == 0


@pytest.mark.parametrize("make", [stats.absmax, stats.histogram, stats.mean, stats.gram])
def test_nan_names_the_value_and_the_batch(make: Any) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    g = Graph(ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10))
    g = tiny.finish(g, g.op("Sqrt", x), "root", ["n", 4])
    rows = np.ones((4, 4), np.float32)
    rows[2, 1] = -1
    data = as_dataset({"x": rows}, g).rebatch(1)
    with pytest.raises(DataError, match=r"value 'root' in batch 2 of .*NaN or infinity"):
        collect(g, [make("root")], data)


def test_only_padding_is_a_data_error() -> None:
    g = tiny.encoder()
    feeds = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.zeros((2, 3), np.int64)}
    with pytest.raises(DataError, match="everything is padding"):
        collect(g, [stats.histogram(inputs(g)[0])], Batches([Batch(feeds)]))


def test_unknown_values_and_changing_channels_are_refused() -> None:
    g = tiny.encoder()
    with pytest.raises(ModelError, match="nothing-of-that-name"):
        collect(g, [stats.absmax("nothing-of-that-name")], dataset(samples(1)))
    with pytest.raises(DataError, match="differs between batches"):
        collect(g, [stats.absmax("input_ids", "channel")], dataset(samples(5)))
    found = collect(g, [stats.absmax("input_ids")], dataset(samples(5)))
    assert found[stats.absmax("input_ids")] < 50


# ---- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
from onnxcomp import stats
from onnxcomp.machine import peak_mib
from onnxcomp.stats.calibrate import collect
from onnxcomp.data.datasets import as_dataset
from tests import tiny
g = tiny.encoder(hidden=128, ffn=512, heads=4, positions=66)
names = list(dict.fromkeys(n.inputs[0].name for n in g.nodes("MatMul") if g.is_constant(n.inputs[1])))
rng = np.random.default_rng(0)
n = int(sys.argv[1])
ids = rng.integers(0, 50, (n * 8, 64))
data = as_dataset({"input_ids": ids, "attention_mask": np.ones_like(ids)}, g, batch=8)
collect(g, [make(v) for v in names for make in (stats.histogram, stats.minmax, stats.gram)], data)
print(round(1024 * peak_mib()))
"""


def test_memory_does_not_grow_with_the_data() -> None:
    """Pains rows 1 and 3: percentile calibration of a few samples took hundreds of gigabytes."""

    def peak(batches: int) -> int:
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", PEAK, str(batches)], cwd=root, capture_output=True, check=True)
        return int(done.stdout)

    assert peak(20) <= 1.1 * peak(4)


def test_a_dataset_of_the_house_gives_the_same() -> None:
    g = tiny.encoder()
    group = samples(6, longest=4)
    whole = padded(group)
    data = as_dataset(whole.feeds, g, batch=4)
    assert isinstance(data, Dataset)
    needs = every(inputs(g)[:3])
    close(collect(g, needs, data), collect(g, needs, dataset(group)))
