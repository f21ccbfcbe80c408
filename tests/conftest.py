"""What all tests share."""

import gc
import os

import pytest

from onnxcomp.runtime import sessions

# Several workers fill the cores; two threads a session would wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    sessions.THREADS = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The code blocks of the pages are one long test: at the end, the other workers would wait for it."""
    items.sort(key=lambda item: item.name != "test_blocks_run_in_order")


def pytest_collection_finish() -> None:
    """Leave modules and tests out of the collector's rounds: going through them took an eighth of all tests' time."""
    gc.collect()
    gc.freeze()
    # 700 new objects is where a round begins otherwise; a graph of the tests is some ten thousand.
    gc.set_threshold(20_000, 20, 20)
