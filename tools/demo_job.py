"""The work behind `tools/demo`: from shipped checkpoints to verified, measured int8 models in one folder."""

import sys
import time
from pathlib import Path

import onnxcomp as oc
from models import docs_lm, vit_digits
from onnxcomp.report import show

JOBS = {
    "vit_digits": (vit_digits, [{"batch": 1}, {"batch": 32}], ["accuracy-drop<=0.5%"]),
    "docs_lm": (docs_lm, [{"batch": 1, "sequence": 128}, {"batch": 8, "sequence": 128}], ["perplexity-rise<=1.5%"]),
}
DATA = Path(__file__).parents[1] / "models" / "data"


def main(folder: Path) -> None:
    """Run both jobs; models that are already exported are kept."""
    started = time.perf_counter()
    for name, (model, shapes, gates) in JOBS.items():
        source, result = folder / name, folder / f"{name}-int8"
        if not (source / "model.onnx").exists():
            print(f"Exporting {name} to {source}")
            model.export(source)
        print(f"Compressing {source} to {result}")
        done = oc.compress(
            source,
            result,
            preset="int8",
            calibration=DATA / name / "calibration.npz",
            evaluation=DATA / name / "heldout.npz",
            gates=gates,
            shapes=shapes,
        )
        show(done.report)
        print(f"Report: {result / 'report.json'}\n")
    print(f"Done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
