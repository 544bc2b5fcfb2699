"""Examples from JSON lines: what is learned, what is padded, what is refused and where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.pairs import PREFERENCE, SUPERVISED, batch_rows, collate, read_pairs
from recipes.preferences import IGNORED
from recipes.tokenizer import ByteTokenizer
from synapse_arch.errors import DataError


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_only_the_answer_is_learned(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd", "id": 7}, "", {"prompt": "", "completion": "é"}
    )
    batch = collate(read_pairs(file, SUPERVISED, ByteTokenizer(), length=9).rows)
    assert batch.ids.tolist() == [[0, 97, 98, 99, 100], [0, 0xC3, 0xA9, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 99, 100, 0], [0xC3, 0xA9, 0, IGNORED, IGNORED]]
    assert batch.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_the_better_answers_come_first(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "chosen": "x" * (n + 1), "rejected": "y"} for n in range(2)]
    batch = collate(read_pairs(write(tmp_path / "a.jsonl", *lines), PREFERENCE, ByteTokenizer(), length=9).rows)
    answers = [bytes(row[(row != IGNORED) & (row != 0)].tolist()).decode() for row in batch.targets]
    assert answers == ["x", "xx", "y", "y"]
    assert (batch.ids[:, :2] == torch.tensor([0, ord("p")])).all()


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "completion": ', r"a\.jsonl, line 2: expected a JSON object"),
        ([1], r"line 2: expected a JSON object, got list"),
        ({"promt": "p", "completion": "c"}, r"line 2: .*got promt, completion; is 'promt' meant for 'prompt'\?"),
        ({"prompt": "p"}, r"line 2: expected the fields prompt, completion, got prompt; add 'completion'"),
        ({"prompt": 3, "completion": "c"}, r"line 2: prompt: expected a text, got int"),
        ({"prompt": "p\0", "completion": "c"}, r"line 2: .*character 0"),
        ({"prompt": "\ud800", "completion": "c"}, r"line 2: .*surrogate"),
        ({"prompt": "p" * 9, "completion": "c"}, r"line 2: expected at most 9 tokens, got 12"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(write(tmp_path / "a.jsonl", GOOD, line), SUPERVISED, ByteTokenizer(), length=9)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    write(tmp_path / "empty.jsonl", "", " ")
    for name in ("missing", "binary", "empty"):
        with pytest.raises(DataError, match=rf"{name}\.jsonl"):
            read_pairs(tmp_path / f"{name}.jsonl", SUPERVISED, ByteTokenizer(), length=9)


def test_every_epoch_reads_every_example_once_in_its_own_order() -> None:
    read = [row for step in range(7) for row in batch_rows(7, batch_size=3, seed=1, step=step)]
    epochs = [read[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_rows(7, batch_size=3, seed=1, step=5) == read[15:18]
