"""Local functions of a model, replaced by their nodes; how many there will be is counted before the first is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedFunctionsPass, _c_api_utils

from onnxcomp.errors import ModelError
from onnxcomp.files.verified import verify

__all__ = ["check_growth", "expanded", "inline"]

# What functions may grow to: so many nodes, or so many times those of the file. Exports with a function for each layer
# have some 10,000 nodes when they are inlined, 25 times those of their file; a file of 1 kB can ask for 2^60.
MAX_NODES, MAX_GROWTH = 20_000, 20
# Names that inlining tries: the n-th instance of a function tries n for each of its nodes. A million take 5 seconds.
MAX_NAMES = 1_000_000
_Key = tuple[str, str, str]


def expanded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its functions inlined by the onnx package where they are called too often for `inline`.

    The onnx package takes linear time, but its names say less. Raises `ModelError` for functions, none of which calls
    itself, that would grow too large.
    """
    if check_growth(proto) <= MAX_NAMES:
        return proto
    try:
        inlined = onnx.inliner.inline_local_functions(proto)
        verify(inlined)
        return inlined
    except (onnx.checker.ValidationError, RuntimeError, ValueError, TypeError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ModelError(f"its local functions cannot be inlined: {why}") from e


def check_growth(proto: onnx.ModelProto) -> int:
    """How many names inlining would try; raises `ModelError` where functions would grow too large."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    sizes: dict[_Key, int] = {}
    stack = list(functions)
    while stack:  # called ones first, without recursion: a chain of functions may be long
        nodes = functions[stack[-1]].node
        if below := [k for k in set(_keys(nodes)) if k in functions and k not in sizes]:
            stack += below
        else:
            sizes[stack.pop()] = _count(nodes, sizes)
    total = _count(proto.graph.node, sizes)
    most = max(MAX_NODES, MAX_GROWTH * sum(1 for f in (proto.graph, *functions.values()) for _ in _every(f.node)))
    if total > most:
        raise ModelError(f"its local functions expand to {total} nodes; at most {most} are taken from such a file")
    instances = Counter(_keys(proto.graph.node))
    for key in reversed(sizes):  # callers first
        for callee, n in Counter(_keys(functions[key].node)).items():
            instances[callee] += instances[key] * n
    return sum(instances[k] ** 2 * len(f.node) // 2 for k, f in functions.items())


def _keys(nodes: Iterable[onnx.NodeProto]) -> Iterable[_Key]:
    return ((n.domain, n.op_type, n.overload) for n in _every(nodes))


def _count(nodes: Iterable[onnx.NodeProto], sizes: Mapping[_Key, int]) -> int:
    return sum(max(1, sizes.get(key, 1)) for key in _keys(nodes))


def _every(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    """Nodes with those of their subgraphs."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        yield node
        for a in node.attribute:
            stack += a.g.node
            for g in a.graphs:
                stack += g.node


def inline(model: ir.Model, path: Path) -> None:
    """Replace local functions by their nodes, in place; `expanded` said that there are not too many."""
    if not model.functions:
        return
    try:
        InlinePass()(model)
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        _c_api_utils.call_onnx_api(verify, model)  # a call may leave out what its function's nodes need
    except ModelError as e:
        raise ModelError(f"{path}: not a valid ONNX model: {e}") from e
    except RecursionError as e:
        raise ModelError(f"{path}: its local functions are nested too deep to be inlined") from e
    except (ir.passes.PassError, ir.passes.InvariantError, ValueError, KeyError, TypeError) as e:
        while e.__cause__ is not None and isinstance(e.__cause__, Exception):
            e = e.__cause__  # type: ignore[assignment]
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ModelError(f"{path}: its local functions cannot be inlined: {why}") from e
