"""The page in a real browser: it opens offline, shows its pictures, sorts, and is read in the dark, on a phone, on paper."""

from __future__ import annotations

import json

import pytest
from selenium.webdriver.common.by import By

from moa.eval.paired.page import to_html
from moa.eval.paired.pictures import pictures
from moa.eval.paired.view import View

HOSTILE = ["<img src=http://192.0.2.1/x.png onerror=window.caught=1>", "<script>window.caught=1</script>"]
TASKS = ("needle_10", "needle_2", "needle_1", HOSTILE[0])
CONTRAST = """
const found = [];
const shown = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length > 3 && c[3] === 0 ? null : c; };
const light = (c) => c.slice(0, 3).map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
for (const element of document.querySelectorAll("h1,h2,p,a,dt,dd,th,td,caption,figcaption,button,code")) {
  if (!element.textContent.trim()) continue;
  let behind = element;
  while (behind && !shown(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const paper = behind ? shown(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
  const both = [light(shown(getComputedStyle(element).color)), light(paper)].sort((a, b) => b - a);
  found.push([(both[0] + 0.05) / (both[1] + 0.05), element.tagName + "." + element.className]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""


@pytest.fixture(scope="module")
def file(made_up, tmp_path_factory):
    """A page with hostile names, and with an entry that was not measured."""
    report = made_up(("dense", "moa", "other", HOSTILE[1]), TASKS, (1024, 4096), model=HOSTILE[1])
    there = tuple(s for s in report.scores if (s.variant, s.task) != ("moa", "needle_2"))
    view = View(report.model_copy(update={"scores": there}))
    path = tmp_path_factory.mktemp("page") / "eval.html"
    path.write_text(to_html(view, list(pictures(view))), encoding="utf-8")
    return path


@pytest.fixture
def page(browser, file):
    """The page, opened anew without a network."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    for kind in ("performance", "browser"):
        browser.get_log(kind)  # what came before
    browser.get(file.as_uri())
    return browser


def requested(page) -> list[str]:
    """Everything that the browser asked for since the page was opened."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def overview(page):
    return page.find_element(By.CSS_SELECTOR, "#length-1 table")


def column(table, number: int, part: str = "tbody") -> list[str]:
    rows = table.find_elements(By.CSS_SELECTOR, f"{part} tr")
    return [row.find_elements(By.CSS_SELECTOR, "th, td")[number].text for row in rows]


def click(table, number: int) -> None:
    table.find_elements(By.CSS_SELECTOR, "thead button")[number].click()


def test_it_opens_offline_and_asks_for_nothing(page, file):
    assert page.find_element(By.TAG_NAME, "h1").text == f"{HOSTILE[1]}: evaluation"
    page.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    asked = requested(page)
    assert file.as_uri() in asked  # the log works
    assert [url for url in asked if url != file.as_uri() and not url.startswith("data:")] == []
    assert page.get_log("browser") == []  # nor was anything stopped by the page's own policy
    assert page.execute_script("return window.caught") is None


def test_its_pictures_are_decoded(page):
    images = page.find_elements(By.TAG_NAME, "img")
    assert len(images) == 4
    for image in images:
        page.execute_async_script("arguments[0].decode().then(arguments[1], arguments[1])", image)
        wide, high = (int(image.get_property(name)) for name in ("naturalWidth", "naturalHeight"))
        assert min(wide, high) > 200
        shown = image.size
        assert shown["width"] / shown["height"] == pytest.approx(wide / high, rel=0.02)
        assert image.get_attribute("alt")


def test_a_click_on_a_heading_sorts(page):
    table = overview(page)
    foot = column(table, 0, "tfoot")
    before = [float(text.rstrip(" %▼▲")) for text in column(table, 2)]
    click(table, 2)  # dense: four shares between 0 and 1, and a loss
    values = [
        float(row.get_attribute("data-value")) for row in table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(3)")
    ]
    assert values == sorted(values)
    assert sorted(float(text.rstrip(" %▼▲")) for text in column(table, 2)) == sorted(before)
    click(table, 2)
    down = [
        float(row.get_attribute("data-value")) for row in table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(3)")
    ]
    assert down == values[::-1] != values
    assert column(table, 0, "tfoot") == foot == ["mean of 4 shares", "KV bytes"]
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    assert [head.get_attribute("aria-sort") for head in heads] == [None, None, "descending", None, None, None]


def test_rows_stay_whole_and_gaps_go_last(page):
    table = overview(page)
    rows = {row.text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")}
    for times in (1, 2):
        click(table, 3)
        assert column(table, 3)[-1] == "–", times
    assert {row.text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")} == rows


def test_names_sort_by_the_numbers_in_them(page):
    table = overview(page)
    click(table, 0)
    assert [name for name in column(table, 0) if "needle" in name] == ["needle_1", "needle_2", "needle_10"]
    other = page.find_element(By.CSS_SELECTOR, "#length-2 table")
    assert [name for name in column(other, 0) if "needle" in name] == ["needle_10", "needle_2", "needle_1"]  # as it was


def test_every_table_has_buttons_that_a_keyboard_reaches(page):
    for table in page.find_elements(By.TAG_NAME, "table"):
        heads = table.find_elements(By.CSS_SELECTOR, "thead th")
        assert len(heads) == len(table.find_elements(By.CSS_SELECTOR, "thead button"))
        assert all(head.text for head in heads)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(scheme, page):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 600) is (scheme == "light")
    least, where = page.execute_script(CONTRAST)
    assert least >= 4.5, where  # WCAG 2, level AA


@pytest.mark.parametrize("width", [320, 768])
def test_a_narrow_window_scrolls_no_page_sideways(width, page):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = page.execute_script("const root = document.documentElement; return root.scrollWidth - root.clientWidth")
    assert wide == 0


def test_on_paper_nothing_is_cut(page):
    metrics = {"width": 690, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 less its margins
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    assert not page.find_element(By.TAG_NAME, "nav").is_displayed()
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    wide = page.execute_script(
        "return [...document.querySelectorAll('table, img')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
        ".map((e) => e.textContent.slice(0, 40) + e.getBoundingClientRect().right)"
    )
    assert wide == []
    assert len(page.print_page()) > 10_000
