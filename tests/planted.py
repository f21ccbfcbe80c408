"""Faults planted in compressed models, whose places are known: what must find them is judged by these."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import blocks
from onnxcomp.data.datasets import Dataset, as_dataset
from onnxcomp.engine.manager import PassManager
from onnxcomp.engine.recipe import parse_pass
from onnxcomp.engine.walk import Shared
from onnxcomp.errors import GateFailed
from onnxcomp.graph import Graph, Site
from onnxcomp.passes.quantize_weights import QuantizeWeights
from onnxcomp.pipeline import Env, Fidelity, Pass, Stage
from onnxcomp.reports.outcome import Culprit
from onnxcomp.target import Target
from onnxcomp.validation.gates import Gate
from tests import zoo

__all__ = ["ARCHITECTURES", "FAULTS", "Case", "cases"]

# Each as two exporters write it: the first is the original, the second is what is compressed.
ARCHITECTURES = {
    "bert": ("bert.dynamo-sdpa-18", "bert.legacy-sdpa-14"),
    "gpt2": ("gpt2.dynamo-sdpa-18", "gpt2.legacy-sdpa-14"),
    "qwen2": ("qwen2.transformers-sdpa-23", "qwen2.transformers-sdpa-23"),
    "opt": ("opt.legacy-eager-16", "opt.legacy-eager-16"),
    "bart": ("bart.dynamo-sdpa-17", "bart.dynamo-eager-17"),
}
INT8 = ["canonicalize", "cleanup", "quantize-weights: {bits: 8, method: nearest, min_size: 1, block: channel}"]


def weight(g: Graph, rng: np.random.Generator) -> tuple[str, ...]:
    """One stored weight of one linear takes the sign and size that it has least."""
    x = _pick(g, rng)
    v = x.weight if x.dequantize is None else x.dequantize.inputs[0]
    a = g.array(v).copy()
    at = np.unravel_index(int(np.abs(a.astype(np.float32)).argmax()), a.shape)
    limits = np.iinfo(a.dtype) if a.dtype.kind in "iu" else None
    a[at] = (limits.min if float(a[at]) > 0 else limits.max) if limits else -4 * a[at]
    g.put(v, a)
    return _names(x)


def scale(g: Graph, rng: np.random.Generator) -> tuple[str, ...]:
    """The scales of one linear's codes are twice what they were; of a float one, its weights."""
    x = _pick(g, rng)
    v = x.weight if x.dequantize is None else x.dequantize.inputs[1]
    g.put(v, g.array(v) * g.array(v).dtype.type(2))
    return _names(x)


def mask(g: Graph, rng: np.random.Generator) -> tuple[str, ...]:
    """One attention sees what it must not, and nothing else."""
    found = [n for n in g.nodes("Attention") if n.domain == ""]
    node = found[int(rng.integers(len(found)))]
    v = node.inputs[3] if len(node.inputs) > 3 else None
    if v is None:
        g.set_attr(node, is_causal=1 - node.attributes.get_int("is_causal", 0))
    elif v.dtype is ir.DataType.BOOL:
        g.set_input(node, 3, g.op("Not", v))
    else:
        hidden = g.op("Less", v, np.array(-1.0, v.dtype.numpy()))
        g.set_input(node, 3, g.op("Where", hidden, np.array(0, v.dtype.numpy()), np.array(-1e4, v.dtype.numpy())))
    return (str(node.name),)


def bias(g: Graph, rng: np.random.Generator) -> tuple[str, ...]:
    """One linear's bias is gone."""
    x = _pick(g, rng, biased=True)
    product = x.node.outputs[0]
    if x.add is None:
        x.node.resize_inputs(2)
    else:
        g.replace(x.add.outputs[0], product)
    return _names(x)


FAULTS: dict[str, Callable[[Graph, np.random.Generator], tuple[str, ...]]] = {
    "weight": weight,
    "scale": scale,
    "mask": mask,
    "bias": bias,
}


def _pick(g: Graph, rng: np.random.Generator, *, biased: bool = False) -> blocks.Linear:
    inside = [x for layer in blocks.layers(g) for x in layer.linears if not biased or x.bias is not None]
    return inside[int(rng.integers(len(inside)))]


def _names(x: blocks.Linear) -> tuple[str, ...]:
    return tuple(str(node.name) for node in (x.node, x.add) if node is not None)


@dataclass(frozen=True)
class Faulty(QuantizeWeights):
    """A pass that quantizes, and makes one mistake."""

    name: ClassVar[str] = "faulty"
    case: str = ""

    def run(self, g: Graph, env: Env) -> None:
        """Quantize, then plant the fault."""
        super().run(g, env)
        architecture, fault, seed = self.case.split("-")
        Case(architecture, fault, int(seed)).plant(g)


@dataclass(frozen=True)
class Harmless(Pass):
    """A lossy pass that loses next to nothing."""

    name: ClassVar[str] = "harmless"
    stage: ClassVar[Stage] = Stage.RESCALE
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    def sites(self, g: Graph, target: Target) -> list[Site]:
        """The first norm."""
        return [x.site for x in blocks.norms(g)[:1]]

    def run(self, g: Graph, env: Env) -> None:
        """Change its gain a little."""
        v = blocks.norms(g)[0].gain
        g.put(v, g.array(v) * np.float32(1 + 1e-6))


@dataclass(frozen=True)
class Case:
    """An architecture, a kind of fault and a seed for its place."""

    architecture: str
    fault: str
    seed: int

    def original(self) -> Graph:
        """The model as the first exporter writes it."""
        return Graph(zoo.load_graph(ARCHITECTURES[self.architecture][0]))

    def data(self) -> Dataset:
        """Random inputs without padding."""
        a, _ = zoo.kept()[ARCHITECTURES[self.architecture][0]]
        return as_dataset([zoo.feeds(a, 1, 9 + i) for i in range(4)], self.original())

    def compressed(self) -> Graph:
        """The model of the other exporter with weights of 8 bits."""
        made = Graph(zoo.load_graph(ARCHITECTURES[self.architecture][1]))
        return PassManager([parse_pass(p) for p in INT8]).run(made, self.data()).model

    def planted(self) -> tuple[Graph, tuple[str, ...]]:
        """The compressed model with the fault, and the nodes that it is in."""
        g = self.compressed()
        return g, self.plant(g)

    def plant(self, g: Graph) -> tuple[str, ...]:
        """Put the fault into a model; the nodes that it is in."""
        names = FAULTS[self.fault](g, np.random.default_rng([self.seed, zlib.crc32(self.architecture.encode())]))
        g.sweep()
        g.sort()
        return names

    def bisected(self, gate: str) -> tuple[Culprit, tuple[str, ...]]:
        """Whom the engine blames where one of two lossy passes plants the fault, and the nodes that it is in."""
        faulty = Faulty(
            bits=8, method="nearest", min_size=1, block="channel", case=f"{self.architecture}-{self.fault}-{self.seed}"
        )
        passes = [parse_pass("canonicalize"), parse_pass("cleanup"), Harmless(), faulty]
        manager = PassManager(passes, gate=Gate([gate]), bisect=True, shared=Shared(advise=False))
        try:
            manager.run(Graph(zoo.load_graph(ARCHITECTURES[self.architecture][1])), self.data(), self.data())
        except GateFailed as e:
            return e.report.culprit, self.planted()[1]  # type: ignore[attr-defined, return-value]
        raise AssertionError(f"{self}: the gate {gate} did not refuse it")


def cases(seed: int = 0) -> list[Case]:
    """Every fault in every architecture."""
    return [Case(a, f, seed) for a in ARCHITECTURES for f in FAULTS]
