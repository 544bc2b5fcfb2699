"""The parts of the benchmark beside the peers, and how much each of them measures.

They stand here and not in the command, since a fresh process cannot import what `python -m` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.measure import Figure
from benchmarks.peers import functions, language, parts
from benchmarks.processes import processes
from synapse_arch import SynapseConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are what the goals are about."""

    small: SynapseConfig = field(default_factory=lambda: SynapseConfig(vocab_size=4096, d_model=256, n_layers=4))
    large: SynapseConfig = field(default_factory=lambda: SynapseConfig.preset("small", n_layers=6))
    shapes: tuple[tuple[int, int], ...] = functions.SHAPES
    looped: int = 512
    peaks: bool = True
    rounds: int = 9
    lengths: tuple[int, ...] = (512, 4096)
    prefill: tuple[int, ...] = (2048, 16384, 65536)
    batches: tuple[int, ...] = (1, 8)
    read: tuple[int, ...] = (64, 4096, 65536)
    peers_read: tuple[int, ...] = (64, 4096)
    turns: int = 10
    compiled: bool = True
    cases: tuple[tuple[int, int, int], ...] = parts.CASES


QUICK = Sizes(
    small=SynapseConfig(vocab_size=256, d_model=128, n_layers=1), large=SynapseConfig(vocab_size=512, n_layers=1),
    shapes=((1, 128),), looped=32, peaks=False, rounds=3, lengths=(64,), prefill=(128, 256), batches=(1,),
    read=(16, 64), peers_read=(16,), turns=1, compiled=False, cases=((8, 2, 128),),
)  # fmt: skip


def _training(sizes: Sizes) -> list[Figure]:
    figures = []
    for config in (sizes.small, sizes.large):
        peers = list(language.models.PEERS)
        for length in sorted(sizes.lengths):
            batch = 4 if length <= 512 and config is sizes.small else 1
            rounds = sizes.rounds if config is sizes.small else max(3, sizes.rounds // 3)
            found = language.training(config, batch=batch, length=length, rounds=rounds, peers=peers)
            figures, peers = [*figures, *found], language.patient(found)
    return figures


MEASUREMENTS: dict[str, Callable[[Sizes], list[Figure]]] = {
    "ops": lambda s: functions.measure(s.shapes, s.rounds, looped=s.looped, peaks=s.peaks),
    "training": _training,
    "prefill": lambda s: language.prefill(s.small, lengths=s.prefill, rounds=s.rounds),
    "decoding": lambda s: language.decoding(
        s.small,
        batches=s.batches,
        lengths=s.read,
        peer_lengths=s.peers_read,
        turns=s.turns,
        compiled=s.compiled,
    ),
    "dispatch": lambda s: parts.dispatch(s.cases, s.rounds),
    "memory": lambda s: language.training_memory(s.small, length=s.lengths[-1]),
    "start": lambda s: parts.start(s.rounds),
}
"""Everything that can be measured, in order."""


def measure(name: str, sizes: Sizes) -> list[Figure]:
    """Measures a part in a process of its own: what another part left in memory would change its times.

    Raises:
        KeyError: there is no such part.
    """
    with processes(prepare=functions.quiet) as pool:
        return pool.submit(_part, name, sizes).result()


def _part(name: str, sizes: Sizes) -> list[Figure]:
    return MEASUREMENTS[name](sizes)
