"""The PNG: what it shows, where its labels are, and that the page shows the same in the same colours."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import msgspec
import pytest
import synthetic
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from mvmoe_deploy.bench.report.charts import COLOURS
from mvmoe_deploy.bench.report.page import html
from mvmoe_deploy.bench.report.png import draw, picture
from mvmoe_deploy.bench.results import Results


@pytest.fixture(scope="module")
def results() -> Results:
    """A dense and a routed row; the routed one is noisy and its time is short."""
    noisy = synthetic.latency(1.06, 7, reasons=["times scatter (coefficient of variation 0.31)"])
    routed = msgspec.structs.replace(synthetic.row("mobile-vmoe", seed=2), warm=noisy)
    dense = msgspec.structs.replace(synthetic.row("dense", seed=1), warm=synthetic.latency(1.0))
    return synthetic.results([dense, routed])


def texts(results: Results) -> list[str]:
    return [text.get_text() for text in picture(results).findobj(Text) if text.get_text()]


def test_it_is_a_picture(results: Results, tmp_path: Path) -> None:
    draw(results, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_noisy_row_is_marked_and_the_mark_explained(results: Results) -> None:
    shown = texts(results)
    assert shown.count("mobile-vmoe †") == 2 and shown.count("dense") == 2
    assert "Imagined CPU, 2 cores · 1 thread · at least 300 interleaved rounds · † too noisy to quote" in shown
    quiet = synthetic.results([synthetic.row("dense")], threads=2)
    assert not any("†" in text for text in texts(quiet)) and any("2 threads" in text for text in texts(quiet))


def test_labels_keep_off_the_axis(results: Results) -> None:
    figure = picture(results)
    figure.draw_without_rendering()
    for axes in figure.axes:
        inside = axes.get_window_extent()
        for label in axes.texts:
            box = label.get_window_extent()
            assert inside.y0 < box.y0 and box.y1 < inside.y1, label.get_text()
        times = [label.get_window_extent() for label in axes.texts]
        assert not any(a.overlaps(b) for n, a in enumerate(times) for b in times[:n])


def test_a_row_has_one_colour_in_the_png_and_on_the_page(results: Results) -> None:
    latency = picture(results).axes[0]
    boxes = [to_hex(patch.get_facecolor()) for patch in latency.patches]
    assert boxes == [COLOURS["dense"], COLOURS["mobile-vmoe"]]
    assert (COLOURS["dense"], COLOURS["mobile-vmoe"]) == ("#4477aa", "#ee6677")  # blue and red
    page = resources.files("mvmoe_deploy.bench.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    light = page[page.index(":root") : page.index("@media")]
    assert dict(re.findall(r"--c-([a-z-]+): (#[0-9a-f]{6});", light)) == COLOURS
    drawn = re.findall(r"fill: var\(--c-([a-z-]+)\)", html(results))
    assert {"dense", "mobile-vmoe"} <= set(drawn)


def test_without_memory_there_is_one_panel() -> None:
    assert len(picture(synthetic.results([synthetic.bare()])).axes) == 1
