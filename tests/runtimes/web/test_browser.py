"""The runtime in a real browser, headless Chromium, against Python's answers and a server that misbehaves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import conformance as conformance_cases
import numpy as np
import pytest
import web_page
from exported import export_tiny
from web_page import Page

import mvmoe_deploy
from mvmoe_deploy.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle
from mvmoe_deploy.runtimes import WEB
from mvmoe_deploy.selftest import logits_departure
from mvmoe_deploy.serve import ISOLATED, Server

pytestmark = browser.needs_browser

SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
"""Flags for WebGPU on the processor, since machines that run tests have no graphics card."""


@pytest.fixture(scope="module")
def cases(conformance: Path) -> dict[str, Any]:
    """The content of ``conformance.json``."""
    return json.loads(conformance.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(conformance: Path) -> Iterator[Server]:
    """Serves the page, the package, its engine and the conformance cases."""
    site = web_page.page_site()
    web_page.add_tree(site, "/cases", conformance.parent)
    with web_page.served(site) as opened:
        yield opened


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """One browser for all tests of this file."""
    with browser.browser(tmp_path_factory.mktemp("chromium") / "profile", *SOFTWARE_GPU) as opened:
        yield opened


@pytest.fixture
def page(chromium: browser.Browser, server: Server) -> Iterator[Page]:
    """The page, opened anew, over a server without faults."""
    opened = Page(chromium, server)
    opened.site.whole()
    yield opened
    opened.site.heal()


def image_urls(bundle: dict[str, Any]) -> list[str]:
    """Where the page finds the images of a bundle's cases."""
    return [f"/cases/images/{case['image']}" for case in bundle["cases"]]


def compare(bundle: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Fails unless the answers are Python's: the same pixels and routes, logits within 1e-4 at fp32."""
    for case, answer in zip(bundle["cases"], answers, strict=True):
        name = f"{bundle['name']}: {case['image']}"
        assert "error" not in answer, f"{name}: {answer}"
        assert answer["experts"] == case["experts"], name
        if not case["exact"] and answer["pixels"] != case["pixels"]:
            continue  # this browser's JPEG decoder differs from Pillow's, which may move logits further
        assert answer["pixels"] == case["pixels"], name
        assert answer["gates"] == pytest.approx(case["gates"], abs=bundle["tolerance"]["gate"]), name
        if bundle["precision"] == "fp32":
            assert np.abs(np.array(answer["logits"]) - case["logits"]).max() < 1e-4, name
        departure = logits_departure(np.array(answer["logits"], np.float32), np.array(case["logits"], np.float32))
        assert departure <= bundle["tolerance"]["logits"], name


@pytest.mark.parametrize("name", conformance_cases.BUNDLES)
def test_every_conformance_case_on_the_processor(name: str, page: Page, cases: dict[str, Any]) -> None:
    (bundle,) = [each for each in cases["bundles"] if each["name"] == name]
    url = f"/cases/{bundle['path']}"
    predicted, tested = page.ask(
        [
            {"ask": "predict", "bundle": url, "options": {"maxResident": 1}, "images": image_urls(bundle)},
            {"ask": "selftest", "bundle": url, "options": {}},
        ]
    )
    compare(bundle, predicted["answers"])
    assert tested["passed"], tested


@pytest.mark.parametrize("name", ["moe-standalone-fp32", "k2-swappable-fp32"])
def test_conformance_cases_on_webgpu(name: str, page: Page, cases: dict[str, Any]) -> None:
    if not page.ask_one(ask="webgpu")["available"]:
        pytest.skip("this Chromium has no WebGPU, not even SwiftShader's")
    (bundle,) = [each for each in cases["bundles"] if each["name"] == name]
    chosen = {**bundle, "cases": bundle["cases"][::9]}  # SwiftShader takes its time
    options = {"executionProvider": "webgpu"}
    answer = page.ask_one(ask="predict", bundle=f"/cases/{bundle['path']}", options=options, images=image_urls(chosen))
    compare(chosen, answer["answers"])
    assert page.ask_one(ask="engine")["webgpu"], "the engine's build for WebGPU was not the one that ran"


def test_the_rest_of_layouts_precisions_and_k(page: Page, folder: Path, tmp_path: Path) -> None:
    """What the conformance bundles leave out: half precision with k = 2."""
    config = conformance_cases.K2
    exported = export_tiny(config, folder / "browser-k2-fp16.mvmoe", precision="fp16")
    web_page.add_tree(page.site, "/k2", exported.path)
    image = conformance_cases.PHOTOS / "coffee.jpg"
    page.site.files["/coffee.jpg"] = image
    answer = page.ask_one(ask="predict", bundle="/k2", options={}, images=["/coffee.jpg"])["answers"][0]
    with mvmoe_deploy.load(exported.path) as runtime:
        expected = runtime.answer(image)
    assert answer["experts"] == expected.experts and len(expected.experts) == 2
    assert np.abs(np.array(answer["logits"]) - expected.logits).max() < 1e-4


def test_whatever_a_page_holds_can_be_predicted(page: Page, cases: dict[str, Any]) -> None:
    bundle = cases["bundles"][0]
    names = ("png_profile.png", "bmp.bmp")
    requests = [{"ask": "kinds", "bundle": f"/cases/{bundle['path']}", "image": f"/cases/images/{n}"} for n in names]
    of_files = {"blob", "bytes", "image", "files", "handle"}  # a profile in these is ignored, as in training
    shown = {"bitmap", "canvas", "pixels", "video"}  # here the browser has converted the colours already
    for name, answers in zip(names, page.ask(requests), strict=True):
        (case,) = [each for each in bundle["cases"] if each["image"] == name]
        assert set(answers) == of_files | shown
        for kind, answer in answers.items():
            assert answer["pixels"] == case["pixels"] or (name == "png_profile.png" and kind in shown), (name, kind)


def test_refused_images(page: Page, cases: dict[str, Any]) -> None:
    images = [f"/cases/images/{case['image']}" for case in cases["refused_images"]]
    url = f"/cases/{cases['bundles'][0]['path']}"
    answer = page.ask_one(ask="predict", bundle=url, options={}, images=images)
    for case, found in zip(cases["refused_images"], answer["answers"], strict=True):
        assert found.get("error", "").startswith("ImageError") and case["error"] in found["error"], (case, found)


def test_damaged_bundles(page: Page, cases: dict[str, Any]) -> None:
    requests = [
        {
            "ask": "damaged", "bundle": f"/cases/{case['path']}",
            "image": f"/cases/images/{case['image']}" if "image" in case else None,
        }
        for case in cases["damaged"]
    ]  # fmt: skip
    for case, found in zip(cases["damaged"], page.ask(requests), strict=True):
        late = case["when"] == "predict"
        assert found["opened"] == late, (case, found)
        assert case["error"] in found["error"], (case, found)
        assert found["error"].startswith(("BundleError", "BackendError", "AnswerError")), (case, found)


def standalone(cases: dict[str, Any], page: Page) -> tuple[str, Path]:
    """The address of the first bundle, and its folder."""
    bundle = cases["bundles"][0]
    assert bundle["name"] == "moe-standalone-fp32"
    url = f"/cases/{bundle['path']}"
    return url, page.site.files[f"{url}/{MANIFEST}"].parent


def request_for(cases: dict[str, Any], page: Page, expert: int = 2, **options: Any) -> dict[str, Any]:
    """A prediction of one image that is routed to an expert."""
    bundle = cases["bundles"][0]
    image = next(case["image"] for case in bundle["cases"] if case["experts"] == [expert])
    return {
        "ask": "predict", "bundle": f"/cases/{bundle['path']}", "options": {"cache": False, **options},
        "images": [f"/cases/images/{image}"],
    }  # fmt: skip


def test_only_the_chosen_expert_is_fetched(page: Page, cases: dict[str, Any]) -> None:
    url, folder = standalone(cases, page)
    page.driver.execute_cdp_cmd("Network.clearBrowserCache", {})  # an earlier test may have fetched the same files
    page.site.sent.clear()
    page.site.requests.clear()
    answer = page.ask_one(**request_for(cases, page))
    asked = {path.removeprefix(f"{url}/"): count for path, count in page.site.requests.items() if path.startswith(url)}
    assert set(asked) == {
        MANIFEST, MANIFEST_DIGEST, "trunk.onnx", "trunk.bin", "expert_02.onnx", "expert_02.bin", "tail_shared.bin"
    }  # fmt: skip
    assert set(asked.values()) == {1}
    sizes = {file.path: file.bytes for file in open_bundle(folder).manifest.files}
    needed = sum(size for path, size in sizes.items() if path in asked)
    sent = sum(count for path, count in page.site.sent.items() if path.startswith(url))  # headers included
    assert needed < sent <= needed + 40_000
    manifest = (folder / MANIFEST).stat().st_size + (folder / MANIFEST_DIGEST).stat().st_size
    assert answer["stats"]["fetchedBytes"] == needed + manifest


def test_a_second_visit_needs_no_server(page: Page, cases: dict[str, Any]) -> None:
    for cache in ("caches", "opfs"):
        request = request_for(cases, page, cache=cache)
        url, _ = standalone(cases, page)
        page.ask_one(ask="forget")
        first = page.ask_one(**request)
        assert first["stats"]["fetchedBytes"] > 100_000
        page.open()
        paths = [path for path in page.site.files if path.startswith(url)]
        page.site.faults = dict.fromkeys(paths, web_page.hang_up)
        again = page.ask_one(**request)
        assert again["answers"] == first["answers"]
        assert again["stats"]["fetchedBytes"] == 0
        other = page.ask_one(**request_for(cases, page, expert=1, cache=cache))
        assert "cannot be fetched" in other["answers"][0]["error"]
        page.site.heal()


def test_a_kept_file_that_was_altered_is_fetched_again(page: Page, cases: dict[str, Any]) -> None:
    request = request_for(cases, page, cache="caches")
    page.ask_one(ask="forget")
    first = page.ask_one(**request)
    assert page.ask_one(ask="alter")["altered"] >= 5
    again = page.ask_one(**request)
    assert again["answers"] == first["answers"]
    assert again["stats"]["fetchedBytes"] == first["stats"]["fetchedBytes"]


def test_a_flipped_byte_is_refused(page: Page, cases: dict[str, Any]) -> None:
    url, _ = standalone(cases, page)
    page.site.faults[f"{url}/expert_02.bin"] = web_page.flip_a_byte
    (answer,) = page.ask_one(**request_for(cases, page))["answers"]
    assert answer["error"].startswith("BundleError: expert_02.bin: sha256 differs from manifest.json")
    # a proxy may have kept an old file, so it was asked for once more
    assert page.site.requests[f"{url}/expert_02.bin"] >= 2


def test_a_missing_expert_is_named_and_the_others_work(page: Page, cases: dict[str, Any]) -> None:
    url, _ = standalone(cases, page)
    del page.site.files[f"{url}/expert_02.bin"]
    request = request_for(cases, page)
    request["images"] += request_for(cases, page, expert=1)["images"]
    missing, other = page.ask_one(**request)["answers"]
    assert missing["error"].startswith("BundleError: expert_02.bin: missing from the bundle (HTTP 404)")
    assert other["experts"] == [1]


def test_a_server_that_dies_in_the_middle(page: Page, cases: dict[str, Any]) -> None:
    """What arrived is kept, and only the rest is asked for; where nothing more comes, the error says so."""
    url, folder = standalone(cases, page)
    size = (folder / "expert_02.bin").stat().st_size
    fault = web_page.DieInTheMiddle(deaths=1)
    page.site.faults[f"{url}/expert_02.bin"] = fault
    page.site.sent.clear()
    (answer,) = page.ask_one(**request_for(cases, page))["answers"]
    assert answer.get("experts") == [2], answer
    assert fault.ranges == ["", f"bytes={size // 2}-"]
    assert page.site.sent[f"{url}/expert_02.bin"] < size + 2000
    fault = web_page.DieInTheMiddle(deaths=2, share=0)  # after the header
    page.site.faults[f"{url}/expert_02.bin"] = fault
    (answer,) = page.ask_one(**request_for(cases, page))["answers"]
    assert answer.get("experts") == [2], answer
    assert len(fault.ranges) == 3

    page.site.faults[f"{url}/expert_02.bin"] = web_page.DieInTheMiddle(deaths=9)
    request = request_for(cases, page)
    request["images"] *= 2
    first, second = page.ask_one(**request)["answers"]
    assert first["error"].startswith("BundleError: expert_02.bin: cannot be fetched")
    assert second["error"] == first["error"]  # and the runtime still answers


def test_a_slow_server(page: Page, cases: dict[str, Any]) -> None:
    url, _ = standalone(cases, page)
    page.site.faults[f"{url}/trunk.bin"] = web_page.drip  # longer than the timeout in all, but never silent
    (answer,) = page.ask_one(**request_for(cases, page, timeout=0.6))["answers"]
    assert answer["experts"] == [2]
    page.site.faults[f"{url}/trunk.bin"] = web_page.fall_silent
    answer = page.ask_one(**request_for(cases, page, timeout=0.6))
    assert answer["error"].startswith("BundleError: trunk.bin: cannot be fetched (no data for 0.6 s)")


def test_threads_are_used_only_where_the_page_may(page: Page, cases: dict[str, Any]) -> None:
    """Without the headers that isolate a page, some engines hang when they are asked for threads."""
    request = request_for(cases, page, threads=2)
    alone = page.ask_one(**request)["answers"]
    assert page.ask_one(ask="engine") == {"isolated": False, "threads": 1, "webgpu": False}
    page.site.headers |= ISOLATED
    page.open()
    together = page.ask_one(**request)["answers"]
    assert page.ask_one(ask="engine") == {"isolated": True, "threads": 2, "webgpu": False}
    assert together[0]["experts"] == alone[0]["experts"] == [2]
    assert np.abs(np.subtract(together[0]["logits"], alone[0]["logits"])).max() < 1e-4


@pytest.mark.parametrize("cache", ["caches", "opfs"])
def test_full_storage_is_no_error(page: Page, cases: dict[str, Any], cache: str) -> None:
    origin = page.url.rstrip("/")
    page.ask_one(ask="forget")
    page.driver.execute_cdp_cmd("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 20_000})
    try:
        for _ in range(2):
            found = page.ask_one(**request_for(cases, page, cache=cache))
            assert found["answers"][0]["experts"] == [2]
            assert found["stats"]["fetchedBytes"] > 100_000  # the large files were not kept
    finally:
        page.driver.execute_cdp_cmd("Storage.overrideQuotaForOrigin", {"origin": origin})


@pytest.mark.parametrize("kind", ["standalone", "swappable"])
def test_eight_predictions_at_once(page: Page, cases: dict[str, Any], kind: str) -> None:
    """They answer as one after the other would, and an expert is loaded once however many ask."""
    (bundle,) = [each for each in cases["bundles"] if each["name"] == f"moe-{kind}-fp32"]
    chosen = {**bundle, "cases": bundle["cases"][:8]}
    used = {expert for case in chosen["cases"] for expert in case["experts"]}
    page.site.requests.clear()
    url = f"/cases/{bundle['path']}"
    for options, misses in (({"cache": False}, len(used)), ({"cache": False, "maxResident": 1}, None)):
        answer = page.ask_one(ask="atOnce", bundle=url, options=options, images=image_urls(chosen))
        compare(chosen, answer["answers"])
        assert answer["stats"]["hits"] + answer["stats"]["misses"] == 8
        assert misses in (None, answer["stats"]["misses"])
        assert len(answer["stats"]["resident"]) == (len(used) if misses else 1)
        if misses:
            weights = [count for path, count in page.site.requests.items() if path.startswith(url)]
            assert set(weights) == {1}


def test_the_page_in_the_documentation(page: Page, cases: dict[str, Any], tmp_path: Path) -> None:
    """A whole page, as docs/on-device.md shows it, with a bundle's real digest."""
    text = (conformance_cases.ROOT / "docs" / "on-device.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- tested: browser -->\n```html\n(.*?)```", text, re.DOTALL)
    assert found and found[1].count("…") == 1
    _, folder = standalone(cases, page)
    web_page.add_tree(page.site, "/birds.mvmoe", folder)
    page.site.add_folder("/mvmoe-deploy/", WEB / "src")
    page.site.files["/doc.html"] = tmp_path / "doc.html"
    page.site.files["/doc.html"].write_text(found[1].replace("…", open_bundle(folder).digest), encoding="utf-8")
    case = next(case for case in cases["bundles"][0]["cases"] if case["image"] == "bmp.bmp")
    driver = page.driver
    driver.get(f"{page.url}doc.html")
    driver.execute_async_script(
        "const done = arguments[0], wait = () => document.querySelector('input').onchange ? done() : setTimeout(wait, 20); wait()"
    )
    driver.find_element("css selector", "input").send_keys(f"{cases['images']}/bmp.bmp")
    shown = driver.execute_async_script(
        "const done = arguments[0], wait = () => { const t = document.querySelector('output').textContent; t ? done(t) : setTimeout(wait, 20); }; wait()"
    )
    assert shown.startswith("thing ") and f"by group {case['experts'][0]}:" in shown
