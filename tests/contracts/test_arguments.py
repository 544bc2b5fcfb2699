"""Wrong arguments: the right SynapseError, worded as what, expected, got."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from synapse_arch import ops
from synapse_arch.errors import BackendUnavailable, ConfigError, ShapeError, StateError, SynapseError
from synapse_arch.modules import MambaState
from synapse_arch.ops import _mamba_ssm, _triton
from synapse_arch.ops._backends import KERNELS
from tests.contracts.cases import CASES, MODULES, OPS, RECURRENT, Case
from tests.helpers import Tensors


def grown(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


def checked(name: str) -> bool:
    """Parameters of modules are the module's own business."""
    return not name.startswith("param")


def misfits(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Every input with every dimension one larger, with one dimension less, with one more."""
    for name, x in filter(lambda item: checked(item[0]), tensors.items()):
        for dim in range(x.dim()):
            yield f"{name} dim {dim}", tensors | {name: grown(x, dim)}
        yield f"{name} without its last dim", tensors | {name: x[..., 0]}
        yield f"{name} with a dim more", tensors | {name: x[None]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_misfit_is_explained(case: Case) -> None:
    options = {"segment_ids": torch.zeros(2, 6, dtype=torch.long), "mask": torch.ones(2, 6, dtype=torch.bool)}
    for what, tensors in misfits(case.draw(2, 6)):
        expected = StateError if what.startswith("state") else (ShapeError, StateError)
        with pytest.raises(expected, match=r"expected .*got") as caught:
            pytest.fail(f"{what}: accepted, {case.call(tensors, **options).keys()}")
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_position_and_no_row(case: Case) -> None:
    tensors = case.draw(2, 6)
    empty = {name: x[:, :0] if name in case.sequence else x for name, x in tensors.items()}
    with pytest.raises(ShapeError, match="expected"):
        case.call(empty)
    owned = [name for name in tensors if name in case.sequence or name.startswith("state")]
    with pytest.raises(ShapeError, match="expected"):
        case.call(tensors | {name: tensors[name][:0] for name in owned})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_where_numbers_are_needed(case: Case) -> None:
    tensors = case.draw(2, 6)
    for name, x in tensors.items():
        if checked(name):
            expected = StateError if name.startswith("state") else ShapeError
            with pytest.raises(expected, match=r"expected a floating dtype, got torch\.int64"):
                pytest.fail(f"{name}: accepted {case.call(tensors | {name: x.long()}).keys()}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_where_tensors_are_needed(case: Case) -> None:
    tensors = case.draw(2, 6)
    for name, x in tensors.items():
        if checked(name) and not name.startswith("state"):
            with pytest.raises(ShapeError, match="expected"):
                case.call(tensors | {name: x.tolist()})  # type: ignore[dict-item]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.ones(2, 6)},
        {"mask": torch.ones(2, 6, dtype=torch.long)},
        {"mask": torch.ones(2, 5, dtype=torch.bool)},
        {"mask": torch.ones(1, 6, dtype=torch.bool)},
        {"mask": torch.ones(6, dtype=torch.bool)},
        {"segment_ids": torch.zeros(2, 6)},
        {"segment_ids": torch.zeros(2, 6, dtype=torch.bool)},
        {"segment_ids": torch.zeros(2, 7, dtype=torch.long)},
        {"segment_ids": torch.zeros(6, dtype=torch.long)},
        {"segment_ids": [[0] * 6] * 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_masks_and_segments_that_do_not_fit(case: Case, options: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match=f"{next(iter(options))}: expected"):
        case.call(case.draw(2, 6), **options)


@pytest.mark.parametrize("case", MODULES, ids=str)
@pytest.mark.parametrize("state", [torch.zeros(2), (), {}, 5, MambaState(torch.zeros(1), None)], ids=str)  # type: ignore[arg-type]
def test_states_of_something_else(case: Case, state: Any) -> None:
    x = torch.randn(2, 6, case.module.d_model, dtype=torch.float64)
    with pytest.raises(StateError, match="expected"):
        case.module(x, state)


@pytest.mark.parametrize("case", OPS, ids=str)
@pytest.mark.parametrize("state", [(), [torch.zeros(2)], 5], ids=str)
def test_states_of_ops_that_are_no_tensors(case: Case, state: Any) -> None:
    function = getattr(ops, case.name.split("-")[0], ops.delta_rule)
    arguments = {name: x for name, x in case.draw(2, 6).items() if not name.startswith("state")}
    with pytest.raises(StateError, match="expected"):
        function(**arguments, state=state)


@pytest.mark.parametrize("case", RECURRENT, ids=str)
@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, None], ids=str)
def test_chunk_sizes_that_are_none(case: Case, chunk_size: Any) -> None:
    with pytest.raises(ConfigError, match="chunk_size: expected"):
        case.call(case.draw(2, 6), chunk_size=chunk_size)


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_backend_names(case: Case) -> None:
    tensors = case.draw(2, 6)
    with pytest.raises(ConfigError, match=r"expected one of auto, .*chunked, .*reference, got 'fastest'"):
        case.call(tensors, backend="fastest")
    for kernels in set(case.backends) & set(KERNELS):
        with pytest.raises(BackendUnavailable, match="use 'chunked' or 'auto'"):
            case.call(tensors, backend=kernels)
    with pytest.raises(SynapseError):
        case.call(tensors, backend=None)


def test_the_report_names_what_can_be_asked_for() -> None:
    report = ops.backends()
    for case in RECURRENT:
        name = case.name.split("-")[0].replace("hebbian", "delta_rule")
        absent = {"triton"} if _triton.missing() else set()
        absent |= {"mamba_ssm"} if _mamba_ssm.missing(name) else set()
        assert set(report[name]) == set(case.backends) - absent
    report.clear()
    assert ops.backends()["ssd"][-1] == "reference"


def test_unknown_rule() -> None:
    q, k, v = torch.randn(3, 1, 2, 1, 4)
    with pytest.raises(ConfigError, match="rule: expected 'delta' or 'hebbian', got 'oja'"):
        ops.delta_rule(q, k, v, torch.ones(1, 2, 1), rule="oja")  # type: ignore[arg-type]


def test_heads_that_no_group_divides() -> None:
    with pytest.raises(ShapeError, match="groups that divides H=3, got 2"):
        ops.ssd(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3), -torch.ones(3), *torch.ones(2, 1, 2, 2, 5))


def test_the_message_of_the_design() -> None:
    """The example the errors are modelled on."""
    q = torch.randn(2, 16, 8, 32)
    with pytest.raises(
        ShapeError, match=r"k: expected \(B, T, H, K\) with B=2, T=16, H=8, K=32, got \(2, 16, 4, 32\); check n_heads"
    ):
        ops.mlstm(q, q[:, :, :4], q, q[..., 0], q[..., 0])


def experts(**changed: Tensor) -> dict[str, Tensor]:
    return {
        "x": torch.randn(6, 8), "w_in": torch.randn(3, 8, 10), "w_out": torch.randn(3, 5, 8),
        "indices": torch.randint(0, 3, (6, 2)), "weights": torch.rand(6, 2),
    } | changed  # fmt: skip


def test_experts_that_do_not_fit() -> None:
    for what, tensors in misfits(experts()):
        with pytest.raises(ShapeError, match=r"expected .*got"):
            pytest.fail(f"{what}: accepted {ops.expert_swiglu(**tensors).shape}")
    for name, x in experts().items():
        wrong = x.float() if name == "indices" else x.long()
        with pytest.raises(ShapeError, match=r"expected an? .* dtype"):
            ops.expert_swiglu(**experts(**{name: wrong}))


@pytest.mark.parametrize("backend", ["auto", "sorted", "reference"])
@pytest.mark.parametrize("index", [3, 100, -2])
def test_experts_that_do_not_exist(index: int, backend: str) -> None:
    indices = torch.randint(0, 3, (6, 2))
    indices[4, 1] = index
    with pytest.raises(ShapeError, match=rf"indices: expected .*-1 .*2.*got {index}"):
        ops.expert_swiglu(**experts(indices=indices), backend=backend)


def test_experts_of_another_dtype_than_the_tokens() -> None:
    with pytest.raises(ShapeError, match=r"w_in: expected .*float32, got torch.float64"):
        ops.expert_swiglu(**experts(w_in=torch.randn(3, 8, 10, dtype=torch.float64)))


def test_expert_backends() -> None:
    with pytest.raises(ConfigError, match="expected one of auto, sorted, grouped, rowwise, reference, got 'chunked'"):
        ops.expert_swiglu(**experts(), backend="chunked")
