"""Rules of shapes, contents and bounds: whatever a node's schema allows has an answer, if only that nothing is known.

Nodes are drawn at random: every operator with a rule, every version of its schema, attributes of the right types with
odd numbers, inputs of any rank, small constants and sizes that are computed. A rule that raises is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.analysis.content_rules import CONTENT_RULES
from onnxcomp.analysis.facts import Facts
from onnxcomp.analysis.fused_rules import CONTRIB_RULES
from onnxcomp.analysis.shape_rules import SHAPE_RULES
from onnxcomp.graph import CONTRIB, Graph

Rng = np.random.Generator
NUMBERS = (0, 0, 1, 1, 1, 2, 2, 3, -1, -1, -2, -3, 4, 64, 1 << 31, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 3e38, -3e38, float("nan"), float("inf"), -float("inf"), 1e-45)
CASES = 8  # of one operator
OPERATORS = sorted(
    {("", op) for op in {*SHAPE_RULES, *CONTENT_RULES, "Split", "Size", "Constant"}}
    | {(CONTRIB, op) for op in CONTRIB_RULES}
)
# What the schemas of com.microsoft are is not in the onnx package: the attributes that the rules read.
CONTRIB_ATTRIBUTES = ("num_heads", "kv_num_heads", "transA", "transB", "transBatchA", "transBatchB", "axis", "alpha")


def pick(rng: Rng, some: Sequence[Any]) -> Any:
    return some[int(rng.integers(len(some)))]


def schemas(domain: str, op: str) -> list[onnx.defs.OpSchema]:
    """All versions of an operator's schema that are not deprecated."""
    found = (s for s in onnx.defs.get_all_schemas_with_history() if (s.domain, s.name) == (domain, op))
    return [s for s in found if not s.deprecated]


def attribute(rng: Rng, name: str, kind: str) -> ir.Attr | None:
    """A value of the type that a schema says."""
    ints, floats = [int(pick(rng, NUMBERS)) for _ in range(int(rng.integers(5)))], [float(pick(rng, FLOATS))] * 2
    values: dict[str, Any] = {
        "INT": int(pick(rng, (*NUMBERS, 6, 7, 9, 10, 11))),
        "INTS": ints,
        "FLOAT": floats[0],
        "FLOATS": floats,
        "STRING": pick(rng, ("NOTSET", "VALID", "SAME_UPPER", "none", "")),
        "STRINGS": ["a"],
        "TENSOR": ir.tensor(constant(rng)),
    }
    return ir.Attr(name, getattr(ir.AttributeType, kind), values[kind]) if kind in values else None


def constant(rng: Rng) -> Any:
    """A small array of any rank up to two."""
    shape = [int(rng.integers(4)) for _ in range(int(pick(rng, (0, 1, 1, 1, 2))))]
    if rng.random() < 0.7:
        return np.array([pick(rng, NUMBERS) for _ in range(int(np.prod(shape)))], np.int64).reshape(shape)
    kind = pick(rng, (np.float32, np.float16, bool))
    with np.errstate(all="ignore"):
        return np.array([pick(rng, FLOATS) for _ in range(int(np.prod(shape)))], np.float32).astype(kind).reshape(shape)


def values(rng: Rng, opset: int) -> tuple[list[ir.Value], list[ir.Node], list[ir.Value]]:
    """Inputs of any rank, what is computed from their sizes, and constants."""
    dims = [pick(rng, (0, 1, 2, 3, 4, "n", "m", None, 1 << 40)) for _ in range(int(rng.integers(6)))]
    shape = None if rng.random() < 0.1 else ir.Shape(dims)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    flat = ir.Value(name="flat", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
    size = ir.node("Shape", [x])
    sum_ = ir.node("Add", [size.outputs[0], size.outputs[0]])
    for node in (size, sum_):
        node.outputs[0].name = f"{node.op_type}_out"
    made = [constant(rng) for _ in range(3)]
    stored = [ir.Value(name=f"c{i}", const_value=ir.tensor(a, name=f"c{i}")) for i, a in enumerate(made)]
    for v in stored:
        v.shape, v.type = v.const_value.shape, ir.TensorType(v.const_value.dtype)  # type: ignore[union-attr, assignment]
    return [x, flat], [size, sum_], stored


def graphs(domain: str, op: str, rng: Rng) -> Iterator[Graph]:
    """Graphs of one node of an operator that its schema allows."""
    known = schemas(domain, op)
    for _ in range(CASES):
        schema = pick(rng, known) if known else None
        opset = schema.since_version if schema is not None and domain == "" else 23
        inputs, nodes, stored = values(rng, opset)
        least, most = (schema.min_input, schema.max_input) if schema is not None else (3, 8)
        every = [*inputs, *(n.outputs[0] for n in nodes), *stored, *stored]
        args = [pick(rng, every) for _ in range(int(rng.integers(least, min(most, least + 4) + 1)))]
        if schema is None:
            attributes = [attribute(rng, name, "INT") for name in CONTRIB_ATTRIBUTES if rng.random() < 0.5]
            attributes += [attribute(rng, "qkv_hidden_sizes", "INTS")] if rng.random() < 0.5 else []
        else:
            args = [
                None
                if i < len(schema.inputs) and schema.inputs[i].option.name == "Optional" and rng.random() < 0.3
                else v
                for i, v in enumerate(args)
            ]
            given = [(n, a) for n, a in schema.attributes.items() if a.required or rng.random() < 0.5]
            given = given[:1] if op == "Constant" else given
            attributes = [attribute(rng, n, a.type.name) for n, a in given]
        count = int(rng.integers(1, 4)) if op == "Split" or (schema is not None and schema.max_output > 1) else 1
        count = min(count, schema.max_output) if schema is not None else count
        if op == "Constant" and not any(attributes):
            continue
        node = ir.Node(domain, op, args, [a for a in attributes if a is not None], num_outputs=count)
        used = ir.node("Identity", node.outputs[:1])
        for i, v in enumerate((*node.outputs, *used.outputs)):
            v.name = f"y{i}"
            if rng.random() < 0.3:  # what inference or an exporter recorded, which may be wrong
                v.shape = ir.Shape([pick(rng, (*NUMBERS, "n", None)) for _ in range(int(rng.integers(4)))])
        graph = ir.Graph(
            inputs,
            used.outputs,
            nodes=[*nodes, node, used],
            initializers=stored,
            opset_imports={"": opset, CONTRIB: 1},
            name="g",
        )
        yield Graph(ir.Model(graph, ir_version=10))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda x: f"{x[0]}.{x[1]}".strip("."))
def test_a_node_that_its_schema_allows_has_an_answer(operator: tuple[str, str]) -> None:
    rng = np.random.default_rng([ord(c) for c in operator[1]])
    made = 0
    for g in graphs(*operator, rng):
        f = Facts(g)
        for v in (v for node in g.nodes() for v in node.outputs):
            shape, content, bounds = f.shape(v), f.content(v), f.uniform(v)
            assert bounds is None or bounds.low is None or bounds.low == bounds.low
            assert shape is None or all(not isinstance(d, int) or d >= 0 for d in shape)
            assert content is None or content.size <= 64
        made += 1
    assert made > CASES // 2


def test_a_fault_of_a_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a node that its operator does not allow is nothing known; an error in a rule is an error of ours."""

    def wrong(f: Facts, node: ir.Node) -> None:
        raise IndexError("a fault of ours")

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    node = ir.node("Relu", [x])
    g = Graph(ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10))
    monkeypatch.setitem(SHAPE_RULES, "Relu", wrong)
    with pytest.raises(IndexError, match="a fault of ours"):
        Facts(g)


@pytest.mark.parametrize(
    ("op", "numbers", "expected"),
    [("Pow", (7, 1 << 62), None), ("Pow", (2, 10), 1024), ("Mul", (1 << 40, 1 << 40), None), ("Div", (-7, 2), -3),
     ("Div", ((1 << 62) + 1, 1), (1 << 62) + 1), ("Sub", (-(1 << 63), 1), None)],
)  # fmt: skip
def test_arithmetic_stays_within_int64_and_is_exact(op: str, numbers: tuple[int, int], expected: int | None) -> None:
    """A power that would take hours is not computed; the runtime's integers wrap around where ours would not."""
    stored = [ir.Value(name=f"c{i}", const_value=ir.tensor(np.array(x, np.int64))) for i, x in enumerate(numbers)]
    for v in stored:
        v.shape, v.type = ir.Shape([]), ir.TensorType(ir.DataType.INT64)
    node = ir.node(op, stored)
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=stored, opset_imports={"": 20}, name="g")
    content = Facts(Graph(ir.Model(graph, ir_version=10))).content(node.outputs[0])
    assert content is not None
    assert content.item() == expected


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "shapes"),
    [
        ("Split", 11, {"axis": 0, "split": [1, 4]}, [(1, 3), (4, 3)]),
        ("Concat", 3, {}, [(5, 6)]),
        ("Unsqueeze", 11, {"axes": [0, 0]}, [None]),
        ("Transpose", 11, {"perm": [0, 0]}, [None]),
        ("Transpose", 11, {"perm": [1, 0]}, [(3, 5)]),
        ("Squeeze", 11, {"axes": [2]}, [None]),
        ("Flatten", 11, {"axis": 3}, [None]),
        ("Flatten", 11, {"axis": -2}, [(1, 15)]),
    ],
)
def test_shapes_of_older_and_of_invalid_nodes(op: str, opset: int, attributes: Any, shapes: Any) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([5, 3]))
    node = ir.node(op, [x, x] if op == "Concat" else [x], attributes, num_outputs=len(shapes))
    for i, v in enumerate(node.outputs):
        v.name = f"y{i}"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": opset}, name="g")
    f = Facts(Graph(ir.Model(graph, ir_version=10)))
    assert [f.shape(v) for v in node.outputs] == shapes
