"""A model with planted activation outliers: plain int8 fails its gates, and what is made for outliers holds them."""

from pathlib import Path

import pytest

from tests.legacy_export import export_logits

pytestmark = [pytest.mark.export, pytest.mark.slow, pytest.mark.no_cover]
DATA = Path(__file__).parents[2] / "models" / "data" / "vit_digits"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    import torch

    from models import outliers, vit_digits

    folder = tmp_path_factory.mktemp("planted")
    outliers.plant(vit_digits.WEIGHTS, folder / "checkpoint")
    return export_logits(vit_digits.load(folder / "checkpoint"), torch.zeros(2, 1, 8, 8), folder / "model.onnx")


def compress(planted: Path, out: Path, *what: str) -> int:
    from onnxcomp.cli import main

    data = ["--calibration", str(DATA / "calibration.npz"), "--eval", str(DATA / "heldout.npz"), "--samples", "300"]
    return main(["compress", str(planted), "-o", str(out), *what, *data, "--no-measure"])


def recipe(*passes: str) -> list[str]:
    return [x for spec in ("canonicalize", *passes, "lower") for x in ("--pass", spec)]


def test_plain_int8_is_refused_and_says_so(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnxcomp.engine.remedy.SECONDS", 2.0)  # of ranking sites, of which nothing is asked here
    assert compress(planted, tmp_path / "out", *recipe("qdq"), "--gate", "accuracy-drop<=1%") == 3
    assert "accuracy-drop" in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["int8-accurate", "smooth-quant"])
def test_presets_and_passes_about_outliers_hold(planted: Path, tmp_path: Path, what: str) -> None:
    """Plain int8 of the clean model is 42.8 dB from it; `tools/int8` judges the other recipes."""
    passes = ["--preset", what] if what == "int8-accurate" else recipe(what, "qdq")
    gates = ["--gate", "sqnr>=40", "--gate", "accuracy-drop<=1%"]
    assert compress(planted, tmp_path / "out", *passes, *gates) == 0
    assert (tmp_path / "out" / "model.onnx").exists()
