"""Datasets: batches from files, folders, functions or Python objects, checked against the model and repeatable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.data import arrays
from onnxcomp.data.arguments import whole
from onnxcomp.data.input_check import InputCheck
from onnxcomp.data.inputs import Batch, Derived, Source, TensorSpec, roles, specs, vocabulary
from onnxcomp.data.untrusted import guarded
from onnxcomp.errors import DataError
from onnxcomp.graph import Graph

__all__ = [
    "Batch",
    "Dataset",
    "TensorSpec",
    "as_dataset",
    "load_data",
    "open_data",
    "overlap",
    "roles",
    "specs",
    "static_batch",
]

RANDOM_SAMPLES = 32  # where nobody says how many
MOST_RANDOM = 1 << 18  # random samples at once: they are counted one by one, some microseconds each


class Dataset:
    """Samples in batches; every iteration gives the same batches.

    The samples, their split and their fingerprint depend neither on the batch size nor on the order of use.
    """

    def __init__(
        self,
        source: Source,
        batch: int = 8,
        check: InputCheck | None = None,
        indices: Sequence[int] | None = None,
        fixed_batch: bool = False,
    ):
        if batch < 1:
            raise DataError(f"the batch size must be at least 1, got {batch}")
        self._source, self._check, self.batch, self._fixed_batch = source, check, batch, fixed_batch
        self._change: Callable[[Batch], Batch] | None = None
        self.indices = tuple(range(len(source)) if indices is None else indices)
        if fixed_batch:  # the model takes batches of exactly this size
            self.indices = self.indices[: len(self.indices) // batch * batch]
        self._hashes: dict[int, bytes] = {}

    @property
    def name(self) -> str:
        """What the data is called in reports."""
        return self._source.name

    @property
    def source(self) -> Source:
        """What gives the samples."""
        return self._source

    @property
    def random(self) -> bool:
        """Whether the samples are random numbers, from which nothing follows for the model's quality."""
        return self._source.random

    @property
    def notes(self) -> list[str]:
        """What loading changed: arrays ignored, texts truncated, inputs derived."""
        return self._source.notes

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._rows, self._groups())

    def _groups(self) -> Iterator[list[int]]:
        """The indices of each batch."""
        group: list[int] = []
        for i in self.indices:
            if group and (len(group) == self.batch or self._source.key(i) != self._source.key(group[0])):
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _rows(self, indices: Sequence[int]) -> Batch:
        return self._as_fed(self._source.rows(indices), self._check, indices[0])

    def _as_fed(self, batch: Batch, check: InputCheck | None, first: int) -> Batch:
        batch = batch if check is None else check(batch, first, self._source.notes)
        return batch if self._change is None else self._change(batch)

    def _select(self, indices: Sequence[int], batch: int | None = None) -> Dataset:
        size = self.batch if self._fixed_batch else batch or self.batch
        part = Dataset(self._source, size, self._check, indices, self._fixed_batch)
        part._hashes, part._change = self._hashes, self._change
        return part

    def changed(self, change: Callable[[Batch], Batch]) -> Dataset:
        """The same samples, each checked batch changed."""
        part = Dataset(self._source, self.batch, self._check, self.indices, self._fixed_batch)
        part._change = change
        return part

    def of_result(self) -> Dataset:
        """The same samples as a result takes them: what another model makes of them, that one's result makes."""
        if not isinstance(self._source, Derived):
            return self
        part = Dataset(self._source.of_result(), self.batch, self._check, self.indices, self._fixed_batch)
        part._change = self._change
        return part

    def copied(self, make: Callable[[Source], Source], copies: int) -> Dataset:
        """These samples, and behind them `copies` of each: `make` gives a source with copy `c` of `i` at `i + c n`."""
        n = len(self._source)
        indices = [i + c * n for c in range(copies + 1) for i in self.indices]
        part = Dataset(make(self._source), self.batch, self._check, indices, self._fixed_batch)
        part._change = self._change
        return part

    def checked(self) -> Dataset:
        """This dataset, after checking every batch; raises `DataError`."""
        if not len(self):
            few = (
                f"fewer than the {self.batch} samples of the model's fixed batch" if self._fixed_batch else "no samples"
            )
            raise DataError(f"{self.name}: holds {few}")
        for _ in self:
            pass
        return self

    def head(self, n: int) -> Dataset:
        """The first `n` samples."""
        return self._select(self.indices[:n])

    def leading(self, n: int) -> tuple[Dataset, int]:
        """The first batches, whole, that hold at most `n` samples together, but at least one; and their number."""
        total, count = 0, 0
        for group in self._groups():
            if count and total + len(group) > n:
                break
            total, count = total + len(group), count + 1
        return self.head(total), count

    def spread(self, n: int) -> Dataset:
        """At most `n` samples at equal distances, so that data sorted by class or length stays represented."""
        if n >= len(self):
            return self
        return self._select([self.indices[i * len(self) // n] for i in range(n)])

    def singly(self, n: int) -> Dataset:
        """At most `n` samples at equal distances, one by one; one batch where the model takes but one size of them."""
        return self.leading(1)[0] if self._fixed_batch else self.spread(n).rebatch(1)

    def rebatch(self, batch: int) -> Dataset:
        """The same samples in batches of another size."""
        return self._select(self.indices, batch)

    def split(self, holdout: int = 5) -> tuple[Dataset, Dataset]:
        """Calibration and evaluation parts: every `holdout`-th sample is held out; raises `DataError`.

        Where the model takes batches of one size only, whole batches are held out, the last one at least.
        """
        size = self.batch if self._fixed_batch else 1
        units = [self.indices[i : i + size] for i in range(0, len(self), size)]
        if len(units) < (2 if self._fixed_batch else holdout):
            raise DataError(
                f"{self.name}: {len(self)} samples are too few to hold one in {holdout} out for evaluation; "
                "give evaluation data of its own (--eval)"
            )
        every = min(holdout, len(units))
        held = [i for n, unit in enumerate(units, 1) for i in unit if n % every == 0]
        kept = [i for n, unit in enumerate(units, 1) for i in unit if n % every]
        return self._select(kept), self._select(held)

    def _hash(self, i: int) -> bytes:
        """Hash of the feeds of one sample, or of what they are derived from."""
        if i not in self._hashes:
            digest = hashlib.sha256()
            check = None if self._check is None else self._check.of_any_batch()
            given = self._source.given if isinstance(self._source, Derived) else None
            fed = self._as_fed(self._source.rows([i]), check, i) if given is None else given.rows([i])
            for name, a in sorted(fed.feeds.items()):
                digest.update(f"{name} {a.dtype} {a.shape} ".encode() + np.ascontiguousarray(a).tobytes())
            self._hashes[i] = digest.digest()
        return self._hashes[i]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all samples and labels in order, whatever the batch size."""
        digest, source = hashlib.sha256(), self._source
        if isinstance(source, Derived):
            digest.update(source.content().encode())
            source = source.given
        for i in self.indices:
            digest.update(self._hash(i))
            labels = source.rows([i]).labels
            if labels is not None:
                digest.update(f"{labels.dtype} {labels.shape} ".encode() + np.ascontiguousarray(labels).tobytes())
        return digest.hexdigest()


def overlap(a: Dataset, b: Dataset) -> int:
    """How many samples of `b` are also in `a`, by content; labels do not count."""
    known = {a._hash(i) for i in a.indices}
    return sum(b._hash(i) in known for i in b.indices)


def as_dataset(x: Any, graph: Graph | None = None, *, batch: int = 8, name: str = "") -> Dataset:
    """A `Dataset` from what a Python caller has: one, a path, a dict of arrays, or an iterable of feeds or `Batch`."""
    if isinstance(x, Dataset):
        return x
    if isinstance(x, (str, Path)):
        if graph is None:
            raise DataError(f"{x}: reading data needs the model it is for; call load_data(source, graph, folder)")
        return load_data(x, graph, graph.path.parent if graph.path else None, batch=batch)
    axes = None if graph is None else arrays.axes_of(specs(graph))
    source = arrays.Rows.of(x, name or f"{type(x).__name__} of batches", axes)
    check = None if graph is None else InputCheck(specs(graph), vocabulary(graph), source.name)
    fixed = static_batch(graph)
    return Dataset(source, fixed or max(batch, source.widest), check, fixed_batch=fixed is not None).checked()


def static_batch(graph: Graph | None) -> int | None:
    """The batch size of a model with a static batch axis."""
    ports = specs(graph) if graph is not None else []
    sizes = [s.shape[s.samples] for s in ports if s.samples is not None]
    return next((d for d in sizes if isinstance(d, int)), None)


def load_data(
    src: str | Path,
    graph: Graph,
    folder: Path | None,
    *,
    batch: int = 8,
    samples: int | None = None,
    sequence: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    allow_code: bool = False,
    seed: int = 0,
) -> Dataset:
    """Samples for a model from a `SRC`; `folder` holds its tokenizer or image processor, `samples` limits their number.

    `.npz`, a folder of those, `.jsonl`, `.txt`, a folder of images, `package.module:function` (with `allow_code`) or
    `random`; columns are those of `.jsonl` (`a,b` for pairs). Every batch is checked here; raises `DataError` with
    source, input and sample.
    """
    for name, number, least in (
        ("samples", samples, 1),
        ("batch", batch, 1),
        ("sequence", sequence, 1),
        ("seed", seed, 0),
    ):
        whole(name, number, least)
    with guarded(f"{src}: cannot be used with the files beside the model"):
        columns = (text_column, label_column)
        return _loaded(str(src), graph, folder, batch, samples, sequence, columns, allow_code, seed)


def _loaded(
    src: str, graph: Graph, folder: Path | None, batch: int, samples: int | None, sequence: int | None,
    columns: tuple[str | None, str | None], code: bool, seed: int,
) -> Dataset:  # fmt: skip
    inputs, vocab = specs(graph), vocabulary(graph)
    fixed = static_batch(graph)
    if fixed and (samples is not None or src == "random"):  # at least one whole batch
        samples = max(samples or RANDOM_SAMPLES, fixed)
    source = open_data(
        src, graph, folder, samples=samples, sequence=sequence, columns=columns, allow_code=code, seed=seed
    )
    data = Dataset(source, fixed or batch, InputCheck(inputs, vocab, source.name), fixed_batch=fixed is not None)
    if samples is not None:
        data = data.spread(samples)
    if fixed and len(source) > len(data):
        omitted = len(source) - len(data)
        source.notes.append(f"{omitted} samples were left out: the model takes batches of exactly {fixed}")
    return data.checked()


def open_data(
    src: str,
    graph: Graph,
    folder: Path | None,
    *,
    samples: int | None,
    sequence: int | None,
    columns: tuple[str | None, str | None],
    allow_code: bool,
    seed: int,
) -> Source:
    """The samples behind a `SRC`, not checked yet; raises `DataError` for one of no known kind."""
    from onnxcomp.data import images, texts

    path, axes = Path(src), arrays.axes_of(specs(graph))
    if src == "random":
        if (fixed := static_batch(graph) or 0) > MOST_RANDOM:
            raise DataError(
                f"the model takes {fixed:,} samples at once, and random data has at most {MOST_RANDOM:,}; give data"
            )
        return arrays.Random(graph, folder, samples or RANDOM_SAMPLES, sequence, seed)
    if not path.exists() and ":" in src:
        return arrays.from_function(src, allow_code, axes)
    if path.is_dir():
        if sorted(path.glob("*.npz")):
            return arrays.Npz(sorted(path.glob("*.npz")), src, axes)
        return images.Images(path, graph, folder)
    if not path.exists():
        raise DataError(
            f"{src}: no such file or folder. Data is an .npz, .jsonl or .txt file, a folder of .npz files or images, "
            "package.module:function, or the word random"
        )
    if path.suffix == ".npz":
        return arrays.Npz([path], src, axes)
    if path.suffix in (".jsonl", ".txt"):
        return texts.open_text(path, graph, folder, sequence, texts.Columns(*columns))
    raise DataError(f"{src}: unknown kind of data '{path.suffix}'; use .npz, .jsonl, .txt or a folder of images")
