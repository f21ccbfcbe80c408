"""One export: the module, its task and options, what it is fed and gives, and the comparison with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.exporter.checkpoints import TASKS, one_line

__all__ = ["TOLERANCE", "Work", "array_of", "difference", "image_sizes"]

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}  # largest difference, relative to the largest output
Axes = tuple[str | int | None, ...]  # names of open axes, sizes that the exporter may not know


@dataclass
class Work:
    """One export of a model that reads whole sequences or images, and the failed attempts so far."""

    model: Any
    task: str
    dtype: str
    opset: int
    static: dict[str, int]
    inputs: tuple[str, ...]
    attempts: list[dict[str, str]] = field(default_factory=list)
    file: ClassVar[str] = "model.onnx"
    past: ClassVar[bool] = False  # whether it takes and gives key-value caches

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def outputs(self) -> tuple[str, ...]:
        return TASKS[self.task][1]

    def axes(self) -> dict[str, Axes]:
        """Names of the leading open axes of each input; None for one that is fixed."""
        names = ("batch",) if self.inputs == ("pixel_values",) else ("batch", "sequence")
        return {name: tuple(None if a in self.static else a for a in names) for name in self.inputs}

    def output_axes(self) -> dict[str, Axes]:
        """All axes of the outputs that the exporter cannot name."""
        return {}

    def sample(self) -> dict[str, Any]:
        """The inputs that are traced, as torch tensors."""
        return self.example(2, 9, seed=0)

    def module(self) -> Any:
        """A PyTorch module from the inputs, in order, to the outputs, in order."""
        import torch

        work = self

        class Exported(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = work.model

            def forward(self, *args: Any) -> tuple[Any, ...]:
                outputs = self.model(**dict(zip(work.inputs, args, strict=True)))
                return tuple(outputs[n] for n in work.outputs)

        return Exported().eval()

    def example(self, batch: int, sequence: int, seed: int, padded: bool = False) -> dict[str, Any]:
        """Random inputs as torch tensors; `padded` masks the last third of every second row."""
        import torch

        rng = np.random.default_rng(seed)
        batch, sequence = self.static.get("batch", batch), self.static.get("sequence", sequence)
        if self.inputs == ("pixel_values",):
            pixels = rng.standard_normal((batch, *image_sizes(self.config))).astype(np.float32)
            return {"pixel_values": torch.from_numpy(pixels).to(self.model.dtype)}
        ids = self.tokens(rng, batch, sequence)
        mask = np.ones_like(ids)
        if padded and sequence > 1:
            mask[1::2, sequence - max(sequence // 3, 1) :] = 0
            ids[mask == 0] = self.padding
        types = np.zeros_like(ids)
        types[:, sequence // 2 :] = 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {n: torch.from_numpy(arrays[n]) for n in self.inputs}

    def tokens(self, rng: np.random.Generator, batch: int, sequence: int) -> Any:
        """Random tokens `[batch, sequence]` without the padding token."""
        pad, count = self.config.pad_token_id, self.config.vocab_size
        ids = rng.integers(0, count, (batch, sequence))
        ids[ids == pad] = (1 if pad == 0 else 0) % count
        return ids

    @property
    def padding(self) -> int:
        """The token that fills rows up."""
        pad = self.config.pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self.config.vocab_size else 0

    def verify(self, file: Path) -> dict[str, Any]:
        """The largest differences to PyTorch, for export.json; raises `ModelError` beyond the tolerance."""
        from onnxcomp.runtime.sessions import Session

        try:
            session = Session(file)
        except ModelError as e:
            if self.dtype != "bf16":
                raise
            return {"done": False, "why": f"the CPU runtime cannot run bf16: {one_line(e)}"}
        with session:
            differences = self.differences(session)
        return {"done": True, "tolerance": TOLERANCE[self.dtype], "differences": differences}

    def differences(self, session: Any) -> list[dict[str, Any]]:
        """Largest differences to PyTorch on two shapes with padding, on rows that are not padding."""
        positions = getattr(self.config, "max_position_embeddings", None) or 64
        found = []
        for seed, (batch, sequence) in enumerate([(2, min(9, positions)), (3, min(14, positions))], 1):
            feeds = self.example(batch, sequence, seed, padded=True)
            arrays = {k: array_of(v) for k, v in feeds.items()}
            ours, theirs = session.run(arrays), self.reference(feeds)
            for name in self.outputs:
                mask = None if self.task == "text-classification" else arrays.get("attention_mask")
                shapes = {k: list(v.shape) for k, v in arrays.items()}
                found.append(difference(self.dtype, name, theirs[name], ours[name], mask) | {"inputs": shapes})
        return found

    def reference(self, feeds: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """PyTorch's outputs as float32 arrays, by name."""
        import torch

        with torch.no_grad():
            out = self.model(**feeds, **options)
        return {n: out[n].float().numpy() for n in TASKS[self.task][1]}


def image_sizes(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model reads."""
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def array_of(t: Any) -> Any:
    """A torch tensor as an array of numpy or ml_dtypes."""
    import torch

    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return t.float().numpy().astype(ml_dtypes.bfloat16)
    return t.detach().cpu().numpy()


def difference(dtype: str, name: str, a: Any, b: Any, mask: Any) -> dict[str, Any]:
    """The largest difference of one output where `mask` is above 0; raises `ModelError` beyond the tolerance."""
    if a.shape != b.shape:
        raise ModelError(f"output '{name}' has shape {b.shape}, PyTorch gives {a.shape}")
    if mask is not None:
        a, b = a[mask > 0], b[mask > 0]
    error, scale = float(np.abs(a - b.astype(np.float32)).max()), float(np.abs(a).max()) or 1.0
    if not np.isfinite(b.astype(np.float32)).all() or not error <= TOLERANCE[dtype] * scale:
        raise ModelError(f"output '{name}' differs from PyTorch by {error:.3g} where its largest value is {scale:.3g}")
    return {"output": name, "max_abs": error, "scale": scale}
