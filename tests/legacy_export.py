"""Models of images exported by torch's legacy exporter: it takes a tenth of the time of the one that users get."""

import warnings
from pathlib import Path
from typing import Any


def export_logits(model: Any, example: Any, path: Path, output: str = "logits") -> Path:
    """Write the model of one input, `pixel_values` with an open first axis, and one output, its logits."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return self.model(x).logits

    options = {"dynamic_axes": {n: {0: "batch"} for n in ("pixel_values", output)}, "opset_version": 18}
    names = {"input_names": ["pixel_values"], "output_names": [output]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits().eval(), (example,), str(path), dynamo=False, **options, **names)
    return path
