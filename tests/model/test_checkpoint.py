"""Checkpoints: exact, sharded where large, never half-written, and clear about every kind of damage."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from synapse_arch import CheckpointError, ConfigError, ExpertsConfig, SynapseModel
from synapse_arch.model import _files, checkpoint
from synapse_arch.model.checkpoint import from_pretrained, save_pretrained
from tests.model.small import VARIANTS, small_config, small_model, tokens

SINGLE, SHARDED = 2**30, 20_000
LIMITS = {"single": SINGLE, "sharded": SHARDED}
limits = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(model: SynapseModel, other: SynapseModel) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.fixture
def model() -> SynapseModel:
    return small_model()


@pytest.fixture
def other() -> SynapseModel:
    return small_model(experts=ExpertsConfig(n_experts=6, d_expert=6))


@pytest.fixture
def folder(model: SynapseModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


class TestRoundTrip:
    @limits
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_everything_comes_back(self, variant: str, limit: int, tmp_path: Path) -> None:
        model = small_model(**VARIANTS[variant])
        for buffer in model.buffers():  # what balancing and consolidation leave behind
            if buffer.is_floating_point():
                buffer.normal_()
        model.save_pretrained(tmp_path, max_shard_bytes=limit)
        loaded = SynapseModel.from_pretrained(tmp_path)
        assert loaded.config == model.config
        assert same(model, loaded)
        ids = tokens(2, 9)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not any(module.training for module in loaded.modules())

    def test_labels_and_other_tuples_come_back(self, tmp_path: Path) -> None:
        model = small_model(experts=ExpertsConfig(n_experts=2, d_expert=4, labels=("a", "b")))
        model.save_pretrained(tmp_path)
        assert SynapseModel.from_pretrained(tmp_path).config == model.config

    def test_loaded_parameters_keep_their_marks_and_learn(self, model: SynapseModel, folder: Path) -> None:
        loaded = from_pretrained(folder)
        for name, parameter in model.named_parameters():
            assert loaded.get_parameter(name).__dict__ == parameter.__dict__, name
        loaded(tokens(1, 5), targets=tokens(1, 5)).loss.backward()
        assert all(parameter.grad is not None for parameter in loaded.parameters())

    def test_loaded_weights_do_not_hang_on_the_file(self, model: SynapseModel, folder: Path) -> None:
        loaded = from_pretrained(folder)
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(10)
        assert same(model, loaded)

    @limits
    def test_tied_weights_are_stored_once_and_stay_tied(self, limit: int, tmp_path: Path) -> None:
        model = small_model(tie_embeddings=True)
        model.save_pretrained(tmp_path, max_shard_bytes=limit)
        stored = [name for path in tmp_path.glob("*.safetensors") for name in load_file(path)]
        assert "embedding.weight" in stored
        assert "head.weight" not in stored
        loaded = from_pretrained(tmp_path)
        assert loaded.head.weight is loaded.embedding.weight

    def test_a_model_saves_over_the_file_it_was_loaded_from(self, model: SynapseModel, folder: Path) -> None:
        for _ in range(3):
            from_pretrained(folder).save_pretrained(folder)
        assert same(model, from_pretrained(folder))

    def test_dtype_casts_all_but_the_marked_parameters(self, folder: Path) -> None:
        loaded = from_pretrained(folder, dtype=torch.bfloat16)
        for name, parameter in loaded.named_parameters():
            kept = getattr(parameter, "_keep_float32", False)
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32, torch.int64}
        for unknown in (torch.int64, "bfloat16"):
            with pytest.raises(ConfigError, match="dtype: expected a floating dtype"):
                from_pretrained(folder, dtype=unknown)

    def test_a_wider_dtype_is_that_of_all_parameters(self, folder: Path) -> None:
        loaded, ids = from_pretrained(folder, dtype=torch.float64), tokens(1, 9)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
        expected = from_pretrained(folder).double()(ids).logits
        assert torch.equal(loaded(ids).logits, expected)

    def test_shapes_alone(self, folder: Path) -> None:
        assert all(tensor.is_meta for tensor in from_pretrained(folder, device="meta").state_dict().values())

    def test_without_dtype_the_saved_one_stays(self, folder: Path, tmp_path: Path) -> None:
        narrow = from_pretrained(folder, dtype=torch.bfloat16)
        narrow.save_pretrained(tmp_path / "narrow")
        assert same(narrow, from_pretrained(tmp_path / "narrow"))
        assert from_pretrained(tmp_path / "narrow").embedding.weight.dtype == torch.bfloat16

    def test_loading_draws_no_random_numbers(self, folder: Path) -> None:
        before = torch.get_rng_state()
        from_pretrained(folder)
        assert torch.equal(torch.get_rng_state(), before)


class TestLayout:
    def test_single_file(self, model: SynapseModel, folder: Path) -> None:
        assert names(folder) == {"config.json", "model.safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert config.pop("schema") == "synapse.model/1"
        assert isinstance(config.pop("library_version"), str)
        assert config == model.config.to_dict()
        embedded = metadata(folder / "model.safetensors")
        assert embedded["schema"] == "synapse.model/1"
        assert json.loads(embedded["config"]) == config

    def test_shards_stay_below_the_limit_and_the_index_is_right(self, model: SynapseModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path, max_shard_bytes=SHARDED)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        tensors = model.state_dict()
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        shards = sorted(set(index["weight_map"].values()))
        assert len(shards) > 2
        assert names(tmp_path) == {"config.json", "model.safetensors.index.json", *shards}
        for shard in shards:
            held = load_file(tmp_path / shard)
            assert set(held) == {name for name, place in index["weight_map"].items() if place == shard}
            assert sum(tensor.nbytes for tensor in held.values()) <= SHARDED
            assert shard.endswith(f"-of-{len(shards):05d}.safetensors")

    def test_a_tensor_above_the_limit_gets_its_own_shard(self, model: SynapseModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path, max_shard_bytes=1)
        assert len(list(tmp_path.glob("model-*.safetensors"))) == len(model.state_dict())
        assert same(model, from_pretrained(tmp_path))

    def test_a_limit_below_one_is_refused(self, model: SynapseModel, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="max_shard_bytes: expected 1 or more, got 0"):
            model.save_pretrained(tmp_path, max_shard_bytes=0)

    def test_other_files_are_left_alone(self, model: SynapseModel, folder: Path) -> None:
        others = ["tokenizer.json", "optimizer.bin", "adapter_model.safetensors", "model-00001-of-00002.safetensors"]
        for name in others:
            (folder / name).write_text(name)
        for limit in (SHARDED, SINGLE, SHARDED):
            model.save_pretrained(folder, max_shard_bytes=limit)
            for name in others:
                assert (folder / name).read_text() == name

    def test_a_failed_save_takes_no_weights_of_others(
        self, model: SynapseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        foreign = {"model.safetensors": "a", "model-00001-of-00001.safetensors": "b"}
        foreign["model.safetensors.index.json"] = json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}})
        for name, content in foreign.items():
            (tmp_path / name).write_text(content)
        with monkeypatch.context() as patch:
            calls_until(patch, os, "replace", OSError(28, "No space left on device"), 0)
            with pytest.raises(CheckpointError):
                model.save_pretrained(tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == foreign
        model.save_pretrained(tmp_path)
        assert same(model, from_pretrained(tmp_path))

    @pytest.mark.parametrize("limits", [(SINGLE, SHARDED), (SHARDED, SINGLE), (SHARDED, 30_000), (SINGLE, SINGLE)])
    def test_a_save_leaves_nothing_of_the_older_one(
        self, model: SynapseModel, other: SynapseModel, limits: tuple[int, int], tmp_path: Path
    ) -> None:
        save_pretrained(other, tmp_path, max_shard_bytes=limits[0])
        save_pretrained(model, tmp_path, max_shard_bytes=limits[1])
        save_pretrained(model, tmp_path / "new", max_shard_bytes=limits[1])
        assert len(names(tmp_path)) == len(names(tmp_path / "new")) + 1
        assert (tmp_path / "config.json").read_text() == (tmp_path / "new" / "config.json").read_text()
        assert same(model, from_pretrained(tmp_path))


def steps() -> dict[str, tuple[object, str]]:
    """Everything a save does to the disk."""
    return {
        "write a weights file": (_files, "save_file"),
        "write text": (_files, "write_text"),
        "fsync": (os, "fsync"),
        "rename": (os, "replace"),
        "remove": (Path, "unlink"),
    }


def restore(pristine: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pristine, folder)


class Interrupt(BaseException):
    """As if the process had been killed: nothing is caught and nothing cleaned up."""


def calls_until(monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: BaseException, after: int) -> None:
    """Lets a function work `after` times and then raise, for good."""
    original: Callable[..., Any] = getattr(where, name)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, counted)


def interruptions(
    start: Callable[[], None], save: Callable[[], None], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Saves with each of the steps failing in turn, at each of its calls, always from the same start.

    Yields what failed, after every save that did.
    """
    for step, (where, name) in steps().items():
        for after in range(100):
            start()
            with monkeypatch.context() as patch:
                calls_until(patch, where, name, error, after)
                if isinstance(error, Interrupt):
                    patch.setattr(checkpoint, "_sweep", lambda _: None)
                try:
                    save()
                except (CheckpointError, Interrupt):
                    pass
                else:
                    break
            yield f"{step}, call {after + 1}"


CHANGES = {f"{a} to {b}": (LIMITS[a], LIMITS[b]) for a in LIMITS for b in LIMITS}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
class TestInterruption:
    def test_the_old_or_the_new_checkpoint_is_there_after_a_kill_at_any_step(
        self,
        model: SynapseModel,
        other: SynapseModel,
        change: tuple[int, int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, pristine, seen = tmp_path / "checkpoint", tmp_path / "pristine", set()
        save_pretrained(other, pristine, max_shard_bytes=change[0])

        def save() -> None:
            save_pretrained(model, folder, max_shard_bytes=change[1])

        for where in interruptions(lambda: restore(pristine, folder), save, Interrupt(), monkeypatch):
            loaded = from_pretrained(folder)
            expected = model if loaded.config == model.config else other
            assert same(expected, loaded), where
            seen.add(expected is model)
            save_pretrained(model, folder, max_shard_bytes=change[1])  # the next save works and cleans up
            assert same(model, from_pretrained(folder)), where
            assert not any(name.startswith(".synapse-") for name in names(folder)), where
        assert seen == {False, True}

    def test_a_full_disk_leaves_no_half_written_file(
        self,
        model: SynapseModel,
        other: SynapseModel,
        change: tuple[int, int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, pristine = tmp_path / "checkpoint", tmp_path / "pristine"
        save_pretrained(other, pristine, max_shard_bytes=change[0])
        save_pretrained(model, tmp_path / "new", max_shard_bytes=change[1])

        def save() -> None:
            save_pretrained(model, folder, max_shard_bytes=change[1])

        full = OSError(28, "No space left on device")
        for where in interruptions(lambda: restore(pristine, folder), save, full, monkeypatch):
            loaded = from_pretrained(folder)
            expected = model if loaded.config == model.config else other
            assert same(expected, loaded), where
            whole = tmp_path / "new" if expected is model else pristine
            if not where.startswith("remove"):
                assert not any(name.startswith(".synapse-") for name in names(folder)), where
                assert len(names(folder)) == len(names(whole)), where


def test_an_interrupted_first_save_is_no_checkpoint(
    model: SynapseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"

    def save() -> None:
        save_pretrained(model, folder)

    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    for where in interruptions(start, save, OSError(28, "No space left on device"), monkeypatch):
        if "model.safetensors" in names(folder):
            assert same(model, from_pretrained(folder)), where
        else:
            with pytest.raises(CheckpointError, match="neither"):
                from_pretrained(folder)


def test_the_systems_own_refusal_in_the_middle_of_writing(other: SynapseModel, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"to write .*File too large"):
            other.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made(model: SynapseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="check that the folder exists and is writable"):
        model.save_pretrained(tmp_path / "file" / "below")
    assert not caplog.records


def test_a_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(CheckpointError, match="a readable folder, got PermissionError"):
        from_pretrained(folder)


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = SynapseModel(small_config())
    with pytest.raises(CheckpointError, match="meta tensors"):
        model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


class TestDamage:
    def refused(self, folder: Path, *parts: str) -> None:
        """Loading fails with a CheckpointError that says all of `parts`."""
        with pytest.raises(CheckpointError) as caught:
            from_pretrained(folder)
        for part in parts:
            assert part in str(caught.value), str(caught.value)

    def rewrite(self, path: Path, change: Callable[[dict[str, torch.Tensor]], Any], **header: str) -> None:
        tensors, kept = load_file(path), metadata(path)
        change(tensors)
        save_file(tensors, path, metadata=kept | header)

    def test_no_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "none", "nothing there")
        (tmp_path / "file").touch()
        self.refused(tmp_path / "file", "a checkpoint folder, got a file")
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path / "empty", "model.safetensors", "neither")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
    def test_only_pickles(self, name: str, tmp_path: Path) -> None:
        torch.save({}, tmp_path / name)
        self.refused(tmp_path, name, "never loaded", "convert")

    def test_a_pickle_under_our_name(self, folder: Path) -> None:
        for content in (pickle.dumps({}), b"PK\x03\x04...."):
            (folder / "model.safetensors").write_bytes(content)
            self.refused(folder, "model.safetensors", "a pickle or zip archive")

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_truncated(self, folder: Path, keep: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, "model.safetensors", "truncated")

    @pytest.mark.parametrize("size", [2**63, 2**40, 99_000_000])
    def test_huge_header(self, folder: Path, size: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
        self.refused(folder, "model.safetensors", "header")

    def test_foreign_weights(self, folder: Path) -> None:
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
        self.refused(folder, "schema", "not of synapse_arch")
        save_file({"weight": torch.ones(2)}, folder / "model.safetensors", metadata={"schema": "synapse.state/1"})
        self.refused(folder, "schema", "not of synapse_arch")

    def test_newer_schema(self, folder: Path) -> None:
        self.rewrite(folder / "model.safetensors", lambda tensors: None, schema="synapse.model/2")
        self.refused(folder, "expected synapse.model/1, got synapse.model/2", "update the library")
        self.rewrite(folder / "model.safetensors", lambda tensors: None, schema="synapse.model/0")
        self.refused(folder, "expected synapse.model/1, got synapse.model/0", "a former version")

    def test_more_layers_than_tensors(self, folder: Path) -> None:
        """Refused before they are built."""
        self.rewrite(folder / "model.safetensors", lambda tensors: None, config='{"n_layers": 1000000000}')
        self.refused(folder, "those of n_layers=1000000000")

    @pytest.mark.parametrize(
        "config", ["{", "[" * 100_000, "[]", '{"n_layers": 0}', '{"layers": 3}', '{"thalamus": {"mamba": 4}}']
    )
    def test_embedded_config_that_is_none(self, folder: Path, config: str) -> None:
        self.rewrite(folder / "model.safetensors", lambda tensors: None, config=config)
        self.refused(folder, "embedded config")

    def test_missing_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, "config.json", "none of that name")

    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
    def test_damaged_config(self, folder: Path, content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        self.refused(folder, "config.json", "a")

    def test_a_config_that_differs_is_reported_and_not_used(
        self, model: SynapseModel, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"n_layers": 5, "note": "mine"}))
        with caplog.at_level(logging.WARNING, "synapse_arch"):
            assert same(model, from_pretrained(folder))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "n_layers" in caplog.text
        assert "config.json" in caplog.text

    def test_tensors_missing_and_unexpected(self, folder: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            del tensors["layers.0.experts.w_in"], tensors["norm.weight"]
            tensors["layers.9.extra"] = torch.ones(1)

        self.rewrite(folder / "model.safetensors", change)
        self.refused(folder, "2 missing ['layers.0.experts.w_in', 'norm.weight']", "1 unexpected ['layers.9.extra']")

    def test_only_the_first_ten_names_are_listed(self, folder: Path) -> None:
        extra = {f"x{i:02d}": torch.ones(1) for i in range(20)}
        self.rewrite(folder / "model.safetensors", lambda tensors: tensors.update(extra))
        with pytest.raises(CheckpointError, match=r"20 unexpected \['x00'.*'x09'\]$"):
            from_pretrained(folder)

    def test_wrong_shape(self, folder: Path) -> None:
        other = {"norm.weight": torch.ones(17)}
        self.rewrite(folder / "model.safetensors", lambda tensors: tensors.update(other))
        self.refused(folder, "norm.weight", "expected (16,), got (17,)")

    def test_wrong_dtype(self, folder: Path) -> None:
        other = {"norm.weight": torch.ones(16).long()}
        self.rewrite(folder / "model.safetensors", lambda tensors: tensors.update(other))
        self.refused(folder, "norm.weight", "torch.float32", "torch.int64")

    class TestShards:
        @pytest.fixture
        def sharded(self, model: SynapseModel, tmp_path: Path) -> Path:
            model.save_pretrained(tmp_path / "sharded", max_shard_bytes=SHARDED)
            return tmp_path / "sharded"

        def test_missing_shard(self, sharded: Path) -> None:
            gone = sorted(sharded.glob("model-*.safetensors"))[1]
            gone.unlink()
            with pytest.raises(CheckpointError, match=gone.name):
                from_pretrained(sharded)

        def test_shards_of_two_models(self, sharded: Path, tmp_path: Path) -> None:
            small_model(norm_eps=1e-5).save_pretrained(tmp_path / "other", max_shard_bytes=SHARDED)
            ours, theirs = (sorted(folder.glob("model-*.safetensors")) for folder in (sharded, tmp_path / "other"))
            shutil.copy(theirs[-1], ours[-1])
            with pytest.raises(CheckpointError, match=r"expected the configuration of .*, got another"):
                from_pretrained(sharded)

        def test_a_shard_with_other_tensors(self, sharded: Path) -> None:
            first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
            shutil.copy(first, second)
            with pytest.raises(CheckpointError, match=r"missing .* unexpected"):
                from_pretrained(sharded)

        @pytest.mark.parametrize(
            "index",
            ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a"}}'],
        )
        def test_damaged_index(self, sharded: Path, model: SynapseModel, index: str) -> None:
            (sharded / "model.safetensors.index.json").write_text(index)
            with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
                from_pretrained(sharded)
            model.save_pretrained(sharded)
            assert same(model, from_pretrained(sharded))


def test_no_checkpoint_code_can_unpickle() -> None:
    """Neither module reaches for a loader that executes what it reads."""
    for module in (checkpoint, _files):
        source = Path(str(module.__file__)).read_text()
        assert "torch.load" not in source
        assert "import pickle" not in source


def test_every_buffer_of_the_model_is_persistent(model: SynapseModel) -> None:
    assert {name for name, _ in model.named_buffers()} <= set(model.state_dict())
    assert isinstance(model, nn.Module)
