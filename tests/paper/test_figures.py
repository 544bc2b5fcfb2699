"""Figures and the PDF, from made-up results; skipped without the packages of the extra "paper"."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paper import build, document, tables
from tests.paper import fixture

PARTS = {"memory": fixture.memory, "routing": fixture.routing, "consolidation": fixture.consolidation}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> fixture.Numbers:
    folder = tmp_path_factory.mktemp("results")
    for name, make in PARTS.items():
        (folder / f"{name}.json").write_text(json.dumps(make()))
    return fixture.numbers(folder, fixture.everything())


def test_every_figure_is_drawn_and_twice_the_same(found: fixture.Numbers, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from paper import figures

    assert figures.draw(found, tmp_path / "a", dpi=40) == list(figures.FIGURES)
    figures.draw(found, tmp_path / "b", dpi=40)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_figure_without_results_is_taken_away(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from paper import figures

    (tmp_path / "curves.png").touch()
    assert figures.draw(fixture.numbers(tmp_path / "results", []), tmp_path, dpi=40) == ["layer"]
    assert build.drawn(tmp_path) == {"layer"}


def test_every_table_has_one_width(found: fixture.Numbers) -> None:
    for name, make in tables.TABLES.items():
        widths = {line.count("|") for line in make(found).splitlines()}
        assert len(widths) == 1, name


def test_the_best_of_a_column_is_bold_and_changes_have_signs(found: fixture.Numbers) -> None:
    first, second = tables.scores(found, ["parity"]).splitlines()[2:4]
    assert "**" in first
    assert "**" not in second
    (line,) = [line for line in tables.ablations(found).splitlines() if line.startswith("| no\u00a0memory")]
    assert "**−" in line
    assert "**+" in line, "bits per byte rose"


def test_the_pdf(found: fixture.Numbers, tmp_path: Path) -> None:
    pytest.importorskip("typst")
    pytest.importorskip("pypandoc")
    text = document.render(found, tables.TABLES, set())
    pdf = build.typeset(text, here=tmp_path)
    assert pdf.startswith(b"%PDF")
    assert build.fingerprint(text).encode() in pdf


def test_the_text_is_cut_into_title_abstract_and_body() -> None:
    title, abstract, body = build.split("# T\n\nby\n\n## Abstract\n\nShort.\n\n## 1 Intro\n\nLong.\n")
    assert (title, abstract) == ("T", "Short.")
    assert body.startswith("## 1 Intro")
    with pytest.raises(ValueError, match="Abstract"):
        build.split("no title")
