"""Builds the paper from its results: python -m paper.build (make paper).

paper/results → numbers → paper/figures and paper/synapse.md → paper/synapse.pdf. Without results it builds too: what
was not run is said to be. Two builds from the same results give the same text and figures.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from paper import numbers as results
from paper.document import render
from paper.tables import TABLES

HERE = Path(__file__).resolve().parent
TEXT = HERE / "synapse.md"
PDF = HERE / "synapse.pdf"
STYLE = HERE / "style.typ"
FIGURES = HERE / "figures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds; 2 where a tool is missing."""
    parser = argparse.ArgumentParser(prog="python -m paper.build", description=__doc__)
    parser.add_argument("--no-pdf", action="store_true", help="text and figures only")
    parser.add_argument("--no-figures", action="store_true", help="keep the figures as they are")
    options = parser.parse_args(arguments)
    numbers = results.gather()
    if not options.no_figures:
        from paper.figures import draw

        draw(numbers, FIGURES)
    text = render(numbers, TABLES, drawn())
    TEXT.write_text(text, encoding="utf-8")
    if not options.no_pdf:
        PDF.write_bytes(typeset(text))
    left = len(numbers.bars_that_are(None))
    sys.stdout.write(f"{TEXT.name}: {len(text.split()):,} words; {left} of {len(numbers.bars)} goals not run\n")
    return 0


def drawn(folder: Path = FIGURES) -> set[str]:
    """Names of the figures that are there."""
    return {file.stem for file in folder.glob("*.png")}


def typeset(text: str, *, here: Path = HERE) -> bytes:
    """The PDF of a text whose figures lie in `here`."""
    import typst

    source = to_typst(text)
    with tempfile.TemporaryDirectory(dir=here, prefix=".build-") as folder:
        file = Path(folder) / "synapse.typ"
        file.write_text(source.replace('image("figures/', 'image("/figures/'), encoding="utf-8")
        return bytes(typst.compile(str(file), root=str(here)))


def to_typst(text: str) -> str:
    """The text in Typst's language, by pandoc with this paper's style around it."""
    import pypandoc  # type: ignore[import-untyped]

    title, abstract, body = split(text)
    header = "\n".join(["---", "abstract: |", *(f"  {line}" for line in abstract.splitlines()), "---", ""])
    body = re.sub(r"^(\*\*Table \d+\.\*\*.*\n\n\|)", r"Table: \1", body, flags=re.MULTILINE)
    extensions = "markdown-implicit_figures+implicit_figures+tex_math_dollars+pipe_tables+table_captions-citations"
    arguments = [
        f"--template={STYLE}", "--columns=10000", "--wrap=none", f"--metadata=title:{title}",
        f"--variable=fingerprint:{fingerprint(text)}", "--shift-heading-level-by=-1",
    ]  # fmt: skip
    source = str(pypandoc.convert_text(header + body, "typst", format=extensions, extra_args=arguments))
    source = re.sub(r"^(= References\n<.*>\n)(.*)$", r"\1#references[\n\2]\n", source, flags=re.MULTILINE | re.DOTALL)
    source = re.sub(r"\\\| ([^|$\n]+?) \\\|", r"abs(\1)", source)  # or bars stand apart from what they enclose
    source = source.replace("Transformer++", "#box[Transformer++]")
    return re.sub(r"^(=+ [\d.]+) ", r"\1#h(0.7em)", source, flags=re.MULTILINE)  # space behind a section's number


def split(text: str) -> tuple[str, str, str]:
    """The title, the abstract and the rest."""
    found = re.fullmatch(r"# (?P<title>[^\n]+)\n.*?## Abstract\n(?P<abstract>.*?)\n(?P<body>## .*)", text, re.DOTALL)
    if found is None:
        raise ValueError("the text: expected '# title', '## Abstract' and further sections")
    return found["title"].strip(), found["abstract"].strip(), found["body"]


def fingerprint(text: str) -> str:
    """Names a text; the PDF carries it as a keyword, so that a stale PDF can be told."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
