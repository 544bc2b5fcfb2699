"""Takes the README's pictures of the page from a running server: python -m tests.serving.pictures --help."""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize

from tests.serving.browsing import browser, drawn, generate, visit

PROMPT = '''def mean(values):
    """The mean of a list of numbers."""
    total = 0
    for value in values:
        total += value
    return total / len(values)


def largest(values):
    """The largest of a list of numbers."""
'''
DESKTOP: ViewportSize = {"width": 1280, "height": 960}
PHONE: ViewportSize = {"width": 390, "height": 844}


def look_inside(page: Page) -> None:
    """A session, a prompt, a continuation, and the sources of one read."""
    page.set_default_timeout(120_000)
    page.click("#session-new")
    page.wait_for_selector("#generate:not([disabled])")
    generate(page, PROMPT, tokens=140, level="full")
    page.locator("#composer summary").click()
    page.locator("#stream").focus()
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    with page.expect_response("**/attribution"):
        page.keyboard.press("a")
    page.locator("#generate").focus()
    drawn(page)


def compare(page: Page) -> None:
    """What banning an expert changes."""
    page.locator("#diff [name=expert]").fill("3")
    page.locator("#diff [type=submit]").click()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector("#diff pre")
    drawn(page)


def figures(page: Page, names: tuple[str, ...], out: Path) -> None:
    """Charts that stand below each other, as one picture."""
    page.set_viewport_size({"width": DESKTOP["width"], "height": 5000})
    drawn(page)
    boxes = [box for name in names if (box := page.locator(f"#{name}").bounding_box())]
    top, bottom = boxes[0]["y"], boxes[-1]["y"] + boxes[-1]["height"]
    clip = {"x": boxes[0]["x"], "y": top, "width": boxes[0]["width"], "height": bottom - top}
    page.screenshot(path=out, clip=clip)
    page.set_viewport_size(DESKTOP)


def take(running: Browser, site: str, out: Path) -> None:
    """The page's top on a desktop and on a phone, light and dark; charts: one half light, the other dark."""
    charts = {"light": ("pathways", "diff"), "dark": ("gates", "memory")}
    for scheme, names in charts.items():
        with visit(running, site, viewport=DESKTOP, color_scheme=scheme) as page:
            look_inside(page)
            page.screenshot(path=out / f"page-{scheme}.png")
            if "diff" in names:
                compare(page)
            figures(page, names, out / f"page-{names[-1]}.png")
        with visit(running, site, viewport=PHONE, color_scheme=scheme) as page:
            look_inside(page)
            page.locator("#navigator").evaluate("(card) => scrollTo(0, card.offsetTop - 420)")
            drawn(page)
            page.screenshot(path=out / f"page-phone-{scheme}.png")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  synapse-serve --model my_model &\n  python -m tests.serving.pictures --out docs",
    )
    parser.add_argument("--site", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with browser() as running:
        take(running, given.site, given.out)


if __name__ == "__main__":
    main()
