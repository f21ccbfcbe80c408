"""Models with a state whose samples are not along the first axis, as voice-activity detectors ship."""

import numpy as np
import onnx_ir as ir
import pytest

import onnxcomp as oc
from onnxcomp.data import open_axes
from onnxcomp.data.datasets import as_dataset, load_data, specs
from onnxcomp.errors import DataError
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from onnxcomp.runtime.sessions import Session
from tests.data.test_data import model_of

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
WIDTH = 8


def branch(name: str, step: int, x: ir.Value, state: ir.Value, rng: np.random.Generator) -> ir.Graph:
    """Every `step`-th sample through an LSTM; gives a probability and the new state."""
    nodes, constants = [], []

    def constant(a, label):
        v = ir.Value(name=f"{name}_{label}", const_value=ir.tensor(a, name=f"{name}_{label}"))
        v.type, v.shape = ir.TensorType(v.const_value.dtype), ir.Shape(a.shape)
        constants.append(v)
        return v

    def op(kind, *xs, outputs=1, **attributes):
        node = ir.node(kind, xs, attributes, num_outputs=outputs, name=f"{name}_{kind}_{len(nodes)}")
        for i, out in enumerate(node.outputs):
            out.name = f"{node.name}_{i}"
            out.type = ir.TensorType(FLOAT)
        nodes.append(node)
        return node.outputs

    def floats(*shape):
        return (rng.standard_normal(shape) / 2).astype(np.float32)

    ends = {k: constant(np.array([k]), f"at{k}") for k in (0, 1, 2)}
    far, stride = constant(np.array([2**31]), "far"), constant(np.array([step]), "step")
    (rows,) = op("Slice", x, ends[0], far, ends[0], stride)
    hidden, cell = (op("Slice", state, ends[k], ends[k + 1], ends[0])[0] for k in (0, 1))
    weights = [constant(floats(1, 4 * WIDTH, n), f"w{n}_{i}") for i, n in enumerate((1, WIDTH))]
    bias = constant(floats(1, 8 * WIDTH), "b")
    _, last, memory = op("LSTM", rows, *weights, bias, None, hidden, cell, outputs=3, hidden_size=WIDTH)
    (kept,) = op("Identity", last)
    (score,) = op("MatMul", op("Squeeze", kept, ends[0])[0], constant(floats(WIDTH, 1), "head"))
    (output,) = op("Sigmoid", score)
    (new,) = op("Concat", kept, memory, axis=0)
    return ir.Graph([], [*op("Identity", output), *op("Identity", new)], nodes=nodes, initializers=constants, name=name)


def detector(axis: str = "batch") -> Graph:
    """`input [b, n]`, `state [2, b, 8]`, `sr`: an If on the sampling rate whose branches hold an LSTM each."""
    g = model_of(("input", FLOAT, [axis, "n"]), ("state", FLOAT, [2, axis, WIDTH]), ("sr", INT, []))
    samples, state, rate = g.inputs
    x = g.op("Unsqueeze", g.op("Transpose", samples, perm=[1, 0]), np.array([2]))
    rng = np.random.default_rng(0)
    branches = {"then_branch": branch("wide", 2, x, state, rng), "else_branch": branch("narrow", 1, x, state, rng)}
    node = g.op("If", g.op("Equal", rate, np.array(16000)), outputs=2, **branches).producer()
    for v, name, shape in zip(node.outputs, ("output", "stateN"), ([axis, 1], [2, axis, WIDTH]), strict=True):
        v.name, v.type, v.shape = name, ir.TensorType(FLOAT), ir.Shape(shape)
        g.model.graph.outputs.append(v)
    g.model.opset_imports[""] = 16
    g.sort()
    return Graph(g.model)


def feeds(samples: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {"input": rng.standard_normal((samples, 12)), "state": rng.standard_normal((2, samples, WIDTH))}
    return {k: a.astype(np.float32) for k, a in made.items()} | {"sr": np.array(16000)}


@pytest.mark.parametrize("axis", ["batch", "?"])
def test_the_axis_of_the_samples_is_found(axis):
    g = detector(axis)
    assert {s.name: s.samples for s in specs(g)} == {"input": 0, "state": 1, "sr": None}
    assert open_axes.shapes_of(g, {"batch": 3, "n": 12})["state"] == (2, 3, WIDTH)


def test_samples_of_a_state_are_cut_and_joined_along_their_axis(tmp_path):
    g, given = detector(), feeds(5)
    parts = list(as_dataset(given, g, batch=2).rebatch(2))
    assert [(b.size, b.feeds["state"].shape) for b in parts] == [(2, (2, 2, 8)), (2, (2, 2, 8)), (1, (2, 1, 8))]
    np.testing.assert_array_equal(np.concatenate([b.feeds["state"] for b in parts], axis=1), given["state"])
    np.savez(tmp_path / "x.npz", **given)
    (whole,) = load_data(tmp_path / "x.npz", g, None)
    np.testing.assert_array_equal(whole.feeds["state"], given["state"])
    (drawn,) = load_data("random", g, None, samples=4, sequence=6)
    assert (drawn.size, drawn.feeds["state"].shape, drawn.feeds["sr"].shape) == (4, (2, 4, 8), ())
    with Session(g) as session:
        assert session.run(drawn.feeds)["stateN"].shape == (2, 4, 8)
    with pytest.raises(DataError, match="first axes differ"):
        as_dataset(given | {"state": given["state"][:, :3]}, g)


def test_a_state_of_fixed_size_is_shared_by_all_samples():
    g = model_of(("input", FLOAT, ["n", 6]), ("h", FLOAT, [1, 1, 4]))
    assert {s.name: s.samples for s in specs(g)} == {"input": 0, "h": None}
    data = as_dataset({"input": np.ones((5, 6), np.float32), "h": np.zeros((1, 1, 4), np.float32)}, g, batch=2)
    assert [b.size for b in data.rebatch(2)] == [2, 2, 1]
    fixed = model_of(("input", FLOAT, [1, 6]), ("state", FLOAT, [2, 1, 4]))
    assert {s.name: s.samples for s in specs(fixed)} == {"input": 0, "state": 1}
    assert [b.size for b in load_data("random", fixed, None, samples=3)] == [1, 1, 1]


@pytest.mark.parametrize("rate", [16000, 8000])
def test_a_voice_activity_model_goes_through(tmp_path, rate):
    g = detector()
    storage.save(g, tmp_path / "vad.onnx")
    batches = [feeds(2, seed=i) | {"sr": np.array(rate)} for i in range(4)]
    oc.optimize(tmp_path / "vad.onnx", tmp_path / "fast", measure=False)
    found = oc.validate(tmp_path / "vad.onnx", tmp_path / "fast" / "vad.onnx", batches)
    assert (found.samples, sorted(found.outputs)) == (8, ["output", "stateN"])
    assert found.values()["sqnr"] > 100
