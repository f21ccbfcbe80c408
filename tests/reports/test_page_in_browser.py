"""The page in a browser: no errors, nothing wider than the window, contrast, order of the keyboard; skipped without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxcomp.reports import json_report
from onnxcomp.reports.outcome import Report
from onnxcomp.reports.page.render import page
from tests.reports.test_page import HOSTILE, rich

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
WIDTHS = (390, 1024, 1600)

# Texts whose colour is too near to what is behind them (WCAG 2.2 AA: 4.5, of large text 3), with their ratio.
PALE = """() => {
  const rgb = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(x => linear(x / 255))
    .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = walk.nextNode(); n; n = walk.nextNode()) {
    const e = n.parentElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!n.data.trim() || !box.width || e.closest('script, style, title, .hidden, [hidden]')) continue;
    const a = light(rgb(e.closest('svg') ? style.fill : style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05), large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) found.push(`${n.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        made = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def opened(browser: Any, folder: Path, report: Report, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window, with everything unfolded, and what the browser complained of."""
    file = folder / "report.html"
    file.write_text(page(json.loads(json_report.text(report))), "utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    shown, said = context.new_page(), list[str]()
    shown.on("console", lambda m: said.append(m.text))
    shown.on("pageerror", lambda e: said.append(str(e)))
    shown.on("dialog", lambda d: (said.append(f"dialog: {d.message}"), d.dismiss()))
    shown.goto(file.as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
    return shown, said


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["layer/0", HOSTILE], ids=["plain", "hostile"])
def test_nothing_is_wider_than_the_window_and_nothing_complains(
    browser: Any, tmp_path: Path, width: int, name: str
) -> None:
    shown, said = opened(browser, tmp_path, rich(name), width)
    assert said == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("document.querySelectorAll('img, iframe').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS[:2])
def test_texts_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    shown, _ = opened(browser, tmp_path, rich("layer/0"), width, scheme)
    assert shown.evaluate(PALE) == []


def test_the_keyboard_goes_down_the_page(browser: Any, tmp_path: Path) -> None:
    shown, _ = opened(browser, tmp_path, rich("layer/0"), 1024)
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
    shown, said = opened(browser, tmp_path, rich("layer/0"), 1024)
    button = shown.locator("button[data-copies=command]")
    assert button.is_visible()
    button.click()
    shown.wait_for_function("document.querySelector('button[data-copies=command]').textContent !== 'Copy'")
    assert said == []
