"""What is refused: a clear line, the inputs as they were, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from merge import run, writer
from merge.cli import main
from merge.io import Checkpoint
from synapse_arch import SynapseModel
from synapse_arch.errors import CheckpointError
from tests.merge.folders import assert_same_tensors, left_over, merging, weights
from tests.model.small import small_model

pytestmark = pytest.mark.usefixtures("inside")
ROOT = Path(__file__).resolve().parents[2]


def broken(name: str, change: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = weights("b")
    change(tensors)
    Path(name).mkdir()
    save_file(tensors, f"{name}/model.safetensors", metadata=Checkpoint("b").metadata)
    return name


def pickled() -> str:
    Path("pickle").mkdir()
    torch.save({}, "pickle/pytorch_model.bin")
    return "pickle"


def truncated() -> str:
    Path("short").mkdir()
    content = Path("b/model.safetensors").read_bytes()
    Path("short/model.safetensors").write_bytes(content[:-100])
    return "short"


def renamed(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors)[:12]:
        tensors[f"other.{name}"] = tensors.pop(name)


W_IN = "layers.1.experts.w_in"
BAD: dict[str, tuple[Callable[[], str], str]] = {
    "other names": (lambda: broken("x", renamed), "12 missing ['"),
    "other shapes": (lambda: broken("x", lambda t: t.update({W_IN: t[W_IN][:2]})), f"1 others ['{W_IN} ("),
    "integers for floats": (
        lambda: broken("x", lambda t: t.update({W_IN: t[W_IN].int()})),
        "floats where the base has",
    ),
    "other integers": (
        lambda: broken("x", lambda t: t.update({"layers.0.experts.expert_ids": t["layers.0.experts.expert_ids"] + 1})),
        "x: layers.0.experts.expert_ids: expected the torch.int64 values of the base",
    ),
    "NaN": (
        lambda: broken("x", lambda t: t[W_IN].view(-1)[3:5].fill_(float("nan"))),
        f"x: {W_IN}: expected finite numbers, got 2 of",
    ),
    "infinite": (
        lambda: broken("x", lambda t: t["norm.weight"].view(-1)[0].fill_(-float("inf"))),
        "x: norm.weight: expected finite",
    ),
    "pickle": (pickled, "never loaded"),
    "truncated": (truncated, "the file is truncated"),
    "nothing there": (lambda: "nowhere", "nowhere: expected a checkpoint folder, got nothing there"),
}


def fails(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, one line that says it, nothing written, nothing changed."""
    before = {path: path.read_bytes() for name in ("base", "a", "b", "c") for path in Path(name).iterdir()}
    capsys.readouterr()
    assert main([*words, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert left_over() == []
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize("case", BAD)
def test_bad_models(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = BAD[case]
    fails(["--base", "base", "--models", "a", make(), "--out", "out"], message, capsys)


def test_models_of_another_base(capsys: pytest.CaptureFixture[str]) -> None:
    """Two models share an embedding that this base has otherwise: neither was trained from it."""
    torch.manual_seed(9)
    small_model().save_pretrained("stranger")
    message = "a and b agree bit by bit in 1 tensors that it has otherwise: ['embedding.weight']"
    fails(["--base", "stranger", "--models", "a", "b", "--out", "out"], message, capsys)
    assert merging("--trust-base", base="stranger", models="ab") == 0
    notes = capsys.readouterr().err
    assert notes.count("times the base's norm away from the base") == 2
    assert "times the base's norm" in Path("out/README.md").read_text()


def test_narrow_copies_of_the_base_s_tensors_are_the_base_s() -> None:
    """What training left alone differs from a float32 base by rounding, and in both models alike."""
    for name in "ab":
        SynapseModel.from_pretrained(name).to(torch.bfloat16).save_pretrained(f"narrow-{name}")
    assert main(["--base", "base", "--models", "narrow-a", "narrow-b", "--out", "out", "--quiet"]) == 0


def test_models_whose_configuration_differs_are_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("a", "odd")
    config = json.loads(Path("odd/config.json").read_text())
    Path("odd/config.json").write_text(json.dumps(config | {"norm_eps": 0.5}))
    assert main(["--base", "base", "--models", "odd", "b", "--out", "out", "--quiet"]) == 0
    assert "note: the configuration of odd differs from the base's in norm_eps" in capsys.readouterr().err


def with_tokens(name: str, model: str, content: dict[str, Any]) -> str:
    """A copy of a model that has a tokenizer.json."""
    shutil.copytree(model, name)
    Path(name, "tokenizer.json").write_text(json.dumps(content))
    return name


ADDED = [{"id": 2, "content": "<end>"}]
TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "bpe": ({"model": {"vocab": {"one": 1, "two": 0}}}, "2 others [\"0 'one' and 'two'\", \"1 'two' and 'one'\"]"),
    "unigram": ({"model": {"vocab": [["one", -1.5], ["three", -2.0]]}}, "1 others [\"1 'two' and 'three'\"]"),
    "added": ({"model": {"vocab": {"one": 0}}, "added_tokens": ADDED}, "1 others [\"2 '<start>' and '<end>'\"]"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("base", ["with a base", "without"])
def test_models_whose_ids_stand_for_another_text_are_refused(
    case: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = TOKENIZERS[case]
    ours = {"model": {"vocab": {"one": 0, "two": 1}}, "added_tokens": [{"id": 2, "content": "<start>"}]}
    names = [with_tokens("own", "base", ours), with_tokens("other", "a", content)]
    words = ["--base", "own", "--models", "other", "b"] if base == "with a base" else ["--method", "linear", "--models"]
    words += [] if base == "with a base" else names
    fails(
        [*words, "--out", "out"],
        f"tokenizer of other against own: expected the same token for each id, got {message}",
        capsys,
    )


def test_tokens_that_one_tokenizer_has_more_are_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    with_tokens("own", "base", {"model": {"vocab": {"one": 0, "two": 1}}})
    with_tokens("more", "a", {"model": {"vocab": {"one": 0, "two": 1}}, "added_tokens": ADDED})
    with_tokens("broken", "b", {"model": None})  # of another form: it says nothing
    assert main(["--base", "own", "--models", "more", "broken", "--out", "out", "--quiet"]) == 0
    assert "note: the tokenizer of more has 3 tokens and the base's 2; the base's is kept" in capsys.readouterr().err


OPTIONS: dict[str, tuple[list[str], str]] = {
    "no models": (["--base", "base"], "--models: expected one or more paths"),
    "no base": (["--models", "a", "b"], "base: expected a checkpoint"),
    "no out": (["--base", "base", "--models", "a", "b"], "--out: expected a folder"),
    "method": (["--base", "base", "--models", "a", "--method", "tise"], "did you mean ties?"),
    "ignored": (
        ["--base", "base", "--models", "a", "--method", "linear", "--density", "0.5"],
        "density with method linear",
    ),
    "density": (["--base", "base", "--models", "a", "--density", "0"], "density: expected above 0, up to 1, got 0.0"),
    "count": (["--base", "base", "--models", "a", "b", "--weights", "1", "2", "3"], "weights: expected 1 value or 2"),
    "pattern": (["--base", "base", "--models", "a", "b", "--override", "hed.*", "skip"], "got ['hed.*']"),
    "override": (["--base", "base", "--models", "a", "--override", "head.*", "drop"], "expected skip, copy=MODEL"),
    "copy": (["--base", "base", "--models", "a", "--override", "head.*", "copy=1"], "a model's place, 0 to 0"),
    "recipe": (["--recipe", "r.json"], "r.json: expected a readable recipe"),
    "calibration": (
        ["--base", "base", "--models", "a", "--align-experts", "activations"],
        "calibration: expected a text",
    ),
    "mergekit": (["--base", "base", "--models", "a", "--method", "mergekit:tise"], "mergekit:NAME with one of"),
    "shard": (
        ["--base", "base", "--models", "a", "--max-shard", "1e300"],
        "--max-shard: expected a size above 0 in GiB",
    ),
    "input": (["--base", "base", "--models", "a", "--overwrite", "--out", "a"], "apart from the inputs"),
    "inside": (["--base", "base", "--models", "a", "--out", "a/merged"], "apart from the inputs"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = OPTIONS[case]
    if case == "mergekit":
        pytest.importorskip("mergekit", reason="mergekit is not installed")
    out = [] if case in ("no out", "input", "inside") else ["--out", "out"]
    fails([*words, *out], message, capsys)


def test_an_output_that_is_there_is_kept_or_replaced_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert merging("--density", "1") == 0
    first = weights("out")
    assert merging() == 2
    assert "name another, or --overwrite" in capsys.readouterr().err
    assert_same_tensors(weights("out"), first)
    assert merging("--overwrite") == 0
    assert not torch.equal(weights("out")["head.weight"], first["head.weight"])
    assert left_over() == ["out"]
    Path("notes").mkdir()
    Path("notes/diary.txt").write_text("mine")
    assert merging("--overwrite", out="notes") == 2
    assert Path("notes/diary.txt").read_text() == "mine"


def linked(folder: str, real: str) -> str:
    """A folder whose files are links to those of another."""
    Path(folder).mkdir()
    for path in Path(real).iterdir():
        Path(folder, path.name).symlink_to(path.resolve())
    return folder


def test_an_output_that_holds_what_an_input_links_to_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("a", "real")
    before = weights("real")
    for words in (["--models", linked("links", "real"), "b", "--base", "base"], ["--models", "b", "--base", "links"]):
        assert main([*words, "--out", "real", "--overwrite", "--quiet"]) == 2
        assert "apart from the inputs, got real, and links/" in capsys.readouterr().err
        assert_same_tensors(weights("real"), before)


def test_where_a_folder_cannot_be_renamed_nothing_is_merged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merging(out="above") == 0
    Path("above/below").mkdir()
    words = ["--base", "../../base", "--models", "../../a", "../../b", "--overwrite", "--quiet", "--out"]
    with monkeypatch.context() as patch:
        patch.chdir("above/below")
        assert main([*words, ".."]) == 2
        assert "out: expected a folder that can be renamed, got .., the current one" in capsys.readouterr().err
        assert main([*words, "new/.."]) == 2
        assert main([*words, "../below/new/../merged", "--report"]) == 0
        assert [path.name for path in Path().iterdir()] == ["merged"]
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "above")
    monkeypatch.setattr(run, "stream", None)
    assert merging("--overwrite", out="above") == 2
    assert "the root of a disk; name one below it" in capsys.readouterr().err


def test_no_room_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    size = sum(tensor.nbytes for tensor in weights("a").values()) + (1 << 20)
    message = f"expected {size / 1e6:.2f} MB free, got 1.00 kB; make room"
    fails(["--base", "base", "--models", "a", "--out", "out"], message, capsys)
    assert [writer._readable(size) for size in (999, 10**6, 3 * 10**9)] == ["999 bytes", "1.00 MB", "3.00 GB"]


def test_a_disk_that_fills_up_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = []

    def full(file: Any, tensor: Tensor) -> None:
        written.append(1)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        file.write(bytes(8))

    monkeypatch.setattr(writer, "_write", full)
    fails(["--base", "base", "--models", "a", "--out", "out"], "No space left on device", capsys)


def test_ctrl_c_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert merging("--density", "1") == 0
    first = weights("out")
    monkeypatch.setattr(run, "check_finite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert merging("--overwrite") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert_same_tensors(weights("out"), first)
    assert left_over() == ["out"]


SLOW = """
import sys, time
from merge import run
from merge.cli import main
whole = run.check_finite
def slowly(*arguments):
    time.sleep(0.2)
    whole(*arguments)
run.check_finite = slowly
sys.exit(main(["--base", "base", "--models", "a", "b", "--out", "out", "--quiet"]))
"""


def test_killed_in_the_middle() -> None:
    """SIGTERM leaves nothing; SIGKILL leaves no output, and what lies beside it is gone with the next merge."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SLOW], env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in "12"
    ]
    deadline = time.monotonic() + 300
    while len(list(Path().glob(".synapse-merge-out-*/model.safetensors"))) < 2:
        assert time.monotonic() < deadline, "neither began to write"
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)
    assert processes[0].wait(60) == 128 + signal.SIGTERM
    assert len(left_over()) == 1
    processes[1].kill()
    processes[1].wait(60)
    assert [name.startswith(".synapse-merge-out-") for name in left_over()] == [True]
    assert merging() == 0
    assert left_over() == ["out"]


BETWEEN = """
import os, signal, sys
from merge.cli import main
rename = os.rename
def killed(*names):
    rename(*names)
    os.kill(os.getpid(), signal.SIGKILL)
os.rename = killed
main(["--base", "base", "--models", "a", "b", "--out", "out", "--quiet", "--overwrite"])
"""


def test_killed_between_the_two_renames(capsys: pytest.CaptureFixture[str]) -> None:
    """The earlier result comes back, and is not replaced without being asked."""
    assert merging("--density", "1") == 0
    first = weights("out")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", BETWEEN], env=environment, check=False).returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert merging() == 2
    assert "name another, or --overwrite" in capsys.readouterr().err
    assert left_over() == ["out"]
    assert_same_tensors(weights("out"), first)


def test_an_older_folder_that_could_not_be_removed_goes_with_the_next_merge() -> None:
    assert merging() == 0
    left = Path(f".synapse-merge-out-{'0' * 32}.older")
    shutil.copytree("out", left)
    at_work = left.with_suffix("")
    at_work.mkdir()
    lock = writer._lock(at_work)
    assert merging("--overwrite") == 0
    assert left.is_dir()
    assert lock is not None
    os.close(lock)
    assert merging("--overwrite") == 0
    assert left_over() == ["out"]


def test_what_was_there_comes_back_where_the_result_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "old").touch()

    def broken(source: str, target: str) -> None:
        if Path(target) == out and ".older" not in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(CheckpointError), writer.whole_folder(out):
        pass
    assert (out / "old").exists()
