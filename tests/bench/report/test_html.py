"""The page of results, rendered by a real browser: nothing loads, nothing runs, nothing sticks out, nothing is empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import msgspec
import pytest
import synthetic

from mvmoe_deploy.bench.report.charts import charts
from mvmoe_deploy.bench.report.page import SECTIONS, html
from mvmoe_deploy.bench.results import Results

PHONE, DESKTOP, A4 = 375, 1280, 695  # the last is 184 mm: A4 less the margins


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.browser(tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    given = {
        "full": synthetic.results(),
        "suite": synthetic.paper_suite(),
        "hostile": hostile(),
        "bare": synthetic.results([synthetic.bare()]),
    }
    for name, results in given.items():
        (folder / f"{name}.html").write_text(html(results), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in given}


def hostile() -> Results:
    """Every text that a file can hold tries to become something else."""
    bad = synthetic.HOSTILE
    row = synthetic.row("mobile-vmoe", bad, group=bad, backend=bad, precision=bad, layout=bad)
    row = msgspec.structs.replace(row, residency=[msgspec.structs.replace(each, mix=bad) for each in row.residency])
    row = msgspec.structs.replace(row, warm=synthetic.latency(9, reasons=[bad]))
    results = synthetic.results([row, synthetic.row("dense", bad + "2", group=bad)])
    return msgspec.structs.replace(
        results,
        machine={bad: bad, "processor": bad, "commit": bad, "nested": {bad: [bad]}},
        method={bad: bad, "threads": bad},
        class_names=[bad] * synthetic.CLASSES,
        expert_names=[bad] * synthetic.EXPERTS,
    )


@browser.needs_browser
@pytest.mark.parametrize("name", ["full", "suite", "hostile", "bare"])
@pytest.mark.parametrize(
    ("width", "media", "dark"), [(PHONE, "screen", False), (DESKTOP, "screen", True), (A4, "print", False)]
)
def test_a_page_loads_nothing_and_fits(
    chromium: browser.Browser, pages: dict[str, Path], name: str, width: int, media: str, dark: bool
) -> None:
    look = chromium.look(pages[name], width, media, dark)
    assert look.complaints == []
    assert look.requests == []
    assert look.overflow == 0
    assert look.empty == []
    assert look.scripts == 0
    assert look.background == ("rgb(21, 23, 27)" if dark else "rgb(255, 255, 255)")


@browser.needs_browser
def test_every_part_is_there_if_measured_and_absent_if_not(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    full = chromium.look(pages["full"], DESKTOP)
    assert full.sections == [*SECTIONS, "method"]
    for words in ("mobile-vmoe", "stock †", "coefficient of variation 0.31", "Imagined CPU", "interleaved", "group 3"):
        assert words in full.text
    assert chromium.look(pages["bare"], DESKTOP).sections == ["models", "work", "measured", "latency", "method"]


@browser.needs_browser
def test_no_column_of_a_table_is_lost(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    """A desktop shows all columns at once; elsewhere the last can be scrolled to, beside the first, which stays."""
    assert chromium.look(pages["full"], 1200).scrolling == []
    for width in (PHONE, 500):
        assert "Measured" in chromium.look(pages["full"], width).scrolling
        tables = chromium.scrolled_to_the_end()
        assert len(tables) > 5 and {(first, last) for _, first, last in tables} == {(True, True)}
    assert chromium.look(pages["full"], A4, "print").scrolling == []


@browser.needs_browser
def test_a_hostile_name_is_shown_as_it_is(chromium: browser.Browser, pages: dict[str, Path]) -> None:
    text = chromium.look(pages["hostile"], DESKTOP).text
    assert '"><img src=http://192.0.2.1/x onerror=alert(1)><script>alert(2)</script>|$\\alpha_{$&amp;�[31m =1+1' in text


@browser.needs_browser
def test_the_browser_sees_what_is_wrong(chromium: browser.Browser, tmp_path: Path) -> None:
    """Known-bad pages: without them, the tests above could pass by seeing nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<body onload='0'><script>console.error('seen')</script><img src='http://192.0.2.1/x'>"
        "<div style='width: 2000px'>wide</div><section id='hollow'><figure></figure></section>"
    )
    look = chromium.look(page, PHONE)
    assert any("seen" in complaint for complaint in look.complaints)
    assert look.requests == ["http://192.0.2.1/x"]
    assert look.overflow > 1000
    assert look.scripts == 2
    assert len(look.empty) == 2 and look.sections == []


def test_pages_stay_small(pages: dict[str, Path]) -> None:
    assert max(page.stat().st_size for page in pages.values()) < 1_000_000


def test_charts_of_one_page_do_not_share_ids() -> None:
    """Otherwise a clip path of one chart would cut another chart."""
    import re

    ids = [each for chart in charts(synthetic.results()) for each in re.findall(r'\bid="([^"]*)"', chart.svg)]
    assert ids and len(set(ids)) == len(ids)
    assert all(
        "href" not in chart.svg.replace('href="#', "").replace('href="data:image/png', "")
        for chart in charts(hostile())
    )


def test_pages_are_reproducible() -> None:
    assert html(synthetic.results()) == html(synthetic.results())
