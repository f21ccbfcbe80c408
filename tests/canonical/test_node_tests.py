"""A share of the onnx package's node tests: what the runtime gets right stays right (`tools/node_tests` takes all)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
from tests import node_cases

EVERY = 16  # every n-th module of the onnx package
AT_MOST = 4  # tests of a module
# Operators of which tests went wrong once: the module and the test's name.
ONCE_WRONG = {
    "affinegrid": "test_affine_grid_2d_expanded",
    "bitcast": "test_bitcast_float32_to_int32",
    "if_": "test_if_opt",
    "layernormalization": "test_layer_normalization_2d_axis_negative_2_expanded",
    "mod": "test_mod_float32_mixed_sign_fmod_0",
    "sequence_map": "test_sequence_map_identity_1_sequence_expanded",
    "swish": "test_swish",
    "tensorscatter": "test_tensorscatter",
}


def cases() -> list[node_cases.Case]:
    """A few tests of every n-th module, and those that went wrong once."""
    prefix = node_cases.cases.__name__
    # What makes the outputs of these takes seconds; nothing rewrites a pooling, and attention has tests of its own.
    share = [m for m in node_cases.modules()[::EVERY] if not m.endswith(("attention", "averagepool"))]
    made = list(node_cases.collect([*share, *(f"{prefix}.{m}" for m in ONCE_WRONG)]))
    once = set(ONCE_WRONG.values())
    counted: Counter[str] = Counter()
    chosen = []
    for case in made:
        op = case.model.graph.node[0].op_type
        counted[op] += 1
        if case.name in once or (op not in {"Mod", "BitCast"} and counted[op] <= AT_MOST):
            chosen.append(case)
    assert once <= {c.name for c in chosen}
    return chosen


def test_what_the_runtime_gets_right_stays_right(tmp_path: Path) -> None:
    verdicts = {case.name: node_cases.judge(case, tmp_path) for case in cases()}
    judged = {name: v for name, v in verdicts.items() if v[0] != "unjudged"}
    assert {name: v for name, v in judged.items() if v[0] != "right"} == {}
    assert len(judged) >= 40
    assert set(ONCE_WRONG.values()) <= set(judged)


def test_stored_models_stay_right(tmp_path: Path) -> None:
    """Small models as PyTorch 0.3 and the onnx package wrote them, every fourth one."""
    verdicts = {case.name: node_cases.judge(case, tmp_path) for case in list(node_cases.stored())[::4]}
    assert {name: v for name, v in verdicts.items() if v[0] not in ("right", "unjudged")} == {}
    assert sum(v[0] == "right" for v in verdicts.values()) >= 20


def test_a_scan_over_a_batch_is_refused_in_one_line(tmp_path: Path) -> None:
    prefix = node_cases.cases.__name__
    case = next(c for c in node_cases.collect([f"{prefix}.scan"]) if c.name == "test_scan_sum")
    verdict, why = node_cases.judge(case, tmp_path)
    assert verdict == "refused"
    assert why == "node 'Scan_y' is a Scan over a batch, of opset 8; export at opset 9 or above"
