"""How the page looks and holds up: themes, contrast, a phone, reduced motion, a long text, a model with fewer parts."""

from __future__ import annotations

import base64
import json
from functools import partial

import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")

from playwright.sync_api import Browser, Page

from synapse_arch import TraceSpec
from tests.serving.browsing import colour, done, drawn, generate, sliders, visit
from tests.serving.servers import byte_model, listening, make_app


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_both_themes_and_a_switch_that_is_kept(chromium: Browser, site: str, scheme: str, other: str) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with visit(chromium, site, color_scheme=scheme) as page:
        assert page.evaluate(paper) == "rgb({}, {}, {})".format(*colour("paper", scheme))
        page.locator(f"#theme input[value={other}]").check(force=True)
        assert page.evaluate(paper) == "rgb({}, {}, {})".format(*colour("paper", other))
        page.reload()
        page.wait_for_selector("#status[data-state=ready]")
        assert page.evaluate(paper) == "rgb({}, {}, {})".format(*colour("paper", other))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_to_read(scheme: str) -> None:
    def luminance(name: str) -> float:
        parts = [part / 255 for part in colour(name, scheme)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for text, back in (("ink", "card"), ("quiet", "card"), ("quiet", "paper"), ("quiet", "soft"), ("danger", "card")):
        assert contrast(text, back) >= 4.5, (text, back)
    assert contrast("on-accent", "accent") >= 4.5
    for step in range(5):
        assert contrast("ink", f"ink-{step}") >= 4.5, step
    for mark in ("cursor", "accent", "series-0", "series-1", "series-2", "series-3"):
        assert contrast(mark, "card") >= 3, mark
    shades = [luminance(f"heat-{step}") for step in range(5)]  # order by brightness alone, whatever the eye's colours
    assert shades == sorted(shades, reverse=scheme == "light")


def test_a_phone_needs_no_scrolling_sideways(chromium: Browser, site: str) -> None:
    with visit(chromium, site, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as page:
        wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert page.evaluate(wide) == 360
        page.click("#session-new")
        generate(page, "a word-without-any-place-to-break-" * 3, tokens=20, level="full")
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.locator("#diff [type=submit]").click()
        page.get_by_role("button", name="Compare").click()
        page.wait_for_selector("#diff pre")
        assert page.evaluate(wide) == 360
        beyond = """() => [...document.querySelectorAll("main *, .side *")].filter((one) =>
            !one.closest(".scroll, .segments, .hidden") && one.getBoundingClientRect().right > 361).length"""
        assert page.evaluate(beyond) == 0


def test_reduced_motion_is_respected(chromium: Browser, site: str) -> None:
    moving = """() => {
        const status = document.getElementById("status");
        status.dataset.state = "busy";
        return getComputedStyle(status, "::before").animationName;
    }"""
    with visit(chromium, site) as page:
        assert page.evaluate(moving) == "pulse"
    with visit(chromium, site, reduced_motion="reduce") as page:
        assert page.evaluate(moving) == "none"


def long_trace(length: int) -> str:
    """Live events of a model that read `length` tokens at once, in the API's layout."""
    ids = torch.randint(32, 127, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trace = byte_model()(ids, trace=TraceSpec(level="gates", max_tokens=length)).trace.to_dict()
    row = partial(map, lambda column: column[0])
    pos, known = row(trace["tokens"].values())
    tokens = [
        {"pos": p, "id": i, "bytes_b64": base64.b64encode(bytes([i])).decode(), "src": "prompt"}
        | {"logprob": -1.0, "entropy": p % 7 / 7}
        for p, i in zip(pos, known, strict=True)
    ]
    drop = {"confidence", "load", "uniform", "balance", "utilisation", "capacity"}
    layers = [
        {"i": layer["i"]}
        | {
            part: {name: values[0] for name, values in layer[part].items() if name not in drop and values}
            for part in ("routing", "mlstm", "memory")
            if layer[part].pop("positions")
        }
        for layer in trace["layers"]
    ]
    last = {"experts": trace["experts"], "pathways": trace["pathways"]}
    return f"data: {json.dumps({'tokens': tokens, 'layers': layers})}\n\nevent: done\ndata: {json.dumps(last)}\n\n"


def test_4096_tokens_stay_interactive(page: Page) -> None:
    answer = 'data: {"trace_id":"long","choices":[{"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    stream = {"status": 200, "content_type": "text/event-stream"}
    page.route("**/v1/completions", lambda route: route.fulfill(**stream, body=answer))
    page.route("**/traces/long/events", lambda route: route.fulfill(**stream, body=long_trace(4096)))
    page.fill("#prompt", "long")
    page.click("#generate")
    page.wait_for_selector("#stream i[data-i='4095']", state="attached")
    done(page)
    page.click("#zoom-fit")
    page.locator("#stream").focus()
    timed = """async (keys) => {
        const times = [];
        for (const key of keys) {
            const start = performance.now();
            document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
            await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)));
            times.push(performance.now() - start);
        }
        return times;
    }"""
    keys = ["ArrowLeft"] * 20 + ["Home", "ArrowRight", "ArrowDown", "PageDown", "]", "+", "-", "0", "End"]
    times = sorted(page.evaluate(timed, keys))
    assert sliders(page) == {"4095"}
    assert times[len(times) // 2] < 200, times  # milliseconds from the key to the frame; 15 to 60 on a quiet machine
    assert times[-1] < 1000, times


@pytest.mark.parametrize("missing", [("xlstm", "memory"), ("experts",)])
def test_a_model_with_fewer_parts_is_shown_without_their_charts(chromium: Browser, missing: tuple[str, ...]) -> None:
    model = byte_model(**dict.fromkeys(missing))
    with listening(make_app(model)) as address, visit(chromium, address) as page:
        generate(page, "fewer parts", tokens=4, level="full")
        charts = {"routing": "experts", "gates": "xlstm", "memory": "memory", "pathways": "experts"}
        for figure, part in charts.items():
            assert page.locator(f"#{figure}").is_visible() == (part not in missing), figure
        for measure in ("margin", "age", "write", "none", "entropy"):
            page.locator(f"#measure input[value={measure}]").check(force=True)
            drawn(page)
        assert page.locator("#stream i.b4").count() > 0
