"""Headless Chromium for the tests of pages, which are skipped where it is not installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSER = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")

NEEDED = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed (Debian: apt-get install chromium)"),
    pytest.mark.skipif(DRIVER is None, reason="no chromedriver is installed (Debian: apt-get install chromium-driver)"),
]
"""Marks of a test that needs the browser."""


@contextmanager
def browser(profile: Path, *arguments: str) -> Iterator:
    """A browser that keeps its messages and requests as logs."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    arguments = ("--headless=new", "--disable-dev-shm-usage", f"--user-data-dir={profile}", *arguments)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments = ("--no-sandbox", *arguments)  # Chromium refuses to run as root with it
    for argument in arguments:
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()
