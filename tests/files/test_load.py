"""What loading accepts, as the runtime does, and what it refuses with the node and the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.helper import (  # noqa: TID251  onnx_ir cannot build invalid models
    make_attribute,
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
)

from onnxcomp import blocks
from onnxcomp.errors import ModelError
from onnxcomp.files import storage
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU

F = TensorProto.FLOAT
Port = onnx.ValueInfoProto


def port(name: str, kind: int = F, shape: Sequence[str | int] | None = ("b", 4)) -> Port:
    return make_tensor_value_info(name, kind, shape)


def weight(name: str = "w", kind: type = np.float32) -> TensorProto:
    return numpy_helper.from_array((np.eye(4) * 2).astype(kind), name)


def chain() -> list[NodeProto]:
    return [make_node("MatMul", ["x", "w"], ["h"], name="product"), make_node("Relu", ["h"], ["y"])]


def model(
    nodes: list[NodeProto] | None = None,
    *,
    ins: Sequence[Port] = (),
    outs: Sequence[Port] = (),
    stored: Sequence[TensorProto] = (),
    opsets: Sequence[tuple[str, int]] = (("", 18),),
    functions: Sequence[onnx.FunctionProto] = (),
    known: Sequence[Port] = (),
) -> ModelProto:
    graph = make_graph(
        chain() if nodes is None else nodes, "g", ins or [port("x")], outs or [port("y")], stored or [weight()],
        value_info=known,
    )  # fmt: skip
    made = make_model(graph, opset_imports=[make_opsetid(*x) for x in opsets], functions=functions)
    made.ir_version = 9
    return made


def branches(*bodies: onnx.GraphProto) -> ModelProto:
    """`y = relu(x w)` and an If on an input `c` that gives `i`."""
    choice = make_node("If", ["c"], ["i"], name="choice", then_branch=bodies[0], else_branch=bodies[-1])
    ports = [port("x"), port("c", TensorProto.BOOL, ())]
    return model([*chain(), choice], ins=ports, outs=[port("y"), port("i")])


def body(*nodes: NodeProto, out: str = "q", stored: Sequence[TensorProto] = ()) -> onnx.GraphProto:
    return make_graph(list(nodes), "b", [], [port(out)], stored)


def changed(change: Callable[[Any], object], made: Any = None) -> Any:
    made = made or model()
    change(made)
    return made


def flatten(*attributes: AttributeProto) -> ModelProto:
    node = make_node("Flatten", ["x"], ["y"], name="flat")
    node.attribute.extend(attributes)
    return model([node])


SKIP = make_node("SkipLayerNormalization", ["x", "x", "v"], ["y"], domain="com.microsoft")
VECTOR = numpy_helper.from_array(np.ones(4, np.float32), "v")
ACCEPTED = {
    "nodes out of order": model(chain()[::-1]),
    "domain ai.onnx declared": model(opsets=[("ai.onnx", 18)]),
    "domain ai.onnx of a node": model([make_node("Relu", ["x"], ["y"], domain="ai.onnx")]),
    "domain declared twice": model(opsets=[("", 18), ("ai.onnx", 18)]),
    "com.microsoft not declared": model([SKIP], stored=[VECTOR]),
    "default domain not declared": model(opsets=[("com.microsoft", 1)]),
    "graph without a name": changed(lambda m: m.graph.ClearField("name")),
    "output without a shape": changed(lambda m: m.graph.output[0].type.tensor_type.ClearField("shape")),
    "output without a type": changed(lambda m: m.graph.output[0].ClearField("type")),
    "input without a shape": model(ins=[port("x", F, None)]),
    "size of -1": model(ins=[port("x", F, (-1, 4))], outs=[port("y", F, (-1, 4))]),
    "two declarations of a value": model(known=[port("h"), port("h")]),
    "an output named twice": model(outs=[port("y"), port("y")]),
    "an input and a weight as outputs": model(outs=[port("y"), port("x"), port("w", F, (4, 4))]),
    "a weight as an output of another shape": model(outs=[port("y"), port("w", F, (4, 4, "b"))]),
    "a weight without a name": model(stored=[weight(), weight("")]),
    "nodes of one name": model([make_node("MatMul", ["x", "w"], ["h"], name="n"), make_node("Relu", ["h"], ["y"])]),
    "a node's name that is no UTF-8": changed(lambda m: m.graph.node[0].MergeFromString(b"\x1a\x03a\xc3b")),
    "IR version 2": changed(lambda m: setattr(m, "ir_version", 2)),
    "a weight of a branch hides another": branches(body(make_node("MatMul", ["x", "w"], ["q"]), stored=[weight()])),
    "an operator of the runtime in the default domain": model(
        [make_node("LayerNormalization", ["x", "v"], ["y"])], stored=[VECTOR], opsets=[("", 11)]
    ),
}
SELF = make_function("my", "F", ["a"], ["b"], [make_node("F", ["a"], ["b"], domain="my")], [make_opsetid("my", 1)])
WANTING = make_function("my", "G", ["a"], ["b"], [make_node("Abs", ["a"], ["b"])], [make_opsetid("", 18)])
REFUSED: dict[str, tuple[ModelProto, str]] = {
    "two weights of one name": (model(stored=[weight(), weight()]), "two initializers are called 'w'"),
    "two inputs of one name": (model(ins=[port("x"), port("x")]), "two values are called 'x'"),
    "two producers": (model([*chain(), make_node("Abs", ["x"], ["h"], name="a")]), "'a' (Abs): two values are called"),
    "a weight and a node's output": (model(stored=[weight(), weight("h")]), "'product' (MatMul): two values"),
    "dangling": (model([*chain(), make_node("Abs", ["no"], ["q"])]), "node 'q' (Abs) reads 'no', which nothing"),
    "dangling in a branch": (branches(body(make_node("Abs", ["no"], ["q"]))), "in a graph of node 'choice' (If): node"),
    "cycle": (model([make_node("Add", ["x", "y"], ["h"]), make_node("Relu", ["h"], ["y"])]), "part of a cycle"),
    "cycle through a branch": (branches(body(make_node("Abs", ["i"], ["q"]))), "'choice' (If) is part of a cycle"),
    "value of a graph around": (branches(body(out="h")), "it belongs to a graph around it"),
    "name taken around": (branches(body(make_node("Abs", ["x"], ["h"]), out="h")), "two values are called 'h'"),
    "output that nothing computes": (model(outs=[port("y"), port("z")]), "output 'z': nothing computes it"),
    "output of maps": (
        changed(lambda m: m.graph.output[0].type.sequence_type.elem_type.map_type.SetInParent()),
        "its output 'y' is made of maps (ZipMap), which are not supported; export without it",
    ),
    "input of no element type": (
        changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0)),
        "input 'x' has no type",
    ),
    "input without a type": (changed(lambda m: m.graph.input[0].ClearField("type")), "input 'x' has no type"),
    "weight unlike its input": (model(ins=[port("x"), port("w", F, (4, 5))]), "the input of that name is something"),
    "one input of two": (model([make_node("MatMul", ["x"], ["y"])]), "has 1 inputs where the operator has 2"),
    "no outputs": (model([*chain(), make_node("Relu", ["x"], [])]), "has 0 outputs where the operator has 1"),
    "input left out": (model([make_node("Relu", [""], ["y"])]), "its input 0 is left out"),
    "attribute twice": (flatten(*[make_attribute("axis", 1)] * 2), "the attribute 'axis' twice"),
    "attribute of another type": (flatten(make_attribute("axis", 1.0)), "'axis' must be of type INT"),
    "attribute without a type": (flatten(AttributeProto(name="axis", i=1)), "'axis' must be of type INT"),
    "unknown attribute": (flatten(make_attribute("depth", 1)), "no attribute 'depth'"),
    "no permutation": (
        model([make_node("Transpose", ["x"], ["y"], perm=[1, 1])]),
        "its perm [1, 1] is no permutation of axes",
    ),
    "missing attribute": (model([make_node("Cast", ["x"], ["y"])]), "attribute 'to' is missing"),
    "a type unlike its operator's": (model(known=[port("h", TensorProto.INT64)]), "'h' is recorded as INT64, what"),
    "constant without a value": (model([make_node("Constant", [], ["y"])]), "has one attribute, its value; this one"),
    "unknown operator": (model([make_node("Foo", ["x"], ["y"])]), "opset 18 has no such operator"),
    "operator of a newer opset": (model([make_node("Gelu", ["x"], ["y"])]), "opset 18 has no such operator"),
    "unknown domain": (model([make_node("Foo", ["x"], ["y"], domain="my")]), "declares no operator set 'my'"),
    "opset of the future": (model(opsets=[("", 99)]), "declares opset 99"),
    "IR version of the future": (changed(lambda m: setattr(m, "ir_version", 99)), "IR version 99 is newer"),
    "types that differ": (model(stored=[weight(kind=np.float64)]), "tensor(float) and tensor(double)"),
    "a type the operator lacks": (model(stored=[weight(kind=np.bool_)]), "'w' is tensor(bool)"),
    "a call without the input that its function needs": (
        model([make_node("G", [], ["y"], domain="my")], opsets=[("", 18), ("my", 1)], functions=[WANTING]),
        "its input 0 is left out, the operator needs it",
    ),
    "a function that calls itself": (
        model([make_node("F", ["x"], ["y"], domain="my")], opsets=[("", 18), ("my", 1)], functions=[SELF]),
        "function 'F' calls itself",
    ),
}


def stored(made: ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_runtime_accepts_is_loaded_and_stays_equal(tmp_path: Path, name: str) -> None:
    path = stored(ACCEPTED[name], tmp_path)
    before = path.read_bytes()
    g = storage.load(path)
    g.clone().verify()
    written = storage.save(g, tmp_path / "out")
    assert path.read_bytes() == before
    feeds = {"x": np.arange(-6, 6, dtype=np.float32).reshape(3, 4), "c": np.array(True)}
    with Session(path, CPU) as a, Session(written, CPU) as b:
        fed = {p.name: feeds[p.name] for p in a.inputs}
        expected, found = a.run(fed), b.run(fed)
    assert list(found) == list(expected)
    for y in expected:
        np.testing.assert_array_equal(found[y], expected[y])


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_model_is_refused_with_its_node_and_the_reason(tmp_path: Path, name: str) -> None:
    made, reason = REFUSED[name]
    path = stored(made, tmp_path)
    with pytest.raises(ModelError) as e:
        storage.load(path)
    assert str(e.value).startswith(f"{path}: not a valid ONNX model: ")
    assert reason in str(e.value)
    assert "\n" not in str(e.value)


def test_what_outputs_leave_open_is_inferred(tmp_path: Path) -> None:
    g = storage.load(stored(ACCEPTED["output without a type"], tmp_path))
    assert g.interface[1] == (("y", "FLOAT", ("b", 4)),)
    g = storage.load(stored(ACCEPTED["size of -1"], tmp_path))
    assert [p[2] for p in g.interface[0]] == [("?", 4)]
    ids = model([make_node("Cast", ["i"], ["y"], to=F)], ins=[port("i", TensorProto.INT64, ("n", "n"))])
    assert [p[2] for p in storage.load(stored(ids, tmp_path)).interface[0]] == [("n", "?")]
    untyped = model(known=[port("w", F, (4, 1 << 31))])  # what is said of a weight is not what it is
    untyped.graph.output[0].ClearField("type")
    assert storage.load(stored(untyped, tmp_path)).interface[1] == (("y", "FLOAT", ("b", 4)),)


def test_an_operator_of_the_users_own_is_none_of_that_name(tmp_path: Path) -> None:
    own = model([make_node("Gather", ["x"], ["y"], domain="my")], opsets=[("", 18), ("my", 1)])
    g = storage.load(stored(own, tmp_path))
    assert [n.op_type for n in g.nodes()] == ["Gather"]
    assert not list(g.nodes("Gather"))
    assert not blocks.embeddings(g)


def test_recorded_shapes_that_contradict_the_operators_are_dropped(tmp_path: Path) -> None:
    """What is recorded is a claim: runtimes infer, and so do we; names of open sizes stay."""
    expected = {("q", 7): None, ("rows", 4): ("rows", 4), ("b", 4, 1): None}
    for claimed, kept in expected.items():
        g = storage.load(stored(model(known=[port("h", F, claimed)]), tmp_path))
        shape = g.value("h").shape
        assert shape is not None
        assert [str(d) for d in shape] == [str(d) for d in kept or ("b", 4)]
    g = storage.load(stored(branches(changed(lambda b: b.value_info.append(port("t", F, (3,))), deep())), tmp_path))
    (choice,) = g.nodes("If")
    (inner, _) = choice.attributes["then_branch"].as_graph()
    assert [str(d) for d in inner.outputs[0].shape or ()] == ["b", "4"]


def deep() -> Any:
    return body(make_node("Abs", ["x"], ["t"]), make_node("Neg", ["t"], ["q"]))


def test_sorting_moves_only_what_must_move(tmp_path: Path) -> None:
    nodes = [make_node("Abs", ["x"], ["a"]), *chain()[::-1], make_node("Neg", ["x"], ["n"])]
    g = storage.load(stored(model(nodes), tmp_path))
    assert [n.op_type for n in g.nodes()] == ["Abs", "MatMul", "Relu", "Neg"]
