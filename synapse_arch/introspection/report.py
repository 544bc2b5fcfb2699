"""A trace as text: bars for the loads, one line a head, the strongest pathways. Averages over rows and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from synapse_arch.introspection.analysis import Pathway
    from synapse_arch.introspection.records import (
        ExpertStats,
        GateTrace,
        LayerTrace,
        MemoryTrace,
        RoutingTrace,
        SynapseTrace,
    )

Decode = Callable[[int], str]

SHOWN_EXPERTS = 16
SHOWN_TOKENS = 4
BAR = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(trace: SynapseTrace, width: int, decode: Decode | None) -> str:
    """The report of `trace`, lines of at most `width` columns; `decode` turns a token id into text."""
    lines = [*_header(trace)]
    for layer in trace.layers:
        lines += ["", f"── layer {layer.index} " + "─" * (width - 10 - len(str(layer.index)))]
        if layer.routing is not None:
            lines += _routing(layer.routing, trace.expert_stats(layer.index), decode)
        if layer.gates is not None:
            lines += _gates(layer.gates)
        if layer.memory is not None:
            lines += _memory(layer.memory)
    lines += _pathways(trace, trace.pathways())
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in lines)


def bar(value: float, full: float, width: int = BAR, *, mark: float | None = None) -> str:
    """A bar of `width` cells for value in [0, full]; `mark` sets a tick at that value."""
    share = min(1.0, max(0.0, value / full)) if full > 0 and math.isfinite(value) else 0.0
    whole, part = divmod(round(share * width * 8), 8)
    cells = list(("█" * whole + (_EIGHTHS[part] if part else "")).ljust(width))
    if mark is not None and full > 0:
        at = min(width - 1, int(mark / full * width))
        cells[at] = "┃" if cells[at] == "█" else "│"
    return "".join(cells)


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is undefined."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(3, digits)}f}"
    return f"{value:.2e}"


def _header(trace: SynapseTrace) -> Iterator[str]:
    rows, kept = trace.tokens.shape
    real = int((trace.at >= 0).sum())
    noun = "row" if rows == 1 else "rows"
    yield f"Synapse trace, level {trace.level}: {rows} {noun} of {trace.length} tokens; {kept} a row kept, {real} real"
    yield "Means over rows and kept tokens; medians for confidence, half-life, age; load over the whole call"


def _routing(routing: RoutingTrace, stats: tuple[ExpertStats, ...], decode: Decode | None) -> Iterator[str]:
    experts = len(stats)
    yield (
        f"routing   confidence p1/p2 {number(_median(routing.confidence))}   margin {number(_mean(routing.margin))}   "
        f"entropy {number(_mean(routing.entropy))} of {number(math.log(experts))} nats   "
        f"balance {number(_mean(routing.balance))}"
    )
    used = sum(stat.tokens > 0 for stat in stats)
    shown = sorted(stats, key=lambda stat: -stat.load)[:SHOWN_EXPERTS] if experts > SHOWN_EXPERTS else stats
    names = [_name(stat) for stat in shown]
    pad = min(24, max(map(len, names)))
    full = max([stat.load for stat in stats] + [2 / experts if experts > 1 else 1])
    yield f"          {used} of {experts} experts used; │ marks uniform load, {100 / experts:.1f} %"
    yield f"  {'':<{pad + BAR}}      load  special  shuffled    norm  sparse"
    for stat, name in zip(shown, names, strict=True):
        special, shuffled = number(stat.specialisation), number(stat.specialisation_shuffled)
        line = f"  {name[:pad]:<{pad}} {bar(stat.load, full, mark=stat.uniform)} {100 * stat.load:6.1f} %"
        line += f"  {special:>7}  {shuffled:>8}  {number(stat.out_norm):>6}  {number(stat.sparsity):>6}"
        if decode is not None and stat.top_tokens:
            line += "  " + " ".join(repr(decode(token.id)) for token in stat.top_tokens[:SHOWN_TOKENS])
        yield line
    if len(shown) < experts:
        yield f"  … and {experts - len(shown)} experts with less load"


def _gates(gates: GateTrace) -> Iterator[str]:
    yield "language  head    input i   forget f     output    half-life   memory age    norm of C"
    for h in range(gates.log_i.shape[-1]):
        i, f, o, norm = (
            number(_mean(values[..., h]))
            for values in (gates.log_i.exp(), gates.log_f.exp(), gates.o_mean, gates.C_norm)
        )
        half, age = (number(_median(values[..., h])) + " tok" for values in (gates.half_life, gates.age_tokens))
        yield f"          {h:>4}  {i:>9}  {f:>9}  {o:>9}  {half:>11}  {age:>11}  {norm:>11}"


def _memory(memory: MemoryTrace) -> Iterator[str]:
    writes, reads = int(memory.writes.sum()), int(memory.reads.sum())
    yield f"memory    {writes} writes, {reads} reads; room for {memory.capacity} orthogonal keys a head"
    yield "          head      write      decay  collision  read conf    norm of W  utilisation"
    utilisation = memory.utilisation.mean(0).tolist()
    for h in range(memory.write.shape[-1]):
        fields = (memory.write, memory.decay, memory.collision, memory.read_conf, memory.fro_norm)
        w, d, c, r, n = (number(_mean(field[..., h])) for field in fields)
        used = utilisation[h]
        yield f"          {h:>4}  {w:>9}  {d:>9}  {c:>9}  {r:>9}  {n:>11}  {bar(used, 1)} {100 * used:.0f} %"


def _pathways(trace: SynapseTrace, paths: tuple[Pathway, ...]) -> Iterator[str]:
    across = [path for path in paths if path.source[0] != path.target[0]]
    inside = [path for path in paths if path.source[0] == path.target[0]]
    groups: tuple[tuple[str, str, list[Pathway], Callable[[Pathway], float]], ...] = (
        ("Pathways between layers (mean product of the two mixing weights)", "→", across, lambda p: p.weight),
        ("Experts chosen together (running co-activation)", "+", inside, lambda p: p.hebbian),
    )
    for title, sign, group, strength in groups:
        if not group:
            continue
        yield ""
        yield title
        full = max(map(strength, group))
        ends = [(_end(trace, path.source), _end(trace, path.target)) for path in group]
        pad = max(len(end) for pair in ends for end in pair)
        for path, (source, target) in zip(group, ends, strict=True):
            value = strength(path)
            yield f"  {source:<{pad}} {sign} {target:<{pad}}  {bar(value, full)} {number(value)}"


def _end(trace: SynapseTrace, end: tuple[int, int]) -> str:
    layer, slot = end
    return f"layer {layer} {expert_name(trace.layer(layer), slot, trace.labels)[:24]}"


def expert_name(layer: LayerTrace, slot: int, labels: tuple[str, ...] | None) -> str:
    """The user's label, or "expert" and the stable id."""
    if labels:
        return labels[slot]
    return f"expert {slot if layer.expert_ids is None else int(layer.expert_ids[slot])}"


def _name(stat: ExpertStats) -> str:
    return stat.label if stat.label else f"expert {stat.id}"


def _mean(x: Tensor) -> float:
    return float(torch.nanmean(x.double()))


def _median(x: Tensor) -> float:
    return float(torch.nanmedian(x.double()))
