"""Measuring in a browser: a real one from end to end, and reports that cannot be true."""

from __future__ import annotations

import copy
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import msgspec
import pytest
from selenium.webdriver.common.by import By
from web_runtime import npm_packages

from mvmoe_deploy import web_engine
from mvmoe_deploy.bench.candidates.configuration import Configuration
from mvmoe_deploy.bench.devices import browser as device
from mvmoe_deploy.bench.devices.browser import MeasuringSite, Plan, Report, ReportHandler
from mvmoe_deploy.bench.measure.images import choose_images
from mvmoe_deploy.bench.report.tables import terminal_text
from mvmoe_deploy.bench.results import read_json
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.cli import bench
from mvmoe_deploy.errors import BackendError
from mvmoe_deploy.serve import Server, open_server

FLAGS = ("--enable-blink-features=ForceEagerMeasureMemory", "--host-resolver-rules=MAP phone.test 127.0.0.1")
"""Memory without a minute's wait, and a name that a browser does not take for this machine."""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """One browser for all tests of this file."""
    with browser.browser(tmp_path_factory.mktemp("chromium") / "profile", *FLAGS) as opened:
        yield opened


def wait_for(driver: Any, condition: str) -> None:
    """Waits until a JavaScript expression is true."""
    end = time.monotonic() + 120
    while not driver.execute_script(f"return Boolean({condition})"):
        text = driver.execute_script("return document.body.innerText")
        assert time.monotonic() < end, f"{condition}: {text} {driver.get_log('browser')}"
        time.sleep(0.1)


ENDED = "!/^(Measuring …)?$/.test(document.querySelector('#measure-status').innerText)"


def measured_by(
    chromium: browser.Browser, host: str, bundles: list[Path], *options: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs the command and lets a browser measure; returns how it ended, and what the page said then."""
    engine = str(npm_packages() / "onnxruntime-web")
    command = [sys.executable, "-m", "mvmoe_deploy.cli.bench", "--device", "browser", *map(str, bundles), "--engine", engine,
               "--host", "127.0.0.1", *options]  # fmt: skip
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None
    said = ""
    while "Only this machine" not in said:
        line = started.stdout.readline()
        assert line, (said, started.communicate())
        said += line
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
    assert found and "tap Start" in said
    driver = chromium.driver
    driver.get_log("browser")
    driver.get(f"http://{host}:{found[1]}/")
    wait_for(driver, "document.querySelector('#measure-about').innerText")
    driver.find_element(By.ID, "measure-start").click()
    wait_for(driver, ENDED)
    text = driver.execute_script("return document.body.innerText")
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(overflow) == 0
    out, err = started.communicate(timeout=60)
    return subprocess.CompletedProcess(command, started.returncode, said + out, err), str(text)


@browser.needs_browser
def test_a_browser_measures(
    chromium: browser.Browser, bundle_path: Path, dense_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Routed beside dense: the results have every part, and go where every other device's go."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    chromium.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    file, page = tmp_path / "phone.json", tmp_path / "phone.html"
    options = ["--rounds", "12", "--cold-starts", "2", "--json", str(file), "--html", str(page)]
    done, said = measured_by(chromium, "localhost", [dense_path, bundle_path], *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert not chromium.driver.get_log("browser")
    assert "Done. The results are on the computer" in said
    assert "This device answers all 4 test pictures as it should" in said

    results = read_json(file)
    dense, moe = results.rows
    assert (dense.name, moe.name, moe.backend, moe.group) == ("dense", "moe", "onnxruntime-web wasm", "browser")
    for row in results.rows:
        assert len(row.warm.samples) == 12 and row.warm.warmup >= 20
        assert row.cold_start is not None and len(row.cold_start.load) == 2
        assert row.memory is not None and 1e6 < row.memory.used.total <= row.memory.peak < 1e9
        assert [stage.passed for stage in row.selftest] == [stage.cases for stage in row.selftest]
    assert dense.hit is dense.switch is dense.ratio is None
    assert moe.hit and moe.switch and moe.ratio and len(moe.switch.samples) == 12
    assert moe.memory is not None and (moe.memory.loaded.resident, moe.memory.used.resident) == (0, 1)
    assert [stage.stage for stage in moe.selftest] == ["pixels", "route", "gate", "logits"]
    assert "Chromium" in results.machine["browser"] and results.machine["isolated"] is True
    assert results.machine["engine"] == f"onnxruntime-web {web_engine.VERSION}"
    fetched = results.method["bytes fetched before the first prediction"]
    for row in results.rows:
        manifest = sum(f.stat().st_size for f in (dense_path if row is dense else bundle_path).glob("manifest.*"))
        assert fetched[row.name] == row.bytes_first_image + manifest
    assert results.method["p10 ratio"]["moe"] > 0 and results.expert_names == [f"group {i}" for i in range(4)]
    assert "Hit and switch" in done.stdout and "Self-test" in done.stdout
    assert "onnxruntime-web wasm" in page.read_text()
    assert bench.main(["compare", str(file), str(file)]) == 0
    assert "switch" in capsys.readouterr().out


@browser.needs_browser
def test_a_phone_on_plain_http_measures_too(chromium: browser.Browser, bundle_path: Path, tmp_path: Path) -> None:
    """Its clock is coarse, and it has no threads and tells no memory; the results say so."""
    file = tmp_path / "phone.json"
    options = ["--rounds", "10", "--cold-starts", "1", "--threads", "2", "--json", str(file)]
    done, said = measured_by(chromium, "phone.test", [bundle_path], *options)
    assert (done.returncode, done.stderr) == (0, ""), said
    results = read_json(file)
    (row,) = results.rows
    assert row.memory is None and results.method["memory"] == "the browser does not tell"
    assert results.machine["isolated"] is False and results.method["threads"] == 1
    assert results.method["clock ms"] >= 0.09
    assert results.method["calls per sample"]["moe"] > 1 and min(row.warm.samples) > 0


@browser.needs_browser
def test_a_page_that_cannot_measure_says_why(chromium: browser.Browser, bundle_path: Path) -> None:
    options = ["--rounds", "10", "--provider", "webgpu"]  # this browser was started without
    done, said = measured_by(chromium, "phone.test", [bundle_path], *options)
    assert done.returncode == 2
    assert "WebGPU is not available here" in said
    assert done.stderr.startswith("error: the browser could not measure: BackendError: WebGPU is not available here")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def site(bundle_path: Path, dense_path: Path, tmp_path: Path) -> tuple[MeasuringSite, list[Configuration]]:
    """A measuring site of a dense and a routed bundle; the engine's files are empty here."""
    engine, images = tmp_path / "engine", tmp_path / "images"
    for folder in (engine, images):
        folder.mkdir()
    for name in web_engine.FILES:
        (engine / name).touch()
    return device.measuring_site([dense_path, bundle_path], choose_images(None), Plan(), engine, images)


@pytest.fixture
def server(site: tuple[MeasuringSite, list[Configuration]]) -> Iterator[Server]:
    """A server that takes reports; :func:`wait_for_report` closes it."""
    opened = open_server(site[0], "127.0.0.1", 0, handler=ReportHandler)
    yield opened
    opened.server_close()


def post(server: Server, kind: str, body: object, who: str = "a", key: str = "", **headers: str) -> tuple[int, Any]:
    """Sends what a page would send."""
    assert isinstance(server.site, MeasuringSite)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request("POST", f"/report/{key or server.site.key}/{who}/{kind}", data, sent)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def times(scale: float, count: int = 20) -> dict[str, Any]:
    """Times as a page reports them."""
    samples = [scale * (1 + 0.001 * (i % 3)) for i in range(count)]
    return {"first": 9 * scale, "warmup": 26, "stable": True, "samples": samples, "repeats": 2}


def report(configurations: list[Configuration]) -> dict[str, Any]:
    """A report as a page sends it."""
    bundles = []
    for number, c in enumerate(configurations):
        stage = {"stage": "logits", "cases": 4, "passed": 4, "departure": 1e-6, "tolerance": 1e-4}
        cold = {"frame": 20.0, "imports": 60.0, "load": 300.0, "first_run": 12.0, "bytes": 150_000}
        held = {"resident": 1, "bytes": 20_000_000, "ledger": 100_000}
        alternating = times(2.0) if c.experts else None
        bundles.append(
            {
                "name": c.name, "digest": open_bundle(Path(c.path)).digest, "selftest": [stage],
                "warm": times(1.0 + number / 10), "hit": alternating, "switch": alternating, "cold": [cold] * 3,
                "memory": [held, held],
            }
        )  # fmt: skip
    return {"device": {"system": "Android 16"}, "clock": 0.1, "threads": 1, "hidden": False, "bundles": bundles}


def test_a_report_becomes_results(site: tuple[MeasuringSite, list[Configuration]]) -> None:
    made = report(site[1])
    results = device.results_of(msgspec.convert(made, Report), site[1], Plan(), "some")
    assert results.rows[1].ratio is not None and results.rows[1].ratio.value == pytest.approx(1.1)
    assert results.rows[1].cold_start is not None and results.rows[1].cold_start.total.value == 392.0
    assert results.method["p10 ratio"]["moe"] == pytest.approx(1.1)
    assert not results.rows[0].warm.noise.reasons and "†" not in terminal_text(results)
    made["hidden"] = True
    made["bundles"][1]["selftest"][0]["passed"] = 3
    text = terminal_text(device.results_of(msgspec.convert(made, Report), site[1], Plan(), "some"))
    assert "the page was out of sight meanwhile" in text and "moe failed its self-test at logits" in text


def test_reports_of_something_else_are_refused(site: tuple[MeasuringSite, list[Configuration]]) -> None:
    def edited(edit: Any) -> Report:
        made = copy.deepcopy(report(site[1]))
        edit(made["bundles"])
        return msgspec.convert(made, Report)

    for edit in (
        lambda bundles: bundles.pop(),
        lambda bundles: bundles.append(bundles[0]),
        lambda bundles: bundles[0].update(digest="0" * 64),
        lambda bundles: bundles[0].update(name="other"),
    ):
        with pytest.raises(BackendError, match="measured other bundles"):
            device.results_of(edited(edit), site[1], Plan(), "some")
    with pytest.raises(BackendError, match="another number of rounds"):
        device.results_of(edited(lambda bundles: bundles[0].update(warm=times(1.0, 5))), site[1], Plan(), "some")


def test_what_is_no_report_is_refused(site: tuple[MeasuringSite, list[Configuration]], server: Server) -> None:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    made = report(site[1])
    assert post(server, "results", made, key="guessed")[0] == 404
    assert post(server, "other", made)[0] == 404
    assert post(server, "results", made, Content_Type="text/plain")[0] == 415  # what another site's page may send
    assert post(server, "results", b"", Content_Length=str(1 << 40))[0] == 413
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 5000, b"{}"):
        assert post(server, "results", body)[0] == 400, body
    for place, value in (
        ("clock", 0),
        ("clock", None),
        ("threads", 0),
        ("threads", "1"),
        ("device", []),
        ("bundles", {}),
    ):
        assert post(server, "results", {**made, place: value})[0] == 400, (place, value)
    for value in (0, -1, None, "1", 1e300):
        changed = copy.deepcopy(made)
        changed["bundles"][0]["warm"]["samples"][3] = value
        assert post(server, "results", changed)[0] == 400, value
    assert site[0].said.empty()
    assert post(server, "progress", {"what": "latency", "done": 1, "total": 2}) == (200, {"taken": True})
    status, answer = post(server, "progress", {"what": "latency", "done": 1, "total": 2}, who="b")
    assert status == 409 and "another browser is measuring" in answer["error"]
    site[0].owner = ("a", time.monotonic() - device.SILENCE - 1)
    assert post(server, "results", made, who="b")[0] == 200
    server.shutdown()


def test_waiting_for_a_browser(site: tuple[MeasuringSite, list[Configuration]], server: Server) -> None:
    site[0].said.put(device.Progress("latency", 3, 4))
    site[0].said.put(device.Failure("Error: first line\nsecond line"))
    steps: list[tuple[str, int, int]] = []
    with pytest.raises(BackendError, match=r"could not measure: Error: first line$"):
        device.wait_for_report(server, 10, lambda *step: steps.append(step))
    assert steps == [("latency", 3, 4)]
    other = open_server(site[0], "127.0.0.1", 0, handler=ReportHandler)
    with pytest.raises(BackendError, match=r"no word from a browser for 0\.05 s"):
        device.wait_for_report(other, 0.05)


def test_bundles_are_fetched_anew_and_the_engine_is_kept(
    site: tuple[MeasuringSite, list[Configuration]], server: Server
) -> None:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    page = site[0].documents["/site.json"]
    kept = {}
    for path in (
        f"{page['bundles'][0]['url']}/manifest.json",
        page["bundles"][0]["images"][0],
        "engine/ort.wasm.min.mjs",
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read() is not None
        kept[path.split("/")[0]] = answer.headers["Cache-Control"]
        connection.close()
    assert kept == {"bundles": "no-store", "images": "no-cache", "engine": "no-cache"}
    server.shutdown()


def test_only_onnx_bundles(bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.mvmoe"
    assert bench.main(["browser", str(missing), "--engine", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
