"""vit_glyphs: a pre-norm ViT of 1.2 M parameters that reads distorted letters and digits of 16 typefaces.

    python -m models.vit_glyphs --report     held-out accuracy with a bootstrap interval
    python -m models.vit_glyphs --train      train again from the shipped glyphs into weights/vit_glyphs
    python -m models.vit_glyphs --write DIR  write train.npz, calibration.npz and heldout.npz
    python -m models.vit_glyphs --glyphs     draw the glyphs anew from matplotlib's typefaces (needs matplotlib)

36 classes (0 to 9, A to Z) in grey images of 24 x 24. Shipped are the undistorted glyphs; every image is one of them
rotated, sheared, scaled, shifted, crossed by a stroke and covered with noise, by a seed of its own for each part, so
that no image is in two parts. The seed is fixed, but equal bytes of weights need the same torch, machine and number of
threads; elsewhere the accuracy agrees within noise. Training takes about 10 minutes of one core.
"""

from __future__ import annotations

import argparse
import string
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models import vit_training
from models.vit_training import Schedule

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

WEIGHTS = Path(__file__).parent / "weights" / "vit_glyphs"
DATA = Path(__file__).parent / "data" / "vit_glyphs"
CLASSES = string.digits + string.ascii_uppercase
FACES = [
    f"DejaVu{family}{style}"
    for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
    for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
]
FACES += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
SIZE, DRAWN = 24, 32  # pixels of an image, and of a glyph, which has a margin
PARTS = {"train": (4096, 11), "calibration": (128, 12), "tuning": (2000, 13), "heldout": (3000, 14)}  # images, seed
BATCH, NOISE = 64, 0.3
TESTED = 0.7  # strength of the distortions of all parts; training ends at 1, so that the model has seen worse
GROWING = 0.5  # share of the steps in which distortions grow: at full strength from the start nothing is learnt
SCHEDULE = Schedule(steps=2000, peak=1.2e-3, warmup=150, decay=0.05, smoothing=0.05, average=0.995)


def build(seed: int = 0) -> ViTForImageClassification:
    """The untrained model: 16 patches of 6 x 6, 6 layers of width 128, 4 heads, GELU MLP of 512."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=6,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(CLASSES),
        initializer_range=0.04,
        id2label=dict(enumerate(CLASSES)),
        label2id={c: i for i, c in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def load(folder: Path = WEIGHTS) -> ViTForImageClassification:
    """The trained model in float32, in evaluation mode."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder).float().eval()


def processor():
    """The image processor: grey images to [1, 1, 24, 24] between -1 and 1."""
    from transformers import ViTImageProcessorPil

    size = {"height": SIZE, "width": SIZE}
    return ViTImageProcessorPil(do_convert_rgb=False, size=size, image_mean=[0.5], image_std=[0.5])


def draw_glyphs(data: Path = DATA) -> None:
    """Draw every class in every typeface, centred, 20 pixels high or wide: uint8 [classes, faces, 32, 32]."""
    import matplotlib as mpl
    from PIL import Image, ImageDraw, ImageFont

    folder, glyphs = Path(mpl.get_data_path()) / "fonts" / "ttf", []
    for text in CLASSES:
        for face in FACES:
            large = Image.new("L", (256, 256))
            font = ImageFont.truetype(str(folder / f"{face}.ttf"), 160)
            ImageDraw.Draw(large).text((128, 128), text, fill=255, font=font, anchor="mm")
            cut = large.crop(large.getbbox())
            scale = 20 / max(cut.size)
            cut = cut.resize([max(1, round(side * scale)) for side in cut.size], Image.Resampling.LANCZOS)
            image = Image.new("L", (DRAWN, DRAWN))
            image.paste(cut, ((DRAWN - cut.width) // 2, (DRAWN - cut.height) // 2))
            glyphs.append(np.asarray(image))
    data.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(data / "glyphs.npz", glyphs=np.stack(glyphs).reshape(len(CLASSES), len(FACES), DRAWN, DRAWN))


def sampled(
    glyphs: np.ndarray, count: int, rng: np.random.Generator, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 1, 24, 24] between -1 and 1 with labels [N], by one generator; `strength` 0 distorts nothing."""
    labels = rng.integers(0, glyphs.shape[0], count)
    ink = _moved(glyphs[labels, rng.integers(0, glyphs.shape[1], count)].astype(np.float64) / 255, rng, strength)
    ink = np.maximum(ink, strength * _strokes(count, rng))
    low, high = strength * rng.random((count, 1, 1)) - 1, 1 - 0.8 * strength * rng.random((count, 1, 1))
    noise = rng.normal(size=ink.shape) * NOISE * strength * rng.random((count, 1, 1))
    return np.clip(low + (high - low) * ink + noise, -1, 1).astype(np.float32)[:, None], labels.astype(np.int64)


def _moved(glyphs: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Glyphs [N, 32, 32] rotated, sheared, scaled and shifted: [N, 24, 24], interpolated linearly."""
    count = len(glyphs)
    angle, shear = strength * rng.uniform(-0.4, 0.4, (count, 1, 1)), strength * rng.uniform(-0.3, 0.3, (count, 1, 1))
    wide, high = 1 + strength * rng.uniform(-0.15, 0.4, (2, count, 1, 1))
    right, down = strength * rng.uniform(-3.0, 3.0, (2, count, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    x, y = x + right, y + down
    along, across = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    column = np.clip(wide * (along + shear * across) + (DRAWN - 1) / 2, 0, DRAWN - 1.001)
    row = np.clip(high * across + (DRAWN - 1) / 2, 0, DRAWN - 1.001)
    left, top = column.astype(int), row.astype(int)
    u, v, n = column - left, row - top, np.arange(count)[:, None, None]
    above = glyphs[n, top, left] * (1 - u) + glyphs[n, top, left + 1] * u
    below = glyphs[n, top + 1, left] * (1 - u) + glyphs[n, top + 1, left + 1] * u
    return above * (1 - v) + below * v


def _strokes(count: int, rng: np.random.Generator) -> np.ndarray:
    """A soft straight line across half of the images: ink [N, 24, 24]."""
    angle, offset = rng.uniform(0, np.pi, (count, 1, 1)), rng.uniform(-8, 8, (count, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    distance = np.abs(np.cos(angle) * x + np.sin(angle) * y - offset)
    return np.clip(1.5 - distance, 0, 1) * (rng.random((count, 1, 1)) < 0.5)


def glyphs() -> np.ndarray:
    """The shipped glyphs, uint8 [classes, faces, 32, 32]."""
    with np.load(DATA / "glyphs.npz") as data:
        return data["glyphs"]


def arrays(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixel_values [N, 1, 24, 24], labels [N]) of a part; each has a seed of its own."""
    count, seed = PARTS[part]
    return sampled(glyphs(), count, np.random.default_rng(seed), TESTED)


def write_data(folder: str | Path) -> None:
    """Write the parts as .npz files, as the other models' data is shipped."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        images, labels = arrays(part)
        np.savez(Path(folder) / f"{part}.npz", pixel_values=images, labels=labels)


def train(folder: Path = WEIGHTS, steps: int = SCHEDULE.steps, seed: int = 0, threads: int = 1, log=None) -> None:
    """Train on fresh draws of the glyphs and write weights (in half precision) and processor."""
    import torch

    torch.set_num_threads(threads)
    drawn, rng = glyphs(), np.random.default_rng(seed)
    strengths = iter(np.clip(np.arange(steps) / (GROWING * steps), 0.0, 1.0))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = sampled(drawn, BATCH, rng, next(strengths))
        return torch.from_numpy(images), torch.from_numpy(labels)

    model = vit_training.fit(build(seed), draw, replace(SCHEDULE, steps=steps), log)
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)


def report(folder: Path = WEIGHTS, part: str = "heldout") -> dict[str, float]:
    """Accuracy on a part with its 95 % bootstrap interval."""
    return vit_training.interval(vit_training.correct(load(folder), *arrays(part)))


def export(out: str | Path, seed: int = 0) -> Path:
    """Write the trained model as an ONNX folder; the weights are shipped, so `seed` changes nothing."""
    import onnxcomp as oc

    return oc.export(WEIGHTS, out, dtype="fp32")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("glyphs", "train", "report"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--write", type=Path, help="folder for the data as .npz files")
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=tuple(PARTS), default="heldout")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.glyphs:
        draw_glyphs()
    if args.write:
        write_data(args.write)
    if args.train:
        train(args.out, args.steps, args.seed, args.threads, lambda line: print(line, flush=True))
    if args.report:
        print({name: round(value, 4) for name, value in report(args.out, args.part).items()})


if __name__ == "__main__":
    main()
