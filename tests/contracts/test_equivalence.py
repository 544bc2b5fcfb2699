"""One result, however it is computed: fast or by the definition, in chunks of any size, in one pass or in pieces."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from tests.contracts.cases import CASES, MODULES, RECURRENT, Case, packing
from tests.contracts.transforms import in_pieces
from tests.helpers import Tensors, assert_same, cast, flatten, measure

LENGTHS = (1, 63, 64, 65, 200)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_fast_form_equals_definition(case: Case, length: int, packed: bool, dtype: torch.dtype) -> None:
    tensors = cast(case.draw(2, length), dtype)
    options = packing(2, length) if packed else {}
    expected = measure(lambda z: case.call(z, backend="reference", **options), tensors)
    for backend in ("chunked", "auto"):
        assert_same(measure(lambda z, b=backend: case.call(z, backend=b, **options), tensors), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 50, 64, 70, 71, 1000])
@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_chunk_size_changes_nothing(case: Case, chunk_size: int) -> None:
    tensors = case.draw(2, 70)
    options = packing(2, 70)
    expected = measure(lambda z: case.call(z, backend="reference", **options), tensors)
    assert_same(measure(lambda z: case.call(z, chunk_size=chunk_size, **options), tensors), expected)


@pytest.mark.parametrize("case", [case for case in RECURRENT if case.name != "selective_scan"], ids=str)
def test_a_strong_decay_costs_no_digits(case: Case) -> None:
    """Decays as differences of running sums would be off by 1e-3 behind a decay of e^-1e4, in float32."""
    tensors = cast(case.draw(2, 70), torch.float32)
    name = {"ssd": "dt", "mlstm": "f"}.get(case.name, "log_decay")
    tensors[name][:, ::20] = 1e4 if name == "dt" else -1e4
    if name == "dt":
        tensors["x"][:, ::20] = 1e-4  # so that the write stays of the size of the others
    expected = measure(lambda z: case.call(z, backend="reference"), cast(tensors, torch.float64))
    assert_same(measure(case.call, tensors), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_split_equals_the_full_pass(case: Case) -> None:
    length = 67
    tensors = case.draw(2, length)
    expected = measure(case.call, tensors)
    for split in (1, 2, 3, 31, 32, 33, 63, 64, 65, 66):
        assert_same(measure(lambda z, s=split: in_pieces(case, z, [0, s, length]), tensors), expected)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_single_steps_equal_the_full_pass(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(case.draw(2, 65), dtype)
    steps = measure(lambda z: in_pieces(case, z, list(range(66))), tensors)
    assert_same(steps, measure(case.call, tensors))


@DTYPES
@pytest.mark.parametrize("case", RECURRENT, ids=str)
@pytest.mark.parametrize("fresh", [False, True], ids=["state", "fresh"])
def test_a_step_without_gradients_equals_definition(case: Case, fresh: bool, dtype: torch.dtype) -> None:
    """Decoding has a form of its own: alone, and beside a row that is masked, which keeps its state bit by bit."""
    tensors = cast(case.draw(3, 1), dtype)
    if fresh:
        tensors = {name: x for name, x in tensors.items() if not name.startswith("state")}
    before = {name: x.clone() for name, x in tensors.items()}
    mask = torch.tensor([[True], [False], [True]])
    for options in ({}, {"mask": mask}, {"segment_ids": torch.ones(3, 1, dtype=torch.long)}):
        with torch.no_grad():
            expected, found = case.call(tensors, backend="reference", **options), case.call(tensors, **options)
        assert_same(found, expected)
        for name, x in found.items():
            if name.startswith("state") and not fresh and "mask" in options:
                assert torch.equal(x[1], tensors[name][1]), name
    assert all(torch.equal(before[name], x) for name, x in tensors.items())


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_without_gradients_equal_the_full_pass(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(case.draw(2, 65), dtype)
    mask = torch.ones(2, 65, dtype=torch.bool)
    mask[0, 20:23], mask[1, 64] = False, False
    for options in ({}, {"mask": mask}):
        with torch.no_grad():
            steps, whole = in_pieces(case, tensors, list(range(66)), **options), case.call(tensors, **options)
        for outputs in (steps, whole) if options else ():
            outputs.update({name: x[mask] for name, x in outputs.items() if not name.startswith("state")})
        assert_same(steps, whole)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", MODULES, ids=str)
def test_modules_in_uneven_pieces(case: Case, length: int) -> None:
    tensors = case.draw(2, length)
    bounds = sorted({0, *(b for b in (1, 2, 7, 40, 64, 104, 197) if b < length), length})
    assert_same(measure(lambda z: in_pieces(case, z, bounds), tensors), measure(case.call, tensors))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_split_within_a_segment_and_around_padding(case: Case) -> None:
    tensors = case.draw(2, 40)
    segment_ids = torch.stack([torch.arange(40) // 14, torch.arange(40) // 39])
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 15:18] = False  # ids 1, right after the first segment's end at 14
    mask[1, 10:30] = False
    options = {"segment_ids": segment_ids, "mask": mask}

    def real(outputs: Tensors) -> Tensors:
        return {k: x if k.startswith("state") else x[mask] for k, x in outputs.items()}

    expected = measure(lambda z: real(case.call(z, **options)), tensors)
    for split in (1, 15, 16, 18, 25, 30):
        pieces = measure(lambda z, s=split: real(in_pieces(case, z, [0, s, 40], **options)), tensors)
        assert_same(pieces, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_state_means_a_fresh_one(case: Case) -> None:
    drawn = case.draw(2, 20)
    stateless = {name: x for name, x in drawn.items() if not name.startswith("state")}
    if case.module is None:
        fresh = {name: torch.zeros_like(x) for name, x in drawn.items() if name.startswith("state")}
    else:
        fresh = flatten(case.module.init_state(2), "state")
    assert_same(case.call(stateless), case.call(stateless | fresh))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gpu_computes_the_same(case: Case) -> None:
    tensors, options = case.draw(2, 200), packing(2, 200)
    there = {name: x.cuda() for name, x in options.items()}
    found = measure(lambda z: case.call(z, **there), {name: x.cuda() for name, x in tensors.items()})
    assert_same({name: x.cpu() for name, x in found.items()}, measure(lambda z: case.call(z, **options), tensors))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_gradients_of_ops_against_finite_differences(case: Case, backend: str, packed: bool) -> None:
    options = {"segment_ids": torch.tensor([[0, 0, 0, 1, 1]]), "mask": torch.tensor([[True, True, False, True, True]])}
    check_gradients(case, case.draw(1, 5), backend=backend, chunk_size=2, **(options if packed else {}))


@pytest.mark.parametrize("case", [case for case in CASES if not case.backends], ids=str)
def test_gradients_against_finite_differences(case: Case) -> None:
    check_gradients(case, case.draw(1, 4), segment_ids=torch.tensor([[0, 0, 0, 1]]))


def check_gradients(case: Case, tensors: Tensors, **options: object) -> None:
    names = [name for name, x in tensors.items() if x.dtype == torch.float64]
    rest = {name: x for name, x in tensors.items() if name not in names}

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = case.call(dict(zip(names, leaves, strict=True)) | rest, **options)
        return tuple(x for x in outputs.values() if x.requires_grad)

    leaves = [tensors[name].requires_grad_() for name in names]
    assert gradcheck(function, leaves, fast_mode=True)
