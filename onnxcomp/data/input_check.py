"""The checks that batches must pass before they are fed to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxcomp.data.inputs import Batch, TensorSpec, completed, past_length, roles, total_mask
from onnxcomp.errors import DataError
from onnxcomp.maths import Array

__all__ = ["InputCheck"]


class InputCheck:
    """The checks that every batch must pass before it is fed; a failure is a `DataError` naming input and sample."""

    def __init__(self, inputs: Sequence[TensorSpec], vocab: Mapping[str, int], source: str) -> None:
        self.inputs, self.vocab, self.source = list(inputs), dict(vocab), source

    def __call__(self, batch: Batch, first: int = 0, notes: list[str] | None = None) -> Batch:
        """The batch in the model's types, axes and input order; `first` is the index of its first sample, for errors.

        Samples are along the first axis of what is given.
        """
        given = {
            s.name: self._tensor(s, _samples_in_place(s, np.asarray(batch.feeds[s.name])), first)
            for s in self.inputs
            if s.name in batch.feeds
        }
        feeds, notes_made = completed(batch.feeds | given, self.inputs)
        wanted = [s.name for s in self.inputs]
        unknown = [n for n in feeds if n not in wanted]
        if missing := [n for n in wanted if n not in feeds]:
            extra = f"; it has {', '.join(map(repr, unknown))} instead" if unknown else ""
            raise DataError(f"{self.source}: the model's input '{missing[0]}' is missing{extra}")
        for note in [*notes_made, *(f"array '{n}' is no input of the model and was ignored" for n in unknown)]:
            if notes is not None and note not in notes:
                notes.append(note)
        out = {s.name: self._tensor(s, np.asarray(feeds[s.name]), first) for s in self.inputs}
        self._axes(out, first)
        labels = batch.labels
        size = next((out[s.name].shape[s.samples] for s in self.inputs if s.samples is not None), 1)
        if labels is not None and len(labels) != size:
            raise DataError(f"{self.source}: {len(labels)} labels for {size} samples, from sample {first} on")
        return Batch(out, labels, size)

    def of_any_batch(self) -> InputCheck:
        """The same checks for any number of samples, where the model takes batches of one size only."""
        return InputCheck([_open(s) for s in self.inputs], self.vocab, self.source)

    def _where(self, s: TensorSpec, first: int, bad: Array | None = None) -> str:
        row = int(np.argwhere(bad)[0][0]) if bad is not None and bad.ndim else 0
        return f"{self.source}: input '{s.name}', sample {first + row}"

    def _tensor(self, s: TensorSpec, a: Array, first: int) -> Array:
        if a.ndim != len(s.shape):
            raise DataError(f"{self._where(s, first)}: has rank {a.ndim} {a.shape}, the model takes {_show(s)}")
        for axis, (have, want) in enumerate(zip(a.shape, s.shape, strict=True)):
            if isinstance(want, int) and have != want:
                raise DataError(f"{self._where(s, first)}: axis {axis} is {have}, the model takes {_show(s)}")
        if any(d == 0 for axis, d in enumerate(a.shape) if axis != s.cache):
            raise DataError(f"{self._where(s, first)}: is empty, shape {a.shape}")
        a = self._cast(s, a, first)
        if a.dtype.kind not in "iubSUO":
            bad = ~np.isfinite(a.astype(np.float32) if a.dtype.kind == "V" or a.itemsize < 2 else a)
            if bad.any():
                raise DataError(f"{self._where(s, first, bad)}: holds NaN or infinity")
        rows = self.vocab.get(s.name)
        if rows is not None and s.integer:
            bad = (a < 0) | (a >= rows)
            if bad.any():
                raise DataError(
                    f"{self._where(s, first, bad)}: id {a[bad][0]} is outside 0 to {rows - 1}, the rows of the model's "
                    "embedding; was it made with another tokenizer?"
                )
        return a

    def _cast(self, s: TensorSpec, a: Array, first: int) -> Array:
        """The array in the model's type; raises `DataError` where a value changes or a narrower float overflows."""
        if a.dtype == s.dtype:
            return a
        real = "f" if a.dtype.kind == "V" else a.dtype.kind
        wanted_real = s.dtype.kind in "fV"
        if a.dtype.kind in "OSU" or (real == "f" and not wanted_real) or real == "c":
            raise DataError(f"{self._where(s, first)}: has type {a.dtype}, the model takes {s.dtype}; convert it first")
        with np.errstate(over="ignore", invalid="ignore"):
            out = a.astype(s.dtype)
            same = np.isfinite(out.astype(np.float64)) | ~np.isfinite(a) if real == "f" else out.astype(a.dtype) == a
        if not same.all():
            raise DataError(
                f"{self._where(s, first, ~same)}: {a[~same][0]} of type {a.dtype} does not fit the model's {s.dtype}"
            )
        return out

    def _axes(self, feeds: dict[str, Array], first: int) -> None:
        """Check that axes of one name have one size in all inputs, and that all give equally many samples."""
        sizes: dict[str, tuple[int, str]] = {}
        for s in self.inputs:
            for axis, (have, want) in enumerate(zip(feeds[s.name].shape, s.shape, strict=True)):
                name = "first axis" if axis == s.samples == 0 else "samples" if axis == s.samples else f"axis '{want}'"
                name = "tokens in the cache" if axis == s.cache else name
                if axis not in (s.samples, s.cache) and (isinstance(want, int) or want == "?"):
                    continue
                was, other = sizes.setdefault(name, (have, s.name))
                if was != have:
                    places = f"is {was} in '{other}' but {have} in '{s.name}'"
                    raise DataError(f"{self.source}: from sample {first} on, the {name} {places}")
        self._lengths(feeds, first)

    def _lengths(self, feeds: dict[str, Array], first: int) -> None:
        """Check that a mask over cached and new tokens has as many entries as there are of both."""
        mask, tokens = total_mask(self.inputs), roles(self.inputs).get("tokens", "")
        past, new = past_length(feeds, self.inputs), feeds[tokens].shape[1] if tokens else 0
        if mask is not None and feeds[mask.name].shape[1] != past + new:
            raise DataError(
                f"{self.source}: from sample {first} on, '{mask.name}' has {feeds[mask.name].shape[1]} entries for "
                f"{past} tokens in the cache and {new} new ones"
            )


def _open(s: TensorSpec) -> TensorSpec:
    return replace(s, shape=tuple("samples" if axis == s.samples else d for axis, d in enumerate(s.shape)))


def _show(s: TensorSpec) -> str:
    return f"{s.dtype.name}[{', '.join(map(str, s.shape))}]"


def _samples_in_place(s: TensorSpec, a: Array) -> Array:
    """An array whose samples are along the first axis, as the model takes it."""
    return np.moveaxis(a, 0, s.samples) if s.samples and a.ndim > s.samples else a
