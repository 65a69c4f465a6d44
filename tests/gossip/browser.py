"""A real browser without a window: Chromium, driven by Selenium over loopback.

Where there is none, a test that asks for one is skipped; with CRDTMERGE_NEEDS_BROWSER=1 it fails.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
)


@contextmanager
def browser(folder: Path) -> Iterator[Chrome]:
    """A browser that keeps its profile in a folder, and logs the console and the network."""
    chromium = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = (
            f"no {'Chromium' if chromium is None else 'chromedriver'} on PATH: install chromium and chromium-driver"
        )
        if os.environ.get("CRDTMERGE_NEEDS_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*QUIET, f"--user-data-dir={folder}", *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=Service(executable_path=driver))
    try:
        chrome.set_page_load_timeout(60)
        chrome.set_script_timeout(60)
        yield chrome
    finally:
        chrome.quit()


def resized(chrome: Chrome, width: int, height: int) -> None:
    """Give the page so many pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 720}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def preferring(chrome: Chrome, scheme: str) -> None:
    """Let the page believe that its reader prefers "light" or "dark"."""
    wish = [{"name": "prefers-color-scheme", "value": scheme}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wish})


def complaints(chrome: Chrome) -> list[str]:
    """What the console has said since it was last asked."""
    return [line["message"] for line in chrome.get_log("browser")]  # type: ignore[no-untyped-call]


def requested(chrome: Chrome) -> list[str]:
    """The addresses that pages have requested since this was last asked."""
    events: list[dict[str, Any]] = [
        json.loads(line["message"])["message"]
        for line in chrome.get_log("performance")  # type: ignore[no-untyped-call]
    ]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
