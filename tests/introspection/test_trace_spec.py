import pytest
import torch

from synapse_arch.errors import ConfigError
from synapse_arch.introspection import TraceSpec


def test_levels_contain_the_previous() -> None:
    wanted = {level: [TraceSpec(level=level).wants(deep) for deep in ("routes", "gates", "full")] for level in
              ("routes", "gates", "full")}  # fmt: skip
    assert wanted == {"routes": [True, False, False], "gates": [True, True, False], "full": [True, True, True]}


def test_layers_select() -> None:
    assert TraceSpec().covers(7)
    assert TraceSpec(layers=(0, 2)).covers(2)
    assert not TraceSpec(layers=(0, 2)).covers(1)


@pytest.mark.parametrize(
    ("length", "every", "most", "kept"),
    [
        (5, 1, 1024, [0, 1, 2, 3, 4]),
        (7, 3, 1024, [0, 3, 6]),
        (8, 3, 2, [3, 6]),
        (9, 4, 1, [8]),
        (3, 5, 4, [0]),
        (1, 1, 1, [0]),
        (6, 1, 2, [4, 5]),
    ],
)
def test_kept_offsets(length: int, every: int, most: int, kept: list[int]) -> None:
    spec = TraceSpec(every=every, max_tokens=most)
    assert spec.positions(length).tolist() == kept
    assert spec.count(length) == len(kept)
    x = torch.arange(2 * length).view(2, length)
    assert spec.keep(x).tolist() == x[:, kept].tolist()


def test_kept_values_are_detached_and_own_their_memory() -> None:
    x = torch.randn(2, 4000, 3, requires_grad=True)
    kept = TraceSpec(max_tokens=10).keep(x)
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.numel() * 4


@pytest.mark.parametrize(
    "bad",
    [
        {"level": "everything"},
        {"every": 0},
        {"every": 1.5},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"layers": (-1,)},
        {"layers": (0, 0)},
        {"layers": [0, 1]},
        {"layers": ("0",)},
    ],
)
def test_bad_spec_is_refused(bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got "):
        TraceSpec(**bad)
