"""The owner of a model in memory: every edit goes through `Graph`, which counts edits and records the nodes touched."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedOpsetsPass,
)

from onnxcomp.errors import ModelError, NotConstant
from onnxcomp.graph import graphsurgeon, valid
from onnxcomp.graph.groups import Group
from onnxcomp.graph.identities import drop_identities
from onnxcomp.graph.inference import infer_shapes
from onnxcomp.graph.interface import interface as interface_of
from onnxcomp.graph.interface import same_interface
from onnxcomp.graph.operators import ONNX_ONLY
from onnxcomp.graph.records import Covered, Declined, Noted, Site
from onnxcomp.graph.scratch import as_tensor, release_weights
from onnxcomp.graph.sweeping import remove_unused
from onnxcomp.graph.take import cut_group
from onnxcomp.maths import Array

__all__ = ["Graph"]

CONTRIB = "com.microsoft"
# Bytes of mapped weights read after which their pages are given back, where a graph is too large to stay in memory.
RELEASE_AFTER = 256 << 20


def _is_known(node: ir.Node) -> bool:
    return not node.domain or (node.domain == CONTRIB and node.op_type not in ONNX_ONLY)


class Graph:
    """An `onnx_ir.Model` with counted edits; raises `ModelError` when an edit would break it."""

    def __init__(self, model: ir.Model, path: Path | None = None) -> None:
        self.model = model
        self.path = path
        self.edits = 0
        self.touched: set[str] = set()
        self.declined: list[Declined] = []
        self.noted: list[Noted] = []
        self.covered: list[Covered] = []
        self.spool: Path | None = None  # folder for large new constants; None keeps them in memory
        self._read = 0
        self._counter = itertools.count()
        self._names = self._give_names()
        self.interface = interface_of(model.graph)

    # ---- reading -------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> list[ir.Value]:
        """Graph inputs that are fed at run time (initializers that are also listed as inputs are left out)."""
        return [v for v in self.model.graph.inputs if v.name not in self.model.graph.initializers]

    @property
    def outputs(self) -> list[ir.Value]:
        """Graph outputs, in order."""
        return list(self.model.graph.outputs)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.model.opset_imports.get("", 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all constants, each counted once however often it is used."""
        tensors = (v.const_value for graph in self.model.graphs() for v in graph.initializers.values())
        return sum({id(t): t.nbytes for t in tensors if t is not None}.values())

    def nodes(self, *ops: str) -> Iterator[ir.Node]:
        """Top-level nodes in order, all or those of the named operator types; safe to edit while iterating.

        A name means ONNX's or ONNX Runtime's operator; one of the same name in a set of the user's own is another.
        """
        for node in list(self.model.graph):
            if node.graph is not None and (not ops or (node.op_type in ops and _is_known(node))):
                yield node

    def node(self, name: str) -> ir.Node:
        """The top-level node of that name; raises `ModelError` if there is none."""
        for node in self.model.graph:
            if node.name == name:
                return node
        raise ModelError(f"the graph has no node named '{name}'")

    def value(self, name: str) -> ir.Value:
        """The value of that name at the top level; raises `ModelError` if there is none."""
        graph = self.model.graph
        computed = (v for node in graph for v in node.outputs)
        for v in itertools.chain(graph.inputs, graph.initializers.values(), computed):
            if v.name == name:
                return v
        raise ModelError(f"the graph has no value named '{name}'")

    @staticmethod
    def tensor(v: ir.Value | None) -> ir.TensorProtocol | None:
        """The constant behind a value without reading its bytes, or None for a computed value and a graph input."""
        if v is None:
            return None
        if v.const_value is not None and not (v.is_graph_input() and not v.is_initializer()):
            return v.const_value
        node = v.producer()
        if node is not None and node.op_type == "Constant" and node.domain == "":
            return ir.convenience.get_const_tensor(v)
        return None

    def is_constant(self, v: ir.Value | None) -> bool:
        """Whether the value is known before the model runs."""
        return self.tensor(v) is not None

    def array(self, v: ir.Value | None) -> Array:
        """The constant as a numpy array, memory-mapped where the file allows; raises `NotConstant`."""
        t = self.tensor(v)
        if t is None:
            raise NotConstant(f"value '{v.name if v is not None else ''}' is computed at run time, not a constant")
        a: Array = t.numpy()
        if self.spool is not None:  # a large model: pages read before need not stay resident
            self._read += a.nbytes
            if self._read > RELEASE_AFTER:
                release_weights(self.model)
                self._read = a.nbytes
        return a

    # ---- editing -------------------------------------------------------------------------------------------------

    def _give_names(self) -> set[str]:
        names = {v.name for v in self.model.graph.initializers.values()} | {v.name for v in self.model.graph.inputs}
        node_names: set[str] = set()
        for node in self.model.graph:
            if not node.name or node.name in node_names:
                node.name = f"{node.op_type}_{node.outputs[0].name if node.outputs else next(self._counter)}"
                while node.name in node_names:
                    node.name = f"{node.op_type}_{next(self._counter)}"
            node_names.add(node.name)
            names.update(v.name for v in node.outputs)
        return {n for n in names if n} | node_names

    def fresh(self, stem: str) -> str:
        """A name no value or node of the graph has."""
        name = stem
        while name in self._names:
            name = f"{stem}_{next(self._counter)}"
        self._names.add(name)
        return name

    def _touch(self, *nodes: ir.Node | None) -> None:
        self.edits += 1
        self.touched.update(str(n.name) for n in nodes if n is not None)

    def constant(self, a: Array | ir.TensorProtocol, name: str = "const") -> ir.Value:
        """A new initializer holding the array or tensor (a lazy or external tensor is not read)."""
        tensor = as_tensor(a, folder=self.spool)
        fresh = self.fresh(name)
        v = ir.Value(
            name=fresh, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        if isinstance(tensor, (ir.Tensor, ir.LazyTensor)):
            tensor.name = fresh
        self.model.graph.register_initializer(v)
        return v

    def put(self, v: ir.Value, a: Array | ir.TensorProtocol, *, users: Collection[ir.Node] | None = None) -> ir.Value:
        """Replace a constant's content, for all users or for the given ones only; no edit where it is equal.

        Returns the value that now holds the content. Raises `NotConstant` for a computed value.
        """
        old = self.tensor(v)
        if old is None:
            raise NotConstant(f"value '{v.name}' is computed at run time, so its content cannot be replaced")
        if old is a or (not isinstance(a, ir.TensorProtocol) and _equal(old.numpy(), a)):
            return v
        all_users = [u for u, _ in v.uses()]
        affected = all_users if users is None else [u for u in all_users if u in users]
        if not v.is_initializer() or len(set(affected)) < len(set(all_users)) or v.is_graph_output():
            new = self.constant(a, f"{v.name}_new")
            self.replace(v, new, users=None if users is None else affected)
            return new
        tensor = as_tensor(a, v.name, self.spool)
        v.const_value = tensor
        v.type, v.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self._touch(*affected)
        return v

    def scale(self, v: ir.Value, by: Array, axis: int, *, users: Collection[ir.Node] | None = None) -> ir.Value:
        """Multiply a constant along one axis by `by` of shape `[v.shape[axis]]`, rounding once to its type."""
        a = self.array(v)
        factor = np.asarray(by, np.float64).reshape([-1 if i == axis % a.ndim else 1 for i in range(a.ndim)])
        return self.put(v, (a.astype(np.float64) * factor).astype(a.dtype), users=users)

    def op(
        self,
        op: str,
        *xs: ir.Value | Array | None,
        domain: str = "",
        outputs: int = 1,
        name: str = "",
        like: ir.Value | None = None,
        **attrs: Any,
    ) -> ir.Value:
        """Add a node and return its first output; arrays become constants, `like` lends its type and shape to it."""
        args = [self.constant(x, f"{name or op.lower()}_const") if isinstance(x, np.ndarray) else x for x in xs]
        while args and args[-1] is None:
            args.pop()
        node_name = self.fresh(name or op)
        node = ir.node(
            op,
            args,
            {k: a for k, a in attrs.items() if a is not None},
            domain=domain,
            num_outputs=outputs,
            name=node_name,
        )
        for i, out in enumerate(node.outputs):
            out.name = self.fresh(f"{node_name}_out{i}" if i else f"{node_name}_out")
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.model.graph.append(node)
        if domain and domain not in self.model.opset_imports:
            self.model.opset_imports[domain] = 1
        self._touch(node)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value, *, users: Collection[ir.Node] | None = None) -> None:
        """Let users of `old` (all, or those given) read `new`, whose producer may read `old`; outputs keep names."""
        if old is new:
            return
        if users is None and old.is_graph_output():
            new = self._as_output(old, new)
        consumers = []
        for user, index in tuple(old.uses()):
            if user is not new.producer() and (users is None or user in users):
                user.replace_input_with(index, new)
                consumers.append(user)
        self._touch(old.producer(), *consumers)

    def _as_output(self, old: ir.Value, new: ir.Value) -> ir.Value:
        """Make `new` the graph output in place of `old`, under the same name."""
        if new.is_graph_input() or new.is_initializer() or new.is_graph_output() or new.producer() is None:
            new = self.op("Identity", new, like=old)
        public, shape = old.name, old.shape
        old.name = self.fresh(f"{public}_was")
        new.name = public
        if new.dtype is None:
            new.type = old.type
        new.shape = shape
        outputs = self.model.graph.outputs
        for i, v in enumerate(outputs):
            if v is old:
                outputs[i] = new
        return new

    def set_input(self, node: ir.Node, index: int, v: ir.Value | None) -> None:
        """Replace one input of one node."""
        if index < len(node.inputs) and node.inputs[index] is v:
            return
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, v)
        self._touch(node)

    def set_attr(self, node: ir.Node, **attrs: Any) -> None:
        """Set attributes; None removes one; no edit where nothing differs."""
        for key, a in attrs.items():
            old = node.attributes.get(key)
            if a is None:
                if old is not None:
                    node.attributes.pop(key)
                    self._touch(node)
                continue
            new = ir.convenience.convert_attribute(key, a)
            if old is None or old.value != new.value:
                node.attributes[key] = new
                self._touch(node)

    def take(self, group: Group, keep: Array) -> None:
        """Keep only the units `keep` (indices, ascending) of a group, everywhere at once; all units is no edit.

        Raises `ModelError` when a place does not fit the group; nothing is edited then.
        """
        kept = group.kept(keep)
        if kept.size < group.units:
            cut_group(self, group, kept)

    def decline(self, site: Site | ir.Node | str, why: str) -> None:
        """Record that an eligible site is left unchanged, and why; the report shows it."""
        entry = Declined(site if isinstance(site, str) else str(site.name), why)
        if entry not in self.declined:
            self.declined.append(entry)

    def note(self, site: Site | str, what: str, values: Mapping[str, float] | None = None) -> None:
        """Record what a pass did to a site, in words and numbers; the report and a dry run show it."""
        self.noted.append(Noted(site if isinstance(site, str) else site.name, what, values or {}))

    # ---- upkeep --------------------------------------------------------------------------------------------------

    def clone(self) -> Graph:
        """An independent copy of the structure; tensors are shared and never edited in place."""
        other = Graph(self.model.clone(), self.path)
        other.interface, other.spool = self.interface, self.spool
        return other

    @classmethod
    def from_graphsurgeon(cls, graph: Any) -> Graph:
        """The model of an `onnx_graphsurgeon.Graph`; raises `ModelError`."""
        return cls(graphsurgeon.from_graphsurgeon(graph))

    def to_graphsurgeon(self) -> Any:
        """A copy as an `onnx_graphsurgeon.Graph`, whose constants are read when their values are."""
        return graphsurgeon.to_graphsurgeon(self.model)

    def sort(self) -> None:
        """Put the nodes into topological order; raises `ModelError` for a cycle."""
        valid.order(self.model.graph)

    def adopt(self, new: Graph) -> None:
        """Replace the model by that of another graph, as one edit; handles into the old model become invalid."""
        self.model = new.model
        self._names |= new._names
        self.edits += 1

    def sweep(self) -> int:
        """Remove unused nodes and constants; returns the number of nodes removed."""
        before = self.model.graph.num_nodes()
        remove_unused(self.model)
        removed = before - self.model.graph.num_nodes()
        self.edits += removed
        return removed

    def tidy(self) -> None:
        """Remove identities, repeated subexpressions, small equal constants, dead nodes and unused operator sets."""
        steps = (
            DeduplicateInitializersPass(size_limit=4096),
            CommonSubexpressionEliminationPass(),
            remove_unused,
        )
        graph = self.model.graph
        while True:  # merged constants make equal nodes, and these leave unused constants
            before = graph.num_nodes() + len(graph.initializers)
            for step in steps:
                step(self.model)
            drop_identities(self.model)
            removed = before - graph.num_nodes() - len(graph.initializers)
            if removed == 0:
                break
            self.edits += removed
        RemoveUnusedOpsetsPass()(self.model)

    def forget_shapes(self) -> None:
        """Drop recorded shapes of computed values, so that the next `infer_shapes` starts from the inputs."""
        outputs = set(self.model.graph.outputs)
        for node in self.model.graph:
            for v in node.outputs:
                if v not in outputs:
                    v.shape = None

    def infer_shapes(self) -> None:
        """Record what ONNX's shape inference can tell; best effort, never fatal, weights are not read."""
        infer_shapes(self.model)

    def verify(self, *, interface: bool = True) -> None:
        """Check order, names, dangling values, operator schemas, types and the interface; raises `ModelError`."""
        self.sort()
        valid.names(self.model.graph)
        if interface:
            same_interface(self.interface, interface_of(self.model.graph))
        valid.schemas(self.model)


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == np.shape(b) and a.tobytes() == np.ascontiguousarray(b).tobytes()
