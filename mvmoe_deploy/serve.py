"""A small web server for phones on the local network: a page, the runtime for browsers, its engine, and bundles."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from mvmoe_deploy.bundle import MANIFEST, MANIFEST_DIGEST, Bundle
from mvmoe_deploy.errors import BackendError, BundleError
from mvmoe_deploy.runtimes import WEB
from mvmoe_deploy.web_engine import FILES, PROCESSOR, VERSION, cache_folder

PORT = 8470
"""The port that is tried first, so that a page that was installed on a phone is found again."""

COMPRESSED = (".html", ".css", ".js", ".mjs", ".json", ".webmanifest", ".svg")
"""Suffixes of text, which is compressed on its way; a manifest becomes a fifth of its size."""

CERTIFICATE_DAYS = 365
"""How long a certificate lasts that is made here; phones refuse those that last longer than 825 days."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""How this machine calls itself, and no other machine can."""

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


ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
"""Headers without which a browser gives the engine no threads; they count on HTTPS and on localhost alone."""


@dataclass
class Site:
    """What is served.

    Attributes:
        files: files by their path on the server.
        documents: contents that are no files, by their path; they are sent as JSON.
        headers: what every answer's header has besides.
    """

    files: dict[str, Path] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=lambda: dict(ISOLATED))

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
    site = Site()
    site.add_folder("/", WEB / "app")
    site.add_folder("/mvmoe-deploy/", WEB / "src")
    site.files["/"] = site.files.pop("/index.html")
    own = [path for path in sorted(site.files) if not path.endswith((".d.ts", "/node.js"))]
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
        "bundles": [_entry(name, bundle) for name, bundle in bundles.items()],
        # what the app keeps to start offline; it fetches all of it again when the version is another
        "shell": [f".{path}" for path in own if path != "/sw.js"] + [f"./engine/{name}" for name in PROCESSOR],
        "version": _version([site.files[path] for path in own]),
    }
    return site


def _entry(name: str, bundle: Bundle) -> dict[str, Any]:
    """What the page is told of a bundle before it opens it."""
    routing = bundle.manifest.routing
    return {
        "name": name,
        "url": f"bundles/{quote(name)}",
        "digest": bundle.digest,
        "experts": routing.experts if routing else 0,
    }


def _version(files: Sequence[Path]) -> str:
    """A text that differs when a file of the app does, or the engine."""
    known = hashlib.sha256(VERSION.encode())
    for file in files:
        known.update(file.read_bytes())
    return known.hexdigest()[:16]


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

    def send_document(self, content: Any, with_body: bool = True, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Sends JSON."""
        data = json.dumps(content).encode()
        self.head(status, TYPES[".json"], len(data))
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
            facts = os.fstat(content.fileno())
            size, tag = facts.st_size, f'"{facts.st_size:x}-{facts.st_mtime_ns:x}"'
            if self.headers.get("If-None-Match") == tag:
                self.send_response(HTTPStatus.NOT_MODIFIED)
                self.send_headers({"ETag": tag})  # the others too: what a browser keeps takes them over
                return
            start = self._start(size)
            status = HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK
            content_type = TYPES.get(file.suffix, "application/octet-stream")
            extra = {"ETag": tag, "Vary": "Accept-Encoding"}
            if start:
                extra["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            stream: BinaryIO = content
            if not start and file.suffix in COMPRESSED and self._takes_gzip():
                stream = io.BytesIO(gzip.compress(content.read(), 6))
                size = stream.getbuffer().nbytes
                extra["Content-Encoding"] = "gzip"
            self.head(status, content_type, size - start, {"Accept-Ranges": "bytes", **extra})
            stream.seek(start)
            if with_body:
                shutil.copyfileobj(stream, self.wfile, 1 << 16)

    def head(self, status: HTTPStatus, content_type: str, length: int, extra: Mapping[str, str] | None = None) -> None:
        """Sends the header of an answer."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        self.send_headers(extra or {})

    def send_headers(self, extra: Mapping[str, str]) -> None:
        """Sends what every header has, and what one answer's has besides."""
        common = {"Cache-Control": self.cache_control(), "X-Content-Type-Options": "nosniff"}
        for name, value in {**common, **self.server.site.headers, **extra}.items():
            self.send_header(name, value)
        self.end_headers()

    def cache_control(self) -> str:
        """What a browser may do with the answer later: ask whether it still holds, as exporting again keeps names."""
        return "no-cache"

    def _takes_gzip(self) -> bool:
        return "gzip" in re.split(r"[\s,;]+", self.headers.get("Accept-Encoding", ""))

    def _start(self, size: int) -> int:
        """The offset that the request asks for; 0 for a whole file."""
        found = re.fullmatch(r"bytes=(\d{1,18})-", self.headers.get("Range", ""))
        return int(found[1]) if found and int(found[1]) < size else 0

    def log_message(self, *_: object) -> None:
        """Says nothing: the terminal shows the address."""

    def handle(self) -> None:
        """Answers a connection's requests; a phone that leaves in the middle, or does not trust us, is no error."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError, ssl.SSLError):
            self.close_connection = True


class Server(ThreadingHTTPServer):
    """Serves a site until it is shut down."""

    daemon_threads = True

    def __init__(self, site: Site, host: str, port: int, certificate: Path | None, handler: type[Handler]) -> None:
        self.site = site
        context = None if certificate is None else _context(certificate)
        super().__init__((host, port), handler)
        self.scheme = "https" if context else "http"
        if context:
            # the handshake is left to the thread that answers, so that a phone that stays silent keeps nobody waiting
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def url(self, host: str) -> str:
        """The address of the page, by a name or number of this machine."""
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/"


def _context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise BackendError(
            f"{certificate}: no certificate with its key ({reason}); --certificate takes both in one PEM file"
        ) from None
    return context


def open_server(
    site: Site,
    host: str = "0.0.0.0",
    port: int | None = None,
    certificate: Path | None = None,
    handler: type[Handler] = Handler,
) -> Server:
    """Opens a port; call ``serve_forever`` then.

    Args:
        site: what to serve.
        host: address to listen on; by default every network of this machine.
        port: the port; by default :data:`PORT`, or any that is free.
        certificate: PEM file with a certificate and its key, for HTTPS.
        handler: what answers requests.

    Raises:
        BackendError: the port cannot be opened, or the certificate cannot be used.
    """
    tried: Sequence[int] = (PORT, 0) if port is None else (port,)
    for number in tried:
        try:
            return Server(site, host, port=number, certificate=certificate, handler=handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
    raise BackendError(f"{host}:{tried[0]}: cannot be opened ({reason}); choose another by --port or --host")


def self_signed(address: str) -> Path:
    """A certificate for an address of this machine, made once and kept, so that a phone has to be told once.

    Raises:
        BackendError: ``openssl``, which makes it, is not installed or fails.
    """
    kept = cache_folder() / f"certificate-{address.replace(':', '-')}.pem"
    if kept.is_file() and time.time() - kept.stat().st_mtime < 86400 * (CERTIFICATE_DAYS - 30):
        return kept
    openssl = shutil.which("openssl")
    if openssl is None:
        raise BackendError(
            "--https: a certificate is made by openssl, which is not installed; or give --certificate PEM"
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:  # which no other user may read
        key, certificate = Path(folder) / "key.pem", Path(folder) / "certificate.pem"
        command = [
            openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", str(CERTIFICATE_DAYS), "-subj", "/CN=mvmoe-deploy", "-keyout", str(key), "-out", str(certificate),
            "-addext", f"subjectAltName=IP:{address},IP:127.0.0.1,DNS:localhost",
            "-addext", "extendedKeyUsage=serverAuth",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1][:300]
            raise BackendError(f"openssl req failed ({said}); or give --certificate PEM")
        with key.open("a", encoding="ascii") as both:
            both.write(certificate.read_text(encoding="ascii"))
        key.replace(kept)
    return kept


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
