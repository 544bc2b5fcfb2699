"""Whole models: training, prefill, decoding and memory, beside transformers' models of equal active size."""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Figure, interleaved, peak_bytes, progress, seconds
from benchmarks.parity import difference
from benchmarks.peers import models
from benchmarks.peers.functions import AGREE
from benchmarks.peers.limits import bandwidth, matrix_rate
from benchmarks.processes import alone
from recipes.malloc import keep_freed_memory
from synapse_arch import SynapseConfig, SynapseModel
from synapse_arch.model.accounting import active_parameters
from synapse_arch.model.compiling import GUARDED, Step, compiled_step, eager_step, settled
from synapse_arch.model.state import SynapseState

SHORT, LONG = 512, 4096
PATIENCE = 20.0
"""Seconds a training step of a peer may take to be timed as often as ours, and with longer texts as well."""
TRAIN_GOALS = {
    SHORT: {"llama": 1.1, "mixtral": 1.1, "mamba2": 3.0},
    LONG: {"llama": 1.5, "mixtral": 1.5, "mamba2": 3.0},
}
DECODE_GOALS = {64: 2.0, 4096: 5.0}
IN_A_ROW = 20
"""Steps of decoding in a model's turn: they follow each other where text is generated, and find what the last one left
in the processor's caches."""


def training(
    config: SynapseConfig,
    *,
    batch: int,
    length: int,
    rounds: int,
    peers: Sequence[str] = tuple(models.PEERS),
) -> list[Figure]:
    """Tokens/s times active parameters, over each peer's, and over the rate of a matrix product.

    A round times every model and the product in turn; a peer that takes longer than PATIENCE is timed once, after one
    step that is not counted.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, length + 1))
    size, a, b = 2048, *torch.randn(2, 2048, 2048)
    jobs: dict[str, Callable[[], object]] = {"ours": _our_step(config, ids), "product": lambda: torch.mm(a, b)}
    sizes, slow = {"ours": active_parameters(config)}, {}
    for name in peers:
        model = models.PEERS[name](config).train()
        step, sizes[name] = models.training_step(model, ids), models.active(model)
        if seconds(step) > PATIENCE:
            slow[name] = [seconds(step)]
        else:
            jobs[name] = step
    times = interleaved(jobs, rounds, f"training, {_size(config)}, T {length}") | slow
    rate = {name: [6 * sizes[name] * batch * length / value for value in times[name]] for name in sizes}
    product = [2 * size**3 / value for value in times["product"]]
    what = f"training, {_size(config)}, B {batch}, T {length:,}"
    details = {"active parameters": sizes, "seconds": times}
    figures = [
        Figure(
            what=f"{what}: 6 x active parameters x tokens/s over the matrix-product rate",
            values=_over(rate["ours"], product), unit="share", goal=0.7, better="more", details=details,
        )
    ]  # fmt: skip
    for name in peers:
        goal = TRAIN_GOALS.get(length, {}).get(name)
        ratio = f"{what}: active parameters x tokens/s over {name}'s"
        ours = [statistics.median(rate["ours"])] if name in slow else rate["ours"]
        figures.append(Figure(what=ratio, values=_over(ours, rate[name]), unit="ratio", goal=goal, better="more"))
    return figures


def patient(figures: Sequence[Figure]) -> list[str]:
    """The peers of a `training` whose steps took no longer than PATIENCE."""
    times = figures[0].details["seconds"]
    return [name for name in models.PEERS if name in times and statistics.median(times[name]) <= PATIENCE]


def _size(config: SynapseConfig) -> str:
    return f"d {config.d_model} x {config.n_layers}"


def training_memory(config: SynapseConfig, *, length: int) -> list[Figure]:
    """What two training steps add to a fresh process, over Mixtral's; ours also with its layers recomputed."""
    names = ("ours", "ours, layers recomputed", "mixtral")
    found = {name: alone(_training_peak, name, config, length) for name in names}
    what = f"training, {_size(config)}, B 1, T {length:,}: memory over mixtral's"
    goals = {"ours": 0.7, "ours, layers recomputed": None}
    return [
        Figure(
            what=name.replace("ours", what), values=(found[name] / found["mixtral"],), unit="ratio", goal=goal,
            details={"bytes": found},
        )
        for name, goal in goals.items()
    ]  # fmt: skip


def prefill(config: SynapseConfig, *, lengths: Sequence[int], rounds: int) -> list[Figure]:
    """Reading a prompt: the share of the matrix rate at the first length, the time a token at the others over it."""
    torch.manual_seed(0)
    model = SynapseModel(config).eval()
    ids = torch.randint(config.vocab_size, (1, max(lengths)))
    first, *rest = lengths

    def run(length: int) -> Callable[[], object]:
        def read() -> None:
            with torch.inference_mode():
                model(ids[:, :length], logits_to_keep=1)

        return read

    rates, shares = [matrix_rate()], []
    work = 2 * (active_parameters(config) - config.vocab_size * config.d_model) * first  # one position has logits
    run(first)()
    for _ in progress(range(rounds), "prefill"):
        shares.append(work / seconds(run(first)))
        rates.append(matrix_rate(rounds=1))
    figures = [
        Figure(
            what=f"prefill, T {first:,}: 2 x active parameters x tokens/s over the matrix-product rate",
            values=_over(shares, rates[1:]), unit="share", goal=0.75, better="more",
        )
    ]  # fmt: skip
    for length in rest:
        times = interleaved({"first": run(first), "long": run(length)}, max(3, rounds // 3), f"prefill, T {length:,}")
        ratio = tuple(b * first / (a * length) for a, b in zip(times["first"], times["long"], strict=True))
        what = f"prefill: time a token at T {length:,} over T {first:,}"
        figures.append(Figure(what=what, values=ratio, unit="ratio", goal=1.15))
    return figures


def decoding(
    config: SynapseConfig,
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    peer_lengths: Sequence[int],
    turns: int,
    compiled: bool,
) -> list[Figure]:
    """A step of one token: share of the reading limit, speed over the peers', growth with what was read.

    Models take turns of IN_A_ROW steps. With `compiled` all of it again for the step that torch.compile makes, where it
    equals the other; the peers run as they are.
    """
    kinds = {"decoding": eager_step} | ({"decoding compiled": compiled_step()} if compiled else {})
    torch.manual_seed(0)
    model = SynapseModel(config).eval()
    ids = torch.randint(config.vocab_size, (1, max(lengths)))
    states = {length: _read(model, ids[:, :length]) for length in {*lengths, *peer_lengths}}
    figures, rate = [], bandwidth(rounds=25)  # one for all: two measurements may differ by half
    for batch, (kind, step) in itertools.product(batches, kinds.items()):
        if step is not eager_step:
            off = _off(model, states[lengths[0]], batch, step)
            what = f"{kind}, B {batch}: logits and state from those of the uncompiled step"
            figures.append(Figure(what=what, values=(off,), unit="relative", goal=AGREE, exact=True))
            if off > AGREE:
                continue
        ours = {length: _our_decoder(model, states[length], batch, step) for length in lengths}
        limit = _read_bytes(model, batch) / rate
        jobs = {str(length): step for length, step in ours.items()}
        times = _in_turns(jobs, turns, f"{kind}, B {batch}")
        first, *rest = lengths
        what = f"{kind}, B {batch}: time to read every active weight once over a step's, after {first:,} tokens"
        values = tuple(limit / value for value in times[str(first)])
        details = {"bytes_per_second": rate}
        figures.append(Figure(what=what, values=values, unit="share", goal=0.6, better="more", details=details))
        for length in rest:
            ratio = _over(times[str(length)], times[str(first)])
            what = f"{kind}, B {batch}: time a step after {length:,} tokens over after {first:,}"
            figures.append(Figure(what=what, values=ratio, unit="ratio", goal=1.1))
        for length in peer_lengths:
            our_step = _our_decoder(model, states[length], batch, step)
            figures += _against(config, our_step, ids[:, :length].repeat(batch, 1), turns, kind)
    return figures


def _against(config: SynapseConfig, our_step: Callable[[], None], ids: Tensor, turns: int, kind: str) -> list[Figure]:
    """Our step against the attention models', all after the same tokens."""
    jobs: dict[str, Callable[[], object]] = {"ours": our_step}
    for name in ("llama", "mixtral"):
        jobs[name] = models.decoder(models.PEERS[name](config).eval(), ids, again=IN_A_ROW)
    batch, length = ids.shape
    times = _in_turns(jobs, turns, f"{kind} after {length:,}")
    gc.collect()
    return [
        Figure(
            what=f"{kind}, B {batch}, after {length:,} tokens: {name}'s time a step over ours",
            values=_over(times[name], times["ours"]), unit="ratio", goal=DECODE_GOALS.get(length), better="more",
            details={"seconds": {model: statistics.median(found) for model, found in times.items()}},
        )
        for name in ("llama", "mixtral")
    ]  # fmt: skip


def _in_turns(jobs: dict[str, Callable[[], object]], turns: int, what: str) -> dict[str, list[float]]:
    """Seconds a step of each job, one number for each of its turns."""

    def turn(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(IN_A_ROW):
                step()

        return run

    times = interleaved({name: turn(step) for name, step in jobs.items()}, turns, what)
    return {name: [value / IN_A_ROW for value in values] for name, values in times.items()}


def _our_step(config: SynapseConfig, ids: Tensor, *, recompute: bool = False) -> Callable[[], None]:
    model = SynapseModel(config).train()
    model.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.inference_mode()
def _read(model: SynapseModel, ids: Tensor) -> SynapseState:
    """The state after ids (1, T)."""
    return model(ids, logits_to_keep=1).state


def _our_decoder(model: SynapseModel, state: SynapseState, batch: int, step: Step) -> Callable[[], None]:
    """Steps of one token, in as many rows that have read the same."""
    with torch.inference_mode():
        state = state.select([0] * batch)
    ids = torch.zeros(batch, 1, dtype=torch.long)
    step = step if step is eager_step else settled(step)  # as `generate` does

    def read_one() -> None:
        nonlocal state
        with torch.inference_mode():
            _, state = step(model, ids, state, None)

    for _ in range(GUARDED):  # what is set up once
        read_one()
    return read_one


@torch.inference_mode()
def _off(model: SynapseModel, state: SynapseState, batch: int, step: Step) -> float:
    """How far one step's logits and state are from those of the uncompiled step."""
    state, ids = state.select([0] * batch), torch.zeros(batch, 1, dtype=torch.long)
    outputs = (form(model, ids, state, None) for form in (step, eager_step))
    found, expected = ({"logits": logits, **after.to_tensors()} for logits, after in outputs)
    return difference(found, expected)


def _read_bytes(model: SynapseModel, batch: int) -> int:
    """Bytes of weights that a step must read: all active ones, and of a batch every expert that a row may visit."""
    pool = sum(p.numel() for name, p in model.named_parameters() if ".experts.w_" in name)
    config = model.config
    visited = min(1.0, batch * config.thalamus.top_k / max(1, config.n_experts))
    chosen = config.thalamus.top_k / max(1, config.n_experts)
    return round(4 * (active_parameters(model) + pool * (visited - chosen)))


def _training_peak(name: str, config: SynapseConfig, length: int) -> int:
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, length + 1))
    if name.startswith("ours"):
        before, step = peak_bytes(), _our_step(config, ids, recompute=name.endswith("recomputed"))
    else:
        import transformers  # what its import takes is not counted  # noqa: F401

        before, model = peak_bytes(), models.PEERS[name](config).train()
        step = models.training_step(model, ids)
    for _ in range(2):
        step()
    return peak_bytes() - before


def _over(above: Sequence[float], below: Sequence[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(above, below, strict=True))
