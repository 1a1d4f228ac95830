"""The page of ``mstkd app`` in a browser, with WebGL by SwiftShader."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import browsers
import numpy as np
import pytest
from app_inputs import SECONDS, case_of
from PIL import Image

from nnunetv2_mstkd import Predictor, cli
from nnunetv2_mstkd.app import server, serving
from nnunetv2_mstkd.app.server import Settings
from nnunetv2_mstkd.app.session import Session

pytestmark = browsers.NEEDED

FEW, MANY = 20, 200
"""Coloured pixels of a view without and with a segmentation; the crosshair's edges give a few."""


@pytest.fixture(scope="module")
def model(trained) -> Path:
    return trained.fold("MSTKDTrainer").parent


@pytest.fixture(scope="module")
def images(trained, tmp_path_factory) -> dict[str, Path]:
    """Images of a test case under names as people give them."""
    folder, found = tmp_path_factory.mktemp("images"), {}
    for name, image in case_of(trained).items():
        found[name] = folder / f"patient_{name.lower()}.nii.gz"
        found[name].write_bytes(image.read_bytes())
    return found


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    """The sessions that the server opened."""
    return []


@pytest.fixture(scope="module")
def address(model, sessions) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "Session", lambda *what: sessions.append(Session(*what)) or sessions[-1])
        with serving.served(Predictor(model, device="cpu"), Settings()) as address:
            yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    webgl = "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"
    with browsers.browser(tmp_path_factory.mktemp("profile"), *webgl, "--window-size=1400,1000") as driver:
        yield driver


def wait(browser, script: str):
    """Wait until an expression of the page is true, and return its value."""
    end = time.monotonic() + SECONDS
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"{script}: {browser.find_element('tag name', 'body').text}"
        time.sleep(0.05)
    return value


@pytest.fixture
def page(browser, address):
    """The page, just opened."""
    browser.get(address)
    wait(browser, "document.documentElement.dataset.ready === 'true'")
    return browser


def choose(page, *files: Path) -> None:
    page.find_element("id", "files").send_keys("\n".join(map(str, files)))


def sentences(page) -> list[str]:
    wait(page, "!document.getElementById('problems').hidden")
    return [each.text for each in page.find_elements("css selector", "#problems li")]


def click(page, selector: str) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", page.find_element("css selector", selector))
    page.find_element("css selector", selector).click()


def pixels(page, view: str) -> np.ndarray:
    """What is drawn in a view: shape (rows, columns, 3)."""
    wait(page, f"document.getElementById('{view}').dataset.shown")
    canvas = page.find_element("css selector", f"#{view} canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)


def coloured(page, view: str) -> int:
    """How many pixels of a view are neither grey nor the yellow of the crosshair: those of the segmentation."""
    red, green, blue = np.moveaxis(pixels(page, view), -1, 0)
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return int(((spread > 40) & ~((red > blue + 40) & (green > blue + 40))).sum())


def set_opacity(page, value: float) -> None:
    slider = page.find_element("id", "opacity")
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))", slider, value
    )


def segment(page) -> None:
    wait(page, "!document.getElementById('segment').disabled")
    click(page, "#segment")
    wait(page, "!document.getElementById('result').hidden")


def test_two_of_four_sequences_are_segmented_shown_and_downloaded(page, images, model, tmp_path):
    choose(page, images["T1ce"], images["FLAIR"])
    wait(page, "!document.getElementById('segment').disabled")
    assert page.find_element("id", "expected").text.startswith("From T1ce + FLAIR.")
    grey = pixels(page, "left")
    assert (grey > 60).any(axis=-1).mean() > 0.1 and coloured(page, "left") < FEW
    segment(page)
    wait(page, "document.getElementById('left').dataset.shown === 'T1ce+FLAIR'")
    assert coloured(page, "left") > MANY
    page.execute_script(
        "const it = document.getElementById('opacity'); it.value = 0; it.dispatchEvent(new Event('input'))"
    )
    assert coloured(page, "left") < FEW

    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "got")})
    click(page, "#downloads a")
    end = time.monotonic() + SECONDS
    while not (found := list((tmp_path / "got").glob("*.nii.gz"))):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert found[0].name == "segmentation_T1ce+FLAIR.nii.gz"
    given = [word for name in ("T1ce", "FLAIR") for word in ("--image", f"{name}={images[name]}")]
    command = [
        "predict",
        *given,
        "-o",
        str(tmp_path / "expected.nii.gz"),
        "-m",
        str(model),
        "-f",
        "0",
        "-device",
        "cpu",
    ]
    assert cli.main(command) == 0
    assert found[0].read_bytes() == (tmp_path / "expected.nii.gz").read_bytes()


def test_one_click_shows_another_subset_beside(page, images):
    choose(page, images["T1"], images["T1ce"])
    segment(page)
    click(page, "#without-T1ce")
    wait(page, "document.getElementById('right').dataset.shown === 'T1'")
    captions = [each.text for each in page.find_elements("css selector", "figcaption")]
    assert captions == ["Segmented from T1+T1ce", "Segmented from T1"]
    assert coloured(page, "right") > MANY
    head = [each.text for each in page.find_elements("css selector", "#volumes thead th")]
    assert head == ["region", "T1+T1ce, ml", "T1, ml", "Dice of both"]
    click(page, "#without-T1ce")
    wait(page, "document.getElementById('right').hidden")
    segmented = pixels(page, "left")
    click(page, "#uncertain")
    uncertain = pixels(page, "left")
    set_opacity(page, 0)
    clear = pixels(page, "left")
    for one, other in ((segmented, uncertain), (segmented, clear), (uncertain, clear)):
        assert (abs(one - other).max(axis=-1) > 40).sum() > MANY


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_everything_has_a_name(page, images, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        choose(page, *images.values())
        segment(page)
        click(page, "#without-FLAIR")
        wait(page, "document.getElementById('right').dataset.shown === 'T1+T1ce+T2'")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        unnamed = (
            "[...document.querySelectorAll('input, select, button, canvas, progress')]"
            ".filter((each) => !(each.labels?.[0]?.textContent || each.ariaLabel || each.textContent).trim()).length"
        )
        assert page.execute_script(f"return {unnamed}") == 0
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bad_input_is_one_sentence_on_the_page(page, images, tmp_path):
    (tmp_path / "patient_t2.nii.gz").write_bytes(images["T2"].read_bytes()[:3000])
    choose(page, tmp_path / "patient_t2.nii.gz")
    (sentence,) = sentences(page)
    assert sentence.startswith("T2 (patient_t2.nii.gz) is truncated")
    assert not page.find_element("id", "segment").is_enabled()
    click(page, "#clear")
    wait(page, "document.getElementById('problems').hidden")
    page.execute_script("dispatchEvent(new DragEvent('drop', { dataTransfer: new DataTransfer() }))")
    (sentence,) = sentences(page)
    assert sentence.startswith("No file arrived")


def test_what_arrived_of_a_failed_drop_does_not_join_the_next_one(page, images):
    page.execute_script(
        "window.real = window.fetch;"
        "const name = (options) => options?.headers?.['X-File-Name'] ?? '';"
        "const lost = (url, options) => url.endsWith('/discard') || name(options).includes('_t2.');"
        "window.fetch = (...what) => lost(...what) ? Promise.reject(new Error()) : window.real(...what);"
    )
    choose(page, images["T1"], images["T1ce"], images["T2"])
    assert sentences(page) == ["The server does not answer; is mstkd app still running?"]
    page.execute_script("window.fetch = window.real")
    choose(page, images["FLAIR"])
    wait(page, "!document.getElementById('segment').disabled")
    assert len(page.find_elements("css selector", "#images tbody tr")) == 1


def test_a_dropped_file_is_taken_and_its_sequence_can_be_changed(page, images):
    from selenium.webdriver.common.keys import Keys

    page.execute_script(
        "const data = new DataTransfer();"
        "data.items.add(new File([Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0))], 'scan.nii.gz'));"
        "dispatchEvent(new DragEvent('drop', { dataTransfer: data }));",
        base64.b64encode(images["T2"].read_bytes()).decode(),
    )
    (sentence,) = sentences(page)
    assert sentence.startswith("Which sequence is scan.nii.gz?")
    select = page.find_element("css selector", "#images select")
    assert select.get_attribute("aria-label") == "Sequence of scan.nii.gz"
    # T1, T1ce, T2: the state that the server sends meanwhile must not take the keyboard's focus away
    for expected in ("T1", "T1ce", "T2"):
        select.send_keys(Keys.ARROW_DOWN)
        wait(page, f"document.getElementById('expected').textContent.startsWith('From {expected}.')")
    assert page.switch_to.active_element == select


def test_nothing_is_logged_or_requested_from_elsewhere(browser, address):
    """By all pages of the tests above."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    urls = {each["request"]["url"] for each in sent if each["documentURL"].startswith(address)}
    assert f"{address}niivue.js" in urls
    assert {url for url in urls if not url.startswith((address, "data:", "blob:"))} == set()


def test_a_closed_page_leaves_nothing(page, sessions, images):
    choose(page, images["T1"])
    wait(page, "!document.getElementById('segment').disabled")
    assert sessions[-1].folder.is_dir()
    page.get("about:blank")
    end = time.monotonic() + SECONDS
    while any(session.folder.exists() for session in sessions):
        assert time.monotonic() < end
        time.sleep(0.05)
