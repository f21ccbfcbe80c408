"""Graphs that run in ONNX Runtime and were refused or broken: each comes out of the exact passes with equal outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

from onnxcomp.engine.manager import PassManager
from onnxcomp.errors import ModelError, TargetError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.machine import runtime_opset
from onnxcomp.passes.canonicalize import Canonicalize
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.lower import Lower
from onnxcomp.runtime.sessions import Session
from onnxcomp.target import CPU, Target
from tests.canonical.test_odd_graphs import parse

X = "float[b,4] x"
ATTENDS = (
    "(float[b,s,8] x, {more}) => (float[b,s,8] y) <float[8,8] wq, float[8,8] wk, float[8,8] wv> {{"
    "h=Constant<value=int64[4]{{0,0,2,4}}>() f=Constant<value=int64[3]{{0,0,8}}>() q=MatMul(x,wq) k=MatMul(x,wk) "
    "v=MatMul(x,wv) q4=Reshape(q,h) k4=Reshape(k,h) v4=Reshape(v,h) qt=Transpose<perm=[0,2,1,3]>(q4) "
    "kt=Transpose<perm=[0,2,3,1]>(k4) vt=Transpose<perm=[0,2,1,3]>(v4) p=MatMul(qt,kt) m=Add(p,{bias}) "
    "a=Softmax<axis=-1>(m) o=MatMul(a,vt) t=Transpose<perm=[0,2,1,3]>(o) y=Reshape(t,f)}}"
)
MATRIX = f"({X}) => ({{outs}}) <float[4,4] w> {{{{a=MatMul(x,w) {{nodes}}}}}}"
ACCEPTED = {
    "an output and its copy": (MATRIX.format(outs="float[b,4] y, float[b,4] z", nodes="y=Relu(a) z=Identity(y)"), 18),
    "two copies of a value": (
        MATRIX.format(outs="float[b,4] y, float[b,4] z", nodes="r=Relu(a) y=Identity(r) z=Identity(r)"),
        18,
    ),
    "three copies and the value itself": (
        MATRIX.format(
            outs="float[b,4] y, float[b,4] z, float[b,4] q, float[b,4] r",
            nodes="r=Relu(a) y=Identity(r) z=Identity(y) q=Identity(r)",
        ),
        18,
    ),
    "equal nodes as outputs": (MATRIX.format(outs="float[b,4] y, float[b,4] z", nodes="y=Relu(a) z=Relu(a)"), 18),
    "a branch that copies a value of the graph around": (
        f"({X}, bool c) => (float[b,4] y) {{a=Relu(x) y=If(c)<then_branch=p() => (float[b,4] t) {{t=Identity(a)}}, "
        "else_branch=q() => (float[b,4] u) {k=Neg(a) u=Identity(k)}>}",
        18,
    ),
    "a branch with two outputs of one value": (
        f"({X}, bool c) => (float[b,4] y, float[b,4] z) {{a=Relu(x) y, z=If(c)<then_branch=p() => (float[b,4] t, "
        "float[b,4] s) {k=Neg(a) t=Identity(k) s=Identity(k)}, else_branch=q() => (float[b,4] u, float[b,4] v) "
        "{u=Identity(a) v=Abs(a)}>}",
        18,
    ),
    "pads as an attribute": (f"({X}) => (float[b,n] y) {{p=Pad<pads=[0,1,0,2]>(x) y=Relu(p)}}", 9),
    "flatten from the end": ("(float[b,2,4] x) => (float[m,n] y) {f=Flatten<axis=-1>(x) y=Relu(f)}", 18),
    "flatten at the rank": ("(float[b,2,4] x) => (float[m,1] y) {f=Flatten<axis=3>(x) y=Relu(f)}", 18),
    "flatten to one row": ("(float[b,2,4] x) => (float[1,n] y) {f=Flatten<axis=-3>(x) y=Relu(f)}", 18),
    "a reduction over no axes": (
        f"({X}) => (float[b,4] y) "
        "{n=Constant<value=int64[0]{}>() r=ReduceSum<noop_with_empty_axes=1>(x,n) y=Neg(r)}",
        18,
    ),
    "a string constant": (
        f'({X}) => (float[b,4] y, string s) {{t=Constant<value_string="a">() s=Identity(t) y=Neg(x)}}',
        18,
    ),
    "a scalar added to scores": (ATTENDS.format(more="float c", bias="c"), 18),
    "a vector added to scores": (ATTENDS.format(more="float[s] c", bias="c"), 18),
    "lengths as a mask": (
        "(float[b,s,8] x, int32[b] mask) => (float[b,s,8] y) <float[8,24] w, float[24] k> "
        "{y=com.microsoft.Attention<num_heads=2>(x,w,k,mask)}",
        18,
    ),
}
PASSES = (Canonicalize(), Cleanup(), Lower())


def feeds(g: Graph) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(1), {"b": 3, "s": 5}
    made: dict[str, np.ndarray] = {}
    for v in g.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in v.shape]
        if v.dtype is ir.DataType.BOOL:
            made[str(v.name)] = np.array(True)
        elif v.dtype is ir.DataType.INT32:
            made[str(v.name)] = np.arange(3, 3 + shape[0], dtype=np.int32)
        else:
            made[str(v.name)] = rng.standard_normal(shape, np.float32)
    return made


@pytest.mark.parametrize("name", ACCEPTED)
def test_outputs_are_equal_and_keep_their_names(tmp_path: Path, name: str) -> None:
    text, opset = ACCEPTED[name]
    source = parse(text, opset)
    storage.save(source, tmp_path / "source.onnx")
    graph = storage.load(tmp_path / "source.onnx")
    written = storage.save(PassManager(PASSES).run(graph).model, tmp_path / "result.onnx")
    with Session(tmp_path / "source.onnx", CPU) as a, Session(written, CPU) as b:
        before, after = a.run(feeds(graph)), b.run(feeds(graph))
    assert list(before) == list(after)
    for y in before:
        if before[y].dtype.kind == "f":
            np.testing.assert_allclose(after[y], before[y], rtol=1e-5, atol=1e-6)
        else:
            assert (after[y] == before[y]).all()


def test_scalars_and_vectors_on_scores_are_raised() -> None:
    for name in ("a scalar added to scores", "a vector added to scores"):
        g = PassManager((Canonicalize(),)).run(parse(*ACCEPTED[name])).model
        assert [n.op_type for n in g.nodes("Attention", "Softmax")] == ["Attention"]


# ---- operator sets that are newer than the canonical form's ----------------------------------------------------------


def swish(opset: int) -> Graph:
    return parse(f"({X}) => (float[b,4] y) {{y=Swish(x)}}", opset)


def test_the_newest_opset_is_that_of_the_installed_runtime() -> None:
    newest = runtime_opset()
    assert Target(name="mine", providers=CPU.providers).newest_opset == CPU.newest_opset == newest
    identity = parse(f"({X}) => (float[b,4] y) {{y=Identity(x)}}", newest)
    Session(identity).close()
    identity.model.opset_imports[""] = newest + 1
    with pytest.raises(ModelError, match="rejects the model"):
        Session(identity)


def test_a_newer_operator_is_kept_where_the_target_has_it_and_the_refusal_names_the_option() -> None:
    kept = PassManager(PASSES).run(swish(24)).model
    assert (kept.opset, [n.op_type for n in kept.nodes()]) == (24, ["Swish"])
    with pytest.raises(
        TargetError, match=r"node 'Swish_y': there is no Swish in opset 23; .*opset\W+24 keeps the model's"
    ):
        PassManager(PASSES, target=dataclasses.replace(CPU, max_opset=23)).run(swish(24))


def test_mod_of_floats_keeps_the_sign_of_the_divisor_or_is_refused() -> None:
    g = parse(f"({X}) => (float[b,4] y) {{c=Constant<value=float{{3.0}}>() y=Mod(x,c)}}", 28)
    with pytest.raises(TargetError, match="Mod of floats must have fmod=1 in opset 27"):
        PassManager(PASSES, target=dataclasses.replace(CPU, max_opset=27)).run(g)
