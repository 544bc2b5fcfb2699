"""A headless browser for tests of the page: what it may reach, what it must not say, and how a person uses the page."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from serving.page import STATIC

CSS = (STATIC / "page.css").read_text()
NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 30_000  # milliseconds, for machines with other things to do
GUTTER_RIGHT = 8  # pixels that every chart keeps free to its right
ROW = 15  # pixels of a heatmap's row


@contextmanager
def browser() -> Iterator[Browser]:
    """The system's Chromium; no name but loopback's address resolves. Skips where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser ({', '.join(NAMES)}); on Debian: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    args = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:
        args.append("--no-sandbox")  # Chromium refuses to run as root with one
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=args)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def visit(running: Browser, site: str, *, expected: tuple[str, ...] = (), **context: Any) -> Iterator[Page]:
    """The page in a context of its own. It may ask `site` alone and leave nothing but `expected` in its console."""
    said: list[str] = []
    asked: list[str] = []
    surroundings = running.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
    page = surroundings.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(site)
        page.wait_for_selector("#status[data-state=ready], #key-dialog[open]")
        yield page
    finally:
        surroundings.close()
    assert [text for text in said if not any(part in text for part in expected)] == []
    assert [url for url in asked if not url.startswith(f"{site}/")] == []


def generate(page: Page, prompt: str, *, tokens: int = 12, level: str = "gates") -> str:
    """Reads `prompt`, writes `tokens` more, and returns the id of the trace that the page shows."""
    page.fill("#prompt", prompt)
    options = page.locator("#composer details")
    if options.get_attribute("open") is None:
        options.locator("summary").click()
    page.fill("[name=max_tokens]", str(tokens))
    page.select_option("[name=level]", level)
    with page.expect_request("**/events") as request:
        page.click("#generate")
    done(page)
    trace: str = request.value.url.split("/")[-2]
    return trace


def done(page: Page) -> None:
    """Waits until nothing is being generated."""
    page.wait_for_selector("#generate:not([disabled])")
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")


def drawn(page: Page) -> None:
    """Waits for the frame that shows the last change."""
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))")


def pixels(canvas: Locator, columns: int, rows: int) -> list[list[tuple[int, ...]]]:
    """The colour of the middle of each cell of a heatmap that shows `columns` tokens: by token, then by row."""
    script = """(canvas, [columns, rows, tall, right]) => {
        const left = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--gutter"));
        const wide = (canvas.clientWidth - left - right) / columns;
        const scale = canvas.width / canvas.clientWidth;
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const at = (column, row) => [(left + (column + 0.5) * wide) * scale, (row + 0.5) * tall * scale, 1, 1];
        const count = (n) => Array.from({ length: n }, (_, index) => index);
        return count(columns).map((t) => count(rows).map((row) => [...copy.getImageData(...at(t, row)).data]));
    }"""
    canvas.scroll_into_view_if_needed()
    drawn(canvas.page)
    found = canvas.evaluate(script, [columns, rows, ROW, GUTTER_RIGHT])
    return [[tuple(colour) for colour in column] for column in found]


def sliders(page: Page) -> set[str]:
    """Where the views say that the token cursor is."""
    return {str(found.get_attribute("aria-valuenow")) for found in page.get_by_role("slider").all()}


def colour(name: str, scheme: str) -> tuple[int, int, int]:
    """A variable of the stylesheet."""
    found = re.search(rf"--{name}: light-dark\(#(\w+), #(\w+)\)", CSS)
    assert found is not None
    digits = found[1 if scheme == "light" else 2]
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def heat(share: float, scheme: str) -> tuple[int, ...]:
    """The opaque colour of a share in [0, 1]: straight lines between the five steps."""
    low = min(3, int(share * 4))
    ends = zip(colour(f"heat-{low}", scheme), colour(f"heat-{low + 1}", scheme), strict=True)
    return (*(round(a + (b - a) * (share * 4 - low)) for a, b in ends), 255)
