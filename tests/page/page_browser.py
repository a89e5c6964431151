"""Debian's own Chromium, driven by playwright; nothing is downloaded."""

import os
from contextlib import contextmanager

ARGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def executable():
    return os.environ.get("PUNA_CHROMIUM", "chromium")


@contextmanager
def open_browser():
    import shutil

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(executable()), args=list(ARGS))
        try:
            yield browser
        finally:
            browser.close()
