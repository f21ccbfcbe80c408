"""The page in a browser: no errors, nothing wider than the window, contrast, order of the keyboard; skipped without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxcomp.reports import json_report
from onnxcomp.reports.outcome import Report
from onnxcomp.reports.page.render import page
from tests.reports.browser import CHROMIUM, PALE, WIDTHS, chromium, opened
from tests.reports.test_page import HOSTILE, rich

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as made:
        yield made


def show(browser: Any, folder: Path, report: Report, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page of a report in a window."""
    file = folder / "report.html"
    file.write_text(page(json.loads(json_report.text(report))), "utf-8")
    return opened(browser, file, width, scheme)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["layer/0", HOSTILE], ids=["plain", "hostile"])
def test_nothing_is_wider_than_the_window_and_nothing_complains(
    browser: Any, tmp_path: Path, width: int, name: str
) -> None:
    shown, said = show(browser, tmp_path, rich(name), width)
    assert said == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("document.querySelectorAll('img, iframe').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS[:2])
def test_texts_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    shown, _ = show(browser, tmp_path, rich("layer/0"), width, scheme)
    assert shown.evaluate(PALE) == []


def test_the_keyboard_goes_down_the_page(browser: Any, tmp_path: Path) -> None:
    shown, _ = show(browser, tmp_path, rich("layer/0"), 1024)
    order = []
    for _ in range(12):
        shown.keyboard.press("Tab")
        order.append(
            shown.evaluate("[document.activeElement.tagName, document.activeElement.textContent.slice(0, 30)]")
        )
    assert order[0] == ["A", "Skip to the figures"]
    assert [text for tag, text in order if tag == "A"][1:3] == ["Is it good enough?", "What was lost where?"]
    place = "[...document.querySelectorAll('a, button, pre, summary, [tabindex]')].indexOf(document.activeElement)"
    shown.evaluate("document.activeElement.blur()")
    places = []
    for _ in range(20):
        shown.keyboard.press("Tab")
        places.append(shown.evaluate(place))
    assert places == sorted(places)


def test_the_command_is_copied(browser: Any, tmp_path: Path) -> None:
    shown, said = show(browser, tmp_path, rich("layer/0"), 1024)
    button = shown.locator("button[data-copies=command]")
    assert button.is_visible()
    button.click()
    shown.wait_for_function("document.querySelector('button[data-copies=command]').textContent !== 'Copy'")
    assert said == []
