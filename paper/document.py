"""The template into Markdown: numbered sections, tables and figures, references to them, citations.

In the template (Jinja2; an unknown name is an error):

    ## {{ sec("method") }} Method          a section's number; subsec inside a section
    {{ ref("method") }}                    Section 3; for tables and figures likewise, before or after them
    {% call table("mad") %}…{% endcall %}  the table of that name with a numbered caption; figure alike
    {{ cite("mamba", "xlstm") }}           (Gu and Dao, 2023; Beck et al., 2024); citet for Gu and Dao (2023)
    {{ references() }}                     what was cited
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from benchmarks.quality.records import Cell
from paper.numbers import OURS, Numbers

MODEL_NAMES = {
    OURS: "Synapse",
    "transformer": "Transformer++",
    "transformer-conv": "Transformer++, conv",
    "mamba2": "Mamba-2",
    "mlstm": "mLSTM",
    "gated-deltanet": "Gated DeltaNet",
    "deltanet-negative": "Gated DeltaNet, β < 2",
    "hebbian": "Hebbian",
}
HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "template.md"
REFERENCES = HERE / "references.json"
NOT_RUN = "not run"
NBSP = "\u00a0"
"""A space where no line breaks."""


class Labels:
    """Numbers of sections, tables and figures, in the order of the text.

    Args:
        known: what an earlier pass over the text found; None in the first, when every reference is a blank.
    """

    def __init__(self, known: Mapping[str, str] | None) -> None:
        self._known = known
        self.given: dict[str, str] = {}
        self._section = self._subsection = 0
        self._counts = {"Table": 0, "Figure": 0}

    def section(self, label: str) -> str:
        """The next section's number."""
        self._section, self._subsection = self._section + 1, 0
        return self._give(label, "Section", str(self._section))

    def subsection(self, label: str) -> str:
        """The next subsection's number."""
        self._subsection += 1
        return self._give(label, "Section", f"{self._section}.{self._subsection}")

    def float(self, kind: str, label: str) -> str:
        """The next "Table" or "Figure", with its number."""
        self._counts[kind] += 1
        self._give(f"{kind.lower()}:{label}", kind, str(self._counts[kind]))
        return f"{kind} {self._counts[kind]}"

    def ref(self, label: str) -> str:
        """Where it is: "Section 3", or of "table:mad" "Table 1"."""
        return "" if self._known is None else self._known[label]

    def _give(self, label: str, kind: str, number: str) -> str:
        if label in self.given:
            raise KeyError(f"the label {label!r} is given twice")
        self.given[label] = f"{kind}{NBSP}{number}"
        return number


class Citations:
    """Citations in the text and the list of what was cited.

    Args:
        entries: by key: authors (family names with initials), year, title, where; arxiv where there is one.
    """

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self.entries = entries
        self.cited: set[str] = set()

    def cite(self, *keys: str) -> str:
        """All in one pair of parentheses."""
        return "(" + "; ".join(f"{self._authors(key)}, {self.entries[key]['year']}" for key in keys) + ")"

    def citet(self, key: str) -> str:
        """As part of the sentence."""
        return f"{self._authors(key)} ({self.entries[key]['year']})"

    def references(self) -> str:
        """The list, by authors and year."""
        lines = []
        for entry in sorted((self.entries[key] for key in self.cited), key=lambda e: (e["authors"], e["year"])):
            arxiv = f" [arXiv:{entry['arxiv']}](https://arxiv.org/abs/{entry['arxiv']})." if "arxiv" in entry else ""
            where = f" {entry['where']}." if entry.get("where") else ""
            lines.append(f"- {'; '.join(entry['authors'])} ({entry['year']}). *{entry['title']}*.{where}{arxiv}")
        return "\n".join(lines)

    def _authors(self, key: str) -> str:
        self.cited.add(key)
        family = [author.split(",")[0] for author in self.entries[key]["authors"]]
        if len(family) == 2:
            return " and ".join(family)
        return family[0] if len(family) == 1 else f"{family[0]} et al."


def render(
    numbers: Numbers,
    tables: Mapping[str, Callable[[Numbers], str]],
    figures: Collection[str],
    *,
    template: str | None = None,
) -> str:
    """The paper as Markdown.

    Args:
        numbers: what may be said.
        tables: by name.
        figures: names of those that could be drawn.
        template: Jinja2 text; None for the paper's.

    Raises:
        jinja2.UndefinedError, KeyError: the template asks for something that nothing defines.
    """
    source = TEMPLATE.read_text(encoding="utf-8") if template is None else template
    environment = Environment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        comment_start_string="<!--", comment_end_string="-->",
    )  # fmt: skip
    environment.filters.update(FORMATS)
    compiled = environment.from_string(source)
    entries = json.loads(REFERENCES.read_text(encoding="utf-8"))

    def run(known: Mapping[str, str] | None) -> tuple[str, Labels]:
        labels, citations = Labels(known), Citations(entries)

        def table(name: str, caller: Callable[[], str]) -> str:
            content = tables[name](numbers)
            caption = f"**{labels.float('Table', name)}.** {_line(caller())}"
            return f"{caption}\n\n{content}\n" if content else f"{caption} *({NOT_RUN.capitalize()}.)*\n"

        def figure(name: str, caller: Callable[[], str]) -> str:
            caption = f"**{labels.float('Figure', name)}.** {_line(caller())}"
            missing = f"{caption} *({NOT_RUN.capitalize()}.)*\n"
            return f"![{caption}](figures/{name}.png)\n" if name in figures else missing

        text = compiled.render(
            n=numbers, score=numbers.cell, core=numbers.core, table=table, figure=figure, sec=labels.section,
            subsec=labels.subsection, ref=labels.ref, cite=citations.cite, citet=citations.citet,
            references=citations.references,
        )  # fmt: skip
        return text, labels

    _, labels = run(None)
    text, _ = run(labels.given)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, without the sign."""
    return NOT_RUN if value is None else f"{100 * value:.{digits}f}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals."""
    return NOT_RUN if value is None else f"{value:.{digits}f}"


def whole(value: float | None) -> str:
    """A whole number, thousands apart."""
    return NOT_RUN if value is None else f"{value:,.0f}"


def power(value: float | None) -> str:
    """A small number as a mantissa and a power of ten."""
    if value is None:
        return NOT_RUN
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"${mantissa} \\times 10^{{{int(exponent)}}}$"


def plain(value: float | None) -> str:
    """As short as it is exact: 0.003, 300, 1e-06."""
    return NOT_RUN if value is None else f"{value:g}"


def each(values: Sequence[float], digits: int = 2) -> str:
    """One number a layer."""
    return " / ".join(fixed(value, digits) for value in values)


def shares(values: Sequence[float], digits: int = 0) -> str:
    """One percentage a layer, without the sign."""
    return " / ".join(percent(value, digits) for value in values)


def result(cell: Cell) -> str:
    """The median in the unit of its task: percent or bits per byte."""
    return fixed(cell.median, 3) if cell.bits else percent(cell.median)


def spread(cell: Cell) -> str:
    """The median, and in parentheses the least and the largest; a star where there is one seed only."""
    if not cell.found:
        return NOT_RUN
    if len(cell.scores) == 1:
        return f"{result(cell)}\\*"
    ends = [fixed(end, 3) if cell.bits else percent(end) for end in (cell.low, cell.high)]
    return f"{result(cell)} ({ends[0]}–{ends[1]})"


def model_name(model: str) -> str:
    """As the paper calls it."""
    return MODEL_NAMES.get(model, model.removeprefix(f"{OURS}:").replace("-", " "))


def code(text: str) -> str:
    """As a command is set."""
    return f"`{text}`"


def listing(items: Collection[Any]) -> str:
    """A, B and C."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


FORMATS: dict[str, Callable[..., str]] = {
    "percent": percent, "fixed": fixed, "whole": whole, "power": power, "plain": plain, "each": each, "result": result,
    "spread": spread, "listing": listing, "name": model_name, "code": code, "shares": shares,
}  # fmt: skip
