"""The runtime for browsers in a real one: a server of the tests that can misbehave, and a page that answers questions."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from browser import Browser
from selenium.webdriver import Chrome
from web_runtime import HERE, npm_packages

from mvmoe_deploy.runtimes import WEB
from mvmoe_deploy.serve import Handler, Server, Site, open_server
from mvmoe_deploy.web_engine import FILES

SECONDS = 120.0

Fault = Callable[["FaultyHandler", Path], None]
"""Sends a file wrongly."""


@dataclass
class FaultySite(Site):
    """A site that counts what it sends, and sends some files wrongly.

    Attributes:
        faults: what is wrong, by path.
        sent: bytes sent by path, headers included.
        requests: number of requests by path.
        gone: whether connections that are still open get no answer, as when the server's process has ended.
    """

    faults: dict[str, Fault] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    gone: bool = False
    _whole: dict[str, Path] = field(default_factory=dict)

    def whole(self) -> None:
        """Takes what is served now as what :meth:`heal` brings back."""
        self._whole = dict(self.files)

    def heal(self) -> None:
        """Ends all faults."""
        self.faults.clear()
        self.headers.clear()
        self.files |= self._whole


class FaultyHandler(Handler):
    """Answers as the real server does, but for the site's faults."""

    @property
    def site(self) -> FaultySite:
        """The site, which counts."""
        assert isinstance(self.server.site, FaultySite)
        return self.server.site

    def reply(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        site = self.site
        if site.gone:
            self.close_connection = True
            return
        site.requests[path] += 1
        before = self.wfile
        self.wfile = Counting(before, site.sent, path)  # type: ignore[assignment]
        try:
            super().reply(with_body)
        finally:
            self.wfile = before

    def send_file(self, file: Path, with_body: bool) -> None:
        site = self.site
        fault = site.faults.get(unquote(urlsplit(self.path).path))
        if fault:
            fault(self, file)
        else:
            super().send_file(file, with_body)


class Counting:
    """A stream that counts the bytes written to it."""

    def __init__(self, stream: Any, sent: Counter[str], path: str) -> None:
        self.stream, self.sent, self.path = stream, sent, path

    def write(self, data: bytes) -> int:
        self.sent[self.path] += len(data)
        return int(self.stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def hang_up(handler: FaultyHandler, file: Path) -> None:
    """Closes the connection without an answer, as a server does that is gone."""
    handler.close_connection = True


def flip_a_byte(handler: FaultyHandler, file: Path) -> None:
    """Sends the file with one byte that differs."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    handler.head(HTTPStatus.OK, "application/octet-stream", len(content))
    handler.wfile.write(content)


def drip(handler: FaultyHandler, file: Path) -> None:
    """Sends the file in ten parts, each after a pause."""
    content = file.read_bytes()
    handler.head(HTTPStatus.OK, "application/octet-stream", len(content))
    for part in range(10):
        handler.wfile.write(content[part * len(content) // 10 : (part + 1) * len(content) // 10])
        time.sleep(0.15)


def fall_silent(handler: FaultyHandler, file: Path) -> None:
    """Promises the file, and sends nothing."""
    handler.head(HTTPStatus.OK, "application/octet-stream", file.stat().st_size)
    time.sleep(2.0)
    handler.close_connection = True


class DieInTheMiddle:
    """Sends a share of a file and hangs up, some times; then as it should.

    Attributes:
        ranges: the Range headers of the requests so far.
    """

    def __init__(self, deaths: int, share: float = 0.5) -> None:
        self.deaths, self.share = deaths, share
        self.ranges: list[str] = []

    def __call__(self, handler: FaultyHandler, file: Path) -> None:
        self.ranges.append(handler.headers.get("Range", ""))
        if len(self.ranges) > self.deaths:
            Handler.send_file(handler, file, with_body=True)
            return
        content = file.read_bytes()
        handler.head(HTTPStatus.OK, "application/octet-stream", len(content))
        handler.wfile.write(content[: int(len(content) * self.share)])
        handler.wfile.flush()
        time.sleep(0.5)  # a browser drops what it has not passed on when the connection ends
        handler.close_connection = True


def add_tree(site: Site, prefix: str, folder: Path) -> None:
    """Serves a folder with all that is below it."""
    site.files |= {f"{prefix}/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()}


def page_site() -> FaultySite:
    """The package, its engine, and a page that asks."""
    site = FaultySite(headers={})
    site.add_folder("/src/", WEB / "src")
    engine = npm_packages() / "onnxruntime-web" / "dist"
    site.files |= {f"/engine/{name}": engine / name for name in FILES}
    site.files["/"] = HERE / "page.html"
    site.files |= {f"/{name}": HERE / name for name in ("page.mjs", "answer.mjs")}
    return site


@contextmanager
def served(site: FaultySite, port: int = 0, certificate: Path | None = None) -> Iterator[Server]:
    """A server of a site on this machine, with the address ``http://localhost:PORT``; by HTTPS with a certificate."""
    site.gone = False
    server = open_server(site, "127.0.0.1", port, certificate, FaultyHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        site.gone = True
        server.shutdown()
        server.server_close()
        thread.join()


class Page:
    """The page of the tests, open in a browser."""

    def __init__(self, opened: Browser, server: Server) -> None:
        self.driver: Chrome = opened.driver
        self.url = f"http://localhost:{server.port}/"
        assert isinstance(server.site, FaultySite)
        self.site = server.site
        self.driver.set_script_timeout(SECONDS)
        self.open()

    def open(self) -> None:
        """Opens it anew: nothing is left in memory."""
        self.driver.get(self.url)

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to requests, which answer.mjs describes."""
        script = """
            const [requests, done] = arguments;
            import('/page.mjs').then(page => page.ask(requests)).then(done, error => done({error: String(error)}));
        """
        found = self.driver.execute_async_script(script, list(requests))
        assert isinstance(found, str), found
        answers: list[dict[str, Any]] = json.loads(found)
        assert len(answers) == len(requests)
        return answers

    def ask_one(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        return self.ask([request])[0]
