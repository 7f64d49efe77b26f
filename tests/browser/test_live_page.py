"""The live page in a real browser: signs in, updates, warns, fits a phone, and breaks no rule of its own."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.conftest import MODELS, READER, Served

# the ratio of two colours as WCAG 2 has it, of each piece of text that is shown; the worst come back
CONTRAST = """
const luminance = (colour) => {
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (node) => {
  for (let one = node; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
};
return [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility() && !node.closest('svg') &&
  [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim())).map((node) => {
    const [a, b] = [luminance(getComputedStyle(node).color), luminance(ground(node))];
    return [node.tagName + '.' + node.className, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  }).filter((one) => one[1] < 4.5);
"""


def until(browser: Chrome, true: Callable[[Chrome], Any], seconds: float = 15) -> Any:
    return WebDriverWait(browser, seconds, poll_frequency=0.1).until(true)


def text(browser: Chrome, selector: str) -> str:
    """What is in it now; it may be drawn anew between two looks."""
    return str(browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector))


def sign_in(browser: Chrome, key: str) -> None:
    field: WebElement = browser.find_element(By.ID, "key")
    field.clear()
    field.send_keys(key)
    browser.find_element(By.CSS_SELECTOR, "#enter button").click()


def scheme(browser: Chrome, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def size(browser: Chrome, width: int, height: int, mobile: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def page(browser: Chrome, served: Served) -> Iterator[Chrome]:
    """Signed in and live; afterwards nobody may have complained."""
    size(browser, 1280, 900)
    scheme(browser, "light")
    browser.get(f"{served.url}/live")
    sign_in(browser, READER)
    until(browser, lambda one: text(one, "#status") == "Live")
    until(browser, lambda one: len(one.find_elements(By.CSS_SELECTOR, "#models > li")) == len(MODELS))
    yield browser
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]  # type: ignore[no-untyped-call]  # selenium has no types for it
    browser.execute_script("sessionStorage.clear()")
    assert complaints == []


def test_a_wrong_key_is_told_so(browser: Chrome, served: Served) -> None:
    browser.get(f"{served.url}/live")
    browser.execute_script("sessionStorage.clear()")
    browser.refresh()
    assert "Not signed in" in text(browser, "#status")
    sign_in(browser, "sk-wrong")
    until(browser, lambda one: "not known" in text(one, "#wrong"))
    assert browser.execute_script("return sessionStorage.length") == 0
    sign_in(browser, "sk-test")  # may generate, but not look
    until(browser, lambda one: "lacks the scope" in text(one, "#wrong"))


def test_updates_arrive(page: Chrome, served: Served) -> None:
    card = '[data-model="hermes-2"]'
    served.worker.inflight["hermes-2"] = 17
    until(page, lambda one: "17" in text(one, f"{card} dl"))
    served.worker.rate["hermes-2"] = 8.0
    until(page, lambda one: "tok/s" in text(one, f"{card} dl"))
    until(page, lambda one: text(one, "#total dd")[:1] in "123456789")
    until(
        page,
        lambda one: (
            len(str(one.execute_script(f"return document.querySelector('{card} .line').getAttribute('d')"))) > 30
        ),
    )
    served.ask("phi-3-mini")  # a request of a real worker
    assert "hx-llm-server-01" in text(page, "h1")
    assert "localStorage" not in page.page_source
    assert page.execute_script("return localStorage.length") == 0
    assert page.execute_script("return document.cookie") == ""
    assert READER not in page.current_url


def test_a_drained_model_says_so(page: Chrome, served: Served) -> None:
    served.post("/admin/models/phi-3-mini/drain")
    until(page, lambda one: text(one, '[data-model="phi-3-mini"] .state') == "draining")
    assert "drained by operator" in text(page, '[data-model="phi-3-mini"] .reason')
    served.post("/admin/models/phi-3-mini/resume")
    until(page, lambda one: text(one, '[data-model="phi-3-mini"] .state') == "up")


def test_alerts_come_and_go(page: Chrome, served: Served) -> None:
    served.alert("EngineDown", summary="The engine of mixtral-8x7b does not answer <b>now</b>")
    until(page, lambda one: "EngineDown" in text(one, "#alerts"))
    assert "<b>now</b>" in text(page, "#alerts")  # never markup
    link = page.find_element(By.CSS_SELECTOR, '#alerts [data-name="EngineDown"] a')
    assert link.get_attribute("href") == "https://runbooks.example/EngineDown"
    assert "noopener" in str(link.get_attribute("rel"))
    assert page.title == "(1) Citadel live"
    served.alert("Script", summary="x", runbook_url="javascript:alert(1)")
    until(page, lambda one: "Script" in text(one, "#alerts"))
    assert not page.find_elements(By.CSS_SELECTOR, '#alerts [data-name="Script"] a')
    for name in ("EngineDown", "Script"):
        served.alert(name, "resolved")
    until(page, lambda one: "No alert is firing" in text(one, "#alerts"))
    assert "2 resolved" in text(page, "#past summary")


def test_it_says_when_it_is_stale_and_comes_back(page: Chrome, served: Served) -> None:
    os.kill(served.control(), signal.SIGSTOP)
    try:
        until(page, lambda one: text(one, "#status").startswith("Stale"))
    finally:
        os.kill(served.control(), signal.SIGCONT)
    until(page, lambda one: text(one, "#status") == "Live")


def test_it_reconnects_by_itself(page: Chrome, served: Served) -> None:
    page.set_network_conditions(offline=True, latency=0, throughput=0)
    page.execute_script("window.before = performance.now()")
    page.execute_cdp_cmd("Network.enable", {})
    page.delete_network_conditions()
    page.refresh()  # the key is still there
    until(page, lambda one: text(one, "#status") == "Live")
    page.find_element(By.ID, "leave").click()
    assert "Not signed in" in text(page, "#status")
    assert page.execute_script("return sessionStorage.length") == 0


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_phone_and_a_desk(page: Chrome, served: Served, colours: str) -> None:
    scheme(page, colours)
    served.alert("FirstTokenSlow", severity="warning", summary="The first token takes longer than it should")
    until(page, lambda one: "FirstTokenSlow" in text(one, "#alerts"))
    for width, height in ((360, 740), (768, 1024), (1280, 900)):
        size(page, width, height, mobile=width < 500)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script(CONTRAST) == []
    small = page.execute_script(
        "return [...document.querySelectorAll('button, input, summary')]"
        ".filter(one => one.checkVisibility() && one.offsetHeight < 24).length"
    )
    assert small == 0
    served.alert("FirstTokenSlow", "resolved")


def test_what_a_screen_reader_needs(page: Chrome) -> None:
    page.find_element(By.ID, "leave").click()
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert ("textbox", "Key with the scope read") in found
    assert ("heading", "Sign in") in found
    assert any(role == "status" for role, _ in found)
    sign_in(page, READER)
    until(page, lambda one: len(one.find_elements(By.CSS_SELECTOR, "#models > li")) == len(MODELS))
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert {("heading", name) for name in ("Alerts", "Traffic", "Models", *MODELS)} <= found
    assert any(role == "image" and name.startswith("Tokens in the last 5 minutes: now ") for role, name in found)


def test_nothing_from_elsewhere(page: Chrome, served: Served) -> None:
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert loaded
    assert all(name.startswith((served.url, served.url.replace("http", "ws"))) for name in loaded)
    page.execute_script(
        "const s = document.createElement('style'); s.textContent = 'body{display:none}'; document.head.append(s)"
    )
    assert page.find_element(By.TAG_NAME, "body").is_displayed()
    assert any("Content Security Policy" in str(one["message"]) for one in page.get_log("browser"))  # type: ignore[no-untyped-call]  # selenium has no types for it


def test_pictures(page: Chrome, served: Served, tmp_path: Path) -> None:
    """With CITADEL_PICTURES=docs/images the pictures of the documentation are made anew."""
    folder = Path(os.environ.get("CITADEL_PICTURES", tmp_path))
    for name, width, height, colours in (("live-desk", 1280, 1000, "light"), ("live-phone", 360, 780, "dark")):
        scheme(page, colours)
        size(page, width, height, mobile=width < 500)
        assert page.get_screenshot_as_file(str(folder / f"{name}.png"))
