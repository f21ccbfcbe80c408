"""What products with stored weights do, in any graph, raised or lowered: attention, feed-forward part or head.

Read off how values flow between them, since a lowered graph has no typed views any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxcomp.graph import Graph
from onnxcomp.graph.operators import ADDITIONS

__all__ = ["PRODUCTS", "product_roles"]

_INTEGER = ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "MatMulNBits")
PRODUCTS = frozenset(("MatMul", "Gemm", "FusedMatMul", "Einsum", *_INTEGER))
_ATTENTION = "Attention"  # how every fused one is called, but for its first words
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")  # which add the residual stream as well
_SIZES = ("Shape", "Size")  # give no numbers of their input on


def product_roles(g: Graph, weighted: Collection[ir.Node]) -> Mapping[ir.Node, str]:
    """`attention`, `feed-forward` or `head` for products with stored weights of the top graph; not all are one of them.

    A projection to or from an attention has no other product between; feed-forward products follow each other within a
    residual branch; behind those of a head nothing is added to the residual stream.
    """
    flow = _Flow(g, weighted)
    if not flow.cores:
        return {}
    found: dict[ir.Node, str] = {}
    for p in flow.bits:
        if flow.attends(p):
            found[p] = "attention"
        elif not flow.added[p]:
            found[p] = "head"
    near = sum(bit for p, bit in flow.bits.items() if p not in found)
    for p in flow.bits:
        if p not in found and (flow.before[p] | flow.after[p]) & near:
            found[p] = "feed-forward"
    return found


class _Flow:
    """How values flow between weighted products, by node; sets of products are bits of whole numbers.

    `before` and `after` have those next to a node, without one of them or an addition to the stream between; `added`
    says whether anything is added to the stream somewhere behind it.
    """

    def __init__(self, g: Graph, weighted: Collection[ir.Node]) -> None:
        self.nodes = list(g.nodes())
        self.bits = {n: 1 << i for i, n in enumerate(x for x in self.nodes if x in weighted)}
        self._sizes = {n for n in self.nodes if n.op_type in _SIZES}
        cores = self._cores()
        stops = {*self._sizes, *self.bits}
        self._behind = _spread(self.nodes, _givers, dict.fromkeys(cores, 1), stops)
        self._ahead = _spread(self.nodes[::-1], _takers, dict.fromkeys(cores, 1), stops)
        self.cores, ends = cores, self._stream_ends(cores)
        stops = {*self._sizes, *cores, *ends}
        self.before = _spread(self.nodes, _givers, self.bits, stops)
        self.after = _spread(self.nodes[::-1], _takers, self.bits, stops)
        self.added = _spread(self.nodes[::-1], _takers, dict.fromkeys(ends, 1), self._sizes)

    def attends(self, p: ir.Node) -> bool:
        """Whether a product projects to or from an attention."""
        return bool(self._behind[p] or self._ahead[p])

    def _cores(self) -> set[ir.Node]:
        """Fused attentions, and products of two values on the way to or from a Softmax."""
        products = [n for n in self.nodes if n.op_type in PRODUCTS]
        seeds = {n: 1 for n in self.nodes if n.op_type == "Softmax"}
        stops = {*products, *self._sizes}
        to = _spread(self.nodes[::-1], _takers, seeds, stops)
        since = _spread(self.nodes, _givers, seeds, stops)
        fused = {n for n in self.nodes if _ATTENTION in n.op_type}
        return fused | {n for n in products if n not in self.bits and (to[n] or since[n])}

    def _stream_ends(self, cores: Collection[ir.Node]) -> set[ir.Node]:
        """Additions of values that other products give: of a branch to the stream. A GELU adds what one gives."""
        seeds = {**self.bits, **{n: 1 << (len(self.bits) + i) for i, n in enumerate(cores)}}
        known = _spread(self.nodes, _givers, seeds, self._sizes)
        ends = set()
        for n in self.nodes:
            if n.op_type in (*ADDITIONS, *_SKIPS):
                values = [v for v in n.inputs[:2] if v is not None and v.const_value is None]
                given = [0 if (p := v.producer()) is None else seeds.get(p, known.get(p, 0)) for v in values]
                if len(set(given)) > 1:
                    ends.add(n)
        return ends


def _spread(
    order: Sequence[ir.Node],
    near: Callable[[ir.Node], Iterable[ir.Node]],
    seeds: Mapping[ir.Node, int],
    stops: Collection[ir.Node],
) -> dict[ir.Node, int]:
    """For each node the seeds that it is reached from through its neighbours, which come before it in that order."""
    found: dict[ir.Node, int] = {}
    for n in order:
        bits = 0
        for m in near(n):
            bits |= seeds[m] if m in seeds else 0 if m in stops else found.get(m, 0)
        found[n] = bits
    return found


def _givers(n: ir.Node) -> Iterator[ir.Node]:
    yield from (p for v in n.inputs if v is not None and (p := v.producer()) is not None and _carries(v, p))


def _takers(n: ir.Node) -> Iterator[ir.Node]:
    yield from (user for v in n.outputs if _carries(v, n) for user in v.consumers())


def _carries(v: ir.Value, producer: ir.Node) -> bool:
    """Whether a value hands on what its producer read, as run-time scales, which go around the product, do not."""
    return producer.op_type != "DynamicQuantizeLinear" or v is producer.outputs[0]
