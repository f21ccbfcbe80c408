"""What two models have otherwise: by structure and content, whatever the names and the order of nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxcomp import cli
from onnxcomp.engine.model_diff import diff
from onnxcomp.files import storage
from onnxcomp.graph import Graph
from tests import tiny, zoo


def renamed() -> Graph:
    """The encoder with other names of nodes and values."""
    g = tiny.encoder()
    for i, node in enumerate(g.model.graph):
        node.name = f"n{i}"
        for v in node.outputs:
            if not v.is_graph_output():
                v.name = f"v{i}"
    return g


def test_names_are_no_difference() -> None:
    found = diff(tiny.encoder(), renamed())
    assert found.equal
    assert found.same == len(list(tiny.encoder().nodes()))
    assert found.operators == {}


def test_two_exporters_spell_one_model() -> None:
    a, b = (Graph(zoo.load_graph(f"bert.{x}")) for x in ("dynamo-sdpa-18", "dynamo-sdpa-23"))
    plain, raised = diff(a, b), diff(a, b, raised=True)
    assert not plain.equal
    assert plain.removed
    assert (raised.changed, raised.removed, raised.added) == ((), (), ())


def weights(g: Graph) -> None:
    v = next(g.nodes("MatMul")).inputs[1]
    g.put(v, g.array(v) * np.float32(1.5))


def attribute(g: Graph) -> None:
    g.set_attr(next(g.nodes("LayerNormalization")), epsilon=1e-3)


def inserted(g: Graph) -> None:
    node = next(g.nodes("Gelu"))
    g.replace(node.outputs[0], g.op("Relu", node.outputs[0]))


def rewired(g: Graph) -> None:
    first, *_, last = g.nodes("LayerNormalization")
    add = next(n for n in g.nodes("Add") if n.outputs[0] is last.inputs[0])
    at = next(i for i, x in enumerate(add.inputs) if len(list(x.uses())) > 1)  # the residual, which stays in use
    g.set_input(add, at, first.outputs[0])


@pytest.mark.parametrize(
    ("edit", "said"),
    [(weights, "relative difference 5.00e-01"), (attribute, "epsilon: "), (rewired, "which is another value")],
)
def test_what_changed_is_said_of_the_node(edit: Callable[[Graph], None], said: str) -> None:
    g = renamed()
    edit(g)
    g.sort()
    found = diff(tiny.encoder(), g)
    assert not found.equal
    assert (found.removed, found.added) == ((), ())
    assert any(said in what for c in found.changed for what in c.what)
    assert len(found.changed) <= 2


def test_nodes_that_only_one_has_and_an_interface_of_its_own() -> None:
    g = renamed()
    inserted(g)
    g.sort()
    found = diff(tiny.encoder(), g)
    assert [n.op for n in found.added] == ["Relu"]
    assert found.operators == {"Relu": (0, 1)}
    other = diff(tiny.encoder(), tiny.encoder(batch=2))
    assert any("batch" in x for x in other.interface)


def test_diff_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = renamed()
    weights(g)
    a, b = storage.save(tiny.encoder(), tmp_path / "a"), storage.save(g, tmp_path / "b")
    assert cli.main(["diff", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "1 changed, 0 removed, 0 added" in out
    assert "relative difference 5.00e-01" in out
    assert cli.main(["diff", str(a), str(a.parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["constants"][1:]) == (True, [0, 0])
