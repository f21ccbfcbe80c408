"""What makes a parsed model invalid, found before it is used: ONNX's rules as runtimes apply them, in linear time.

Names (each value defined once, before it is read), operators by their schemas (arity, attributes, element types known
without inference), functions that call themselves. Weights are not read.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx.defs import OpSchema, SchemaError

from onnxcomp.errors import ModelError
from onnxcomp.files.normalized import called, subgraphs
from onnxcomp.graph.operators import RUNTIME_OPS

__all__ = ["verify"]

Key = tuple[str, str, str]  # domain, name and overload of a function
ATTRIBUTE_FIELDS = {
    "FLOAT": "f", "INT": "i", "STRING": "s", "TENSOR": "t", "GRAPH": "g", "SPARSE_TENSOR": "sparse_tensor",
    "TYPE_PROTO": "tp", "FLOATS": "floats", "INTS": "ints", "STRINGS": "strings", "TENSORS": "tensors",
    "GRAPHS": "graphs", "SPARSE_TENSORS": "sparse_tensors", "TYPE_PROTOS": "type_protos",
}  # fmt: skip


@dataclass
class Scope:
    """What a node may read: values by name with their types where known; `own` are those of the innermost graph."""

    imports: Mapping[str, int]
    functions: Mapping[Key, onnx.FunctionProto]
    known: ChainMap[str, str] = field(default_factory=ChainMap)
    own: set[str] = field(default_factory=set)


def verify(proto: onnx.ModelProto) -> None:
    """Raise `ModelError` naming node and reason where a normalized model is invalid, or returns maps."""
    if maps := [v.name for v in proto.graph.output if v.type.HasField("map_type") or _of_maps(v.type)]:
        raise ModelError(f"its output '{maps[0]}' is made of maps (ZipMap), which are not supported; export without it")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(f"its IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest known")
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    _no_recursion(functions)
    imports = {x.domain: x.version for x in proto.opset_import}
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= imports.get("", 1) <= newest:
        raise ModelError(f"it declares opset {imports['']}; there are 1 to {newest}")
    if untyped := [v.name for v in proto.graph.input if _is_untyped(v.type)]:
        raise ModelError(f"graph input '{untyped[0]}' has no type")
    _graph(proto.graph, Scope(imports, functions))
    for function in functions.values():
        scope = Scope({x.domain: x.version for x in function.opset_import}, functions)
        for name in function.input:
            _define(scope, name, "", f"function '{function.name}'")
        _nodes(function.node, scope, {})
        _outputs(function.output, scope)


def _is_untyped(t: onnx.TypeProto) -> bool:
    tensor = t.WhichOneof("value") == "tensor_type" and t.tensor_type.elem_type == onnx.TensorProto.UNDEFINED
    return bool(tensor or t.WhichOneof("value") is None)


def _of_maps(t: onnx.TypeProto) -> bool:
    return bool(t.sequence_type.elem_type.HasField("map_type"))  # reading a field that is not set makes none


def _no_recursion(functions: Mapping[Key, onnx.FunctionProto]) -> None:
    """Refuse functions that reach themselves; walked without Python's stack, each function once."""
    state: dict[Key, int] = {}  # 1: being walked, 2: done
    for start in functions:
        stack = [start]
        while stack:
            key = stack[-1]
            if state.get(key):
                state[stack.pop()] = 2
                continue
            state[key] = 1
            for callee in _calls(functions[key].node, functions):
                if state.get(callee) == 1:
                    raise ModelError(f"function '{callee[1]}' calls itself")
                if callee not in state:
                    stack.append(callee)


def _calls(nodes: Iterable[onnx.NodeProto], functions: Mapping[Key, onnx.FunctionProto]) -> set[Key]:
    found = set()
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        if key in functions:
            found.add(key)
        for graph in subgraphs(node):
            found |= _calls(graph.node, functions)
    return found


# ---- names -----------------------------------------------------------------------------------------------------------


def _graph(graph: onnx.GraphProto, scope: Scope) -> None:
    types = {v.name: _type(v.type) for v in graph.value_info}
    stored = {}
    for t in graph.initializer:
        if t.name in stored:
            raise ModelError(f"two initializers are called '{t.name}'; rename one of them")
        stored[t.name] = t
    for v in graph.input:
        kind = _type(v.type)
        _define(scope, v.name, kind, "graph input")
        if v.name in stored:
            _same_tensor(v, stored.pop(v.name), kind)
    for name, t in stored.items():
        scope.known[name] = f"tensor({_element(t.data_type)})"  # in a subgraph it may hide a value around it
        scope.own.add(name)
    _nodes(graph.node, scope, types)
    _outputs((v.name for v in graph.output), scope)


def _same_tensor(v: onnx.ValueInfoProto, t: onnx.TensorProto, kind: str) -> None:
    """An initializer that is also listed as an input must be what the input says."""
    dims = [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
    fits = not v.type.tensor_type.HasField("shape") or (
        len(dims) == len(t.dims) and all(a in (None, b) for a, b in zip(dims, t.dims, strict=True))
    )
    stored = f"tensor({_element(t.data_type)})"
    if not fits or kind not in ("", stored):
        raise ModelError(f"initializer '{t.name}' is {stored} {list(t.dims)}, the input of that name is something else")


def _define(scope: Scope, name: str, kind: str, where: str) -> None:
    if name in scope.known:
        raise ModelError(f"{where}: two values are called '{name}'")
    scope.known[name] = kind
    scope.own.add(name)


def _outputs(names: Iterable[str], scope: Scope) -> None:
    for name in names:
        if name not in scope.own:
            outer = "it belongs to a graph around it" if name in scope.known else "nothing computes it"
            raise ModelError(f"output '{name}': {outer}")


def _nodes(nodes: Iterable[onnx.NodeProto], scope: Scope, types: Mapping[str, str]) -> None:
    for node in nodes:
        for name in node.input:
            if name and name not in scope.known:
                raise ModelError(f"{called(node)} reads '{name}', which nothing computes")
        _operator(node, scope)
        for graph in subgraphs(node):
            try:
                _graph(graph, Scope(scope.imports, scope.functions, scope.known.new_child()))
            except ModelError as e:
                raise ModelError(f"in a graph of {called(node)}: {e}") from e
        for name in filter(None, node.output):
            _define(scope, name, types.get(name, ""), called(node))


# ---- operators -------------------------------------------------------------------------------------------------------


def _operator(node: onnx.NodeProto, scope: Scope) -> None:
    """Check a node against its schema, or against the function it calls."""
    given: set[str] = set()
    for a in node.attribute:
        if a.name in given:
            raise ModelError(f"{called(node)}: has the attribute '{a.name}' twice")
        given.add(a.name)
    function = scope.functions.get((node.domain, node.op_type, node.overload))
    if function is not None:
        if len(node.input) > len(function.input) or len(node.output) > len(function.output):
            raise ModelError(f"{called(node)}: has more inputs or outputs than the function it calls")
        return
    version = scope.imports.get(node.domain)
    if version is None:
        raise ModelError(f"{called(node)}: the model declares no operator set '{node.domain}'")
    rule = _rule(node.op_type, node.domain, version)
    if rule is not None:
        _arity(node, rule)
        _attributes(node, rule)
        _types(node, rule, scope.known)
    elif node.domain == "" and node.op_type not in RUNTIME_OPS:
        raise ModelError(f"{called(node)}: opset {version} has no such operator")


@dataclass(frozen=True)
class Rule:
    """What the schema of an operator says, as Python values; the last entry of `formals` may stand for several."""

    inputs: tuple[int, int]
    outputs: tuple[int, int]
    formals: tuple[tuple[str, frozenset[str], bool, bool], ...]  # type variable, types, must be given, all of one type
    attributes: Mapping[str, str]
    required: tuple[str, ...]


@functools.cache
def _rule(op: str, domain: str, version: int) -> Rule | None:
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except SchemaError:
        return None
    if schema.deprecated:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    single = OpSchema.FormalParameterOption.Single
    formals = tuple(
        (x.type_str, allowed.get(x.type_str, frozenset((x.type_str,))), x.option == single, x.is_homogeneous)
        for x in schema.inputs
    )
    attributes = {name: str(a.type).rpartition(".")[2] for name, a in schema.attributes.items()}
    required = tuple(name for name, a in schema.attributes.items() if a.required)
    counts = (schema.min_input, schema.max_input), (schema.min_output, schema.max_output)
    return Rule(*counts, formals, attributes, required)


def _arity(node: onnx.NodeProto, rule: Rule) -> None:
    for have, (low, high), what in ((node.input, rule.inputs, "inputs"), (node.output, rule.outputs, "outputs")):
        if not low <= len(have) <= high:
            takes = f"{low}" if low == high else f"at least {low}" if len(have) < low else f"at most {high}"
            raise ModelError(f"{called(node)}: has {len(have)} {what} where the operator has {takes}")
    for i, (name, formal) in enumerate(zip(node.input, rule.formals, strict=False)):
        if formal[2] and not name:
            raise ModelError(f"{called(node)}: its input {i} is left out, the operator needs it")


def _attributes(node: onnx.NodeProto, rule: Rule) -> None:
    given = set()
    for a in node.attribute:
        given.add(a.name)
        if a.name not in rule.attributes:
            raise ModelError(f"{called(node)}: the operator has no attribute '{a.name}'")
        kind, wanted = onnx.AttributeProto.AttributeType.Name(a.type), rule.attributes[a.name]
        held = {f.name for f, _ in a.ListFields()} - {"name", "type", "doc_string", "ref_attr_name"}
        if kind != wanted or held - {ATTRIBUTE_FIELDS[wanted]}:
            raise ModelError(f"{called(node)}: its attribute '{a.name}' must be of type {wanted}")
        if (node.op_type, a.name) == ("Transpose", "perm") and sorted(a.ints) != list(range(len(a.ints))):
            raise ModelError(f"{called(node)}: its perm {list(a.ints)} is no permutation of axes")
    if node.op_type == "Constant" and len(given) != 1:
        raise ModelError(f"{called(node)}: a constant has one attribute, its value; this one has {len(given)}")
    if missing := [name for name in rule.required if name not in given]:
        raise ModelError(f"{called(node)}: its attribute '{missing[0]}' is missing")


def _types(node: onnx.NodeProto, rule: Rule, known: Mapping[str, str]) -> None:
    bound: dict[str, str] = {}
    for i, name in enumerate(node.input):
        variable, allowed, _, homogeneous = rule.formals[min(i, len(rule.formals) - 1)]
        kind = known.get(name, "")
        if not kind:
            continue
        if kind not in allowed:
            raise ModelError(f"{called(node)}: its input '{name}' is {kind}, which the operator does not take")
        if homogeneous and bound.setdefault(variable, kind) != kind:
            raise ModelError(f"{called(node)}: its inputs are {bound[variable]} and {kind}, they must be of one type")


# ---- types -----------------------------------------------------------------------------------------------------------


def _element(number: int) -> str:
    names: Sequence[str] = onnx.TensorProto.DataType.keys()
    return onnx.TensorProto.DataType.Name(number).lower() if 0 <= number < len(names) else "undefined"


def _type(kind: onnx.TypeProto) -> str:
    """A type as schemas write it, such as `seq(tensor(float))`; empty where it is unknown."""
    which = kind.WhichOneof("value")
    if which == "tensor_type":
        return f"tensor({_element(kind.tensor_type.elem_type)})" if kind.tensor_type.elem_type else ""
    if which in ("sequence_type", "optional_type"):
        inner = _type(getattr(kind, which).elem_type)
        return f"{'seq' if which == 'sequence_type' else 'optional'}({inner})" if inner else ""
    return ""
