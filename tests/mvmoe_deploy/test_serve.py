"""The server of pages for phones: what it sends, what it never sends, and how it is reached."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from web_runtime import npm_packages

from mvmoe_deploy import serve, web_engine
from mvmoe_deploy.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle
from mvmoe_deploy.cli import inspect
from mvmoe_deploy.errors import BackendError, BundleError
from mvmoe_deploy.serve import Server, Site, app_site, open_server


@pytest.fixture
def site(bundle_path: Path, tmp_path: Path) -> Site:
    """The app and a bundle; the engine's files are empty here."""
    engine = tmp_path / "engine"
    engine.mkdir()
    for name in web_engine.FILES:
        (engine / name).touch()
    return app_site({"a bundle": open_bundle(bundle_path)}, engine)


def running(server: Server) -> Iterator[Server]:
    """Lets a server answer."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def server(site: Site) -> Iterator[Server]:
    """A server of the site on this machine."""
    yield from running(open_server(site, "127.0.0.1", 0))


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer; the path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_everything_of_the_app_is_sent(server: Server, site: Site, bundle_path: Path) -> None:
    facts = json.loads(ask(server, "/site.json")[2])
    (bundle,) = facts["bundles"]
    assert bundle == {"name": "a bundle", "url": "bundles/a%20bundle", "digest": open_bundle(bundle_path).digest, "experts": 4}  # fmt: skip
    assert facts["engine"] == f"onnxruntime-web {web_engine.VERSION}"
    for path in ("./", "./app.js", "./app.webmanifest", "./mvmoe-deploy/index.js", "./engine/ort.wasm.min.mjs"):
        assert path in facts["shell"]
        assert ask(server, path.removeprefix("."))[0] == 200
    for path in (MANIFEST, MANIFEST_DIGEST, "expert_03.bin"):
        assert ask(server, f"/{bundle['url']}/{path}")[2] == (bundle_path / path).read_bytes()
    types = {
        path: ask(server, path)[1]["Content-Type"] for path in ("/", "/app.js", "/app.webmanifest", "/icon-192.png")
    }
    assert types == {
        "/": "text/html; charset=utf-8", "/app.js": "text/javascript; charset=utf-8",
        "/app.webmanifest": "application/manifest+json", "/icon-192.png": "image/png",
    }  # fmt: skip


def test_nothing_else_is_sent(site: Site, bundle_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy.mvmoe"))
    (copy / "private.txt").write_text("secret")
    site.add_bundle("copy", open_bundle(copy))
    for server in running(open_server(site, "127.0.0.1", 0)):
        assert ask(server, "/bundles/copy/trunk.onnx")[0] == 200
        for path in ("/bundles/copy/private.txt", "/../../../etc/passwd", "/bundles/copy/../copy/private.txt", "/..%2f..%2fetc/passwd",
                     "//etc/passwd", "/bundles/", "/bundles/copy/%00", "/node.js", "/engine/../site.json"):  # fmt: skip
            status, _, body = ask(server, path)
            assert status == 404 and b"secret" not in body and b"root:" not in body, path
        assert ask(server, "/site.json", method="POST")[0] == 501
        (copy / "trunk.onnx").unlink()
        assert ask(server, "/bundles/copy/trunk.onnx")[0] == 404


def test_the_rest_of_a_file(server: Server, bundle_path: Path) -> None:
    path, content = "/bundles/a%20bundle/expert_00.bin", (bundle_path / "expert_00.bin").read_bytes()
    status, headers, body = ask(server, path, Range="bytes=1000-")
    assert (status, body) == (206, content[1000:])
    assert headers["Content-Range"] == f"bytes 1000-{len(content) - 1}/{len(content)}"
    for other in ("bytes=0-", "bytes=5-9", "bytes=-5", f"bytes={len(content)}-", "words=1-", "bytes=²-"):
        header = other.encode().decode("latin-1")
        assert ask(server, path, Range=header)[::2] == (200, content), other
    status, headers, body = ask(server, path, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(content)))


def test_a_file_that_did_not_change_is_sent_once(server: Server, site: Site) -> None:
    status, headers, _ = ask(server, "/app.js")
    assert (status, headers["Cache-Control"]) == (200, "no-cache")
    status, again, body = ask(server, "/app.js", If_None_Match=headers["ETag"])
    assert (status, body) == (304, b"")
    assert again["Cross-Origin-Embedder-Policy"] == headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert ask(server, "/app.js", If_None_Match='"another"')[0] == 200


def test_text_is_compressed_on_its_way(server: Server, bundle_path: Path) -> None:
    for path, file in (
        ("/bundles/a%20bundle/manifest.json", bundle_path / MANIFEST),
        ("/app.js", serve.WEB / "app" / "app.js"),
    ):
        status, headers, body = ask(server, path, Accept_Encoding="gzip, deflate, br")
        assert (status, headers["Content-Encoding"], headers["Content-Length"]) == (200, "gzip", str(len(body)))
        assert gzip.decompress(body) == file.read_bytes() and len(body) < file.stat().st_size / 2
        plain = ask(server, path)
        assert "Content-Encoding" not in plain[1] and plain[2] == file.read_bytes()
        assert "Content-Encoding" not in ask(server, path, Accept_Encoding="gzip", Range="bytes=100-")[1]
    weights = ask(server, "/bundles/a%20bundle/trunk.bin", Accept_Encoding="gzip")
    assert "Content-Encoding" not in weights[1] and weights[2] == (bundle_path / "trunk.bin").read_bytes()


def test_the_version_follows_the_files(site: Site, bundle_path: Path, tmp_path: Path) -> None:
    version = site.documents["/site.json"]["version"]
    assert app_site({}, tmp_path / "engine").documents["/site.json"]["version"] == version
    app = tmp_path / "web" / "app"
    shutil.copytree(serve.WEB / "src", tmp_path / "web" / "src")
    shutil.copytree(serve.WEB / "app", app)
    (app / "app.css").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "WEB", tmp_path / "web")
        assert app_site({}, tmp_path / "engine").documents["/site.json"]["version"] != version


def test_bundles_that_no_browser_runs_are_refused(site: Site, bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "expert_01.bin").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"expert_01\.bin: has 5 bytes"):
        app_site({"damaged": open_bundle(bundle_copy)}, tmp_path / "engine")
    tiny.edit_manifest(bundle_copy, lambda manifest: manifest.update(target="executorch"))
    with pytest.raises(BundleError, match="browsers run onnx ones; export it with --target onnx"):
        app_site({"other": open_bundle(bundle_copy)}, tmp_path / "engine")


def test_a_port_that_is_taken(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=rf"127\.0\.0\.1:{port}: cannot be opened .*--port"):
            open_server(site, "127.0.0.1", port)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve, "PORT", port)
            with open_server(site, "127.0.0.1") as server:
                assert server.port != port
    with pytest.raises(BackendError, match="cannot be opened"):
        open_server(site, "203.0.113.1")  # an address that no machine has


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl on PATH, which makes certificates")
def test_https(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "cache_folder", lambda: tmp_path / "cache")
    certificate = serve.self_signed("192.0.2.7")
    if os.name == "posix":
        assert certificate.stat().st_mode & 0o077 == 0
    assert serve.self_signed("192.0.2.7").stat().st_mtime_ns == certificate.stat().st_mtime_ns  # made once
    for server in running(open_server(site, "127.0.0.1", 0, certificate)):
        assert server.url("::1") == f"https://[::1]:{server.port}/"
        silent = socket.create_connection(("127.0.0.1", server.port))  # keeps nobody waiting
        trusting = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("localhost", server.port, context=trusting, timeout=30)
        connection.request("GET", "/site.json")
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["bundles"]
        connection.close()
        silent.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("localhost", server.port, timeout=30).request("GET", "/")
        assert ssl.get_server_certificate(("127.0.0.1", server.port))  # it still answers
    for content in ("", "nonsense"):
        (tmp_path / "other.pem").write_text(content)
        with pytest.raises(BackendError, match=r"other\.pem: no certificate with its key"):
            open_server(site, "127.0.0.1", 0, tmp_path / "other.pem")


def test_a_qr_code() -> None:
    pytest.importorskip("segno", reason="segno, of the extra serve, draws QR codes")
    code = serve.qr_code("http://192.0.2.7:8470/")
    lines = code.splitlines()
    assert len({len(line) for line in lines}) == 1 and set(code) <= set("█▀▄ \n")
    assert len(lines[0]) == 29 and len(lines) == 15  # version 2 with its border, two modules a line


def test_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BackendError, match=r"ort\.wasm\.min\.mjs: no such file; --engine takes the folder of onnxruntime-web@"
    ):
        web_engine.find(tmp_path)
    (tmp_path / "dist").mkdir()
    for name in web_engine.FILES:
        (tmp_path / "dist" / name).write_text("something else")
    with pytest.raises(BackendError, match="its sha256 differs"):
        web_engine.find(tmp_path)
    monkeypatch.setattr(web_engine, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(web_engine.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="npm, which would fetch it, is not installed"):
        web_engine.find()


def test_npm_that_delivers_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, tarfile\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--pack-destination') + 1])\n"
        "file = folder / 'x'\nfile.write_text('not the engine')\n"
        "with tarfile.open(folder / 'package.tgz', 'w:gz') as archive:\n"
        f"    for name in {list(web_engine.FILES)!r}: archive.add(file, f'package/dist/{{name}}')\n"
    )
    npm.chmod(0o755)
    monkeypatch.setattr(web_engine, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(web_engine.shutil, "which", lambda name: str(npm))
    with pytest.raises(BackendError, match="npm delivered another package"):
        web_engine.find()
    assert not list((tmp_path / "cache").glob("onnx*"))
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    with pytest.raises(BackendError, match=r"npm pack onnxruntime-web@\S+ failed \(npm error code E404\)"):
        web_engine.find()


def test_the_command_serves_until_it_is_ended(bundle_path: Path, tmp_path: Path) -> None:
    """It prints an address at which the app is, and ends without a complaint."""
    engine = npm_packages() / "onnxruntime-web"
    command = [sys.executable, "-m", "mvmoe_deploy.cli.inspect", str(bundle_path), "--serve", "--host", "127.0.0.1", "--engine", str(engine)]  # fmt: skip

    def as_in_a_terminal() -> None:  # what a script runs in the background ignores this signal, and so do its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    )
    assert started.stdout is not None
    port = 0
    said = []
    for line in started.stdout:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
            port = int(found[1])
        if "Only this machine" in line:
            break
    assert port, (said, started.communicate())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/site.json")
    facts: Any = json.loads(connection.getresponse().read())
    connection.close()
    assert [bundle["name"] for bundle in facts["bundles"]] == ["moe"]
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out.strip(), err) == (0, "ended", "")


def test_options_of_serving_without_it(bundle_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle_path), "--https", "--port", "9000"]) == 2
    assert capsys.readouterr().err == "error: --port, --https: only with --serve\n"
