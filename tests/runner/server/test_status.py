"""The page at /: its numbers without JavaScript, and in a real browser, light and dark, alone on its own server."""

from __future__ import annotations

import base64
import json
import re

import pytest

from moa.runner.server.status import FOLDER, _digest

# Contrast of every text with what lies behind it; the least, and whose.
CONTRAST = """
const shown = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 && c[3] === 0 ? null : c; };
const light = (c) => c.slice(0, 3).map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
let least = [99, ""];
for (const element of document.querySelectorAll("h1,h2,p,dt,dd,th,td,summary")) {
  if (!element.textContent.trim()) continue;
  let behind = element;
  while (behind && !shown(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const paper = behind ? shown(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
  const both = [light(shown(getComputedStyle(element).color)), light(paper)].sort((a, b) => b - a);
  const ratio = (both[0] + 0.05) / (both[1] + 0.05);
  if (ratio < least[0]) least = [ratio, element.tagName + "." + element.className];
}
return least;
"""


def number(page: str, name: str) -> str:
    found = re.search(rf'id="{name}"[^>]*>([^<]*)<', page)
    assert found, name
    return found[1]


def test_the_numbers_are_there_without_javascript(served):
    with served.client() as client:
        before = client.get("/").text
        served.complete("the castle", max_tokens=90, ignore_eos=True)  # so many that they come in several updates
        served.wait_idle()
        page = client.get("/").text
    assert int(number(page, "output")) == int(number(before, "output")) + 90
    assert int(number(page, "finished")) == int(number(before, "finished")) + 1
    assert number(page, "running") == number(page, "waiting") == "0"
    assert number(page, "state") == "ready"
    for name in ("ttft", "itl", "e2e"):
        assert number(page, name).endswith(" ms")


def test_the_map_tells_the_plans_spans(served):
    plan, n = served.service.plan, served.service.longest_tokens
    shares = plan.span_rules.span(n) / n
    with served.client() as client:
        page = client.get("/").text
    told = re.findall(r'fill-opacity="([\d.]+)"><title>layer (\d+), KV head (\d+): ([\d.]+)%', page)
    assert len(told) == shares.size
    for opacity, layer, head, percent in told:
        assert float(opacity) == pytest.approx(shares[int(layer), int(head)], abs=1e-3)
        assert float(percent) == pytest.approx(100 * shares[int(layer), int(head)], abs=0.1)
    assert plan.sha256[:12] in page


def test_a_dense_server_has_no_map_and_names_are_escaped(serve):
    hostile = "<script>window.caught=1</script>"
    server = serve(name=hostile)
    with server.client() as client:
        page = client.get("/").text
    assert "<svg" not in page
    assert hostile not in page
    assert "&lt;script&gt;" in page
    assert number(page, "ttft") == "-"


def test_browsers_are_told_to_load_and_run_nothing_else(served):
    with served.client() as client:
        answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    for name in ("page.css", "page.js"):
        assert _digest((FOLDER / name).read_text()) in policy
    assert not re.search(r"(src|href)=[\"'](?!data:,)", answer.text)
    assert answer.headers["cache-control"] == "no-store"


@pytest.fixture
def page(browser, served):
    for kind in ("performance", "browser"):
        browser.get_log(kind)  # what came before
    browser.execute_cdp_cmd("Network.enable", {})
    browser.get(served.url)
    return browser


def text_of(page, name: str) -> str:
    """In one call: the page replaces its elements while a test looks at them."""
    return page.execute_script("return document.getElementById(arguments[0]).innerText", name)


def test_it_refreshes_itself_and_loads_nothing_else(page, served, wait_for):
    before = int(text_of(page, "output").replace(",", ""))
    served.complete("the castle", max_tokens=7, ignore_eos=True)
    wait_for(lambda: text_of(page, "output") == f"{before + 7:,}")
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in sent if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in urls if not url.startswith("data:")} == {f"{served.url}/"}
    assert page.get_log("browser") == []


def test_it_says_when_the_server_is_gone(browser, serve, wait_for):
    server = serve()
    browser.get(server.url)
    assert text_of(browser, "state") == "ready"
    server.server.should_exit = True
    server.thread.join(60)
    wait_for(lambda: "not reachable" in text_of(browser, "state"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_can_be_read(page, scheme, width):
    media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        least, whose = page.execute_script(CONTRAST)
        assert least >= 4.5, whose
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert page.find_element("id", "map").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_asks_for_the_key_as_browsers_can_give_it(browser, serve):
    server = serve(api_keys=("correct-horse",))
    given = base64.b64encode(b"anybody:correct-horse").decode()
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {"Authorization": f"Basic {given}"}})
    try:
        browser.get(server.url)
        assert text_of(browser, "state") == "ready"
    finally:
        browser.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": {}})
