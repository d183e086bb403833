"""A small web server for phones on the local network: a page, the runtime for browsers, its engine, and bundles."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mvmoe_deploy.bundle import MANIFEST, MANIFEST_DIGEST, Bundle
from mvmoe_deploy.errors import BackendError, BundleError

PORT = 8470
"""The port that is tried first, so that a page that was installed on a phone is found again."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".wasm": "application/wasm",
}
"""Types by a file's suffix; others are bytes."""


@dataclass
class Site:
    """What is served.

    Attributes:
        files: files by their path on the server.
        documents: contents that are no files, by their path; they are sent as JSON.
    """

    files: dict[str, Path] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)

    def add_folder(self, prefix: str, folder: Path) -> None:
        """Serves the files of a folder as they are now, without sub-folders."""
        self.files |= {prefix + file.name: file for file in folder.iterdir() if file.is_file()}

    def add_bundle(self, name: str, bundle: Bundle) -> None:
        """Serves the files that a bundle's manifest lists, and nothing else that lies in its folder."""
        paths = [MANIFEST, *(file.path for file in bundle.manifest.files)]
        if (bundle.path / MANIFEST_DIGEST).is_file():
            paths.append(MANIFEST_DIGEST)
        self.files |= {f"/bundles/{name}/{path}": bundle.path / path for path in paths}


def app_site(bundles: Mapping[str, Bundle], engine: Path) -> Site:
    """The app with everything that it needs.

    Args:
        bundles: bundles by the name that the app shows.
        engine: the folder of :func:`mvmoe_deploy.web_engine.find`.

    Raises:
        BundleError: a browser cannot run a bundle, or a bundle is damaged.
    """
    from mvmoe_deploy.runtimes import WEB
    from mvmoe_deploy.web_engine import FILES, VERSION

    site = Site()
    site.add_folder("/", WEB / "app")
    site.add_folder("/mvmoe-deploy/", WEB / "src")
    site.files["/"] = WEB / "app" / "index.html"
    site.files |= {f"/engine/{name}": engine / name for name in FILES}
    for name, bundle in bundles.items():
        if bundle.manifest.target != "onnx":
            raise BundleError(
                f"{bundle.path}: is an {bundle.manifest.target} bundle, and browsers run onnx ones; export it with "
                "--target onnx"
            )
        bundle.check()
        site.add_bundle(name, bundle)
    site.documents["/site.json"] = {
        "engine": f"onnxruntime-web {VERSION}",
        "bundles": [
            {"name": name, "url": f"bundles/{quote(name)}", "digest": bundle.digest} for name, bundle in bundles.items()
        ],
    }
    return site


class Handler(BaseHTTPRequestHandler):
    """Answers requests for what a site holds; the rest of the disk is out of reach."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Sends a document or a file, or the rest of one whose transfer broke."""
        self.reply(with_body=True)

    def do_HEAD(self) -> None:
        """Sends the header alone."""
        self.reply(with_body=False)

    def reply(self, with_body: bool) -> None:
        """Sends what the path names."""
        path = unquote(urlsplit(self.path).path)
        site = self.server.site
        if path in site.documents:
            self.send_document(site.documents[path], with_body)
        elif path in site.files:
            self.send_file(site.files[path], with_body)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def send_document(self, content: Any, with_body: bool = True) -> None:
        """Sends JSON."""
        data = json.dumps(content).encode()
        self.head(HTTPStatus.OK, TYPES[".json"], len(data))
        if with_body:
            self.wfile.write(data)

    def send_file(self, file: Path, with_body: bool) -> None:
        """Sends a file, from the offset that a Range header asks for."""
        try:
            content = file.open("rb")
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with content:
            size = file.stat().st_size
            start = self._start(size)
            status = HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK
            extra = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
            content_type = TYPES.get(file.suffix, "application/octet-stream")
            self.head(status, content_type, size - start, {"Accept-Ranges": "bytes", **extra})
            content.seek(start)
            if with_body:
                shutil.copyfileobj(content, self.wfile, 1 << 16)

    def head(self, status: HTTPStatus, content_type: str, length: int, extra: Mapping[str, str] | None = None) -> None:
        """Sends the header of an answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-cache")  # a bundle that was exported again has the same names
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def _start(self, size: int) -> int:
        """The offset that the request asks for; 0 for a whole file."""
        found = re.fullmatch(r"bytes=(\d{1,18})-", self.headers.get("Range", ""))
        return int(found[1]) if found and int(found[1]) < size else 0

    def log_message(self, *_: object) -> None:
        """Says nothing: the terminal shows the address."""

    def handle(self) -> None:
        """Answers a connection's requests; a phone that leaves in the middle is no error."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Serves a site until it is shut down."""

    daemon_threads = True

    def __init__(self, site: Site, host: str, port: int, handler: type[Handler] = Handler) -> None:
        self.site = site
        super().__init__((host, port), handler)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])


def open_server(site: Site, host: str = "0.0.0.0", port: int | None = None, handler: type[Handler] = Handler) -> Server:
    """Opens a port; call ``serve_forever`` then.

    Args:
        site: what to serve.
        host: address to listen on; by default every network of this machine.
        port: the port; by default :data:`PORT`, or any that is free.
        handler: what answers requests.

    Raises:
        BackendError: the port cannot be opened.
    """
    tried: Sequence[int] = (PORT, 0) if port is None else (port,)
    for number in tried:
        try:
            return Server(site, host, number, handler)
        except OSError as error:
            reason = error.strerror or error
    raise BackendError(f"{host}:{tried[0]}: cannot be opened ({reason}); choose another by --port")


def local_address() -> str:
    """This machine's address on its network; ``127.0.0.1`` if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of nobody (RFC 5737); nothing is sent, a route is chosen
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def qr_code(text: str) -> str:
    """A QR code as text for a terminal; empty if the package that draws it is not installed."""
    try:
        import segno
    except ImportError:
        return ""
    drawn = io.StringIO()
    segno.make(text, error="l").terminal(drawn, border=2, compact=True)
    return drawn.getvalue()
