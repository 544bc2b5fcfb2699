"""SynapseState: functional, row by row, exact on disk, and clear about what does not fit."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from synapse_arch import MemoryConfig, StateError, SynapseModel, SynapseState, TraceSpec
from synapse_arch.model.state import map_tensors, named_tensors
from tests.helpers import assert_equal, assert_same
from tests.model.small import VARIANTS, read_state, small_model, tokens

variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def model() -> SynapseModel:
    return small_model()


@torch.no_grad()
def traced_state(model: SynapseModel, batch: int = 3) -> SynapseState:
    """A state that also carries the optional statistics."""
    return model(tokens(batch, 5), trace=TraceSpec(level="gates")).state


def test_names_say_where_a_tensor_stands(model: SynapseModel) -> None:
    names = set(model.init_state(2).to_tensors())
    parts = ["xlstm.conv", "xlstm.cell.C", "xlstm.cell.n", "xlstm.cell.m", "thalamus.mamba.conv", "thalamus.mamba.ssm"]
    parts += ["thalamus.coactivation", "memory.conv", "memory.weights"]
    assert names == {f"layers.{i}.{part}" for i in range(2) for part in parts} | {"position"}


def test_position_counts_unmasked_tokens(model: SynapseModel) -> None:
    mask = torch.tensor([[True, True, True], [False, True, False]])
    state = model(tokens(2, 3), model(tokens(2, 4)).state, mask=mask).state
    assert state.position.tolist() == [7, 5]
    assert (state.batch_size, state.device) == (2, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@variants
def test_size_does_not_depend_on_what_was_read(variant: str, dtype: torch.dtype) -> None:
    model = small_model(**VARIANTS[variant]).to(dtype)
    fresh = {name: (x.shape, x.dtype) for name, x in model.init_state(3).to_tensors().items()}
    for length in (1, 40):
        assert {name: (x.shape, x.dtype) for name, x in read_state(model, 3, length).to_tensors().items()} == fresh


def test_nbytes_is_the_sum_of_all_tensors(model: SynapseModel) -> None:
    state = read_state(model)
    assert state.nbytes == sum(tensor.nbytes for tensor in state.to_tensors().values())


def test_select_takes_repeats_and_reorders_rows(model: SynapseModel) -> None:
    state = read_state(model)
    chosen = state.select([2, 0, 2])
    for name, tensor in state.to_tensors().items():
        assert torch.equal(chosen.to_tensors()[name], tensor[[2, 0, 2]]), name
    assert_equal(state.select(torch.tensor([2, 0, 2])).to_tensors(), chosen.to_tensors())


@pytest.mark.parametrize("rows", [[], [3], [-1], [0.5], [True], torch.tensor([True, False, True])])
def test_select_refuses_rows_that_are_not_there(model: SynapseModel, rows: list[int]) -> None:
    with pytest.raises(StateError, match="rows: expected at least one index, each 0 to 2"):
        read_state(model).select(rows)


@variants
def test_cat_undoes_select(variant: str) -> None:
    state = read_state(small_model(**VARIANTS[variant]))
    joined = SynapseState.cat([state.select([0]), state.select([1, 2])])
    assert_equal(joined.to_tensors(), state.to_tensors())


def test_cat_keeps_optional_statistics_only_where_every_state_has_them(model: SynapseModel) -> None:
    plain, traced = read_state(model), traced_state(model)
    assert "layers.0.xlstm.age" in SynapseState.cat([traced, traced]).to_tensors()
    for states in ([plain, traced], [traced, plain]):
        joined = SynapseState.cat(states).to_tensors()
        assert joined.keys() == plain.to_tensors().keys()
        assert torch.equal(joined["layers.1.xlstm.conv"], torch.cat([s.layers[1].xlstm.conv for s in states]))


def test_cat_refuses_states_of_other_models(model: SynapseModel) -> None:
    with pytest.raises(StateError, match="at least one"):
        SynapseState.cat([])
    other = read_state(small_model(memory=MemoryConfig(n_heads=2, d_key=8, d_value=6)))
    with pytest.raises(StateError, match=r"state\.layers\.0\.memory\.conv: expected \(3, 3, 28\), got \(3, 3, 72\)"):
        SynapseState.cat([read_state(model), other])
    with pytest.raises(StateError, match="device"):
        SynapseState.cat([read_state(model), read_state(model).to("meta")])


def test_where_takes_each_row_from_one_side(model: SynapseModel) -> None:
    a, b = read_state(model), read_state(model)
    mixed = a.where(torch.tensor([True, False, True]), b)
    assert_equal(mixed.select([0, 2]).to_tensors(), a.select([0, 2]).to_tensors())
    assert_equal(mixed.select([1]).to_tensors(), b.select([1]).to_tensors())


def test_where_keeps_values_that_are_not_finite_in_their_row(model: SynapseModel) -> None:
    a = read_state(model)
    poison = SynapseState(map_tensors(lambda x: torch.full_like(x, torch.nan), a.layers), a.position)
    mixed = a.where(torch.tensor([True, False, True]), poison)
    assert_equal(mixed.select([0, 2]).to_tensors(), a.select([0, 2]).to_tensors())


def test_where_refuses_rows_that_do_not_fit(model: SynapseModel) -> None:
    state = read_state(model)
    for rows in (torch.tensor([True, False]), torch.tensor([1, 0, 1])):
        with pytest.raises(StateError, match=r"rows: expected \(3,\) bool"):
            state.where(rows, state)
    with pytest.raises(StateError, match="batch size 3, got 2"):
        state.where(torch.tensor([True, False, True]), read_state(model, 2))


def test_detach_cuts_the_gradient_and_clone_keeps_it(model: SynapseModel) -> None:
    state = model(tokens(2, 4)).state
    assert any(tensor.requires_grad for tensor in state.to_tensors().values())
    assert any(tensor.requires_grad for tensor in state.clone().to_tensors().values())
    assert not any(tensor.requires_grad for tensor in state.detach().to_tensors().values())
    assert_equal(state.detach().to_tensors(), state.to_tensors())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.select([1, 0, 0]),
        lambda state: SynapseState.cat([state, state]),
        lambda state: state.where(torch.tensor([True, False, True]), state.select([2, 1, 0])),
        lambda state: state.clone(),
    ],
)
def test_no_operation_shares_memory_with_its_input(
    model: SynapseModel, change: Callable[[SynapseState], SynapseState]
) -> None:
    state = read_state(model)
    before = {name: tensor.clone() for name, tensor in state.to_tensors().items()}
    changed = change(state)
    assert_equal(state.to_tensors(), before)
    for tensor in changed.to_tensors().values():
        tensor.fill_(7)
    assert_equal(state.to_tensors(), before)


def test_to_moves_every_tensor(model: SynapseModel) -> None:
    moved = read_state(model).to("meta")
    assert {tensor.device.type for tensor in moved.to_tensors().values()} == {"meta"}


@variants
def test_memory_only_is_a_fresh_state_but_for_the_fast_weights(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    for state in (read_state(model), traced_state(model)):
        kept, fresh = state.memory_only().to_tensors(), model.init_state(3).to_tensors()
        assert kept.keys() == fresh.keys()
        for name, tensor in fresh.items():
            assert torch.equal(kept[name], state.to_tensors()[name] if name.endswith("memory.weights") else tensor), (
                name
            )


def test_memory_only_lets_the_gradient_of_the_memory_through(model: SynapseModel) -> None:
    kept = model(tokens(2, 4)).state.memory_only()
    assert kept.layers[0].memory.weights.requires_grad
    model(tokens(2, 3), kept).logits.sum().backward()
    assert model.layers[0].memory.in_proj.weight.grad.abs().sum() > 0


@variants
def test_saved_and_loaded_states_are_bit_equal(variant: str, tmp_path: Path) -> None:
    model = small_model(**VARIANTS[variant])
    for number, state in enumerate((model.init_state(2), read_state(model), traced_state(model))):
        path = tmp_path / f"{number}.safetensors"
        state.save(path)
        loaded = SynapseState.load(path)
        assert_equal(loaded.to_tensors(), state.to_tensors())
        assert_equal(SynapseState.from_bytes(path.read_bytes()).to_tensors(), state.to_tensors())
        assert_equal(SynapseState.from_bytes(state.to_bytes()).to_tensors(), state.to_tensors())
        assert [type(x) for x in loaded.layers] == [type(x) for x in state.layers]
        loaded.check_against(model, state.batch_size)
        ids = tokens(state.batch_size, 3)
        assert torch.equal(model(ids, loaded).logits, model(ids, state).logits)


def test_views_and_narrow_dtypes_are_saved_as_they_are(model: SynapseModel, tmp_path: Path) -> None:
    state = SynapseState(map_tensors(lambda x: x.to(torch.bfloat16), read_state(model, 4).layers), torch.arange(4))
    view = SynapseState(map_tensors(lambda x: x[1:3], state.layers), state.position[1:3])
    view.save(tmp_path / "view")
    assert_equal(SynapseState.load(tmp_path / "view").to_tensors(), view.to_tensors())
    assert (tmp_path / "view").stat().st_size < 0.7 * sum(x.nbytes for x in state.to_tensors().values()) + 4096


def test_check_against_accepts_what_the_model_returns(model: SynapseModel) -> None:
    for state in (model.init_state(3), read_state(model), traced_state(model), read_state(model).memory_only()):
        state.check_against(model, 3, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": None}, r"state\.layers\.0\.memory\.conv: expected a tensor, got none"),
        ({"xlstm": None}, r"state\.layers\.0\.xlstm\.conv: expected a tensor, got none"),
        ({"experts": None}, r"state\.layers\.0\.thalamus\.coactivation: expected \(3, 4, 4\), got \(3, 0, 0\)"),
        (VARIANTS["router alone"], r"state\.layers\.0\.thalamus\.mamba\.conv: expected a tensor, got none"),
        (VARIANTS["s6"], r"state\.layers\.0\.thalamus\.mamba\.conv: expected \(3, 3, 40\), got \(3, 3, 32\)"),
    ],
)
def test_check_against_names_what_differs(model: SynapseModel, changes: dict[str, object], message: str) -> None:
    with pytest.raises(StateError, match=message):
        read_state(small_model(**changes)).check_against(model, 3)


def test_check_against_tells_batch_layers_dtype_and_device(model: SynapseModel) -> None:
    state = read_state(model)
    with pytest.raises(StateError, match=r"batch size 2, got 3; pick rows with state\.select"):
        state.check_against(model, 2)
    with pytest.raises(StateError, match="2 layers, got 1"):
        SynapseState(state.layers[:1], state.position).check_against(model, 3)
    whole = SynapseState(map_tensors(lambda x: x.long(), state.layers), state.position)
    with pytest.raises(StateError, match=r"xlstm\.conv: expected torch\.float32, got torch\.int64"):
        whole.check_against(model, 3)
    with pytest.raises(StateError, match="device meta, got cpu"):
        state.check_against(model, 3, device="meta")
    with pytest.raises(StateError, match=r"3 rows on cpu, got 2 rows on cpu"):
        SynapseState(map_tensors(lambda x: x[:2], state.layers), state.position).check_against(model, 3)
    with pytest.raises(StateError, match="a SynapseState, got dict"):
        SynapseState.check_against({}, model, 3)  # type: ignore[arg-type]


def test_an_unexpected_part_is_named_too() -> None:
    with pytest.raises(StateError, match=r"state\.layers\.0\.memory\.conv: expected none, got a tensor"):
        read_state(small_model()).check_against(small_model(memory=None), 3)


class TestFiles:
    @pytest.fixture
    def path(self, model: SynapseModel, tmp_path: Path) -> Path:
        path = tmp_path / "state.safetensors"
        read_state(model).save(path)
        return path

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="no file of that name"):
            SynapseState.load(tmp_path / "none")
        with pytest.raises(StateError, match="a folder"):
            SynapseState.load(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 50, -1])
    def test_truncated(self, path: Path, keep: int) -> None:
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(StateError, match=r"state\.safetensors: expected a safetensors file"):
            SynapseState.load(path)
        with pytest.raises(StateError, match=r"upload: expected a safetensors file"):
            SynapseState.from_bytes(path.read_bytes(), source="upload")

    def test_huge_header(self, path: Path) -> None:
        path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
        with pytest.raises(StateError, match="header"):
            SynapseState.load(path)
        with pytest.raises(StateError, match="header"):
            SynapseState.from_bytes(path.read_bytes())

    def test_pickles_are_not_opened(self, path: Path) -> None:
        torch.save({"a": torch.ones(1)}, path)
        with pytest.raises(StateError, match="a pickle or zip archive"):
            SynapseState.load(path)
        path.write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(StateError, match="a pickle or zip archive"):
            SynapseState.load(path)
        with pytest.raises(StateError, match="a safetensors file"):
            SynapseState.from_bytes(path.read_bytes())

    @pytest.mark.parametrize("length", [0x20280, 0x20380, 0x20480, 0x20580])
    def test_a_header_whose_length_reads_like_a_pickle(self, path: Path, length: int) -> None:
        data = path.read_bytes()
        tensors = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(length.to_bytes(8, "little") + data[8:tensors].ljust(length) + data[tensors:])
        assert_equal(dict(named_tensors(SynapseState.load(path))), dict(named_tensors(SynapseState.from_bytes(data))))

    @pytest.mark.parametrize("metadata", [{}, {"schema": "synapse.state/99"}, {"schema": "synapse.model/1"}])
    def test_foreign_schema(self, path: Path, metadata: dict[str, str]) -> None:
        save_file(load_file(path), path, metadata=metadata)
        with pytest.raises(StateError, match=r"schema: expected synapse\.state/1"):
            SynapseState.load(path)
        with pytest.raises(StateError, match=r"schema: expected synapse\.state/1"):
            SynapseState.from_bytes(path.read_bytes())

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("layers.1.thalamus.coactivation", r"layers\.1\.thalamus\.coactivation: expected a tensor of that name"),
            ("layers.0.xlstm.cell.m", r"layers\.0\.xlstm\.cell\.m: expected a tensor of that name"),
            ("position", "a number of layers and a position"),
        ],
    )
    def test_missing_tensor(self, path: Path, name: str, message: str) -> None:
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"schema": "synapse.state/1", "layers": "2"})
        with pytest.raises(StateError, match=message):
            SynapseState.load(path)

    def test_wrong_contents(self, path: Path) -> None:
        good = load_file(path)
        metadata = {"schema": "synapse.state/1", "layers": "2"}
        for changes, message in (
            ({"layers.7.extra": torch.ones(3)}, r"only tensors of a state, got \['layers\.7\.extra'\]"),
            ({"position": torch.ones(3)}, r"position: expected \(B,\) torch\.int64"),
            ({"layers.0.memory.weights": torch.ones(2, 2, 4, 6)}, r"memory\.weights: expected B=3 rows"),
        ):
            save_file(good | changes, path, metadata=metadata)
            with pytest.raises(StateError, match=message):
                SynapseState.load(path)
        for layers in ("", "two", "-1", "9" * 5000):
            save_file(good, path, metadata=metadata | {"layers": layers})
            with pytest.raises(StateError):
                SynapseState.load(path)

    @pytest.mark.parametrize("layers", ["1", "999999999999"])
    def test_wrong_number_of_layers(self, path: Path, layers: str) -> None:
        save_file(load_file(path), path, metadata={"schema": "synapse.state/1", "layers": layers})
        with pytest.raises(StateError):
            SynapseState.load(path)

    def test_no_such_folder(self, model: SynapseModel, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="to write there"):
            read_state(model).save(tmp_path / "none" / "state.safetensors")

    @pytest.mark.parametrize("step", ["synapse_arch.model.state.write_tensors", "synapse_arch.model._files.commit"])
    def test_a_failed_save_leaves_the_old_file(
        self, model: SynapseModel, path: Path, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(step, full)
        with pytest.raises(StateError, match="No space left on device"):
            read_state(model).save(path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_a_file_that_grows_too_large_is_not_left_behind(self, model: SynapseModel, path: Path) -> None:
        """The system's own refusal, in the middle of writing."""
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(StateError, match="to write there"):
                read_state(model).save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_mode_is_what_the_umask_grants(self, path: Path) -> None:
        (path.parent / "plain").touch()
        assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_map_and_names_agree_on_nested_tuples() -> None:
    tree = (torch.ones(2), (None, torch.zeros(1)))
    assert [name for name, _ in named_tensors(tree, "x")] == ["x.0", "x.1.1"]
    doubled = map_tensors(torch.add, tree, tree)
    assert doubled[1][0] is None
    assert_same(dict(named_tensors(doubled, "x")), {"x.0": 2 * torch.ones(2), "x.1.1": torch.zeros(1)})
    with pytest.raises(StateError, match="nested tuples of tensors, got list"):
        map_tensors(torch.neg, [torch.ones(1)])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_state_and_its_name_are_on_the_disk_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    small_model()(tokens(1, 3)).state.detach().save(tmp_path / "s")
    assert ".aside" in synced[0]
    assert synced[1:] == [str(tmp_path)]
