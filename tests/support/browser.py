"""What a real browser makes of a page."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on PATH (Debian: chromium chromium-driver)"
)


@dataclass(frozen=True)
class Look:
    """A page as shown at one width.

    Attributes:
        complaints: what the console says: script errors, refused loads.
        requests: addresses asked for, other than the page itself and data within it.
        overflow: pixels by which the page is wider than the screen.
        sections: ids of the sections that have a height, in order.
        empty: figures, tables and sections that show nothing.
        scrolling: titles of the tables that are wider than their frame.
        scripts: script elements, and elements with an inline event handler.
        text: all visible text.
        background: of the page, as computed.
    """

    complaints: list[str]
    requests: list[str]
    overflow: int
    sections: list[str]
    empty: list[str]
    scrolling: list[str]
    scripts: int
    text: str
    background: str


class Browser:
    """Headless Chromium that may not reach anything."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def look(self, page: Path, width: int, media: str = "screen", dark: bool = False) -> Look:
        """Opens a page anew and reports on it.

        Args:
            page: an HTML file.
            width: of the screen, CSS pixels; below 600 it is a phone's.
            media: ``screen`` or ``print``.
            dark: whether the reader prefers dark colours.
        """
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # drops what earlier pages left
        self.driver.get(page.as_uri())
        seen = self.driver.execute_script(
            """
            const shown = element => element.getBoundingClientRect().height > 10;
            const all = selector => [...document.querySelectorAll(selector)];
            return {
              overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
              sections: all("section[id]").filter(shown).map(element => element.id),
              empty: all("figure, table, section, svg").filter(element => !shown(element) ||
                     (element.tagName !== "svg" && !element.querySelector("svg, td, dd")))
                     .map(element => element.outerHTML.slice(0, 80)),
              scrolling: all("table").map(element => element.parentElement)
                     .filter(frame => frame.scrollWidth > frame.clientWidth + 1)
                     .map(frame => frame.getAttribute("aria-label") || ""),
              scripts: all("script").length + all("*").filter(
                     element => [...element.attributes].some(each => each.name.startsWith("on"))).length,
              text: document.body.innerText,
              background: getComputedStyle(document.body).backgroundColor,
            };"""
        )
        complaints = [entry["message"] for entry in self.driver.get_log("browser")]
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        requests = [url for url in asked if url != page.as_uri() and not url.startswith("data:")]
        return Look(complaints, requests, **seen)

    def scrolled_to_the_end(self) -> list[tuple[str, bool, bool]]:
        """Of every table as last shown, scrolled to its right end: title, whether first and last column are in sight."""
        found = self.driver.execute_script(
            """
            return [...document.querySelectorAll("table")].map(table => {
              const frame = table.parentElement;
              frame.scrollLeft = 1e6;
              const inside = cell => {
                const at = cell.getBoundingClientRect(), box = frame.getBoundingClientRect();
                return at.left >= box.left - 2 && at.right <= box.right + 2 && box.right <= innerWidth;
              };
              const heads = table.querySelectorAll("thead th");
              return [frame.getAttribute("aria-label") || "", inside(heads[0]), inside(heads[heads.length - 1])];
            });"""
        )
        return [tuple(each) for each in found]

    def screenshot(self, path: Path) -> None:
        """The whole page as last shown, as a PNG."""
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as last shown, printed with the margins and paper that it asks for."""
        options = {"preferCSSPageSize": True, "printBackground": False}
        printed = self.driver.execute_cdp_cmd("Page.printToPDF", options)
        path.write_bytes(base64.b64decode(printed["data"]))


@contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Browser]:
    """Starts Chromium with an empty profile.

    Args:
        profile: a folder that does not exist yet.
        flags: further flags of Chromium.
    """
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}", *flags):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
