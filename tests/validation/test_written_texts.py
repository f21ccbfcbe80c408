"""Texts beside references: values computed by hand."""

import numpy as np
import pytest

from onnxcomp.validation.written_texts import TEXT_METRICS, edits, scores

BY_NAME = {m.name: m for m in TEXT_METRICS}


def value(name: str, *pairs: tuple[str, str]) -> float:
    metric = BY_NAME[name]
    sums = np.array([metric.score(text, reference) for text, reference in pairs], np.float64)
    return float(metric.reduce(sums.sum(axis=0, keepdims=True))[0])


def test_chrf_is_f_of_the_means_over_orders_that_both_have() -> None:
    """Order 1: 2 of 2 made, 2 of 3 wanted; order 2: 1 of 1 and 1 of 2; order 3 only the reference has."""
    recall = (2 / 3 + 1 / 2) / 2
    assert value("chrf", ("ab", "abc")) == pytest.approx(5 * recall / (4 + recall)) == pytest.approx(7 / 11)
    assert value("chrf", ("a b", "ab")) == value("chrf", ("abcdefgh", "abcdefgh")) == 1
    assert value("chrf", ("xyz", "abc")) == value("chrf", ("", "abc")) == 0
    # Counts of both texts are summed before they are divided: 3 of 4 and 3 of 5 letters, 1 of 2 and 1 of 3 pairs.
    precision, recall = (3 / 4 + 1 / 2) / 2, (3 / 5 + 1 / 3) / 2
    assert value("chrf", ("ab", "abc"), ("ba", "cb")) == pytest.approx(
        5 * precision * recall / (4 * precision + recall)
    )


@pytest.mark.parametrize(
    ("made", "wanted", "count"),
    [("a b c", "a x c d", 2), ("", "a b", 2), ("a b", "", 2), ("b a", "a b", 2), ("a b c", "b c", 1), ("a", "a", 0)],
)
def test_edits_are_the_fewest_words_to_change(made: str, wanted: str, count: int) -> None:
    assert edits(made.split(), wanted.split()) == count


def test_word_error_rate_is_of_all_words_and_exact_match_of_texts() -> None:
    pairs = [("a b c", "a x c d"), ("one", "one")]
    assert value("wer", *pairs) == 2 / 5
    assert value("exact", *pairs) == 1 / 2
    assert value("exact", (" one ", "one")) == 1


def test_both_models_are_compared_on_the_same_references() -> None:
    found = scores(["a b", "c"], ["a b", "d"], ["a b", "c"])
    assert {name: (m.reference, m.candidate) for name, m in found.items()} == {
        "exact": (1, 0.5),
        "chrf": (1, found["chrf"].candidate),
        "wer": (0, 1 / 3),
    }
    assert found["exact"].low <= -0.5 <= found["exact"].high
    assert 0 < found["chrf"].candidate < 1
