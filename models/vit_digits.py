"""vit_digits: a small pre-norm ViT trained on scikit-learn's digits (8 x 8 grey images).

    python -m models.vit_digits --report     held-out accuracy with a bootstrap interval
    python -m models.vit_digits --train      train again from the shipped arrays into weights/vit_digits
    python -m models.vit_digits --data       make the arrays anew from scikit-learn
    python -m models.vit_digits --images DIR write the held-out images as PNG files, one folder per class

The last 899 images, by other writers than the first 898, are held out; choices (size, augmentation, steps) are made by
`--tune`, which trains on the first 700 and scores the other 198 of the training half. The seed is fixed, but equal
bytes need the same torch, machine and number of threads; elsewhere the accuracy agrees within noise. Training takes
3 minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import vit_training
from models.vit_training import Schedule, correct, interval

if TYPE_CHECKING:
    import torch
    from transformers import ViTForImageClassification

WEIGHTS = Path(__file__).parent / "weights" / "vit_digits"
DATA = Path(__file__).parent / "data" / "vit_digits"
TRAINING, TUNING, CALIBRATION = 898, 700, 128
STEPS, BATCH, DROPOUT = 3000, 96, 0.0
SCHEDULE = Schedule(steps=STEPS, peak=2e-3, warmup=150, decay=0.05, smoothing=0.1, average=0.998)


def build(seed: int = 0) -> ViTForImageClassification:
    """The untrained model: patches of 2, 5 layers of width 64, 4 heads, GELU MLP of 256."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
        initializer_range=0.05,
        id2label={i: str(i) for i in range(10)},
        label2id={str(i): i for i in range(10)},
    )
    return ViTForImageClassification(config)


def load(folder: Path = WEIGHTS) -> ViTForImageClassification:
    """The trained model, in evaluation mode."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder).eval()


def processor():
    """The image processor: grey images to [1, 1, 8, 8] between -1 and 1."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(do_convert_rgb=False, size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])


def write_data(data: Path = DATA) -> None:
    """Write `train`, `calibration` (a part of it) and `heldout` arrays as the image processor makes them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    pixels = processor()(images, return_tensors="np")["pixel_values"].astype(np.float32)
    spread = np.linspace(0, TRAINING - 1, CALIBRATION).astype(int)
    parts = {"train": np.arange(TRAINING), "calibration": spread, "heldout": np.arange(TRAINING, len(images))}
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        np.savez_compressed(
            data / f"{name}.npz", pixel_values=pixels[rows], labels=digits.target[rows].astype(np.int64)
        )


def arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixel_values [N, 1, 8, 8], labels [N]) of a shipped part."""
    data = np.load(DATA / f"{part}.npz")
    return data["pixel_values"], data["labels"]


def write_images(folder: str | Path, part: str = "heldout", count: int | None = None) -> int:
    """Write the images of a part as PNG files into one subfolder per class; returns how many."""
    from PIL import Image

    images, labels = arrays(part)
    for at, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        path = Path(folder) / str(label) / f"{part}_{at:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint((image[0] + 1) * 127.5).astype(np.uint8)).save(path)
    return min(len(labels), count or len(labels))


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rotation, scale, shear, shift, contrast and noise of images [N, 1, 8, 8]."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(len(images), *shape, generator=generator) * (high - low) + low

    angle, shear = uniform(-0.26, 0.26), uniform(-0.25, 0.25)
    wide, high = uniform(0.82, 1.2), uniform(0.85, 1.15)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack(
        [
            torch.stack([cos * wide, (cos * shear - sin) * high, uniform(-0.28, 0.28)], -1),
            torch.stack([sin * wide, (sin * shear + cos) * high, uniform(-0.2, 0.2)], -1),
        ],
        1,
    )
    moved = grid_sample(
        images + 1, affine_grid(matrix, list(images.shape), align_corners=False), mode="bicubic", align_corners=False
    )
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.12, 1, 1, 1)
    return (moved * uniform(0.8, 1.15, 1, 1, 1) + noise).clamp(0, 2) - 1


def fit(images: np.ndarray, labels: np.ndarray, steps: int, seed: int, log=None) -> ViTForImageClassification:
    """Train on images [N, 1, 8, 8] and return the model with averaged weights."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        return augment(x[rows], generator), y[rows]

    return vit_training.fit(build(seed), draw, replace(SCHEDULE, steps=steps), log)


def train(folder: Path = WEIGHTS, steps: int = STEPS, seed: int = 0, threads: int = 1, log=None) -> None:
    """Train on the training half and write weights and processor."""
    import torch

    torch.set_num_threads(threads)
    fit(*arrays("train"), steps, seed, log).save_pretrained(folder)
    processor().save_pretrained(folder)


def tune(steps: int = STEPS, seed: int = 0, threads: int = 1, log=None) -> float:
    """Accuracy on the last 198 images of the training half after training on the first 700."""
    import torch

    torch.set_num_threads(threads)
    images, labels = arrays("train")
    model = fit(images[:TUNING], labels[:TUNING], steps, seed, log)
    return float(correct(model, images[TUNING:], labels[TUNING:]).mean())


def report(folder: Path = WEIGHTS) -> dict[str, float]:
    """Held-out accuracy with its 95 % bootstrap interval."""
    return interval(correct(load(folder), *arrays("heldout")))


def export(out: str | Path, seed: int = 0) -> Path:
    """Write the trained model as an ONNX folder; the weights are shipped, so `seed` changes nothing."""
    import onnxcomp as oc

    return oc.export(WEIGHTS, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "tune", "train", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--images", type=Path, help="folder for the held-out images as PNG files, by class")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    options = {
        "steps": args.steps,
        "seed": args.seed,
        "threads": args.threads,
        "log": lambda line: print(line, flush=True),
    }
    if args.images:
        print(write_images(args.images))
    if args.data:
        write_data()
    if args.tune:
        print(f"tuning accuracy {tune(**options):.4f}")
    if args.train:
        train(args.out, **options)
    if args.report:
        print({name: round(value, 4) for name, value in report(args.out).items()})


if __name__ == "__main__":
    main()
