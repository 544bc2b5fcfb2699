"""Experts that do the same in the same slots: one model's experts matched to another's before the two are merged.

A pool of experts is a set: renumbering its experts, and the router's rows with them, leaves the model's function as it
was. Two models trained apart may have settled on different numbers, and averaging slot by slot would then mix experts
that have nothing in common. Here each layer's experts are matched by an optimal assignment (Kuhn 1955; for networks
Ainsworth et al. 2023, "Git Re-Basin", §3), which moves the weights, or what the experts answer to a text, the least.

E experts, n numbers of one expert, D model width, F expert width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from merge.io import Tensors
from synapse_arch import ExpertPool, SynapseModel
from synapse_arch.errors import BackendUnavailable, ShapeError, explain

_SEPARATE = re.compile(r"(?P<pool>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)")
_STACKED: tuple[tuple[re.Pattern[str], tuple[int, ...]], ...] = (
    (re.compile(r"(?P<pool>.+)\.experts\.(w_in|w_out)"), (0,)),
    (re.compile(r"(?P<pool>.+)\.experts\.(gate_up_proj|down_proj)(_bias)?"), (0,)),
)
_ROUTING: tuple[tuple[re.Pattern[str], tuple[int, ...]], ...] = (
    (re.compile(r"(?P<pool>.+)\.thalamus\.(router\.weight|router_bias)"), (0,)),
    (re.compile(r"(?P<pool>.+)\.thalamus\.pathways"), (0, 1)),
    (re.compile(r"(?P<pool>.+)\.(gate|router)\.(weight|bias|e_score_correction_bias)"), (0,)),
)
_IDS = ".experts.expert_ids"
_BLOCK = 1 << 18
"""Columns compared at a time, so that float64 copies stay small."""


class Pool(NamedTuple):
    """The experts of one layer.

    Attributes:
        size: E.
        axes: of each stacked tensor the axes that count experts: (0,) for weights, biases and router rows,
            (0, 1) for a matrix of experts by experts.
        separate: names of tensors that hold one expert each, with "{}" for its number.
        weights: those of `axes` and `separate` that are compared: all but biases and matrices of the router.
    """

    size: int
    axes: dict[str, tuple[int, ...]]
    separate: tuple[str, ...]
    weights: tuple[str, ...]


def find_pools(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Pool]:
    """The pools of experts of a checkpoint, by the names of their layers.

    Known are SynapseModel, and Hugging Face's layouts: a tensor an expert (Mixtral, Qwen, OLMoE) or stacked (gpt-oss).

    Args:
        shapes: of every tensor, by name.

    Raises:
        ShapeError: tensors of one pool speak of different numbers of experts.

    >>> pools = find_pools({"layers.0.experts.w_in": (4, 8, 12), "layers.0.thalamus.router.weight": (4, 8)})
    >>> pools["layers.0"].size, sorted(pools["layers.0"].axes)
    (4, ['layers.0.experts.w_in', 'layers.0.thalamus.router.weight'])
    """
    axes: dict[str, dict[str, tuple[int, ...]]] = {}
    separate: dict[str, dict[str, set[int]]] = {}
    for name in shapes:
        if found := _SEPARATE.fullmatch(name):
            template = f"{found['pool']}.experts.{{}}.{found['rest']}"
            separate.setdefault(found["pool"], {}).setdefault(template, set()).add(int(found["expert"]))
        for pattern, counted in _STACKED:
            if found := pattern.fullmatch(name):
                axes.setdefault(found["pool"], {})[name] = counted
    pools = {}
    for pool in sorted(axes.keys() | separate.keys()):
        stacked, single = axes.get(pool, {}), separate.get(pool, {})
        compared = (*stacked, *single)
        for name in shapes:
            for pattern, counted in _ROUTING:
                if (found := pattern.fullmatch(name)) and found["pool"] == pool:
                    stacked[name] = counted
        rows = tuple(name for name in stacked if name not in compared and name.endswith(".weight"))
        size = _size(pool, shapes, stacked, single)
        pools[pool] = Pool(size, stacked, tuple(single), (*compared, *rows))
    return pools


def _size(
    pool: str,
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, tuple[int, ...]],
    separate: Mapping[str, set[int]],
) -> int:
    counts = {name: shapes[name][axis] for name, counted in axes.items() for axis in counted}
    counts |= {name: len(experts) if experts == set(range(len(experts))) else -1 for name, experts in separate.items()}
    if len(set(counts.values())) > 1 or -1 in counts.values():
        remedy = "the checkpoint is incomplete, or its router is of a kind that --align-experts does not know"
        raise ShapeError(explain(f"experts of {pool}", "one number of experts in every tensor", counts, remedy))
    return next(iter(counts.values()))


@dataclass(frozen=True)
class Aligned:
    """A checkpoint with its experts in the slots of the reference's, read tensor by tensor.

    Every tensor that counts experts moves: weights, router rows, balancing biases, Hebbian pathways. Stable ids
    (`expert_ids`) are the reference's: a matched expert goes by the name of the one it was matched to.

    Attributes:
        source: the checkpoint.
        reference: the one it was matched to.
        permutations: of each pool (E,) int64: which of the source's experts takes each slot.
    """

    source: Tensors
    reference: Tensors
    permutations: Mapping[str, Tensor]
    _moves: dict[str, tuple[str, tuple[int, ...], Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        moves: dict[str, tuple[str, tuple[int, ...], Tensor]] = {}
        for name, pool in find_pools(self.source.shapes).items():
            order = self.permutations[name]
            moves |= {stacked: (stacked, axes, order) for stacked, axes in pool.axes.items()}
            for slot, expert in enumerate(order.tolist()):
                moves |= {one.format(slot): (one.format(expert), (), order) for one in pool.separate}
        object.__setattr__(self, "_moves", moves)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return self.source.shapes

    @property
    def moved(self) -> int:
        """How many experts changed their slot, over all pools."""
        return sum(int((order != torch.arange(len(order))).sum()) for order in self.permutations.values())

    def tensor(self, name: str) -> Tensor:
        """One tensor, its experts in the reference's order."""
        if name.endswith(_IDS) and name in self.reference.shapes:
            return self.reference.tensor(name)
        origin, axes, order = self._moves.get(name, (name, (), torch.empty(0)))
        tensor = self.source.tensor(origin)
        for axis in axes:
            tensor = tensor.index_select(axis, order)
        return tensor


def check_pools(reference: Tensors, source: Tensors) -> dict[str, Pool]:
    """The pools of two checkpoints whose experts can be matched one to one.

    Raises:
        ShapeError: the two have other pools, or pools of other sizes, or none.
    """
    pools, others = find_pools(reference.shapes), find_pools(source.shapes)
    sizes, got = ({name: pool.size for name, pool in found.items()} for found in (pools, others))
    if not sizes or sizes != got:
        differing = [f"{name}: {sizes.get(name)} and {got.get(name)}" for name in sorted(sizes.keys() | got.keys())]
        remedy = (
            "experts can be matched only one to one: merge models with pools of one size, or make a pool of dense "
            "models with python -m merge.upcycle"
        )
        expected = "as many experts in each layer of every model, and at least one pool"
        raise ShapeError(explain("--align-experts", expected, differing[:10] or "no experts", remedy))
    return pools


def align(reference: Tensors, source: Tensors, similarity: Mapping[str, Tensor] | None = None) -> Aligned:
    """The source with each pool's experts in the slots of the reference's that they are most like.

    Args:
        reference: whose order counts: the base, or the first model where there is none.
        source: the checkpoint to reorder; not changed.
        similarity: of each pool (E, E), such as `by_activations` gives; None compares the weights.

    Raises:
        ShapeError: the two have other pools, or pools of other sizes.
        BackendUnavailable: scipy is missing.
    """
    pools = check_pools(reference, source)
    if similarity is None:
        similarity = {name: by_weights(pool, reference, source) for name, pool in pools.items()}
    return Aligned(source, reference, {name: assign(similarity[name]) for name in pools})


def assign(similarity: Tensor) -> Tensor:
    """The one-to-one assignment of the largest sum, exactly (by scipy's linear_sum_assignment).

    Args:
        similarity: (E, E) finite; row: slot, column: expert that may take it.

    Returns:
        (E,) int64, the expert of each slot.

    >>> assign(torch.tensor([[0.9, 0.8], [0.9, 0.1]]))  # greedily the first slot would take expert 0
    tensor([1, 0])
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as cause:
        remedy = "pip install 'synapse-arch[merge]'"
        raise BackendUnavailable(explain("--align-experts", "scipy", "it is not installed", remedy)) from cause
    if not bool(similarity.isfinite().all()):
        raise ShapeError(explain("similarity of experts", "finite numbers", "NaN or infinite ones"))
    return torch.as_tensor(linear_sum_assignment(similarity.numpy(), maximize=True)[1], dtype=torch.int64)


def by_weights(pool: Pool, reference: Tensors, source: Tensors) -> Tensor:
    """(E, E) float64 ⟨a_i, b_j⟩ over all weights of an expert and its router row, of reference i and source j.

    The assignment that maximises its sum minimises Σ ‖a_i − b_j‖², as the norms do not depend on the assignment.
    One tensor of each model is held at a time; where each expert has a tensor of its own, one of each expert.
    """
    total = torch.zeros(pool.size, pool.size, dtype=torch.float64)
    for name in pool.weights:
        total += products(*(_rows(name, pool, tensors) for tensors in (reference, source)))
    return total


def _rows(name: str, pool: Pool, tensors: Tensors) -> Tensor:
    """(E, n): what a name holds of each expert."""
    if name in pool.separate:
        return torch.stack([tensors.tensor(name.format(expert)).flatten() for expert in range(pool.size)])
    return tensors.tensor(name).flatten(1)


def products(a: Tensor, b: Tensor) -> Tensor:
    """(E, n), (E, n) -> (E, E) float64 inner products, a block of columns at a time."""
    blocks = zip(a.split(_BLOCK, 1), b.split(_BLOCK, 1), strict=True)
    return sum((x.double() @ y.double().T for x, y in blocks), torch.zeros(len(a), len(b), dtype=torch.float64))


@torch.no_grad()
def by_activations(
    reference: SynapseModel, model: SynapseModel, ids: Tensor, *, window: int = 256
) -> dict[str, Tensor]:
    """(E, E) float64 ⟨y_i, y'_j⟩ of each pool: y_i is all that expert i of the reference answers to a text.

    Each model reads the text itself with its state carried along, and every expert answers to every token, whether or
    not the router chose it.

    Args:
        reference: whose order counts.
        model: the one to be matched.
        ids: (B, T) the calibration text.
        window: tokens read at a time.
    """
    total: dict[str, Tensor] = {}
    states = [one.init_state(len(ids)) for one in (reference, model)]
    for piece in ids.split(window, dim=1):
        answers: list[dict[str, Tensor]] = [{}, {}]
        for index, one in enumerate((reference, model)):
            with _listening(one, answers[index]):
                states[index] = one(piece, states[index]).state
        for name, answer in answers[0].items():
            similarity = products(answer, answers[1][name])
            total[name] = total[name] + similarity if name in total else similarity
    return total


@contextmanager
def _listening(model: SynapseModel, answers: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a pass of the model leaves in `answers` what each expert says to each token, (E, B·T·D) of each pool."""

    def listen(name: str) -> Callable[[ExpertPool, tuple[Any, ...]], None]:
        def hear(pool: ExpertPool, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            gates = ((x @ w_in).chunk(2, dim=-1) for w_in in pool.w_in)
            outputs = ((F.silu(gate) * up) @ w for (gate, up), w in zip(gates, pool.w_out, strict=True))
            answers[name] = torch.stack([y.flatten() for y in outputs])

        return hear

    handles = [
        module.register_forward_pre_hook(listen(name.removesuffix(".experts")))
        for name, module in model.named_modules()
        if isinstance(module, ExpertPool)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
