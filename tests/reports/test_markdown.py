"""Strings of models and users in Markdown: nothing in them is markup."""

import html

import pytest

from onnxcomp.reports import junit, markdown
from onnxcomp.reports.outcome import Report
from onnxcomp.validation.gates import Verdict


@pytest.mark.parametrize(
    "said",
    ["<img src=x onerror=alert(1)>", "a `b` *c* | d", "[x](javascript:1)", "two\nlines", "\\`", "~~a~~ _b_"],
)
def test_text_is_no_markup(said: str) -> None:
    shown = markdown.text(said)
    assert "\n" not in shown
    assert "<" not in shown
    bare = shown.replace("\\\\", "")
    assert all(bare[i - 1] == "\\" for i, c in enumerate(bare) if c in "`*[]|~" or (c == "_" and "_" in said))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("# heading", "\\# heading"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("12) item", "12\\) item"),
        ("> quote", "\\> quote"),
        ("a - b # c > 1. docs_lm", "a - b # c > 1. docs_lm"),
    ],
)
def test_text_begins_no_block_and_stays_readable(said: str, shown: str) -> None:
    assert markdown.text(said) == shown


def test_code_ends_where_it_ends() -> None:
    assert markdown.code("a_b") == "`a_b`"
    assert markdown.code("a`` `b") == "``` a`` `b ```"
    for said in ("a|b\nc", "a\\|b", "<b>|`_x_`"):  # alike in a table and outside of one
        assert not set(markdown.code(said)[6:-7]) & set("|`\\<>_*")
        assert html.unescape(markdown.code(said)) == f"<code>{' '.join(said.split())}</code>"
    assert markdown.fenced("yaml", "x: ```\n```").startswith("````yaml\n")


def test_names_of_cases_do_not_depend_on_the_outcome() -> None:
    good, bad = (Report(verdicts=[Verdict("sqnr>=9", value, value > 9)]) for value in (10.0, 8.0))
    done, refused = junit.junit("compress", {"model": good}), junit.junit("compress", {"": bad}, "no", refused=True)
    names = [x.split('"')[1] for x in done.splitlines() if "<test" in x]
    assert names == [x.split('"')[1] for x in refused.splitlines() if "<test" in x]
    assert 'failures="1"' in refused
    assert 'failures="1"' in junit.junit("compress", {"": good}, "slower", refused=True)
    assert 'errors="1"' in junit.junit("compress", {}, "no such file")


def test_suites_of_several_graphs_are_called_alike_if_one_is_refused() -> None:
    good, bad = (Report(verdicts=[Verdict("sqnr>=9", value, value > 9)]) for value in (10.0, 8.0))
    done = junit.junit("compress", {"encoder": good, "decoder": good})
    refused = junit.junit("compress", {"decoder": bad}, "no", refused=True)
    assert 'name="onnxcomp.compress.decoder"' in done
    assert 'name="onnxcomp.compress.decoder"' in refused
