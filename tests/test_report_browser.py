"""The page of an evaluation in a browser: nothing is loaded, nothing fails, columns sort, pictures are seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import browsers
import pytest
from report_inputs import CASES, EVIL, report, with_entropies, with_further

from nnunetv2_mstkd.reporting.page import FIGURE_TITLES

pytestmark = browsers.NEEDED


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(report(folder), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    with browsers.browser(tmp_path_factory.mktemp("profile"), "--disable-gpu", "--window-size=1200,1000") as driver:
        driver.get(file.as_uri())
        yield driver


@pytest.fixture(scope="module")
def logs(browser) -> dict[str, list]:
    """What was logged while the page was loaded; reading empties the logs."""
    return {name: browser.get_log(name) for name in ("browser", "performance")}


def test_nothing_is_logged_or_requested(browser, logs, file):
    assert logs["browser"] == []
    messages = [json.loads(entry["message"])["message"] for entry in logs["performance"]]
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    # the browser's own pages load their parts too
    requests = [each["request"]["url"] for each in sent if each["documentURL"] == file.as_uri()]
    assert file.as_uri() in requests
    assert [url for url in requests if url != file.as_uri() and not url.startswith("data:")] == []


def test_a_script_in_a_name_does_not_run(browser):
    from selenium.common.exceptions import NoAlertPresentException

    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert browser.title == "a <b>model</b>: MSTKDTrainer, fold 0"
    assert EVIL in browser.find_element("css selector", ".montage summary").text
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1


def test_all_pictures_are_seen(browser):
    widths = browser.execute_script(
        "return [...document.images].map((image) => [image.naturalWidth, image.clientWidth])"
    )
    # the figures; per case three images, the reference and seven subsets
    assert len(widths) == len(FIGURE_TITLES) + 3 * (3 + 1 + 7)
    assert all(natural > 0 and shown > 0 for natural, shown in widths)
    backgrounds = browser.execute_script(
        "return [...document.querySelectorAll('.segmented .picture')]"
        ".map((each) => getComputedStyle(each).backgroundImage)"
    )
    assert len(backgrounds) == 21 and all(each.startswith('url("data:image/png') for each in backgrounds)


def test_a_click_enlarges_a_picture(browser):
    picture = browser.find_element("css selector", ".segmented .picture")
    width = picture.size["width"]
    browser.execute_script("arguments[0].scrollIntoView()", picture)
    picture.click()
    large = browser.find_element("css selector", "dialog[open] .picture")
    assert large.size["width"] > 2 * width
    assert large.value_of_css_property("background-image").startswith('url("data:image/png')
    large.click()
    assert browser.find_elements("css selector", "dialog[open]") == []
    picture.send_keys("\n")
    assert browser.find_elements("css selector", "dialog[open]") != []
    browser.find_element("css selector", "dialog").click()


def test_the_slider_shows_another_slice(browser, file, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report(tmp_path, load=with_further), encoding="utf-8")
    browser.get(page.as_uri())
    try:
        slider = browser.find_element("css selector", ".slider input")
        assert slider.is_displayed() and slider.get_attribute("value") == "1"

        def seen() -> tuple[str, str, list[str]]:
            shown = browser.find_elements("css selector", ".montage .segmented:first-child .picture img")
            images = [each.get_attribute("src") for each in shown if each.is_displayed()]
            picture = browser.find_element("css selector", ".montage .segmented .picture")
            label = browser.find_element("css selector", ".montage output").text
            return label, picture.value_of_css_property("background-image"), images

        before = seen()
        slider.send_keys("\ue014")  # the right arrow
        after = seen()
        assert (before[0], after[0]) == ("12", "18")
        assert all(one != other for one, other in zip(before[1:], after[1:], strict=True))
        assert len(after[2]) == len(before[2]) > 0
        browser.find_element("css selector", ".montage .segmented .picture").click()
        large = browser.find_element("css selector", "dialog[open] .picture")
        assert large.value_of_css_property("background-image") == after[1]
        assert sum(each.is_displayed() for each in large.find_elements("css selector", "img")) == 1
        large.click()
        outputs = [each.text for each in browser.find_elements("css selector", ".montage output")]
        assert outputs == ["18", "12", "12"]  # of the other cases nothing changes
    finally:
        browser.get(file.as_uri())


def test_the_slider_shows_the_entropy_of_the_slice(browser, file, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report(tmp_path, load=with_entropies), encoding="utf-8")
    browser.get(page.as_uri())
    try:

        def seen() -> list[str]:
            shown = browser.find_elements("css selector", ".montage .segmented:first-child .entropy img")
            return [each.get_attribute("src") for each in shown if each.is_displayed()]

        slider, before = browser.find_element("css selector", ".slider input"), seen()
        slider.send_keys("\ue014")  # the right arrow
        after = seen()
        assert len(before) == len(after) == 9 and before[:3] != after[:3]  # one of each number of modalities
        assert before[3:] == after[3:]  # of the other cases nothing changes
        entropy = browser.find_element("css selector", ".montage .entropy")
        labels = browser.find_element("css selector", ".montage .segmented .picture")
        assert entropy.size == labels.size and entropy.location["y"] > labels.location["y"]
        entropy.click()
        large = browser.find_element("css selector", "dialog[open] .entropy")
        assert large.size["width"] > 2 * entropy.size["width"]
        large.click()
    finally:
        browser.get(file.as_uri())


def test_a_name_leads_to_its_pictures(browser):
    link = browser.find_element("link text", "fine")
    browser.execute_script("arguments[0].click()", link)
    target = browser.execute_script("return document.querySelector(location.hash).textContent")
    assert target.strip().startswith("fine: best")


def cases(browser) -> list[str]:
    return [each.text for each in browser.find_elements("css selector", "table.sortable tbody th")]


def test_a_click_on_a_column_sorts_the_cases(browser):
    worst_first = [EVIL, "middling", "fine"]
    assert cases(browser) == worst_first
    heads = browser.find_elements("css selector", "table.sortable thead th")
    by_name = {head.text: head for head in heads}
    mean = by_name["mean"]
    assert mean.get_attribute("aria-sort") == "ascending"
    mean.find_element("tag name", "button").click()
    assert cases(browser) == worst_first[::-1] and mean.get_attribute("aria-sort") == "descending"
    mean.find_element("tag name", "button").click()
    assert cases(browser) == worst_first
    by_name["case"].find_element("tag name", "button").click()
    assert cases(browser)[1:] == ["fine", "middling"] and set(cases(browser)) == set(CASES)
    assert mean.get_attribute("aria-sort") is None


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_is_as_wide_as_the_window(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    luminances = browser.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [style.color, style.backgroundColor].map((each) => each.match(/\\d+/g).slice(0, 3)"
        ".map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)"
        ".reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0));"
    )
    text, page = luminances
    assert (text < page) == (scheme == "light")
    # WCAG 2, level AAA
    assert (max(text, page) + 0.05) / (min(text, page) + 0.05) >= 7
