"""Debian's Chromium in headless mode, for the tests of pages and the pictures of the documentation."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patience import HUNG_S

CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def launched() -> Iterator[Any]:
    """The browser, until the block ends."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET), timeout=1000 * HUNG_S)
        yield browser
        browser.close()
