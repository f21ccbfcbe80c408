"""Weights that a pass leaves alone stay what they are: ranges of the source's file, copied from there on saving."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.engine.manager import PassManager
from onnxcomp.files import storage
from onnxcomp.graph import Graph, scratch
from onnxcomp.graph.mapped import MappedTensor
from onnxcomp.maths import Array
from onnxcomp.passes.drop_layers import DropLayers
from onnxcomp.passes.low_rank import LowRank
from onnxcomp.passes.prune_ffn import PruneFfn
from onnxcomp.passes.slice import Slice
from onnxcomp.passes.sparsify import Sparsify
from onnxcomp.pipeline import Pass
from onnxcomp.runtime import payload
from onnxcomp.target import CPU
from tests import tiny

LARGE = 4096  # bytes: every matrix of the model, no vector

# The pass, and patterns of the weights that it must leave alone.
PASSES: dict[str, tuple[Callable[[Graph], Pass], tuple[str, ...]]] = {
    "prune-ffn": (
        lambda g: PruneFfn(ratio=0.5, multiple_of=1, skip=next(iter(PruneFfn().sites(g, CPU))).nodes),
        ("layers.0.*", "*.attention.*", "embeddings.*", "head.*"),
    ),
    "low-rank": (
        lambda g: LowRank(ratio=0.5, multiple=1, min_size=1024, skip=("layers.0.*", "head.*")),
        ("layers.0.*", "embeddings.*", "head.*"),
    ),
    "drop-layers": (lambda g: DropLayers(ratio=0.34, protect=0, repair="none"), ("*",)),
    "sparsify": (
        lambda g: Sparsify(skip=("layers.0.*", "head.*")),
        ("layers.0.*", "embeddings.*", "head.*"),
    ),
    "slice": (lambda g: Slice(ratio=0.25, multiple=1), ()),  # turns every weight that reads or writes the stream
}


def large(g: Graph) -> dict[str, ir.TensorProtocol]:
    held = {str(v.name): v.const_value for v in g.model.graph.initializers.values()}
    return {name: t for name, t in held.items() if t is not None and t.nbytes >= LARGE}


def spy(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the tensors of a data file that are mapped or copied as a whole, which copying in pieces is not."""
    seen: set[str] = set()
    mapped, copied = MappedTensor.numpy, MappedTensor.tobytes

    def numpy(t: MappedTensor) -> Array:
        seen.add(str(t.name))
        return mapped(t)

    def tobytes(t: MappedTensor) -> bytes:
        seen.add(str(t.name))
        return copied(t)

    monkeypatch.setattr(MappedTensor, "numpy", numpy)
    monkeypatch.setattr(MappedTensor, "tobytes", tobytes)
    return seen


@pytest.mark.parametrize("name", PASSES)
def test_untouched_weights_stay_in_the_file_of_the_source(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "SCRATCH_FROM", LARGE)
    monkeypatch.setattr(payload, "PREPACK_BELOW", 0)  # compared block by block, as a large model is
    monkeypatch.setattr(storage, "INLINE_LIMIT", 0)
    path = tiny.external(tiny.decoder(layers=3, hidden=64, heads=4, ffn=160), tmp_path)
    source = storage.load(path)
    places = {n: (str(t.location), t.offset, t.nbytes) for n, t in large(storage.load(path)).items()}
    before, seen = large(source), spy(monkeypatch)
    make, patterns = PASSES[name]
    data = [tiny.feeds(source, 2, 6, seed=i) for i in range(4)]
    result = PassManager([make(source)], memory=1 << 14).run(source, data[:3], data[3:])
    written = result.save(tmp_path / "out")
    after = large(result.model)
    left = {n for n in after if any(fnmatchcase(n, p) for p in patterns)}
    assert bool(left) == bool(patterns)
    for n in left:
        t = after[n]
        assert t is before[n]
        assert isinstance(t, MappedTensor)
        assert (str(t.location), t.offset, t.nbytes) == places[n]
    assert not seen & left  # neither statistics, pass, comparison nor saving had one in memory as a whole
    made = {n: t for n, t in after.items() if t is not before.get(n)}
    assert bool(made) == (name != "drop-layers")
    assert all(isinstance(t.numpy(), np.memmap) for t in made.values())  # and what is new lies in files too
    saved = large(storage.load(written))
    for n, t in after.items():
        np.testing.assert_array_equal(saved[n].numpy(), t.numpy())
