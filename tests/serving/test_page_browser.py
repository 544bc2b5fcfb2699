"""The page as a person meets it: in Chromium, against a real server with a small random model on loopback."""

from __future__ import annotations

import base64
import re
from typing import Any

import httpx
import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")

from playwright.sync_api import Browser, Page, Route, expect

from tests.serving.browsing import done, drawn, generate, heat, pixels, sliders, visit
from tests.serving.servers import listening, make_app

KEY = "correct-horse-battery"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def trace_of(site: str, trace: str) -> dict[str, Any]:
    """The first page of a trace, from the API."""
    return httpx.get(f"{site}/api/introspect/traces/{trace}").raise_for_status().json()


def close(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Equal but for rounding."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1


def test_the_text_is_the_prompt_and_what_the_model_wrote(page: Page, site: str) -> None:
    prompt = "naïve “text”\n\tof two lines"
    tokens = trace_of(site, generate(page, prompt, tokens=9))["tokens"]
    assert b"".join(base64.b64decode(token["bytes_b64"]) for token in tokens[:-9]).decode() == prompt
    assert page.locator("#stream i[data-src=gen]").count() == 9
    shown = page.locator("#stream i[data-src=prompt]").all_text_contents()
    assert len(shown) == len(tokens) - 9
    assert shown[0] == "⟨0⟩"  # the token that opens a document has no text
    assert "".join(shown[1:]).replace("↵", "").replace("·", "") == prompt
    assert shown.count("·") == len(prompt.encode()) - len(prompt)  # tokens that end inside a character


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_cell_has_the_colour_of_the_api_s_value(chromium: Browser, site: str, scheme: str) -> None:
    with visit(chromium, site, color_scheme=scheme) as page:
        trace = trace_of(site, generate(page, "a short prompt", tokens=10))
        n = len(trace["tokens"])
        routing = trace["layers"][1]["routing"]
        shown = pixels(page.locator("#routing [data-layer='1'] canvas"), n, 4)
        for t, (experts, weights) in enumerate(zip(routing["experts"], routing["weights"], strict=True)):
            chosen = dict(zip(experts, weights, strict=True))
            for expert in range(4):
                assert close(shown[t][expert], heat(chosen.get(expert, 0.0), scheme)), (t, expert)
        write = trace["layers"][0]["memory"]["write"]
        most = max(max(heads) for heads in write)
        shown = pixels(page.locator("#memory canvas").first, n, 2)
        assert all(
            close(shown[t][head], heat(value / most, scheme)) for t in range(n) for head, value in enumerate(write[t])
        )


def test_tokens_are_coloured_by_the_measure_chosen(page: Page, site: str) -> None:
    trace = trace_of(site, generate(page, "colours of the text", tokens=6))
    layer = trace["layers"][0]
    measures = {
        "entropy": [token["entropy"] for token in trace["tokens"]],
        "margin": layer["routing"]["margin"],
        "age": [sum(heads) / len(heads) for heads in layer["mlstm"]["age_tokens"]],
        "write": [sum(heads) / len(heads) for heads in layer["memory"]["write"]],
    }
    for measure, values in measures.items():
        page.locator(f"#measure input[value={measure}]").check(force=True)
        drawn(page)
        shown = page.locator("#stream i").evaluate_all("(tokens) => tokens.map((token) => token.className)")
        known = [value for value in values if value is not None]
        low, high = min(known), max(known)
        assert values in (known, [None, *known])
        for value, classes in zip(values, shown, strict=True):
            if value is None:  # nothing was predicted before the first token
                assert not re.search(r"\bb\d", classes)
                continue
            share = (high - value if measure == "margin" else value - low) / (high - low)
            assert set(classes.split()) & {f"b{min(4, int((share + slack) * 5))}" for slack in (-1e-9, 0, 1e-9)}


def test_markup_in_a_prompt_stays_text(page: Page, site: str) -> None:
    generate(page, EVIL, tokens=3)
    assert EVIL in (page.locator("#stream").text_content() or "")
    assert "<img" in (page.locator("#turns").text_content() or "")
    assert page.locator("img").count() == 1  # the mark in the header
    assert page.locator("script").count() == 1
    assert page.title() == "synapse_arch"
    for figure in ("routing", "gates", "memory"):
        page.locator(f"#{figure} details.as-table summary").click()
    assert page.locator("table img").count() == 0
    assert page.title() == "synapse_arch"


def test_one_cursor_for_all_views(page: Page) -> None:
    generate(page, "one cursor", tokens=5)
    assert sliders(page) == {"15"}
    page.locator("#stream i").nth(4).click()
    drawn(page)
    assert sliders(page) == {"4"}
    assert page.locator("#stream i.at").get_attribute("data-i") == "4"
    canvas = page.locator("#routing canvas").first
    canvas.focus()
    for key, place in (("ArrowRight", 5), ("ArrowLeft", 4), ("End", 15), ("Home", 0), ("PageDown", 15)):
        page.keyboard.press(key)
        drawn(page)
        assert sliders(page) == {str(place)}, key
        assert page.locator("#stream i.at").get_attribute("data-i") == str(place)
    page.locator("#gates [role=slider]").first.click(position={"x": 60, "y": 40})
    drawn(page)
    assert len(sliders(page)) == 1
    assert sliders(page) != {"15"}


def test_everything_by_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
    while page.evaluate("document.activeElement.id") != "prompt":
        page.keyboard.press("Tab")
    page.keyboard.type("typed")
    page.keyboard.press("Control+Enter")
    done(page)
    order = []
    while (found := page.evaluate("document.activeElement.closest('[id]').id")) not in order[:-1] or found == order[-1]:
        seen = page.evaluate(
            """() => {
                const at = document.activeElement;
                const marked = [at, at.nextElementSibling, at.parentElement].filter(Boolean);
                const wide = (style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
                return marked.some((one) => wide(getComputedStyle(one)));
            }"""
        )
        assert seen, f"focus cannot be seen on {found}"
        order.append(found)
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
    places = [
        order.index(name) for name in ("prompt", "session-list", "stream", "overview", "routing", "memory", "diff")
    ]
    assert places == sorted(places)
    page.locator("#stream").focus()
    page.keyboard.press("Home")
    page.keyboard.press("]")
    drawn(page)
    assert sliders(page) == {"0"}
    assert page.locator("#layers input[value='1']").is_checked()
    page.keyboard.press("-")
    page.keyboard.press("0")
    expect(page.locator("#spoken")).to_contain_text("token 0")


def test_every_chart_has_its_numbers_as_a_table(page: Page, site: str) -> None:
    trace = trace_of(site, generate(page, "tables too", tokens=6))
    for figure in ("stream ~", "routing", "gates", "memory", "pathways"):
        details = page.locator(f"#{figure} details.as-table")
        details.locator("summary").click()
        expect(details.locator("tbody tr").first).to_be_attached()
        expect(details.locator("caption")).not_to_be_empty()
    rows = page.locator("#routing details.as-table tbody tr")
    assert rows.count() == len(trace["tokens"])
    routing = trace["layers"][0]["routing"]
    for t in (0, 7):
        cells = rows.nth(t).locator("td").all_text_contents()
        numbers = [float(number) for number in re.findall(r"e\d+ ([\d.]+)", cells[0])]
        assert numbers == pytest.approx(routing["weights"][t], abs=5e-4)
        assert float(cells[1]) == pytest.approx(routing["entropy"][t], abs=5e-3)


def test_experts_are_shown_as_measured_and_never_named(page: Page, site: str) -> None:
    trace = trace_of(site, generate(page, "experts " * 6, tokens=4, level="full"))
    table = page.get_by_role("region", name="Experts", exact=True)
    rows = table.locator("tbody tr")
    stats = [expert for expert in trace["experts"] if expert["layer"] == 0]
    assert rows.count() == len(stats)
    for row, expert in zip(rows.all(), stats, strict=True):
        text = row.inner_text()
        assert text.startswith(f"e{expert['index']}")
        assert f"{100 * expert['load']:.1f}"[:3] in text
        for top in expert["top_tokens"]:
            assert f"(n {top['n']})" in text
    assert page.locator("#pathways svg line").count() == 2 * len(stats)  # the uniform load of each


def test_a_read_is_split_into_the_tokens_it_came_from(page: Page, site: str) -> None:
    generate(page, "sources of a read", tokens=6)
    page.locator("#stream").focus()
    with page.expect_response("**/attribution") as response:
        page.keyboard.press("a")
    answer = response.value.json()
    sources = [source for source in answer["sources"] if source["pos"] != answer["pos"]]
    expect(page.locator("#arcs path")).to_have_count(len(sources))
    expect(page.locator("#arcs p")).to_contain_text(f"Read of token {answer['pos']}, layer 0, head 0")
    marked = [int(str(found.get_attribute("data-i"))) for found in page.locator("#stream i.source").all()]
    assert sorted(marked) == sorted(source["pos"] for source in answer["sources"])


def test_an_intervention_is_compared_with_random_controls(page: Page) -> None:
    generate(page, "before and after", tokens=8)
    form = page.locator("#diff form")
    form.locator("[name=expert]").fill("1")
    form.get_by_role("button", name="Add").click()
    expect(page.locator("#diff .chips li")).to_have_count(1)
    with page.expect_response("**/diff") as response:
        page.get_by_role("button", name="Compare").click()
    answer = response.value.json()
    first, second = page.locator("#diff pre").all()
    assert (first.text_content(), second.text_content()) == (answer["a"]["text"], answer["b"]["text"])
    charts = page.locator("#diff svg")
    assert charts.count() == 1 + len(answer["controls"])
    assert len(answer["controls"]) >= 1
    assert charts.first.locator("rect").count() == len(answer["kl"])
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#diff .chips li")).to_have_count(0)
    assert page.get_by_role("button", name="Compare").is_disabled()


def test_a_session_goes_on_is_forked_and_forgotten(page: Page, site: str) -> None:
    page.click("#session-new")
    expect(page.locator("#session-line")).to_contain_text("after 0 tokens")
    size = page.locator("#state-card .big").text_content()
    generate(page, "first", tokens=4)
    expect(page.locator("#session-line")).to_contain_text("after 10 tokens")
    generate(page, "second", tokens=4)
    expect(page.locator("#session-line")).to_contain_text("after 20 tokens")
    assert page.locator("#stream i").count() == 10  # the trace of this turn, at positions 10 to 19
    expect(page.locator("#readout")).to_contain_text("19 / id")
    expect(page.locator("#state-card")).to_contain_text("Measured 2 times: the same each time.")
    assert page.locator("#state-card .big").text_content() == size
    first = page.locator("#session-list").input_value()
    page.click("#session-fork")
    expect(page.locator("#session-list")).not_to_have_value(first)
    expect(page.locator("#session-line")).to_contain_text("after 20 tokens")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("#session-forget")
    expect(page.locator("#session-list")).to_have_value("")
    known = [session["id"] for session in httpx.get(f"{site}/api/sessions").json()["data"]]
    assert first in known
    page.locator("#turns button").nth(1).click()
    expect(page.locator("#stream")).to_contain_text("⟨0⟩first")
    written = page.locator("#stream").text_content()
    page.reload()  # what the server still holds can be opened again
    page.locator("#turns button").nth(1).click()
    expect(page.locator("#stream")).to_have_text(written or "")


def test_no_prompt_is_sent_while_a_session_is_being_made(page: Page) -> None:
    held: list[Route] = []
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/v1/" in request.url else None)
    page.route(
        "**/api/sessions", lambda route: held.append(route) if route.request.method == "POST" else route.continue_()
    )
    page.fill("#prompt", "for the new one")
    page.click("#session-new")
    expect(page.locator("#generate")).to_be_disabled()
    page.locator("#prompt").press("Control+Enter")
    page.wait_for_timeout(200)
    assert sent == []
    held[0].continue_()
    expect(page.locator("#session-line")).to_contain_text("after 0 tokens")
    expect(page.locator("#generate")).to_be_enabled()
    page.locator("#prompt").press("Control+Enter")
    expect(page.locator("#session-line")).not_to_contain_text("after 0 tokens")
    done(page)
    assert len(sent) == 1


def test_chat_is_answered(page: Page) -> None:
    page.locator("#mode input[value=chat]").check(force=True)
    generate(page, "hello", tokens=5)
    assert page.locator("#stream i[data-src=gen]").count() == 5
    assert "hello" in (page.locator("#stream").text_content() or "")


def test_a_run_can_be_stopped(page: Page) -> None:
    page.fill("#prompt", "stop me")
    page.locator("#composer summary").click()
    page.fill("[name=max_tokens]", "400")
    page.click("#generate")
    page.wait_for_selector("#stream i[data-src=gen]")
    page.click("#stop")
    done(page)
    assert 0 < page.locator("#stream i[data-src=gen]").count() < 400
    assert page.locator("#problem").is_hidden()


def test_a_refusal_is_told_in_the_server_s_words(chromium: Browser, site: str) -> None:
    with visit(chromium, site, expected=("400 (Bad Request)",)) as page:
        page.fill("#prompt", "say nothing")
        page.check("[name=mode][value=chat]")
        page.locator("#composer summary").click()
        page.fill("[name=max_tokens]", "0")
        page.click("#generate")
        expect(page.locator("#problem")).to_contain_text(re.compile(r"^max_tokens: (?!max_tokens)"))
        assert page.locator("#generate").is_enabled()


def test_the_form_knows_the_server_s_limit(page: Page) -> None:
    expect(page.locator("[name=max_tokens]")).to_have_attribute("max", "400")


def test_an_empty_field_is_left_to_the_server(page: Page, site: str) -> None:
    page.fill("#prompt", "nothing said")
    page.locator("#composer summary").click()
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        page.fill(f"[name={name}]", "")
    with page.expect_request("**/events") as watched, page.expect_request("**/v1/completions") as sent:
        page.click("#generate")
    assert sent.value.post_data_json.keys() == {"prompt", "model", "trace", "stream", "stream_options"}
    done(page)
    request = trace_of(site, watched.value.url.split("/")[-2])["request"]
    assert request["output_tokens"] == 16 or request["finish"] == "stop"  # nobody chose the seed
    expect(page.locator("#stream i[data-src=gen]")).to_have_count(request["output_tokens"])


def test_removing_a_change_keeps_the_focus(page: Page) -> None:
    generate(page, "focus", tokens=2)
    for _ in range(2):
        page.locator("#diff form button").click()
    for left in (1, 0):
        page.locator("#diff .chips button").first.press("Enter")
        assert page.locator("#diff .chips button").count() == left
        assert page.evaluate("document.activeElement.closest('#diff') !== null")


def test_a_key_may_be_given_later(chromium: Browser) -> None:
    with listening(make_app(api_keys=(KEY,))) as site, visit(chromium, site, expected=("401",)) as page:
        page.get_by_role("button", name="Not now").click()
        expect(page.locator("#problem")).to_contain_text("API key")
        page.fill("#prompt", "now")
        page.click("#generate")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#stream i[data-src=gen]")
        done(page)
        page.wait_for_selector("#status[data-state=ready]")


def test_a_key_is_asked_for_once(chromium: Browser) -> None:
    with listening(make_app(api_keys=(KEY,))) as site, visit(chromium, site, expected=("401",)) as page:
        page.fill("#key", "a wrong key")
        page.get_by_role("button", name="Use it").click()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#status[data-state=ready]")
        generate(page, "with a key", tokens=2)
        assert page.locator("#stream i").count() == 13
        assert KEY not in page.content()
