"""Judging a model: the figures against the same computed another way, and the files that are written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.evaluate import main
from recipes.harness import run_tasks
from recipes.measures import loss_by_position, throughput
from recipes.tokenizer import ByteTokenizer, train_bpe
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.errors import ConfigError, DataError
from tests.model.small import small_config


def bytes_model() -> SynapseModel:
    model = SynapseModel(SynapseConfig.from_dict({**small_config().to_dict(), "vocab_size": 256})).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


@torch.no_grad()
def bits(model: SynapseModel, ids: Tensor, targets: Tensor) -> Tensor:
    """(T,) bits of each target, one token at a time."""
    state, found = None, []
    for token, target in zip(ids, targets, strict=True):
        out = model(token.view(1, 1), state)
        state = out.state
        found.append(-out.logits[0, 0].double().log_softmax(-1)[target] / math.log(2))
    return torch.stack(found)


def test_the_curve_is_the_loss_of_each_position_with_all_before_it() -> None:
    model, stream = bytes_model(), torch.randint(0, 256, (2 * 11 + 3,))
    found = loss_by_position(model, stream, length=11, rows=9, sizes=ByteTokenizer().sizes)
    assert [(part.first, part.last) for part in found] == [(1, 2), (2, 4), (4, 8), (8, 12)]
    rows = [bits(model, stream[start : start + 11], stream[start + 1 : start + 12]) for start in (0, 11)]
    for part in found:
        expected = sum(float(row[part.first - 1 : part.last - 1].sum()) for row in rows)
        assert part.bits == pytest.approx(expected, rel=1e-5)
        assert part.bytes == sum(int((stream[s + part.first : s + part.last] != 0).sum()) for s in (0, 11))


def test_a_curve_longer_than_the_text_is_refused() -> None:
    with pytest.raises(DataError, match="--context"):
        loss_by_position(bytes_model(), torch.ones(8), length=8, rows=1, sizes=ByteTokenizer().sizes)


def test_speed_is_measured() -> None:
    speed = throughput(bytes_model(), batch_size=2, length=16, tokens=2, repeats=1)
    assert speed.reading > speed.writing > 0


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = bytes_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a short text, " * 40, encoding="utf-8")
    text = ["--data", str(tmp_path / "text.txt"), "--all", "--context", "64", "--rows", "2"]
    assert main(["--model", str(tmp_path / "model"), *text, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    data = b"\0" + (tmp_path / "text.txt").read_bytes()
    assert result["text"]["bytes"] == len(data) - 1
    expected = result["bits_per_byte"]["model"] * (len(data) - 1)
    assert result["perplexity"] == pytest.approx(2 ** (expected / (len(data) - 1)), rel=1e-9)
    assert [part["first"] for part in result["context"]] == [1, 2, 4, 8, 16, 32]
    assert result["context"][-1]["last"] == 65
    assert (tmp_path / "out" / "context.png").read_bytes()[:4] == b"\x89PNG"
    table = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    assert f"| bits per byte, model | {result['bits_per_byte']['model']:.4f} |" in table
    assert "| 32 to 64 |" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--context", "4096"], "--context"),
        (["--adapter", "nowhere"], "an adapter in peft's format"),
    ],
)
def test_what_cannot_work_is_said(
    tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a short text, " * 40, encoding="utf-8")
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--all"]
    assert main([*given, "--out", str(tmp_path / "out"), *change]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("error: ")
    assert message in shown


def test_a_text_of_one_byte_has_one_prediction(tmp_path: Path) -> None:
    bytes_model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(b"a")
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--all"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["text"]["bytes"] == 1


TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # not ours
def test_tasks_of_the_harness_run_from_local_files(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = bytes_model()
    questions = [
        {"question": f"sky {n}", "choices": ["blue", "green"] if n % 3 else ["a", "bcd"], "answer": n % 2}
        for n in range(8)
    ]
    data = tmp_path / "colours.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    (tmp_path / "colours.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"), encoding="utf-8")
    found = run_tasks(model, ByteTokenizer(), ["colours"], tmp_path)
    right = 0
    for question in questions:
        scores = []
        for choice in question["choices"]:
            ids = torch.tensor([0, *f"{question['question']}{choice}".encode()])
            scores.append(-float(bits(model, ids[:-1], ids[1:])[-len(choice) :].sum()))
        right += max(range(2), key=scores.__getitem__) == question["answer"]
    assert found["colours"]["acc"] == right / 8
    bpe = train_bpe(["sky blue green sky blue"], 260)
    other = SynapseModel(SynapseConfig.from_dict({**small_config().to_dict(), "vocab_size": bpe.vocab_size})).eval()
    assert 0 <= run_tasks(other, bpe, ["colours"], tmp_path, limit=2)["colours"]["acc"] <= 1
    with pytest.raises(ConfigError, match="smells"):
        run_tasks(model, ByteTokenizer(), ["smells"], tmp_path)
