"""Export of small random checkpoints: names, axes, opset, companions and the comparison with PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.data.datasets import specs
from onnxcomp.errors import ExportError
from onnxcomp.files import storage
from onnxcomp.graph import Graph

pytestmark = [pytest.mark.export, pytest.mark.slow]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

from onnxcomp.exporter import TASKS, export  # noqa: E402
from onnxcomp.exporter.checkpoints import PAIRED  # noqa: E402
from onnxcomp.exporter.routes import TOLERANCE, first_verified  # noqa: E402

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "vocab_size": 61,
}
EMPTY = {**TEXT, "num_hidden_layers": 0}  # for what differs from BERT in its ends alone: layers are what exports cost
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[Any], Any]] = {
    "bert": lambda t: t.BertModel(t.BertConfig(**TEXT)),
    "roberta": lambda t: t.RobertaForSequenceClassification(t.RobertaConfig(**EMPTY, type_vocab_size=1, num_labels=3)),
    "distilbert": lambda t: t.DistilBertForQuestionAnswering(
        t.DistilBertConfig(vocab_size=61, dim=16, n_layers=1, n_heads=4, hidden_dim=24, max_position_embeddings=32)
    ),
    "bert-tokens": lambda t: t.BertForTokenClassification(t.BertConfig(**EMPTY, num_labels=5)),
    "bert-mlm": lambda t: t.BertForMaskedLM(t.BertConfig(**EMPTY)),
    "vit": lambda t: t.ViTForImageClassification(
        t.ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=1,
        )
    ),
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1)
    ),
}
AXES: list[int | str] = ["batch", "sequence"]
MASKED = ("input_ids", "attention_mask")
TYPED = (*MASKED, "token_type_ids")
EXPECTED: dict[str, tuple[str, tuple[str, ...], dict[str, list[int | str]]]] = {
    "bert": ("feature-extraction", TYPED, {"last_hidden_state": [*AXES, 16]}),
    "roberta": ("text-classification", MASKED, {"logits": ["batch", 3]}),
    "distilbert": ("question-answering", MASKED, {"start_logits": AXES, "end_logits": AXES}),
    "bert-tokens": ("token-classification", TYPED, {"logits": [*AXES, 5]}),
    "bert-mlm": ("fill-mask", TYPED, {"logits": [*AXES, 61]}),
    "vit": ("image-classification", ("pixel_values",), {"logits": ["batch", 2]}),
    "llama": ("text-generation", MASKED, {"logits": [*AXES, 61]}),
    "gpt2": ("text-generation", MASKED, {"logits": [*AXES, 61]}),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name](transformers).eval()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One export per model for the whole session."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = export(make(name), tmp_path_factory.mktemp("export") / name, past=False)
        return done[name]

    return get


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT checkpoint on disk, with a tokenizer file beside it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "bert"
    make("bert").save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "private.txt").write_text("not to be copied")
    return folder


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return found


def shapes(g: Graph) -> dict[str, list[int | str]]:
    return {str(v.name): [d if isinstance(d, int) else str(d.value) for d in v.shape] for v in g.outputs}


@pytest.mark.parametrize("name", MODELS)
def test_every_task_has_stable_names_and_axes(exported: Callable[[str], Path], name: str) -> None:
    folder = exported(name)
    task, inputs, outputs = EXPECTED[name]
    g = storage.load(folder)
    assert tuple(s.name for s in specs(g)) == inputs
    assert {s.shape[: 1 if name == "vit" else 2] for s in specs(g)} == {("batch",) if name == "vit" else tuple(AXES)}
    assert shapes(g) == outputs
    assert g.opset == 18
    assert g.model.ir_version == 10
    assert g.model.metadata_props["task"] == task
    assert (folder / "config.json").is_file()
    g.verify()


@pytest.mark.parametrize("name", MODELS)
def test_every_export_was_compared_with_pytorch(exported: Callable[[str], Path], name: str) -> None:
    """Row 40 of pains.md: two shapes, padding included, within float noise."""
    found = record(exported(name))
    checks = found["verification"]["differences"]
    first = "pixel_values" if name == "vit" else "input_ids"
    assert len({tuple(c["inputs"][first]) for c in checks}) == 2
    assert {c["output"] for c in checks} == set(EXPECTED[name][2])
    assert all(0 < c["max_abs"] + 1e-12 <= TOLERANCE["fp32"] * c["scale"] for c in checks)
    assert found["route"] in ("transformers.exporters", "torch.onnx.export")
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_model_agrees_at_another_shape(exported: Callable[[str], Path], name: str) -> None:
    """Independent of the exporter's own check: one sample, one token, and a longer batch than any traced."""
    from onnxcomp.runtime.sessions import Session

    module, folder = make(name), exported(name)
    rng = np.random.default_rng(5)
    with Session(folder / "model.onnx") as session:
        for batch, length in ((1, 1), (5, 17)):
            ids = rng.integers(1, 61, (batch, length))
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            if name == "bert":
                feeds["token_type_ids"] = np.zeros_like(ids)
            (ours,) = session.run(feeds).values()
            with torch.no_grad():
                theirs = module(**{k: torch.from_numpy(v) for k, v in feeds.items()})[0].numpy()
            assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_nodes_are_named_by_the_modules_that_made_them(exported: Callable[[str], Path]) -> None:
    products = [str(n.name) for n in storage.load(exported("llama")).nodes("MatMul")]
    assert sum("down_proj" in n for n in products) == 1
    assert any("layers.0.self_attn.q_proj" in n for n in products)
    assert len(set(products)) == len(products)


def test_nothing_of_this_machine_is_in_the_model(exported: Callable[[str], Path]) -> None:
    raw = (exported("bert") / "model.onnx").read_bytes()
    assert b"site-packages" not in raw
    assert b".py" not in raw


def test_a_folder_is_exported_with_its_companions(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy of the tokenizer and configuration lies beside the model; nothing is printed, the log is kept."""
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    steps: list[str] = []
    out = export(checkpoint, tmp_path / "out", static={"batch": 1, "sequence": 12}, watch=steps.append)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "export.json", "model.onnx", "tokenizer.json"]
    assert {s.shape for s in specs(storage.load(out))} == {(1, 12)}
    assert shapes(storage.load(out)) == {"last_hidden_state": [1, 12, 16]}
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    assert steps[0] == "loading the checkpoint"
    assert steps[-1] == "comparing with PyTorch"
    assert capfd.readouterr().out == ""
    assert any("ONNX" in line for line in record(out)["log"])


def test_opset_23_is_reached_even_where_torch_writes_a_graph_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own opset-23 Llama does not run at more than one sample; it is exported lower and converted."""
    from onnxcomp.exporter import routes

    monkeypatch.delitem(routes.ROUTES, "torch.onnx.export")
    out = export(make("llama"), tmp_path / "out", opset=23, past=False, static={"sequence": 9})
    found = record(out)
    assert storage.load(out).opset == found["opset"] == 23
    assert found["converted_from_opset"] == 20 or not found["failed"]
    assert found["verification"]["done"]


def test_half_precision_is_exported_and_verified(tmp_path: Path) -> None:
    import onnx_ir as ir

    out = export(make("bert"), tmp_path / "out", dtype="fp16")
    g = storage.load(out)
    assert {v.dtype for v in g.outputs} == {ir.DataType.FLOAT16}
    assert record(out)["verification"]["tolerance"] == TOLERANCE["fp16"]


# ---- refused ---------------------------------------------------------------------------------------------------------


def refused(source: Any, out: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as e:
        export(source, out, **options)
    assert not out.exists()
    assert list(out.parent.glob(".*")) == []
    return str(e.value)


def test_options_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "unknown task 'ocr'" in refused("x", out, task="ocr")
    assert "18 to 23" in refused("x", out, opset=17)
    assert "18 to 23" in refused("x", out, opset=24)
    assert "fp32, fp16, bf16" in refused("x", out, dtype="int8")
    assert "width=3" in refused("x", out, static={"width": 3})
    assert "batch=0" in refused("x", out, static={"batch": 0})


def test_a_checkpoint_that_cannot_be_loaded_is_one_error(checkpoint: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad"
    assert "no such folder" in refused(tmp_path / "nothing", out)
    assert "is a file" in refused(checkpoint / "config.json", out)
    bad.mkdir()
    assert "no config.json" in refused(bad, out)
    (bad / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert "holds no weights" in refused(bad, out)
    (bad / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:999])
    assert "cannot be loaded" in refused(bad, out)
    (bad / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForTelepathy"]}))
    assert "task=" in refused(bad, out)
    transformers.T5Config(architectures=["T5ForTelepathy"]).save_pretrained(bad)
    assert "the task does not follow from 'T5ForTelepathy'" in refused(bad, out)


BAD = {
    "unknown": (
        {"model_type": "telepathy", "architectures": ["TelepathyModel"]},
        "does not know the model type 'telepathy'",
    ),
    "own_code": (
        {"model_type": "telepathy", "auto_map": {"AutoModel": "m.M"}},
        "brings its own code, which is never run",
    ),
    "no_type": ({"architectures": ["BertModel"]}, "names no model_type"),
    "list": ([1, 2], "is no JSON object"),
    "text": ("{", "config.json cannot be read"),
    "encoder_decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "the task does not follow"),
    "no_weights": ({"model_type": "bert", "architectures": ["BertModel"]}, "holds no weights"),
}


def test_what_the_files_say_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    for name, (config, _) in BAD.items():
        (tmp_path / name).mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name / "config.json").write_text(text)
    code = (
        "import sys\nfrom onnxcomp.cli import main\n"
        "for name in sys.argv[2:]:\n    main(['export', sys.argv[1] + '/' + name, '-o', sys.argv[1] + '/out'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *BAD, "nothing"], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    lines = run.stderr.splitlines()
    assert len(lines) == len(BAD) + 1, run.stderr
    for line, said in zip(lines, [*(said for _, said in BAD.values()), "no such folder"], strict=True):
        assert line.startswith("error: ")
        assert said in line
    assert not (tmp_path / "out").exists()


def test_pickled_weights_need_permission(checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bin"
    bad.mkdir()
    (bad / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    torch.save(make("bert").state_dict(), bad / "pytorch_model.bin")
    assert "allow_pickle=True" in refused(bad, tmp_path / "out")


def test_a_task_the_checkpoint_was_not_trained_for_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would fill the missing head with random numbers and only log it."""
    why = refused(checkpoint, tmp_path / "out", task="text-classification")
    assert "classifier.bias, classifier.weight" in why
    assert "random numbers" in why


def test_an_unreachable_hub_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    why = refused("some-one/some-model", tmp_path / "out")
    assert why == (
        "some-one/some-model: no such folder, and it could not be loaded from the hub: We couldn't connect to the hub"
    )


def test_all_causes_are_in_the_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 41 of pains.md: routes are tried in order; where none works, each says why."""
    from onnxcomp.exporter import routes

    def fail(job: Any, opset: int) -> Any:
        raise RuntimeError(f"broken at {opset}")

    monkeypatch.setattr(routes, "ROUTES", {"one": fail, "two": fail})
    why = refused(make("bert"), tmp_path / "out")
    assert why.startswith("BertModel could not be exported as feature-extraction")
    assert [why.count(x) for x in ("one (sdpa, opset 18): broken at 18", "two (eager, opset 18): broken at 18")] == [
        1,
        1,
    ]


def test_the_next_route_is_taken_and_the_failure_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcomp.exporter import routes

    def fail(job: Any, opset: int) -> Any:
        raise ValueError("an upgrade broke it")

    monkeypatch.setitem(routes.ROUTES, "transformers.exporters", fail)
    found = record(export(make("vit"), tmp_path / "out"))
    assert found["route"] == "torch.onnx.export"
    assert [a["error"] for a in found["failed"]] == ["an upgrade broke it"]
    assert shapes(storage.load(tmp_path / "out")) == {"logits": ["batch", 2]}


def test_row_40_an_export_that_computes_something_else_is_refused(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 40 of pains.md, a broken export is noticed at once: a weight that is off by a hundredth."""
    import onnx_ir as ir

    from onnxcomp.exporter import routes

    def wrong(job: Any, opset: int) -> Any:
        program = ir.load(exported("vit") / "model.onnx")
        for v in program.graph.initializers.values():
            if v.const_value.shape == (2, 16):
                v.const_value = ir.tensor(v.const_value.numpy() * 1.01, name=v.name)
        return program

    monkeypatch.setattr(routes, "ROUTES", {"torch.onnx.export": wrong})
    assert "output 'logits' differs from PyTorch by" in refused(make("vit"), tmp_path / "out")


def test_the_tasks_are_those_of_the_contract() -> None:
    assert set(TASKS) == {task for task, _, _ in EXPECTED.values()} | PAIRED
    assert callable(first_verified)
