"""The page's files as they are served, and rules that their sources keep. test_page_browser opens them."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serving.page import HEADERS, STATIC, TYPES, assets, router

OWN = sorted(path for path in STATIC.glob("*") if path.is_file())
SCRIPTS = [path for path in OWN if path.suffix == ".js"]
VENDORED = STATIC / "vendor"


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_root_is_the_page(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (STATIC / "index.html").read_bytes()


@pytest.mark.parametrize("path", [f"/static/{name}" for name in assets()])
def test_every_file_has_its_type_and_the_headers(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == TYPES[Path(path).suffix]
    assert {name: answer.headers[name] for name in HEADERS} == dict(HEADERS)


def test_policy_allows_nothing_from_elsewhere_and_nothing_inline() -> None:
    directives = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert directives["default-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_head_sends_the_headers_alone(client: TestClient) -> None:
    answer = client.head("/static/main.js")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(assets()["main.js"].body)
    assert not answer.content


def test_an_unchanged_file_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/static/main.js").headers["etag"]
    for held in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/static/main.js", headers={"If-None-Match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/static/main.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/static/page.css").headers["etag"] != tag


@pytest.mark.parametrize(
    "path", ["../page.py", "%2e%2e/page.py", "..%2fpage.py", "vendor", "", "main.js/", "/etc/hostname"]
)
def test_no_other_file_can_be_named(client: TestClient, path: str) -> None:
    answer = client.get(f"/static/{path}")
    assert answer.status_code == 404
    assert b"APIRouter" not in answer.content


def test_files_are_only_read(client: TestClient) -> None:
    assert client.post("/").status_code == 405
    assert client.put("/static/main.js").status_code == 405


def test_everything_named_is_there_and_everything_there_is_named() -> None:
    named = set(re.findall(r'(?:href|src)="static/([^"]+)"', (STATIC / "index.html").read_text()))
    for script in SCRIPTS:
        named |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
    served = {name for name in assets() if not name.endswith("LICENSE")} - {"index.html"}
    assert named == served


def test_what_is_vendored_has_its_licence() -> None:
    assert "MIT" in (VENDORED / "uplot" / "LICENSE").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_say_why_they_exist_and_make_no_markup(script: Path) -> None:
    text = script.read_text()
    lines = text.splitlines()
    assert lines[0].startswith("// ")
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 120
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser", text)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_names_another_host(path: Path) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", path.read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_the_markup_holds_no_script_or_style() -> None:
    text = (STATIC / "index.html").read_text()
    assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", text)


def test_controls_have_names() -> None:
    text = (STATIC / "index.html").read_text()
    for tag, attributes in re.findall(r"<(input|select|textarea)([^>]*)>", text):
        found = re.search(r'id="([^"]+)"', attributes)
        labelled = found is not None and f'for="{found[1]}"' in text
        inside = re.search(rf"<label[^>]*>[^<]*(<span>)?[^<]*<{tag}{re.escape(attributes)}", text)
        assert labelled or inside, f"<{tag}{attributes}>"
