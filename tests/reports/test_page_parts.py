"""Parts of report.html: ranges with what codes cover, forms with their times, models that are unrelated."""

from __future__ import annotations

from tests.reports.test_page import drawn, read, rich


def test_ranges_are_drawn_with_what_codes_cover_of_them() -> None:
    _, found = read(rich("a"))
    tables = [e for e in found.all("table") if "ranges" in e.attributes.get("class", "")]
    assert ["Clipped" in e.text for e in tables] == [True, False]  # of weights it is not counted
    assert "-0.1800 to 23.25" in tables[0].text
    assert "< 0.01%" in tables[0].text
    widths = [
        (e.attributes["class"], float(e.attributes["x"]), float(e.attributes["width"]))
        for e in found.all("rect")
        if e.parent is not None and e.parent.attributes.get("class") == "range"
    ]
    assert widths[:3] == [("was", 0.0, 100.0), ("is", 0.08, 93.91), ("zero", 0.8, 0.7)]
    assert widths[3:6] == [("was", 0.0, 75.0), ("is", 0.0, 100.0), ("zero", 50.0, 0.7)]


@drawn
def test_forms_are_compared_with_the_default_and_each_with_its_times() -> None:
    _, found = read(rich("a"))
    [overview] = [e for e in found.all("figure") if e.attributes["id"] == "picture-forms"]
    assert "a (1): fused (taken)" in overview.text
    assert "fastest, a" in overview.text
    [times] = [e for e in found.all("figure") if e.attributes["id"] == "picture-forms-0-0"]
    assert {e.attributes["data-at"] for e in found.elements if "data-at" in e.attributes and e.tag == "rect"} >= {
        f"/steps/0/choices/0/candidates/{k}/ms/{s}" for k in (0, 1) for s in (0, 1)
    }
    assert "fused (chosen)" in times.text


def test_unrelated_models_are_called_so_and_nothing_of_them_is_drawn() -> None:
    r = rich()
    r.by_layer["unrelated"] = True
    _, found = read(r)
    assert not [e for e in found.all("figure") if e.attributes["id"] == "picture-values"]
    assert [e for e in found.all("p") if e.text.startswith("The two models have nothing in common")]
