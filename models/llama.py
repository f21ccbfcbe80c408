"""llama: Llama-like decoders with random weights, different in every layer, for speed and memory only.

`12x768` is built by transformers and exported; `0.85b` and `7b` are written as ONNX directly (RMSNormalization,
RotaryEmbedding, Attention of opset 23); weights are streamed to its data file in slices of 64 MB: memory does not
depend on the size of the model.

    python -m models.llama OUT --size 0.85b
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from models import randomise

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGN = 65536  # offsets that every system can map
DATA_NAME = "model.onnx.data"


@dataclass(frozen=True)
class Size:
    """The widths of a decoder with untied embeddings."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32000
    positions: int = 2048

    @property
    def head(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights, norm gains included."""
        attention = 2 * self.hidden * (self.hidden + self.kv_heads * self.head)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + 2 * self.vocab * self.hidden + self.hidden


SIZES = {
    "12x768": Size(768, 12, 2048, 12, 4),
    "0.85b": Size(2048, 16, 5632, 32, 8),
    "7b": Size(4096, 32, 11008, 32, 32),
}


class Weights:
    """An external data file that is written while the graph is built; keeps no tensor in memory."""

    def __init__(self, file: BinaryIO, folder: Path, seed: int) -> None:
        self.file, self.folder, self.rng = file, folder, np.random.default_rng(seed)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> ir.Value:
        """Normal weights [rows, columns] of standard deviation gain / sqrt(rows), written in slices of 64 MB."""
        deviation = np.float32(gain / np.sqrt(rows))
        step = max(1, (1 << 24) // columns)
        slices = (
            self.rng.standard_normal((min(step, rows - at), columns), np.float32) * deviation
            for at in range(0, rows, step)
        )
        return self._write(name, (rows, columns), slices)

    def gain(self, name: str, width: int) -> ir.Value:
        """Norm gains [width] around one."""
        return self._write(name, (width,), iter([1 + self.rng.standard_normal(width, np.float32) * np.float32(0.1)]))

    def table(self, name: str, array: np.ndarray) -> ir.Value:
        """A given float32 array."""
        return self._write(name, array.shape, iter([array]))

    def _write(self, name: str, shape: tuple[int, ...], slices: Iterator[np.ndarray]) -> ir.Value:
        import onnx_ir as ir

        self.file.write(b"\0" * (-self.file.tell() % ALIGN))
        offset = self.file.tell()
        for part in slices:
            self.file.write(np.ascontiguousarray(part).data)
        length = self.file.tell() - offset
        tensor = ir.ExternalTensor(
            DATA_NAME, offset, length, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name, base_dir=str(self.folder)
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)


class Builder:
    """The nodes and initializers of a graph under construction."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.nodes, self.initializers = weights, [], []

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: int | float | list[int]) -> ir.Value:
        """Add a node and return its output."""
        import onnx_ir as ir

        self.nodes.append(ir.node(kind, list(inputs), attributes=attributes))
        return self.nodes[-1].outputs[0]

    def keep(self, value: ir.Value) -> ir.Value:
        """Register an initializer."""
        self.initializers.append(value)
        return value

    def constant(self, name: str, numbers: list[int] | int) -> ir.Value:
        """A small int64 initializer."""
        import onnx_ir as ir

        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        return self.keep(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
        )

    def linear(self, x: ir.Value, name: str, rows: int, columns: int, gain: float = 1.0) -> ir.Value:
        """x [.., rows] times fresh weights [rows, columns]."""
        return self.op("MatMul", x, self.keep(self.weights.matrix(name, rows, columns, gain)))

    def norm(self, x: ir.Value, name: str, width: int) -> ir.Value:
        """RMS norm over the last axis with fresh gains."""
        return self.op("RMSNormalization", x, self.keep(self.weights.gain(name, width)), axis=-1, epsilon=1e-5)


@dataclass(frozen=True)
class Side:
    """Read by every layer: mask [B, 1, S, S], positions [B, S], rotary tables [positions, head / 2]."""

    mask: ir.Value
    positions: ir.Value
    cos: ir.Value
    sin: ir.Value


def side_inputs(b: Builder, size: Size, ids: ir.Value, mask: ir.Value) -> Side:
    """Positions 0.. and the causal mask joined with the padding mask."""
    axis_one, axes = b.constant("axis_one", [1]), b.constant("mask_axes", [1, 2])
    shape = b.op("Shape", ids)
    count = b.op("Squeeze", b.op("Slice", shape, axis_one, b.constant("two", [2])))
    steps = b.op("Range", b.constant("zero", 0), count, b.constant("one", 1))
    row = b.op("Unsqueeze", steps, b.constant("axis_zero", [0]))
    causal = b.op("LessOrEqual", row, b.op("Unsqueeze", steps, axis_one))
    real = b.op("Cast", b.op("Unsqueeze", mask, axes), to=9)
    angles = np.outer(np.arange(size.positions), 10000.0 ** (-np.arange(0, size.head, 2) / size.head))
    cos = b.keep(b.weights.table("rotary_cos", np.cos(angles).astype(np.float32)))
    sin = b.keep(b.weights.table("rotary_sin", np.sin(angles).astype(np.float32)))
    return Side(b.op("And", causal, real), b.op("Expand", row, shape), cos, sin)


def layer(b: Builder, size: Size, x: ir.Value, side: Side, at: int) -> ir.Value:
    """One pre-norm decoder layer: x [B, S, hidden] to the same."""
    name, kv, small = f"layers.{at}", size.kv_heads * size.head, 1 / np.sqrt(2 * size.layers)
    h = b.norm(x, f"{name}.input_norm", size.hidden)
    q = b.linear(h, f"{name}.q", size.hidden, size.hidden)
    k = b.linear(h, f"{name}.k", size.hidden, kv)
    v = b.linear(h, f"{name}.v", size.hidden, kv)
    q = b.op("RotaryEmbedding", q, side.cos, side.sin, side.positions, num_heads=size.heads)
    k = b.op("RotaryEmbedding", k, side.cos, side.sin, side.positions, num_heads=size.kv_heads)
    a = b.op("Attention", q, k, v, side.mask, q_num_heads=size.heads, kv_num_heads=size.kv_heads)
    x = b.op("Add", x, b.linear(a, f"{name}.o", size.hidden, size.hidden, small))
    h = b.norm(x, f"{name}.post_norm", size.hidden)
    gate = b.linear(h, f"{name}.gate", size.hidden, size.ffn)
    gate = b.op("Mul", gate, b.op("Sigmoid", gate))
    product = b.op("Mul", gate, b.linear(h, f"{name}.up", size.hidden, size.ffn))
    return b.op("Add", x, b.linear(product, f"{name}.down", size.ffn, size.hidden, small))


def write(out: str | Path, size: Size, seed: int = 0) -> Path:
    """Write `model.onnx` and its external data into `out`, one tensor at a time."""
    import onnx_ir as ir

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shape = ["batch", "sequence"]
    ids, mask = (
        ir.Value(name=n, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64))
        for n in ("input_ids", "attention_mask")
    )
    with (folder / DATA_NAME).open("wb") as file:
        b = Builder(Weights(file, folder, seed))
        side = side_inputs(b, size, ids, mask)
        x = b.op("Gather", b.keep(b.weights.matrix("embedding", size.vocab, size.hidden, np.sqrt(size.vocab))), ids)
        for at in range(size.layers):
            x = layer(b, size, x, side, at)
        logits = b.linear(b.norm(x, "final_norm", size.hidden), "head", size.hidden, size.vocab)
    logits.name, logits.shape, logits.type = "logits", ir.Shape([*shape, size.vocab]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [ids, mask], [logits], nodes=b.nodes, initializers=b.initializers, opset_imports={"": 23}, name="llama"
    )
    ir.save(ir.Model(graph, ir_version=11), folder / "model.onnx")
    return folder


def checkpoint(out: str | Path, seed: int = 0, size: Size = SIZES["12x768"]) -> Path:
    """Write a transformers folder with random weights of the given size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.positions,
    )
    return randomise.save(LlamaForCausalLM(config), out, seed)


def export(out: str | Path, size: str = "12x768", seed: int = 0, layers: int | None = None) -> Path:
    """Write the model of a named size as an ONNX folder; `0.85b` takes 3.4 GB of disk, `7b` 27 GB.

    Other than 12x768 it may have another number of `layers`.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    if size != "12x768":
        return write(out, dataclasses.replace(SIZES[size], layers=layers or SIZES[size].layers), seed)
    import onnxcomp as oc

    with tempfile.TemporaryDirectory() as scratch:
        return oc.export(checkpoint(scratch, seed), out, past=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="12x768")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="instead of the size's own; not of 12x768")
    args = parser.parse_args()
    print(export(args.out, args.size, args.seed, args.layers))


if __name__ == "__main__":
    main()
