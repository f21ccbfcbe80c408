"""Gate expressions: reading, judging, refusing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import RecipeError
from onnxcomp.validation.gates import NAMES, Condition, Gate


@given(
    st.sampled_from(sorted(NAMES)),
    st.sampled_from(["<=", ">=", "<", ">"]),
    st.floats(-1e6, 1e6),
    st.sampled_from(["", "%", "x", " dB"]),
)
def test_reads_what_it_prints(name, op, bound, unit):
    c = Condition.parse(f" {name} {op} {bound!r}{unit} ")
    assert (c.name, c.op) == (name, op)
    assert c.bound == pytest.approx(bound / 100 if unit == "%" else bound)
    assert Condition.parse(c.text) == c


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqnr", "not NAME OP VALUE"),
        ("sqnr>=", "not NAME OP VALUE"),
        ("sqnr==20", "not NAME OP VALUE"),
        ("sqnr>=abc", "not NAME OP VALUE"),
        ("sqnr>=1e", "not a number"),
        ("sqnr>=1e999", "finite"),
        ("sqn>=20", "did you mean 'sqnr'"),
        ("perplexity>=20", "perplexity-rise"),
    ],
)
def test_bad_expressions_say_why(text, message):
    with pytest.raises(RecipeError, match=message):
        Gate([text])


def test_later_expression_on_the_same_side_wins():
    gate = Gate(["sqnr>=10", "size<=0.5x", "sqnr>=20"])
    assert [c.text for c in gate.conditions] == ["sqnr>=20", "size<=0.5x"]


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_nan_and_unmeasured_never_pass(value):
    gate = Gate(["sqnr>=10", "agreement>=0.9"])
    sqnr, agreement = gate.judge({"sqnr": value})
    assert sqnr.passed == (not math.isnan(value) and value >= 10)
    assert not agreement.passed
    assert agreement.value is None


def test_optional_condition_is_judged_where_it_was_measured():
    gate = Gate(["accuracy-drop<=1%?"])
    assert gate.metrics == []
    assert gate.judge({}) == []
    assert [v.passed for v in gate.judge({"accuracy-drop": 0.02})] == [False]
    assert Gate(["accuracy-drop<=1%?", "accuracy-drop<=5%"]).conditions[0].bound == 0.05


def test_quality_and_file_conditions_are_judged_apart():
    gate = Gate(["latency<=0.6x", "size<=0.3x", "perplexity-rise<=1%"])
    assert [v.gate for v in gate.judge({"perplexity-rise": 0.02})] == ["perplexity-rise<=1%"]
    assert [v.passed for v in gate.judge({"latency": 0.5, "size": 0.4}, files=True)] == [True, False]
    assert gate.metrics == ["perplexity"]
    assert gate.wants_latency
