"""A model with planted activation outliers: the plain preset is refused by its default gates, and the advice helps."""

from pathlib import Path

import pytest

pytestmark = [pytest.mark.export, pytest.mark.slow, pytest.mark.no_cover]
DATA = Path(__file__).parents[2] / "models" / "data" / "vit_digits"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    import onnxcomp as oc
    from models import outliers

    folder = tmp_path_factory.mktemp("planted")
    outliers.plant(Path(__file__).parents[2] / "models" / "weights" / "vit_digits", folder / "checkpoint")
    return oc.export(folder / "checkpoint", folder / "model")


def compress(planted: Path, out: Path, *what: str) -> int:
    from onnxcomp.cli import main

    data = ["--calibration", str(DATA / "calibration.npz"), "--eval", str(DATA / "heldout.npz"), "--no-measure"]
    return main(["compress", str(planted), "-o", str(out), *what, *data])


def test_the_plain_preset_is_refused_and_says_what_to_try(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnxcomp.engine.remedy.SECONDS", 2.0)  # of ranking sites, of which nothing is asked here
    assert compress(planted, tmp_path / "out", "--preset", "int8") == 3
    said = "".join(capsys.readouterr())
    assert "accuracy-drop" in said
    assert "clip: entropy" in said
    assert not (tmp_path / "out").exists()


def test_the_first_advice_helps(planted: Path, tmp_path: Path) -> None:
    passes = [x for spec in ("canonicalize", "qdq: {clip: entropy}", "lower") for x in ("--pass", spec)]
    assert compress(planted, tmp_path / "out", *passes, "--gate", "sqnr>=12", "--gate", "accuracy-drop<=1%") == 0
    assert (tmp_path / "out" / "model.onnx").exists()
