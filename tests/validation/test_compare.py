"""Drift, task metrics and their intervals: against plain formulas, with padding, and loud about broken candidates."""

import gc
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from onnxcomp.data.datasets import Batch, Dataset, as_dataset
from onnxcomp.errors import DataError, ModelError, RecipeError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array
from onnxcomp.runtime.sessions import Session
from onnxcomp.validation import kept
from onnxcomp.validation import metrics as scoring
from onnxcomp.validation.compare import Reference, Validation, validate
from onnxcomp.validation.drift import DriftSums
from onnxcomp.validation.gates import Gate
from onnxcomp.validation.rows import OutputRows
from tests import tiny


def data(g: Graph, batches: int = 4, labels: Array | None = None, padding: str = "none", batch: int = 3) -> Dataset:
    rows = []
    for i in range(batches):
        feeds = tiny.feeds(g, batch=batch, sequence=6 + i, seed=i, padding=padding)  # type: ignore[arg-type]
        rows.append(Batch(feeds, None if labels is None else labels[i * batch : (i + 1) * batch]))
    return as_dataset(rows, g, name="tiny")


def nudged(g: Graph, by: float = 1.05) -> Graph:
    """A candidate: every weight matrix a little off."""
    h = g.clone()
    for i, node in enumerate(h.nodes("MatMul")):
        if h.is_constant(node.inputs[1]):
            a = h.array(node.inputs[1])
            noise = np.random.default_rng(i).standard_normal(a.shape).astype(np.float32)
            h.put(node.inputs[1], a + (by - 1) * a.std() * noise)
    return h


def outputs(g: Graph, ds: Dataset) -> list[Array]:
    with Session(g) as s:
        return [s.run(b.feeds)[str(g.outputs[0].name)] for b in ds]


def seen(rows: Array, against: Array | None = None, **more: object) -> OutputRows:
    n = np.arange(len(rows))
    return OutputRows(rows, rows if against is None else against, n, np.zeros_like(n), len(rows), **more)  # type: ignore[arg-type]


# ---- drift -----------------------------------------------------------------------------------------------------------


def test_a_model_compared_with_itself_is_exact_and_its_json_is_plain() -> None:
    g = tiny.encoder()
    v = validate(g, g.clone(), data(g))
    assert v.drift.max_abs == 0
    assert v.drift.sqnr == math.inf
    assert v.values()["cosine"] == pytest.approx(1)
    assert v.samples == 12
    plain = json.loads(json.dumps(v.json(), allow_nan=False))
    assert plain["values"]["sqnr"] is None
    assert plain["finite"] is True


def test_drift_is_the_plain_formula_over_unmasked_tokens() -> None:
    g = tiny.encoder()
    h, ds = nudged(g), data(g, padding="left")
    drift = validate(g, h, ds).drift
    keep = [b.feeds["attention_mask"] == 1 for b in ds]
    x, y = (
        np.concatenate([o[k] for o, k in zip(outputs(m, ds), keep, strict=True)]).astype(np.float64) for m in (g, h)
    )
    assert drift.rows == len(x) == sum(k.sum() for k in keep)
    assert drift.max_abs == pytest.approx(np.abs(x - y).max())
    assert drift.rel_l2 == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert drift.sqnr == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))
    angle = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert drift.cosine == pytest.approx(angle.mean())
    assert drift.agreement == pytest.approx((x.argmax(1) == y.argmax(1)).mean())
    assert drift.kl is None


def test_what_stands_in_padding_does_not_count() -> None:
    g = tiny.encoder()
    h = nudged(g)
    ds = data(g, padding="right")
    other = [
        Batch({**b.feeds, "input_ids": np.where(b.feeds["attention_mask"] == 1, b.feeds["input_ids"], 3)}) for b in ds
    ]
    a, b = validate(g, h, ds), validate(g, h, other)
    assert a.values() == pytest.approx(b.values(), rel=1e-4)


def test_pooled_embeddings_are_compared_for_feature_extraction_only() -> None:
    g = tiny.encoder()
    h, ds = nudged(g), data(g, padding="left")
    values = validate(g, h, ds).values()
    means = []
    for m in (g, h):
        pairs = zip(outputs(m, ds), ds, strict=True)
        masks = [(o, b.feeds["attention_mask"][..., None]) for o, b in pairs]
        means.append(np.concatenate([(o * m).sum(1) / m.sum(1) for o, m in masks]).astype(np.float64))
    x, y = means
    assert values["pooled-sqnr"] == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-4)
    assert values["pooled-cosine"] > 0.9
    lm = tiny.decoder()
    assert "pooled-sqnr" not in validate(lm, nudged(lm), data(lm)).values()


def test_kl_of_logits_is_the_plain_formula() -> None:
    g = tiny.encoder(classes=5)
    h, ds = nudged(g), data(g)
    x, y = (np.concatenate(outputs(m, ds)).astype(np.float64) for m in (g, h))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x, y))
    assert validate(g, h, ds).values()["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 999))
def test_drift_does_not_depend_on_how_rows_are_batched(n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 2 * n, width)).astype(np.float32)
    whole, parts = DriftSums(logits=True), DriftSums(logits=True)
    whole.update(seen(y, x))
    for part in (slice(0, n), slice(n, None)):
        parts.update(seen(y[part], x[part]))
    a, b = whole.result(), parts.result()
    assert a.sqnr == pytest.approx(b.sqnr)
    assert (a.cosine, a.kl, a.agreement) == pytest.approx((b.cosine, b.kl, b.agreement))
    assert a.kl is not None
    assert a.kl >= 0


def test_shared_infinities_are_equal_and_others_are_not_finite() -> None:
    x = np.array([[1.0, -np.inf], [2.0, 3.0]], np.float32)
    same, broken = DriftSums(logits=True), DriftSums(logits=True)
    same.update(seen(x, x))
    broken.update(seen(np.where(np.isinf(x), np.nan, x), x))
    assert same.result().finite
    assert same.result().max_abs == 0
    assert same.result().kl == 0
    assert not broken.result().finite


def test_only_padding_is_an_error() -> None:
    g = tiny.encoder()
    feeds = tiny.feeds(g)
    feeds["attention_mask"] = np.zeros_like(feeds["attention_mask"])
    with pytest.raises(DataError, match="padding"):
        validate(g, g, [feeds])


def test_answers_per_token_position_leave_padding_out() -> None:
    """Question answering: one score per token, so a row is a sample and padding are columns."""
    g = tiny.encoder()
    x = g.outputs[0]
    scores = g.op("Squeeze", g.op("MatMul", x, np.ones((32, 1), np.float32)), np.array([-1], np.int64))
    g.model.graph.outputs.clear()
    g = tiny.finish(g, scores, "start_logits", ["batch", "sequence"])
    h, ds = nudged(g), data(g, padding="left")
    v = validate(g, h, ds, metrics=["agreement"])
    assert v.drift.rows == 12
    agree = []
    for a, b, batch in zip(outputs(g, ds), outputs(h, ds), ds, strict=True):
        hide = np.where(batch.feeds["attention_mask"] == 1, 0, -np.inf)
        agree.append((a + hide).argmax(1) == (b + hide).argmax(1))
    assert v.drift.agreement == pytest.approx(np.concatenate(agree).mean())
    assert v.metrics["agreement"].candidate == pytest.approx(v.drift.agreement)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_labels_make_accuracy_the_task_metric() -> None:
    g = tiny.encoder(classes=5)
    plain = data(g, batches=6)
    truth = np.concatenate(outputs(g, plain)).argmax(1)
    truth[:3] = (truth[:3] + 1) % 5
    v = validate(g, nudged(g, 1.5), data(g, batches=6, labels=truth))
    m = v.metrics["accuracy"]
    assert m.reference == pytest.approx(15 / 18)
    assert v.values()["accuracy-drop"] == pytest.approx(m.reference - m.candidate)
    assert m.low <= m.change <= m.high
    assert m.low < m.high


def test_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((60, 4)).astype(np.float32), rng.integers(0, 4, 60)
    f1 = scoring.METRICS["f1"]
    s = f1.score(seen(scores, labels=labels))
    found = scoring.bootstrap(f1, s, s)
    assert found.candidate == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"))
    assert found.change == found.low == found.high == 0


def test_token_labels_below_zero_and_padding_do_not_count() -> None:
    g = tiny.decoder()
    ds = data(g, batches=1, padding="left")
    batch = next(iter(ds))
    truth = outputs(g, ds)[0].argmax(-1)
    truth[0] = -100
    truth[batch.feeds["attention_mask"] == 0] = 7
    v = validate(g, g.clone(), [Batch(batch.feeds, truth)], metrics=["accuracy"])
    assert v.metrics["accuracy"].reference == 1


def test_perplexity_is_of_next_tokens_without_padding_and_the_first() -> None:
    g = tiny.decoder()
    h, ds = nudged(g, 1.3), data(g, padding="left")
    v = validate(g, h, ds)
    expected = []
    for m in (g, h):
        nll, n = 0.0, 0
        for out, b in zip(outputs(m, ds), ds, strict=True):
            for row, ids, mask in zip(
                out.astype(np.float64), b.feeds["input_ids"], b.feeds["attention_mask"], strict=True
            ):
                logp = row - np.log(np.exp(row).sum(-1, keepdims=True))
                for t in range(len(ids) - 1):
                    if mask[t] and mask[t + 1]:
                        nll, n = nll - logp[t, ids[t + 1]], n + 1
        expected.append(np.exp(nll / n))
    assert v.metrics["perplexity"].reference == pytest.approx(expected[0], rel=1e-5)
    assert v.values()["perplexity-rise"] == pytest.approx(expected[1] / expected[0] - 1, rel=1e-4)


def test_a_model_that_looks_ahead_gets_no_perplexity_unasked() -> None:
    g = tiny.encoder()
    out = g.op("MatMul", g.outputs[0], np.random.default_rng(0).standard_normal((32, 50)).astype(np.float32))
    g.model.graph.outputs.clear()
    masked = tiny.finish(g, out, "logits", ["batch", "sequence", 50])
    assert validate(masked, masked.clone(), data(masked, padding="right")).metrics == {}
    assert set(validate(masked, masked.clone(), data(masked), metrics=["perplexity"]).metrics) == {"perplexity"}


def test_perplexity_reads_the_output_with_a_score_of_every_word() -> None:
    g = tiny.decoder()
    alone = validate(g, nudged(g, 1.3), data(g))
    stream = g.outputs[0].producer().inputs[0]
    tags = g.op("MatMul", stream, np.random.default_rng(0).standard_normal((32, 7)).astype(np.float32))
    words = g.outputs[0]
    g.model.graph.outputs.clear()
    both = tiny.finish(g, tags, "tag_logits", ["batch", "sequence", 7])
    both.model.graph.outputs.append(words)
    both = Graph(both.model)
    assert [v.name for v in both.outputs] == ["tag_logits", "logits"]
    v = validate(both, nudged(both, 1.3), data(both))
    assert v.scored == "logits"
    assert v.metrics["perplexity"].candidate == pytest.approx(alone.metrics["perplexity"].candidate, rel=1e-6)


def test_labels_none_of_which_counts_are_refused_and_a_model_without_a_hit_is_told() -> None:
    g = tiny.encoder(classes=5)
    ignored = data(g, labels=np.full(12, -100))
    with pytest.raises(DataError, match="no label of the data counts"):
        validate(g, g, ignored, metrics=["accuracy"])
    unjudged = validate(g, g, ignored)
    assert unjudged.metrics == {}
    assert "no label of the data counts" in unjudged.notes[0]
    wrong = [Batch(b.feeds, (y.argmax(-1) + 1) % 5) for b, y in zip(data(g), outputs(g, data(g)), strict=True)]
    v = validate(g, g, wrong)
    assert v.metrics["accuracy"].reference == 0
    assert any("gives no label right" in note for note in v.notes)


def test_interval_covers_a_known_difference() -> None:
    """The accuracy of two coins, paired: the true difference lies in the interval nearly always."""
    m, hits = scoring.METRICS["accuracy"], 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, b = (np.stack([rng.random(300) < p, np.ones(300)], 1).astype(np.float64) for p in (0.9, 0.8))
        r = scoring.bootstrap(m, a, b)
        hits += r.low <= -0.1 <= r.high
    assert hits >= 34


def test_the_interval_is_seeded_and_paired() -> None:
    m = scoring.METRICS["accuracy"]
    a = np.stack([np.random.default_rng(0).random(50) < 0.5, np.ones(50)], 1).astype(np.float64)
    worse = a.copy()
    worse[:2, 0] = 0
    assert scoring.bootstrap(m, a, worse) == scoring.bootstrap(m, a, worse)
    same = scoring.bootstrap(m, a, a)
    assert (same.low, same.high) == (0, 0)


def test_many_samples_are_resampled_in_bounded_memory() -> None:
    m, n = scoring.METRICS["cosine"], 100_000
    sums = np.stack([np.random.default_rng(1).random(n), np.ones(n)], 1)
    r = scoring.bootstrap(m, sums, sums + np.array([0.25, 0]))
    assert r.change == pytest.approx(0.25)
    assert r.high - r.low < 1e-9


def score_first(outs: dict[str, Array], feeds: dict[str, Array], labels: Array | None) -> Array:
    """A user's metric: the first score of each sample."""
    assert set(feeds) == {"input_ids", "attention_mask"}
    assert labels is None
    return outs["logits"][:, 0]


def test_a_metric_of_the_user_needs_permission_and_gets_a_gate() -> None:
    g = tiny.encoder(classes=5)
    name = f"{__name__}:score_first"
    with pytest.raises(RecipeError, match="allow_code=True"):
        validate(g, g, data(g), metrics=[name])
    v = validate(g, nudged(g), data(g), metrics=[name], allow_code=True)
    assert v.values()[f"{name}-drop"] == pytest.approx(-v.metrics[name].change)
    assert not Gate([f"{name}-drop<=-99"]).judge(v.values())[0].passed


def test_unknown_metrics_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="'bleu'"):
        scoring.find("bleu")
    with pytest.raises(RecipeError, match="cannot be imported"):
        scoring.find("no_such_module:f", allow_code=True)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "add a field 'label'"),
        (np.zeros(3), "integer class labels"),
        (np.array([0, 1, 9]), "label 9 in the data, the model has 5 classes"),
        (np.zeros((3, 6), np.int64), "one label per sample"),
    ],
)
def test_labels_that_do_not_fit_say_what_to_do(labels: Array | None, message: str) -> None:
    g = tiny.encoder(classes=5)
    with pytest.raises(DataError, match=message):
        validate(g, g, data(g, batches=1, labels=labels), metrics=["accuracy"])


def test_perplexity_of_a_classifier_is_refused() -> None:
    g = tiny.encoder(classes=5)
    with pytest.raises(DataError, match="language model"):
        validate(g, g, data(g), metrics=["perplexity"])


# ---- broken candidates, data that changes ----------------------------------------------------------------------------


def test_nan_fails_every_gate() -> None:
    g = tiny.encoder(classes=5)
    h = g.clone()
    head = [n for n in h.nodes("MatMul") if h.is_constant(n.inputs[1])][-1]
    h.put(head.inputs[1], np.full_like(h.array(head.inputs[1]), np.nan))
    v = validate(g, h, data(g))
    assert not v.finite
    gates = ["sqnr>=-999", "agreement>=0", "kl<=1e9", "max-abs<=1e30", "cosine>=-1"]
    assert not any(verdict.passed for verdict in Gate(gates).judge(v.values()))
    assert json.loads(json.dumps(v.json(), allow_nan=False))["finite"] is False


def test_an_original_that_gives_nan_is_an_error() -> None:
    g = tiny.encoder(classes=5)
    head = [n for n in g.nodes("MatMul") if g.is_constant(n.inputs[1])][-1]
    g.put(head.inputs[1], np.full_like(g.array(head.inputs[1]), np.nan))
    with pytest.raises(ModelError, match="original gives NaN in 'logits'"):
        Reference(g, data(g))


def test_models_of_other_interfaces_are_refused() -> None:
    g = tiny.encoder(classes=5)
    ref = Reference(g, data(g))
    with pytest.raises(ModelError, match="'logits' is \\(3, 5\\) in the original, \\(3, 6\\)"):
        ref.against(tiny.encoder(classes=6))
    with pytest.raises(ModelError, match="no output 'logits'"):
        ref.against(tiny.encoder())
    with pytest.raises(ModelError, match="inputs"):
        ref.against(tiny.linear())
    half = g.clone()
    half.model.graph.outputs.clear()
    out = half.op("Cast", half.value("logits"), to=int(ir.DataType.FLOAT16))
    half.value("logits").name = "wide"
    out.name, out.type = "logits", ir.TensorType(ir.DataType.FLOAT16)
    half.model.graph.outputs.append(out)
    with pytest.raises(ModelError, match="float32 in the original, float16"):
        ref.against(half)


class Fickle(Dataset):
    """Data that is different each time it is read."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.times = getattr(self, "times", 0) + 1
        for b in super().__iter__():
            yield Batch({**b.feeds, "input_ids": (b.feeds["input_ids"] + self.times) % 50})


@pytest.mark.parametrize("kind", [Fickle, "shorter"])
def test_data_that_does_not_repeat_itself_is_refused(kind: object) -> None:
    g = tiny.encoder(classes=5)
    ds = data(g)
    if kind is Fickle:
        ds = Fickle(ds._source, ds.batch, ds._check, ds.indices)
    ref = Reference(g, ds)
    if kind == "shorter":
        ref.data = ds.head(3)
    with pytest.raises(DataError, match="other batches the second time"):
        ref.against(g)


def test_empty_data_is_refused() -> None:
    g = tiny.encoder(classes=5)
    with pytest.raises(DataError, match="empty"):
        Reference(g, data(g).head(0))


def test_large_answers_are_kept_on_disk_and_compared_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = tiny.decoder()
    h, ds = nudged(g), data(g)
    in_memory = validate(g, h, ds)
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    ref = Reference(g, ds, scratch=tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 4
    assert all(np.load(f, allow_pickle=False).dtype == np.float32 for f in files)
    assert ref.against(h).json() == in_memory.json()
    assert ref.against(g).drift.max_abs == 0


def test_a_folder_of_its_own_goes_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    g = tiny.encoder(classes=5)
    ref = Reference(g, data(g))
    folder = ref._kept._scratch
    assert folder is not None
    assert len(list(folder.iterdir())) == 4
    del ref
    gc.collect()
    assert not folder.exists()


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IN_MEMORY", 0)
    (tmp_path / "file").write_text("")
    g = tiny.encoder(classes=5)
    with pytest.raises(DataError, match="cannot keep the original's outputs"):
        Reference(g, data(g), scratch=tmp_path / "file")


def test_paths_and_folders_are_compared_too(tmp_path: Path) -> None:
    g = tiny.encoder(classes=5)
    v = validate(tiny.external(g, tmp_path), tmp_path, data(g))
    assert isinstance(v, Validation)
    assert v.drift.max_abs == 0


def test_cached_keys_and_values_are_read_along_their_token_axis() -> None:
    """An output `[batch, heads, sequence, width]` skips padding as well."""
    g = tiny.encoder(classes=0)
    x = g.outputs[0]
    heads = g.op("Reshape", x, np.array([0, -1, 4, 8], np.int64))
    extra = g.op("Transpose", heads, perm=[0, 2, 1, 3])
    extra.name, extra.type = "present", ir.TensorType(ir.DataType.FLOAT)
    extra.shape = ir.Shape(["batch", 4, "sequence", 8])
    g.model.graph.outputs.append(extra)
    g = Graph(g.model)
    ds = data(g, padding="left")
    v = validate(g, nudged(g), ds)
    tokens = sum(int(b.feeds["attention_mask"].sum()) for b in ds)
    assert v.outputs["present"].rows == 4 * tokens
    assert v.outputs["present"].sqnr == pytest.approx(v.drift.sqnr)


def test_public_names_are_functions_whatever_was_imported_first() -> None:
    code = "from onnxcomp.validation import compare; import onnxcomp as oc; assert oc.validate is compare.validate"
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("axis", [1, 2])
def test_an_output_without_elements_is_equal(axis: int) -> None:
    g = tiny.encoder(classes=0)
    empty = g.op("Slice", g.outputs[0], *(np.array([i], np.int64) for i in (0, 0, axis)), name="nothing")
    empty.name, empty.type, empty.shape = "nothing", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", None, None])
    g.model.graph.outputs.append(empty)
    g = Graph(g.model)
    v = validate(g, nudged(g), data(g))
    assert v.outputs["nothing"].max_abs == 0
    assert v.drift.max_abs > 0


def test_rows_without_elements_do_not_differ() -> None:
    from onnxcomp.validation.rows import row_kl

    assert row_kl(np.ones((3, 0)), np.ones((3, 0))).tolist() == [0, 0, 0]
