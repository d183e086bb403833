"""Fails where a page of the built site would load something from elsewhere: ``python docs/offline.py site``."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADING = {("link", "href"), ("use", "href")}
"""Attributes that load what they name, beside every ``src``, ``srcset``, ``poster`` and ``data``."""

NEVER_LOADED = {"canonical", "next", "prev"}
"""Relations of a ``link`` that only name a page."""


class Loads(HTMLParser):
    """Collects what a page loads from another host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "link" and dict(attrs).get("rel") in NEVER_LOADED:
            return
        for name, value in attrs:
            loads = name in ("src", "srcset", "poster", "data") or (tag, name) in LOADING
            if value and ((loads and _elsewhere(value)) or (name == "style" and _in_css(value))):
                self.found.append(f"<{tag} {name}={value!r}>")


def _elsewhere(url: str) -> bool:
    return re.match(r"\s*(https?:)?//", url) is not None


def _in_css(text: str) -> list[str]:
    return re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^'\")\s]*", text)


def main(site: Path) -> int:
    """Prints what would be loaded; returns 1 where there is anything, or no site."""
    pages = sorted(site.rglob("*.html"))
    found = []
    for page in pages:
        parser = Loads()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page}: {what}" for what in parser.found]
    for sheet in site.rglob("*.css"):
        found += [f"{sheet}: {what}" for what in _in_css(sheet.read_text(encoding="utf-8"))]
    print("\n".join(found) or f"{len(pages)} pages load nothing from elsewhere")
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
