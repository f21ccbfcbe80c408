"""Image samples: files of a folder, preprocessed as the configuration of the model's image processor says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data.arrays import read_json
from onnxcomp.data.inputs import Batch, TensorSpec, roles, specs
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph
from onnxcomp.maths import Array

__all__ = ["Images", "prepare", "settings_of"]

KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
CACHE_BYTES = 256 << 20  # bytes of preprocessed images kept in memory
LARGEST_SIDE = 1 << 13  # pixels; the largest images that models take today have 2,000
BILINEAR = 2  # Pillow's number, as in preprocessor_config.json


class Images:
    """Images of a folder; subfolders named by class give labels, and samples alternate between the classes."""

    random = False

    def __init__(self, path: Path, graph: Graph, folder: Path | None) -> None:
        self.name, self.notes = str(path), list[str]()
        self.spec = _pixels(specs(graph), path)
        self.settings = settings_of(folder)
        config = read_json(folder / "config.json") if folder is not None else {}
        self.files, self.labels = _find(path, config)
        self._cache: dict[int, Array] = {}
        self._bytes = 0
        if not self.settings:
            self.notes.append(
                "no preprocessor_config.json beside the model: images are only resized and scaled to 0..1"
            )

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> object:
        """Only images of equal size share a batch; where the model's size is static, all are."""
        return self._image(index).shape if not self._fixed() else None

    def _fixed(self) -> bool:
        return all(isinstance(d, int) for d in self.spec.shape[1:])

    def rows(self, indices: Sequence[int]) -> Batch:
        """Prepared images `[samples, channels, height, width]` and their labels."""
        pixels = np.stack([self._image(i) for i in indices])
        labels = None if self.labels is None else np.array([self.labels[i] for i in indices], np.int64)
        return Batch({self.spec.name: pixels}, labels)

    def _image(self, index: int) -> Array:
        if index in self._cache:
            return self._cache[index]
        a = prepare(self.files[index], self.settings, self.spec)
        if self._bytes + a.nbytes <= CACHE_BYTES:
            self._cache[index] = a
            self._bytes += a.nbytes
        return a


def _pixels(inputs: Sequence[TensorSpec], path: Path) -> TensorSpec:
    name = roles(inputs).get("pixels")
    for s in inputs:
        if s.name == name:
            return s
    raise DataError(f"{path}: holds no .npz files, and images need an input of shape [batch, channels, height, width]")


def settings_of(folder: Path | None) -> dict[str, Any]:
    """How the image processor of a folder prepares images, `{}` where there is none."""
    if folder is None:
        return {}
    settings = read_json(folder / "preprocessor_config.json")
    nested = read_json(folder / "processor_config.json").get("image_processor")
    return settings or (nested if isinstance(nested, dict) else {})


def _find(path: Path, config: Mapping[str, Any]) -> tuple[list[Path], list[int] | None]:
    """Files and labels; the class numbers are those of config.json where it names them, else alphabetical."""
    flat = sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS and p.is_file())
    classes = sorted(p for p in path.iterdir() if p.is_dir() and any(q.suffix.lower() in KINDS for q in p.iterdir()))
    if flat and classes:
        raise DataError(f"{path}: holds images both directly and in class folders; use one of the two")
    if not flat and not classes:
        raise DataError(f"{path}: holds no .npz files and no images")
    if flat:
        return flat, None
    known = {str(k): int(v) for k, v in (config.get("label2id") or {}).items()}
    number = {c: known.get(c.name, int(c.name) if c.name.isdecimal() else None) for c in classes}
    if any(n is None for n in number.values()):
        if len(known) > 0 and any(n is not None for n in number.values()):
            unknown = next(c.name for c, n in number.items() if n is None)
            raise DataError(f"{path}: class folder '{unknown}' is not in the model's config.json ({', '.join(known)})")
        number = {c: n for n, c in enumerate(classes)}
    columns = [[(p, number[c] or 0) for p in sorted(c.iterdir()) if p.suffix.lower() in KINDS] for c in classes]
    mixed = [x for row in itertools.zip_longest(*columns) for x in row if x is not None]
    return [p for p, _ in mixed], [n for _, n in mixed]


def prepare(file: Path, settings: Mapping[str, Any], spec: TensorSpec) -> Array:
    """One image as float32 `[channels, height, width]`: resize, crop, rescale, normalize as the settings say."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as e:
        raise DataError(f"{file}: images need pillow: pip install 'onnxcomp[image]'") from e
    channels = spec.shape[1] if isinstance(spec.shape[1], int) else 3
    if channels not in (1, 3):
        raise DataError(f"{file}: the model takes {channels} channels; images have 1 or 3")
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise DataError(f"{file}: cannot be read as an image: {e}") from e
    size = _size(settings, spec, image.size)
    if size is not None and not all(0 < n <= LARGEST_SIDE for n in size):
        raise DataError(
            f"{file}: the image processor asks for {size[0]} x {size[1]} pixels; 1 to {LARGEST_SIDE} a side"
        )
    if size is not None and size != image.size:
        image = image.resize(size, Image.Resampling(int(settings.get("resample", BILINEAR))))
    a = np.asarray(image, np.float32)
    a = a.reshape(*a.shape[:2], channels).transpose(2, 0, 1)
    if settings.get("do_center_crop") and settings.get("crop_size"):
        a = _crop(a, *_height_width(settings["crop_size"], file))
    return _scaled(a, settings, file)


def _scaled(a: Array, settings: Mapping[str, Any], file: Path) -> Array:
    if settings.get("do_rescale", True):
        a = a * np.float32(settings.get("rescale_factor") or 1 / 255)
    if settings.get("do_normalize") and settings.get("image_mean") is not None:
        mean, std = (np.array(settings[k], np.float32).reshape(-1, 1, 1) for k in ("image_mean", "image_std"))
        if len(mean) not in (1, a.shape[0]) or len(std) not in (1, a.shape[0]):
            raise DataError(f"{file}: image_mean has {len(mean)} channels, the model takes {a.shape[0]}")
        a = (a - mean) / std
    return np.ascontiguousarray(a, np.float32)


def _height_width(size: Any, file: Path) -> tuple[int, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if isinstance(size, dict) and "height" in size and "width" in size:
        height, width = int(size["height"]), int(size["width"])
        if 0 < height <= LARGEST_SIDE and 0 < width <= LARGEST_SIDE:
            return height, width
    raise DataError(f"{file}: the processor's crop size {size!r} is not understood")


def _size(settings: Mapping[str, Any], spec: TensorSpec, now: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height to resize to, or None to keep the image as it is."""
    height, width = spec.shape[2:]
    fixed = (width, height) if isinstance(height, int) and isinstance(width, int) else None
    size = settings.get("size")
    if not settings.get("do_resize", bool(size)) or not size:
        return None if settings.get("do_resize") is False else fixed
    if isinstance(size, dict) and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        w, h = now
        return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if isinstance(size, dict) and "height" in size and "width" in size:
        return int(size["width"]), int(size["height"])
    if isinstance(size, int):
        return size, size
    raise DataError(f"the image processor's size {size!r} is not understood; use height and width, or shortest_edge")


def _crop(a: Array, height: int, width: int) -> Array:
    """The center of an image `[channels, h, w]`; smaller ones are padded with zeros."""
    pad = [
        (0, 0),
        *(
            ((want - have + 1) // 2, (want - have) // 2) if want > have else (0, 0)
            for have, want in zip(a.shape[1:], (height, width), strict=True)
        ),
    ]
    a = np.pad(a, pad)
    top, left = (a.shape[1] - height) // 2, (a.shape[2] - width) // 2
    return a[:, top : top + height, left : left + width]
