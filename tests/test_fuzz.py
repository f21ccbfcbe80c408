"""A few hundred damaged and hostile inputs; `tools/fuzz` tries thousands."""

import os

import pytest

from tests.fuzzing import fuzz

CASES = {"model": 120, "external": 30, "recipe": 40, "data": 60, "cache": 4}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", CASES)
def test_what_is_not_accepted_is_refused(kind: str) -> None:
    """No raw exception, no hang, no crash, nothing written outside of the output."""
    found = list(fuzz(kind, range(CASES[kind])))
    assert [f"{x.kind} {x.seed}: {x.verdict}: {x.text}" for x in found if x.failed] == []
    assert len({x.verdict for x in found}) == 2, "cases are accepted and refused"
