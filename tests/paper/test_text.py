"""The text: built from the results, free of numbers typed by hand, whole where results are missing."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import jinja2
import pytest

from benchmarks.quality import records
from paper import build, document, numbers, tables
from tests.paper import fixture

NAMES = (
    "Mamba-2", "Mamba-3", "Mamba-1", "RWKV-7", "DeepSeek-V3", "Gated DeltaNet-2", "xLSTM-7B", "S3", "mqar-64",
    "mqar-128", "bfloat16",
)  # fmt: skip
"""Digits in the prose that are part of a name."""
SPELLED = r"(two|three|four|five|six|seven|eight|nine|ten|twenty|hundred|thousand)"


def prose(template: str) -> str:
    """The template without what is computed, formulas, code and addresses."""
    for pattern in (
        r"```.*?```",
        r"`[^`\n]*`",
        r"<!--.*?-->",
        r"\{\{.*?\}\}",
        r"\{%.*?%\}",
        r"\$\$.*?\$\$",
        r"\$[^$\n]+\$",
        r"\]\([^)]*\)",
    ):
        template = re.sub(pattern, " ", template, flags=re.DOTALL)
    for name in NAMES:
        template = template.replace(name, " ")
    return template


def typed(template: str) -> list[str]:
    """Numbers typed by hand: any digit, and multiples, shares and percentages in words."""
    words = (
        rf"\b{SPELLED}\s+(times|percent|per cent|fold|points)\b|\b(twice|thrice|half|a third|a quarter) (as|of|the)\b"
    )
    return [found.group() for found in re.finditer(rf"\S*\d\S*|%|{words}", prose(template), flags=re.IGNORECASE)]


def test_no_number_is_typed_by_hand() -> None:
    assert typed(document.TEMPLATE.read_text(encoding="utf-8")) == []


def test_numbers_typed_by_hand_are_seen() -> None:
    assert typed("It reaches 99.8 on $x_1 = 0.5$ and {{ 1.5 }}, `0.3`, Mamba-2.") == ["99.8"]
    assert typed("It is three times faster, by 12 %, and half the size.") == ["three times", "12", "%", "half the"]


def test_the_committed_text_is_what_the_results_say() -> None:
    rendered = document.render(numbers.gather(), tables.TABLES, build.drawn())
    assert build.TEXT.read_text(encoding="utf-8") == rendered, "run: make paper"


def test_the_committed_pdf_is_of_the_committed_text() -> None:
    text = build.TEXT.read_text(encoding="utf-8")
    assert build.fingerprint(text).encode() in build.PDF.read_bytes(), "run: make paper"


def test_headings_and_paragraphs_stand_apart() -> None:
    lines = build.TEXT.read_text(encoding="utf-8").splitlines()
    glued = [line for before, line in itertools.pairwise(lines) if before and re.match(r"#+ |\*\*[A-Z]", line)]
    assert not glued


def test_figures_in_the_text_are_there() -> None:
    for path in re.findall(r"\]\((figures/[^)]+)\)", build.TEXT.read_text(encoding="utf-8")):
        assert (build.HERE / path).is_file(), path


@pytest.mark.parametrize("results", ["all", "some", "none"])
def test_it_can_be_written_with_any_results(results: str, tmp_path: Path) -> None:
    records = {"all": fixture.everything(), "some": fixture.everything()[:20], "none": []}[results]
    found = fixture.numbers(tmp_path, records)
    text = document.render(found, tables.TABLES, set())
    assert text == document.render(found, tables.TABLES, set()), "two builds from the same results are the same"
    assert ("not run" in text) or results == "all"
    assert "None" not in text
    assert "Undefined" not in text


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    found = fixture.numbers(tmp_path, [])
    for template in ("{{ nothing }}", "{{ n.nothing }}", "{{ score('parity').nothing_there }}{{ n.nothing.at_all }}"):
        with pytest.raises((jinja2.UndefinedError, AttributeError)):
            document.render(found, tables.TABLES, set(), template=template)
    for template in (
        "{{ cite('nobody') }}",
        "{{ ref('nowhere') }}",
        "{{ score('partiy') }}",
        "{% call table('no') %}{% endcall %}",
    ):
        with pytest.raises(KeyError):
            document.render(found, tables.TABLES, set(), template=template)


def test_sections_tables_and_figures_are_numbered_in_order(tmp_path: Path) -> None:
    template = (
        "{{ ref('b') }} {{ ref('table:bars') }}\n## {{ sec('a') }} A\n## {{ sec('b') }} B\n### {{ subsec('c') }} C\n"
        "{% call table('bars') %}All\nbars.{% endcall %}\n{% call figure('x') %}X.{% endcall %}\n"
        "{{ ref('c') }}, {{ ref('figure:x') }}"
    )
    text = document.render(fixture.numbers(tmp_path, []), tables.TABLES, {"x"}, template=template)
    assert text.startswith("Section\u00a02 Table\u00a01\n## 1 A\n## 2 B\n### 2.1 C\n")
    assert "**Table 1.** All bars.\n\n| What |" in text
    assert "![**Figure 1.** X.](figures/x.png)" in text
    assert text.endswith("Section\u00a02.1, Figure\u00a01\n")


def test_every_reference_is_cited_and_well_formed() -> None:
    entries = json.loads(document.REFERENCES.read_text(encoding="utf-8"))
    template = document.TEMPLATE.read_text(encoding="utf-8")
    cited = {key for call in re.findall(r"citet?\(([^)]*)\)", template) for key in re.findall(r'"(\w+)"', call)}
    assert cited == set(entries)
    for key, entry in entries.items():
        assert entry["authors"], key
        assert re.fullmatch(r"\d{4}\.\d{5}", entry.get("arxiv", "0000.00000")), key
        assert entry.get("arxiv") or entry["where"], key


def test_how_numbers_are_printed() -> None:
    assert document.percent(0.9965) == "99.7"
    assert document.power(6.0156e-6) == "$6.0 \\times 10^{-6}$"
    assert document.whole(61440) == "61,440"
    assert document.plain(3e-3) == "0.003"
    assert document.fixed(None) == "not run"
    assert document.listing(["a"]) == "a"
    assert document.listing(["a", "b", "c"]) == "a, b and c"
    cell = records.best([fixture.record("s3", "synapse", seed, score) for seed, score in enumerate((0.5, 0.7, 0.6))])
    assert document.spread(cell) == "60.0 (50.0–70.0)"
    assert document.spread(records.best([fixture.record("bytes", "synapse", 0, 2.0)])) == "2.000\\*"
