"""Products with one weight of a table for each expert: those of the chosen experts, or all of them one by one."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.graph import Graph, Site
from onnxcomp.graph.values import sole_use

__all__ = ["BatchedLinear", "batched_linears"]


@dataclass(frozen=True)
class BatchedLinear:
    """A MatMul with weights `[experts, K, N]` on its right, or `[experts, N, K]` on its left, as experts store them.

    `gather` takes the chosen experts' weights for each row; without it every expert has rows of its own.
    """

    node: ir.Node
    table: ir.Value
    input: ir.Value
    gather: ir.Node | None
    left: bool

    @property
    def name(self) -> str:
        """The name of the product's node."""
        return str(self.node.name)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, fan-in `K` and fan-out `N`."""
        assert self.table.shape is not None
        e, a, b = self.table.shape.numpy()
        return (e, b, a) if self.left else (e, a, b)

    @property
    def fan_in(self) -> int:
        """The table's axis over which a product sums."""
        return 2 if self.left else 1

    @property
    def site(self) -> Site:
        """The place in the graph."""
        return Site(self.name, (self.name,), "experts")


def batched_linears(g: Graph) -> list[BatchedLinear]:
    """Every product with the weights of a table of experts, in graph order."""
    matches = (_batched(g, node, at) for node in g.nodes("MatMul") if node.domain == "" for at in (0, 1))
    return [x for x in matches if x is not None]


def _batched(g: Graph, node: ir.Node, at: int) -> BatchedLinear | None:
    weights, x = node.inputs[at], node.inputs[1 - at]
    if weights is None or x is None or g.is_constant(x):
        return None
    if _is_table(g, weights):
        return BatchedLinear(node, weights, x, None, at == 0)
    gather, use = weights.producer(), sole_use(weights)
    if gather is None or use is None or gather.op_type not in ("Gather", "GatherND") or gather.inputs[0] is None:
        return None
    whole = gather.attributes.get_int("axis", 0) == 0 and gather.attributes.get_int("batch_dims", 0) == 0
    rows = weights.shape is not None and len(weights.shape) == 3  # a single matrix is no batch
    ok = whole and rows and _is_table(g, gather.inputs[0])
    return BatchedLinear(node, gather.inputs[0], x, gather, at == 0) if ok else None


def _is_table(g: Graph, v: ir.Value) -> bool:
    """Whether a value is a constant with a matrix for each of several experts."""
    tensor = g.tensor(v)
    return tensor is not None and len(tensor.shape) == 3 and int(tensor.shape[0]) > 1  # type: ignore[arg-type]
