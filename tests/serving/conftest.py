"""Fixtures of the page's tests: a server with a small random model on loopback, and a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.serving.servers import listening, make_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """The server's address."""
    with listening(make_app(max_output_tokens=400)) as address:
        yield address


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser; skips where there is none."""
    pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    from tests.serving.browsing import browser

    with browser() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, site: str) -> Iterator[Page]:
    """The page, opened afresh; afterwards it must have said nothing in its console and asked nobody else."""
    from tests.serving.browsing import visit

    with visit(chromium, site) as opened:
        yield opened
