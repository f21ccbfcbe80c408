"""What all tests share."""

import contextlib
import functools
import gc
import os

import pytest

from onnxcomp.runtime import sessions
from tests.session_cache import sessions_made_once  # noqa: F401

# Several workers fill the cores; two threads a session would wait for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    sessions.THREADS = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the code blocks of the pages, one long test for which the other workers would wait at the end.

    Then what exports: one worker gets most of it, so that one imports transformers and the exporter.
    """
    items.sort(key=lambda item: (item.name != "test_blocks_run_in_order", not item.get_closest_marker("export")))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of the collector's rounds: going through them took an eighth of all tests' time."""
    gc.collect()
    gc.freeze()
    # 700 new objects is where a round begins otherwise; a graph of the tests is some ten thousand.
    gc.set_threshold(20_000, 20, 20)


@functools.cache
def read_translations_once() -> None:
    """Let torch's exporter read onnxscript's library once, not for every export: a sixth of the time of a small one."""
    with contextlib.suppress(ImportError, AttributeError):  # neither is public; without them exports are only slower
        from torch.onnx._internal.exporter._registration import onnxscript_apis

        onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("export"):
        read_translations_once()
