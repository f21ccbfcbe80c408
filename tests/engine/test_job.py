"""A job end to end: published whole or not at all, judged on the written file, resumed from its cache."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest

import onnxcomp as oc
from onnxcomp import target
from onnxcomp.benchmarking import benchmark
from onnxcomp.engine.compress import compress_each
from onnxcomp.engine.host import host_of
from onnxcomp.engine.job import Job
from onnxcomp.engine.recipe import Recipe
from onnxcomp.engine.settings import Settings
from onnxcomp.errors import GateFailed, ModelError, RecipeError, TargetError
from onnxcomp.files import storage
from onnxcomp.lowering import costs, race
from onnxcomp.pipeline import PassFault
from onnxcomp.target import CPU
from tests import tiny

SMALL = ["canonicalize", "cleanup", "qdq: {min_size: 1}", "lower"]


@pytest.fixture
def batches() -> list:
    g = tiny.encoder()
    return [tiny.feeds(g, 2, 9, seed=i, padding="right") for i in range(10)]


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_compress_publishes_model_report_and_companions(source, batches, tmp_path):
    before = listing(source)
    result = oc.compress(
        source, tmp_path / "out", passes=SMALL, calibration=batches, gates=["sqnr>=10", "size<=1x"], measure=False
    )
    assert listing(source) == before
    assert set(listing(tmp_path / "out")) >= {"model.onnx", "report.json", "config.json"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [s["name"] for s in report["steps"]] == ["canonicalize", "cleanup", "qdq", "lower"]
    assert result.report.step("qdq").changed == 12
    assert result.report.integer.integer_products == result.report.integer.quantized_linears == 12
    assert all(v.passed for v in result.report.verdicts)
    props = storage.load(tmp_path / "out").model.metadata_props
    assert props["onnxcomp.source"] == storage.fingerprint(source / "model.onnx")
    assert props["onnxcomp.passes"] == "canonicalize, cleanup, qdq, lower"


def test_refused_result_writes_nothing_but_the_asked_report(source, batches, tmp_path):
    with pytest.raises(GateFailed, match="sqnr>=90"):
        oc.compress(
            source,
            tmp_path / "out",
            passes=SMALL,
            calibration=batches,
            gates=["sqnr>=90"],
            measure=False,
            report=tmp_path / "why.json",
        )
    assert {p.name for p in tmp_path.iterdir()} == {"model", "why.json", "why.html"}
    assert not json.loads((tmp_path / "why.json").read_text())["verdicts"][0]["passed"]


def test_size_gate_is_judged_on_the_written_file(source, batches, tmp_path):
    with pytest.raises(GateFailed, match=r"size<=0\.01x"):
        oc.compress(source, tmp_path / "out", passes=SMALL, calibration=batches, gates=["size<=0.01x"], measure=False)
    assert not (tmp_path / "out").exists()


def test_latency_gate_is_measured_and_the_report_has_the_rows(source, batches, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "bench", functools.partial(benchmark.bench, runs=1, window=0.01))
    monkeypatch.setattr(race, "ROUNDS", 3)
    monkeypatch.setattr(costs, "ROUNDS", 1)
    result = oc.compress(
        source,
        tmp_path / "out",
        passes=SMALL,
        calibration=batches,
        gates=["latency<=1000x"],
        shapes=[{"batch": 1, "sequence": 8}],
    )
    assert {r.model for r in result.report.benchmark.rows} != set()
    assert [v.passed for v in result.report.verdicts] == [True]
    with pytest.raises(RecipeError, match="latency gate"):
        oc.compress(
            source, tmp_path / "other", passes=SMALL, calibration=batches, gates=["latency<=1000x"], measure=False
        )
    assert not (tmp_path / "other").exists()


def test_same_folder_keeps_the_source_beside_the_result(source, tmp_path):
    before = listing(source)
    result = oc.optimize(source, source, measure=False)
    assert any("model.onnx and its result model-optimize.onnx lie in one folder" in w for w in result.report.warnings)
    after = listing(source)
    assert {k: after[k] for k in before} == before
    assert "model-optimize.onnx" in after
    with pytest.raises(ModelError, match="never overwritten"):
        oc.optimize(source / "model.onnx", source / "model.onnx", measure=False)
    assert listing(source) == after


def test_output_may_be_a_file(source, tmp_path):
    oc.optimize(source, tmp_path / "fast.onnx", measure=False)
    assert (tmp_path / "fast.onnx").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "fast.onnx", "fast.report.json", "fast.report.html"}


def test_every_graph_of_a_folder_or_the_named_one(source, tmp_path):
    tiny.external(tiny.decoder(), source, "decoder.onnx")
    both = compress_each(source, tmp_path / "both", preset="optimize", measure=False)
    assert set(both) == {"model", "decoder"}
    assert {"model.onnx", "decoder.onnx"} <= set(listing(tmp_path / "both"))
    oc.optimize(source, tmp_path / "one", graph="decoder", measure=False)
    assert "model.onnx" not in listing(tmp_path / "one")
    with pytest.raises(ModelError, match="no graph 'encoder'"):
        oc.optimize(source, tmp_path / "none", graph="encoder", measure=False)


def test_one_bad_graph_leaves_nothing(source, tmp_path):
    (source / "broken.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        compress_each(source, tmp_path / "out", preset="optimize", measure=False)
    assert not (tmp_path / "out").exists()


def test_plan_writes_nothing(source, batches, tmp_path):
    results = compress_each(source, tmp_path / "out", passes=SMALL, calibration=batches, plan=True)
    assert results["model"].report.step("qdq").eligible == 12
    assert not (tmp_path / "out").exists()


def test_a_plan_says_by_which_other_options_it_was_made(source):
    plain = "prune-ffn: {score: magnitude, repair: none}"
    found = [
        oc.compress(source, None, passes=["canonicalize", p], plan=True).report.warnings for p in ("prune-ffn", plain)
    ]
    (said,) = [w for w in found[0] if "planned without data" in w]
    assert "(ranking: global, score: magnitude, repair: none)" in said
    assert not [w for w in found[1] if "planned" in w]


def test_what_to_do_must_be_said_once(source, tmp_path):
    for options in ({}, {"preset": "int8", "passes": SMALL}):
        with pytest.raises(RecipeError, match="exactly one"):
            oc.compress(source, tmp_path / "out", **options)
    with pytest.raises(RecipeError, match=r"calib\.jsonl"):
        oc.compress(source, tmp_path / "out", preset="int8")


def test_cached_steps_are_taken_up_where_the_recipe_differs(source, batches, tmp_path):
    def go(out, passes):
        report = oc.compress(
            source, tmp_path / out, passes=passes, calibration=batches, cache=tmp_path / "cache", measure=False
        ).report
        return [s.cached for s in report.steps]

    assert go("a", SMALL) == [False] * 4
    assert go("b", SMALL) == [True] * 4
    assert go("c", [*SMALL[:2], "qdq: {min_size: 1, clip: minmax}", "lower"]) == [True, True, False, False]
    a, b = ((tmp_path / x / "model.onnx").read_bytes() for x in "ab")
    assert a == b


def test_job_hash_follows_everything_that_decides(source):
    job = Job(source / "model.onnx", Recipe.preset("int8"))
    same = Job(source / "model.onnx", Recipe.preset("int8"))
    others = [
        Job(source / "model.onnx", Recipe.preset("int8-dynamic")),
        Job(source / "model.onnx", Recipe.preset("int8"), Settings(seed=1)),
        Job(source / "model.onnx", Recipe.preset("int8"), Settings(samples=3)),
    ]
    assert job.hash() == same.hash()
    assert len({j.hash() for j in (job, *others)}) == 4


def test_absent_target_compresses_on_the_cpu_and_says_so(source, batches, tmp_path):
    result = oc.compress(source, tmp_path / "trt", passes=SMALL, target="tensorrt", calibration=batches)
    assert any("speed not measured" in w for w in result.report.warnings)
    assert result.report.benchmark is None
    assert result.model.opset <= 22
    with pytest.raises(TargetError):
        oc.bench([source / "model.onnx"], oc.CUDA)


@pytest.mark.parametrize(
    ("preset", "target"),
    [
        ("int8", "cuda"),
        ("int8-accurate", "cuda"),
        ("int8-smooth", "cuda"),
        ("int8-dynamic", "tensorrt"),
        ("auto-int8", "cuda"),
        ("int4", "tensorrt"),
        ("bf16", "cpu"),
    ],
)
def test_what_is_not_for_the_target_is_refused_before_the_first_pass(preset, target, source, batches, tmp_path):
    begun = []
    given = {"calibration": batches, "target": target, "watch": lambda *step: begun.append(step)}
    with pytest.raises(TargetError):
        oc.compress(source, tmp_path / "out", preset=preset, **given)
    assert not begun
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (["canonicalize", {"half": {"dtype": "fp16"}}, "lower"], ["not faster"]),
        ([{"qdq": {"min_size": 1}}, "lower"], ["canonicalize"]),
        (["canonicalize", {"qdq": {"min_size": 1}}], ["lower"]),
        (["canonicalize", {"qdq": {"min_size": 1}}, "lower"], []),
        (["canonicalize", "cleanup"], []),
    ],
)
def test_remarks_come_before_the_work_and_stand_in_the_report(source, passes, said):
    told: list[tuple[str, int, int]] = []
    result = oc.compress(source, None, passes=passes, calibration="random", samples=8, measure=False,
                         watch=lambda *x: told.append(x))  # fmt: skip
    remarks = [x[0] for x in told if x[2] == 0]
    assert [x[2] == 0 for x in told] == sorted((x[2] == 0 for x in told), reverse=True)
    assert len(remarks) == len(said)
    assert all(word in remark and remark in result.report.warnings for word, remark in zip(said, remarks, strict=True))


def test_older_opset_on_request(source, tmp_path):
    result = oc.optimize(source, tmp_path / "old", opset=18, measure=False)
    assert result.model.opset == 18
    assert not list(result.model.nodes("Attention"))
    assert result.report.size.result == storage.file_bytes(tmp_path / "old" / "model.onnx")


def test_a_result_that_fails_where_the_original_does_not_is_refused(source, tmp_path):
    from onnxcomp.engine.smoke import smoke

    g = storage.load(source)
    last = g.outputs[0].producer()
    x = last.inputs[0]
    g.set_input(last, 0, g.op("Log", g.op("Neg", g.op("Abs", x, like=x), like=x), like=x))
    g.sort()
    bad = storage.read(storage.save(g, tmp_path / "bad"))
    with pytest.raises(ModelError, match="not finite"):
        smoke(storage.read(source), bad, CPU)
    [first, second] = smoke(bad, bad, CPU)
    assert "the original fails" in first
    assert "'batch': 3" in second


def test_a_result_that_takes_other_inputs_or_does_not_load_is_a_fault(source, tmp_path):
    """Feeds come from the original: a result made for other inputs is a fault, not a model that fails as well."""
    from onnxcomp.engine.smoke import smoke

    original = storage.read(source)
    g = storage.load(source)
    g.inputs[0].name = "renamed"
    with pytest.raises(PassFault, match=r"fails on random inputs .* 'renamed'"):
        smoke(original, storage.read(storage.save(g, tmp_path / "renamed")), CPU)
    h = storage.load(source)
    x = h.outputs[0].producer().inputs[0]
    h.replace(x, h.op("NoSuchOperator", x, like=x, domain="com.microsoft"))
    h.sort()
    broken = storage.read(storage.save(h, tmp_path / "broken"))
    with pytest.raises(PassFault, match="does not load"):
        smoke(original, broken, CPU)
    with pytest.raises(ModelError, match="neither it nor what was made of it can be run") as e:
        smoke(broken, broken, CPU)
    assert str(e.value).count(str(broken.path)) <= 1  # what was made lies in a temporary folder, which helps nobody


@pytest.mark.parametrize("quantizer", ["qdq: {min_size: 1}", "dynamic-quant: {min_size: 1}"])
def test_a_plan_counts_weights_and_products_whatever_type_they_get(source, batches, quantizer):
    (cut,) = compress_each(source, None, passes=["canonicalize", "prune-ffn: {ratio: 0.25}"], plan=True).values()
    passes = ["canonicalize", "prune-ffn: {ratio: 0.25}", quantizer, "lower"]
    (both,) = compress_each(source, None, passes=passes, calibration=batches, plan=True).values()
    assert both.report.plan.macs == cut.report.plan.macs
    scales = both.report.plan.parameters[1] - cut.report.plan.parameters[1]
    assert 0 <= scales < 0.1 * cut.report.plan.parameters[1]


def test_figures_of_another_machine_are_said_to_be_so(monkeypatch):
    elsewhere = dataclasses.replace(CPU, name="elsewhere", here=False)
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset({"avx2", "vnni"}))
    assert host_of(elsewhere) == (elsewhere, host_of(elsewhere)[1])
    assert "'elsewhere' is another one" in host_of(elsewhere)[1]
    assert "saturate" not in host_of(elsewhere)[1]
    monkeypatch.setattr(target, "cpu_features", lambda: frozenset({"avx2"}))
    assert "int8 sums saturate here and not there" in host_of(elsewhere)[1]
    assert host_of(CPU)[1] == ""


def test_another_model_in_the_output_folder_is_not_overwritten_unless_it_is_named(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    storage.save(tiny.linear(), out)
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(ModelError, match=r"model\.onnx: is another model.*-o .*model\.onnx"):
        oc.optimize(source, out, measure=False)
    assert (out / "model.onnx").read_bytes() == before
    oc.optimize(source, out / "model.onnx", measure=False)
    assert (out / "model.onnx").read_bytes() != before
    oc.optimize(source, out, measure=False)  # now it is an earlier result


def test_int8_of_an_int8_model_says_why_nothing_changes(source, batches, tmp_path):
    oc.compress(source, tmp_path / "int8", passes=SMALL, calibration=batches, measure=False)
    with pytest.raises(
        RecipeError, match=r"found nothing to change in it, whose \d+ quantized linears stay as they are"
    ):
        oc.compress(tmp_path / "int8", tmp_path / "again", passes=SMALL, calibration=batches, measure=False)
