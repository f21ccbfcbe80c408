"""A few hundred damaged and hostile inputs; `tools/fuzz` tries thousands."""

import os

import pytest

from tests.fuzzing import fuzz

CASES = {"load": 250, "model": 30, "external": 10, "recipe": 4, "data": 40, "cache": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", CASES)
def test_what_is_not_accepted_is_refused(kind: str) -> None:
    """No raw exception, no hang, no crash, nothing written outside of the output."""
    found = list(fuzz(kind, range(CASES[kind])))
    assert [f"{x.kind} {x.seed}: {x.verdict}: {x.text}" for x in found if x.failed] == []
    assert {x.verdict for x in found} <= {"ok", "refused"}
