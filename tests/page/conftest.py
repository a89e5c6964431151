"""A page in headless Chromium over the fake engine. Every test fails on a console error that it did not expect."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))
sys.path.insert(0, str(Path(__file__).parent))

from page_browser import executable, open_browser  # noqa: E402


@pytest.fixture(scope="session")
def browser():
    if shutil.which(executable()) is None:
        pytest.skip("no chromium here; install it or set PUNA_CHROMIUM")
    with open_browser() as browser:
        yield browser


@pytest.fixture
def site(browser):
    """site(engine, before=SCRIPT, **context options) -> a page at the chat of a fresh server, `before` run first."""
    from contextlib import ExitStack

    from server_fakes import FakeEngine, make_app, running, until

    complaints = []
    with ExitStack() as stack:

        def start(engine=None, app_options=None, before=None, **options):
            url = stack.enter_context(running(make_app(engine or FakeEngine(), **(app_options or {}))))
            context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(30_000)
            page.complaints = complaints
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            if before:
                page.add_init_script(before)
            page.goto(url)
            until(lambda: page.inner_text("#model-name") != "…")
            return page

        yield start
    assert complaints == []
