"""The app of ``mvmoe-inspect --serve`` in headless Chromium: what it shows, to whom, and what is left without a network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
import web_page
from PIL import Image
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from web_page import FaultySite
from web_runtime import npm_packages

import mvmoe_deploy
from mvmoe_deploy import serve
from mvmoe_deploy.bundle import open_bundle
from mvmoe_deploy.runtimes import WEB
from mvmoe_deploy.serve import Server, app_site

pytestmark = browser.needs_browser

APP = WEB / "app"
FLAGS = (
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP phone.test 127.0.0.1",
)
"""A camera that shows a test picture, and a name that a browser does not take for this machine."""


@pytest.fixture(scope="module")
def cases(conformance: Path) -> dict[str, Any]:
    """The content of ``conformance.json``."""
    return json.loads(conformance.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    """One browser for all tests of this file."""
    with browser.browser(tmp_path_factory.mktemp("chromium") / "profile", *FLAGS) as opened:
        yield opened


@pytest.fixture
def site(conformance: Path) -> FaultySite:
    """The real site, of two bundles, on a server that can misbehave."""
    names = {"moe": "moe-standalone-fp32", "dense": "dense-fp32"}
    bundles = {name: open_bundle(conformance.parent / "bundles" / f"{file}.mvmoe") for name, file in names.items()}
    real = app_site(bundles, npm_packages() / "onnxruntime-web" / "dist")
    return FaultySite(files=real.files, documents=real.documents, headers=real.headers)


class App:
    """The app as a user meets it."""

    def __init__(self, opened: browser.Browser, server: Server, host: str = "localhost") -> None:
        self.driver = opened.driver
        self.url = server.url(host)
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.resize(390)

    def resize(self, width: int, dark: bool = False) -> None:
        """Sets the screen's width and the reader's colours."""
        metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self) -> App:
        """Opens the page and waits until a picture can be given."""
        self.driver.get(self.url)
        self.wait("document.querySelector('#device').children.length || !document.querySelector('#problem').hidden")
        return self

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.driver.execute_script(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"{condition}: {self.text('body')} {self.complaints()}"
            time.sleep(0.05)

    def show(self, *images: Path) -> None:
        """Gives pictures as files and waits for the last one's answer, or an error."""
        # An error that is still shown loses its text, so that it is not taken for another one.
        before = self.driver.execute_script(
            "document.querySelector('#problem p').textContent = '';"
            "return document.querySelector('#seen').children.length"
        )
        self.driver.find_element(By.ID, "files").send_keys("\n".join(map(str, images)))
        done = f"document.querySelector('#seen').children.length == {before + len(images)}"
        failed = "(!document.querySelector('#problem').hidden && document.querySelector('#problem p').textContent)"
        self.wait(f"({done} || {failed}) && document.querySelector('#progress').hidden")

    def text(self, selector: str) -> str:
        """The text that an element shows; empty if it is hidden."""
        found = self.driver.execute_script(
            "const e = document.querySelector(arguments[0]); return e.checkVisibility() ? e.innerText : ''", selector
        )
        return str(found).strip()

    def announced(self) -> str:
        """What a screen reader was told last."""
        return str(self.driver.execute_script("return document.querySelector('#announcement').textContent"))

    def states(self) -> list[str]:
        """Where every expert is, as shown."""
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, "#experts .state")]

    def complaints(self) -> list[str]:
        """What the console says since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


def image_for(cases: dict[str, Any], expert: int, skip: int = 0) -> tuple[Path, dict[str, Any]]:
    """An image that is routed to an expert, and its case."""
    found = [case for case in cases["bundles"][0]["cases"] if case["experts"] == [expert]]
    found.sort(key=lambda case: not case["exact"])
    return Path(cases["images"]) / found[skip]["image"], found[skip]


def test_it_says_what_it_sees_which_expert_and_why(
    chromium: browser.Browser, site: FaultySite, cases: dict[str, Any], conformance: Path
) -> None:
    image, case = image_for(cases, 2)
    bundle = conformance.parent / cases["bundles"][0]["path"]
    with mvmoe_deploy.load(bundle) as runtime:
        expected = runtime.predict(image)
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        assert app.text("#announcement") == "" and all(state.startswith("not fetched") for state in app.states())
        app.show(image)
        assert app.text("#label") == expected.label
        assert app.announced().startswith(f"{expected.label}, ") and "Expert 2: group 2" in app.announced()
        (chosen,) = app.driver.find_elements(By.CSS_SELECTOR, "#experts [aria-current=true]")
        assert "2: group 2" in chosen.text and f"{100 * case['gates'][0]:.0f} %" in chosen.text
        shares = [e.text for e in app.driver.find_elements(By.CSS_SELECTOR, "#experts .share")]
        assert sum(float(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=1.5)
        assert "It was fetched for this picture" in app.text("#choice")
        assert [state == "in memory" for state in app.states()] == [False, False, True, False]
        assert "3 of 4 experts were not" in app.text("#bytes")
        assert "loading the expert" in app.text("#times")
        app.show(image_for(cases, 2, skip=1)[0])
        assert "It was in memory already" in app.text("#choice")
        app.show(image_for(cases, 1)[0])
        assert [state == "in memory" for state in app.states()] == [False, True, True, False]
        app.driver.find_element(By.ID, "selftest").click()
        app.wait("document.querySelector('#verdict table')")
        assert "answers all 4 test pictures as it should" in app.text("#verdict")
        assert not app.complaints()


def test_a_dense_bundle_and_one_expert_at_a_time(
    chromium: browser.Browser, site: FaultySite, cases: dict[str, Any]
) -> None:
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        app.driver.execute_script(
            "const s = document.querySelector('#resident'); s.value = '1'; s.dispatchEvent(new Event('change'))"
        )
        app.show(image_for(cases, 2)[0], image_for(cases, 1)[0])
        assert [state for state in app.states() if state == "in memory"] == ["in memory"]
        assert app.states()[2] == "on this device"
        app.driver.execute_script(
            "const s = document.querySelector('#bundle'); s.value = 'dense'; s.dispatchEvent(new Event('change'))"
        )
        app.wait("document.querySelector('#experts-card').hidden")
        app.show(image_for(cases, 2)[0])
        assert app.text("#label").startswith("thing ") and "model" in app.text("#times")
        assert not app.complaints()


def test_it_works_offline_after_the_first_visit(
    chromium: browser.Browser, site: FaultySite, cases: dict[str, Any]
) -> None:
    image, other = image_for(cases, 2)[0], image_for(cases, 3)[0]
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        app.show(image)
        app.wait("document.documentElement.dataset.kept")
        seen = app.text("#label"), app.text("#experts")
    app.open()  # nothing listens any more
    app.show(image)
    assert (app.text("#label"), app.text("#experts")) == seen
    assert "It came from this device" in app.text("#choice")
    assert "nothing came over the network" in app.text("#bytes")
    app.show(other)
    assert "expert_03" in app.text("#problem") and "check the connection and try again" in app.text("#problem")
    app.show(image)
    assert app.text("#problem") == "" and app.text("#label") == seen[0]
    with web_page.served(site, server.port):
        app.show(other)
        assert app.text("#problem") == "" and app.states()[3] == "in memory"


def test_a_new_version_replaces_the_old_one(chromium: browser.Browser, site: FaultySite, tmp_path: Path) -> None:
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        app.wait("document.documentElement.dataset.kept")
        changed = tmp_path / "index.html"
        changed.write_text(
            APP.joinpath("index.html").read_text().replace("One expert per picture</h1>", "Another</h1>")
        )
        site.files["/"] = changed
        app.open()
        assert app.text("h1") == "One expert per picture"  # as kept, since nothing says that there is another
        site.documents["/site.json"] = {**site.documents["/site.json"], "version": "another"}
        app.driver.get(app.url)
        app.wait("document.querySelector('h1').innerText == 'Another'")  # without a further visit
        app.wait("document.documentElement.dataset.kept")
        names = app.driver.execute_async_script("caches.keys().then(arguments[0])")
        assert [name for name in names if name.startswith("mvmoe-app-")] == ["mvmoe-app-another"]


def test_plain_http_still_verifies(chromium: browser.Browser, site: FaultySite, cases: dict[str, Any]) -> None:
    """A phone on the local network has no SubtleCrypto, no cache and no camera by script; all else works."""
    image, case = image_for(cases, 2)
    with web_page.served(site) as server:
        app = App(chromium, server, "phone.test")
        site.faults["/bundles/moe/expert_02.bin"] = web_page.flip_a_byte
        app.open()
        facts = "return [isSecureContext, typeof crypto.subtle, typeof caches, typeof navigator.mediaDevices]"
        assert app.driver.execute_script(facts) == [False, "undefined", "undefined", "undefined"]
        app.show(image)
        assert "expert_02.bin: sha256 differs from manifest.json" in app.text("#problem")
        site.heal()
        app.driver.find_element(By.CSS_SELECTOR, "#problem button").click()
        app.wait("document.querySelector('#seen').children.length")
        assert app.text("#problem") == "" and "2: group 2" in app.text("#experts .chosen")
        assert f"{100 * case['gates'][0]:.0f} %" in app.text("#experts .chosen")
        assert "Over plain HTTP nothing can be kept" in app.text("#store")
        assert app.text("#live") == "" and app.text("#actions") != ""


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl on PATH, which makes certificates")
def test_https_with_a_certificate_made_here(
    chromium: browser.Browser, site: FaultySite, cases: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two taps lead past the warning. Then there is a camera, and files are kept; but the page cannot start offline."""
    monkeypatch.setattr(serve, "cache_folder", lambda: tmp_path)
    with web_page.served(site, certificate=serve.self_signed("127.0.0.1")) as server:
        app = App(chromium, server, "phone.test")
        with contextlib.suppress(WebDriverException):  # the warning
            app.driver.get(app.url)
        for tap in ("details-button", "proceed-link"):
            app.driver.find_element(By.ID, tap).click()
        app.wait("document.querySelector('#device')?.children.length")
        assert app.driver.execute_script("return [isSecureContext, crossOriginIsolated]") == [True, True]
        app.wait("document.querySelector('#store').textContent.includes('cannot start offline')")
        assert app.text("#live") == "Live"
        app.show(image_for(cases, 2)[0], image_for(cases, 1)[0])
        assert app.states()[1:3] == ["in memory", "in memory"]


def test_another_bundle_than_announced_is_refused(
    chromium: browser.Browser, site: FaultySite, conformance: Path
) -> None:
    other = conformance.parent / "bundles" / "k2-standalone-fp32.mvmoe"
    with web_page.served(site) as server:
        app = App(chromium, server)
        site.documents["/site.json"]["bundles"][0]["digest"] = hashlib.sha256(b"").hexdigest()
        app.open()
        assert "is another bundle, or damaged" in app.text("#problem")
        assert open_bundle(other).digest not in app.text("#problem")


def test_the_live_camera(chromium: browser.Browser, site: FaultySite) -> None:
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        live = app.driver.find_element(By.ID, "live")
        live.click()
        app.wait("!document.querySelector('#answer').hidden")
        assert live.get_attribute("aria-pressed") == "true"
        app.wait("document.querySelector('#announcement').textContent")  # said once it has stayed the same
        live.click()
        assert live.get_attribute("aria-pressed") == "false"
        assert app.driver.execute_script("return document.querySelector('#video').srcObject.active") is False


CONTRAST = """
const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const parse = colour => colour.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = parse(getComputedStyle(element).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const poor = [];
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('script, .visually-hidden, :disabled')) continue;
  const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(behind(element))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push([walker.currentNode.data.trim(), ratio]);
}
return poor;
"""
"""Texts whose contrast is below 4.5, which WCAG 2 asks for."""


def test_it_can_be_read_on_every_screen_and_by_a_screen_reader(
    chromium: browser.Browser, site: FaultySite, cases: dict[str, Any]
) -> None:
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        app.show(image_for(cases, 2)[0])
        app.driver.find_element(By.ID, "selftest").click()
        app.wait("document.querySelector('#verdict table')")
        for width in (320, 390, 1280):
            for dark in (False, True):
                app.resize(width, dark)
                overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert app.driver.execute_script(overflow) == 0, width
                assert app.driver.execute_script(CONTRAST) == [], (width, dark)
        app.resize(390)
        small = """return [...document.querySelectorAll('button, .button, select')].filter(e => e.checkVisibility()
            && e.getBoundingClientRect().height < 44).map(e => e.outerHTML)"""
        assert app.driver.execute_script(small) == []  # a finger needs 44 pixels
        tree = app.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        nodes = [node for node in tree if not node["ignored"]]
        roles = {"button", "combobox", "image", "list", "progressbar", "table", "region", "textbox"}
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node]
        assert {role for role, name in named if role in roles and role != "list" and not name} == set(), named
        assert {role for role, _ in named} >= {"main", "heading", "status", "button", "combobox", "listitem", "table"}
        # by keyboard alone
        app.driver.execute_script("document.activeElement.blur()")
        order = []
        for _ in range(8):
            app.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyDown", "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9})  # fmt: skip
            app.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", "key": "Tab", "code": "Tab"})
            order.append(app.driver.execute_script("return document.activeElement.id"))
        assert [name for name in order if name][:4] == ["bundle", "camera", "files", "live"]
        outline = "return getComputedStyle(document.querySelector('#camera').parentElement).outlineStyle"
        app.driver.execute_script("document.querySelector('#camera').focus()")
        assert app.driver.execute_script(outline) == "solid"


def test_it_can_be_installed(chromium: browser.Browser, site: FaultySite) -> None:
    with web_page.served(site) as server:
        app = App(chromium, server).open()
        found = app.driver.execute_cdp_cmd("Page.getAppManifest", {})
        assert found["errors"] == [] and found["url"].endswith("app.webmanifest")
        # headless windows are incognito, where nothing is installed
        errors = app.driver.execute_cdp_cmd("Page.getInstallabilityErrors", {})["installabilityErrors"]
        assert {error["errorId"] for error in errors} <= {"in-incognito"}
    for icon in json.loads((APP / "app.webmanifest").read_text())["icons"]:
        if icon["type"] == "image/png":
            with Image.open(APP / icon["src"]) as opened:
                assert icon["sizes"] == f"{opened.width}x{opened.height}"


def test_everything_that_the_app_keeps_is_there(site: FaultySite) -> None:
    paths = ["/" + path.removeprefix("./") for path in site.documents["/site.json"]["shell"]]
    assert set(paths) <= set(site.files) and len(set(paths)) == len(paths)
    assert {"/", "/app.js", "/app.css", "/mvmoe-deploy/index.js"} <= set(paths)
    assert "/engine/ort-wasm-simd-threaded.wasm" in paths and "/sw.js" not in paths
    assert not any(path.endswith(".d.ts") for path in paths)
