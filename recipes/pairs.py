"""JSON lines of prompts with answers, as batches of tokens in which only the answers are to be learned.

    {"prompt": "2+2=", "completion": "4"}                    supervised
    {"prompt": "2+2=", "chosen": "4", "rejected": "5"}       preference

A sequence is `0 prompt answer 0`: opened and ended as the documents of the training text. B rows, T positions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recipes.preferences import IGNORED
from recipes.sources import SEPARATOR
from recipes.tokenizer import Tokenizer
from recipes.windows import mix
from synapse_arch.errors import DataError, explain

SUPERVISED = ("prompt", "completion")
PREFERENCE = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Sequences:
    """Rows of a batch, padded on the right.

    Attributes:
        ids: (B, T) int64.
        targets: (B, T) int64, the next tokens of the answers; -100 in prompts and padding.
        mask: (B, T) bool, False where a row is padded.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Sequences:
        """The same on `device`."""
        return Sequences(self.ids.to(device), self.targets.to(device), self.mask.to(device))


class Encoded(NamedTuple):
    """A prompt with its answers, as tokens."""

    prompt: list[int]
    """With the opening separator."""
    answers: tuple[list[int], ...]
    """With the closing one: the completion, or the chosen and the rejected answer."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A file of examples.

    Attributes:
        rows: the examples, in the file's order.
        fingerprint: sixteen hex digits that change with any byte of the file.
    """

    rows: tuple[Encoded, ...]
    fingerprint: str


def read_pairs(path: Path, fields: Sequence[str], tokenizer: Tokenizer, *, length: int) -> Pairs:
    """The examples of a JSON lines file; fields beside the named ones are left alone.

    Args:
        path: the file; blank lines are skipped.
        fields: what each line must hold, `SUPERVISED` or `PREFERENCE`.
        tokenizer: the model's.
        length: most tokens a sequence may have; nothing is cut off.

    Raises:
        DataError: missing, empty, no text, or a line, named by its number, that is no such object or too long.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(explain(str(path), "a file of JSON lines in UTF-8", error, "check the path")) from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_encode(f"{path}, line {number}", line, fields, tokenizer, length))
    if not rows:
        example = json.dumps(dict.fromkeys(fields, "…"), ensure_ascii=False)
        raise DataError(explain(str(path), f"lines such as {example}", "none", "give some examples"))
    return Pairs(rows=tuple(rows), fingerprint=hashlib.sha256(data).hexdigest()[:16])


def batch_rows(count: int, *, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples the batch of a step holds: every epoch all of them once, in an order of its own.

    The same for the same arguments, whatever ran before.

    >>> sorted(batch_rows(4, batch_size=4, seed=0, step=7))
    [0, 1, 2, 3]
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(count, seed, epoch) for epoch in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places]


def collate(rows: Sequence[Encoded]) -> Sequences:
    """Examples as one batch: the first answers of all, then, in the same order, the second ones where there are."""
    answers = [[row.answers[number] for row in rows] for number in range(len(rows[0].answers))]
    whole = [(row.prompt, answer) for side in answers for row, answer in zip(rows, side, strict=True)]
    longest = max(len(prompt) + len(answer) for prompt, answer in whole) - 1
    ids = torch.full((len(whole), longest), SEPARATOR)
    targets = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(whole):
        tokens = torch.tensor(prompt + answer)
        end = len(tokens) - 1
        ids[row, :end], mask[row, :end] = tokens[:-1], True
        targets[row, len(prompt) - 1 : end] = tokens[len(prompt) :]
    return Sequences(ids, targets, mask)


def _order(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch, count))).tolist()
    return order


def _encode(place: str, line: str, fields: Sequence[str], tokenizer: Tokenizer, length: int) -> Encoded:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(explain(place, "a JSON object", error, "correct the line or take it out")) from error
    if not isinstance(record, dict):
        raise DataError(explain(place, "a JSON object", type(record).__name__, "correct the line or take it out"))
    for field in fields:
        if field not in record:
            near = difflib.get_close_matches(field, [key for key in record if key not in fields], n=1)
            remedy = f"is {near[0]!r} meant for {field!r}?" if near else f"add {field!r}"
            raise DataError(explain(place, f"the fields {', '.join(fields)}", ", ".join(record) or "none", remedy))
        if not isinstance(record[field], str):
            raise DataError(explain(f"{place}: {field}", "a text", type(record[field]).__name__))
    try:
        prompt, *answers = (tokenizer.encode(record[field]) for field in fields)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if SEPARATOR in prompt or any(SEPARATOR in answer for answer in answers):
        raise DataError(explain(place, "text", "the character 0, which ends a document", "take it out"))
    longest = 2 + len(prompt) + max(map(len, answers))
    if longest > length:
        raise DataError(explain(place, f"at most {length} tokens", longest, "raise --length or take the line out"))
    return Encoded([SEPARATOR, *prompt], tuple([*answer, SEPARATOR] for answer in answers))
