"""GateTrace and MemoryTrace against loops that form every memory, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch.introspection import TraceSpec
from synapse_arch.introspection.matrix_memory import mlstm_stabilizer
from synapse_arch.introspection.probes import gate_trace, memory_trace
from synapse_arch.ops import MLSTMState, delta_rule, mlstm

B, T, H, K, V = 2, 70, 2, 4, 3
CLOSE = {"rtol": 1e-8, "atol": 1e-8}  # square roots of sums with cancellation: half of float64's digits to spare


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def packing(kind: str) -> dict[str, Tensor | None]:
    segments, mask = None, None
    if kind in ("segments", "both"):
        segments = torch.tensor([[0] * 20 + [1] * 15 + [2] * 35, [5] * 3 + [4] * 66 + [9]])
    if kind in ("mask", "both"):
        mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.3
        mask[0, :2] = False
        mask[1, -1] = False
    return {"segment_ids": segments, "mask": mask}


def visits(b: int, segment_ids: Tensor | None, mask: Tensor | None):
    """The real tokens of a row: (t, whether a new segment begins there)."""
    last = None
    for t in range(T):
        if mask is not None and not mask[b, t]:
            continue
        here = 0 if segment_ids is None else int(segment_ids[b, t])
        yield t, last is not None and here != last
        last = here


def norm(x: Tensor) -> float:
    return math.sqrt(float((x * x).sum()))


def memory_inputs(rule: str) -> dict[str, Tensor]:
    beta = 2 * rand(B, T, H, seed=13).sigmoid() if rule == "delta" else rand(B, T, H, seed=13).sigmoid()
    return {
        "q": F.normalize(rand(B, T, H, K, seed=10), dim=-1),
        "k": F.normalize(rand(B, T, H, K, seed=11), dim=-1),
        "v": rand(B, T, H, V, seed=12),
        "beta": beta,
        "log_decay": -rand(B, T, H, seed=14).exp() / 10,
    }


def many(x: dict[str, Tensor], writes: int, gated: bool) -> dict[str, Tensor]:
    """The inputs with several writes a token, the first as it was, and with strengths of the values alone."""
    x = dict(x)
    if writes > 1:
        for name, width, seed in (("k", (K,), 20), ("v", (V,), 21), ("beta", (), 22)):
            more = rand(B, T, writes - 1, H, *width, seed=seed)
            more = F.normalize(more, dim=-1) if name == "k" else more.sigmoid() if name == "beta" else more
            x[name] = torch.cat([x[name][:, :, None], more], 2)
    if gated:
        x["write"] = rand(*x["v"].shape, seed=23).sigmoid()
    return x


def memory_oracle(x: dict[str, Tensor], state: Tensor | None, rule: str, pack: dict[str, Tensor | None]) -> Tensor:
    """collision, read_conf and norm of every token: (3, B, T, H), NaN where undefined or padding."""
    out = torch.full((3, B, T, H), torch.nan, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            w = torch.zeros(K, V, dtype=torch.float64) if state is None else state[b, h].clone()
            for t, begins in visits(b, **pack):
                if begins:
                    w = torch.zeros_like(w)
                q, met = x["q"][b, t, h], []
                several = x["k"].dim() == 5
                ks, vs, betas, *rest = (
                    z[b, t, :, h] if several else z[None, b, t, h]
                    for z in (x[name] for name in ("k", "v", "beta", "write") if name in x)
                )
                amounts = rest[0] if rest else betas[:, None]
                for m, (k, v, beta, amount) in enumerate(zip(ks, vs, betas, amounts, strict=True)):
                    if norm(w) > 0:
                        met.append(norm(w.T @ k) / (norm(w) * norm(k)))
                    w = w if m else x["log_decay"][b, t, h].exp() * w
                    w = w + torch.outer(k, amount * v - beta * (w.T @ k) * (rule == "delta"))
                out[0, b, t, h] = sum(met) / len(met) if met else torch.nan
                out[1, b, t, h] = norm(w.T @ q) / (norm(w) * norm(q))
                out[2, b, t, h] = norm(w)
    return out


@pytest.mark.parametrize("kind", ["plain", "segments", "mask", "both"])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
@pytest.mark.parametrize("fresh", [True, False])
def test_memory(rule: str, kind: str, fresh: bool) -> None:
    x, pack = memory_inputs(rule), packing(kind)
    state = None if fresh else rand(B, H, K, V, seed=15)
    o, final = delta_rule(*x.values(), state, rule=rule, **pack)
    trace = memory_trace(*x.values(), o, state, final, TraceSpec(level="gates"), rule=rule, **pack)
    expected = memory_oracle(x, state, rule, pack)
    for got, want in zip((trace.collision, trace.read_conf, trace.fro_norm), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)
    mask = pack["mask"]
    blank = torch.zeros(B, T, H, dtype=torch.bool) if mask is None else ~mask[..., None].expand(B, T, H)
    torch.testing.assert_close(trace.write, x["beta"].masked_fill(blank, torch.nan), equal_nan=True)
    torch.testing.assert_close(trace.decay, x["log_decay"].exp().masked_fill(blank, torch.nan), equal_nan=True)
    count = [T] * B if mask is None else mask.sum(1).tolist()
    assert trace.writes.tolist() == trace.reads.tolist() == count
    assert trace.capacity == K


@pytest.mark.parametrize(("writes", "gated"), [(1, True), (3, False), (2, True)])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_memory_of_several_writes_and_of_a_write_gate(rule: str, writes: int, gated: bool) -> None:
    x, pack, state = many(memory_inputs(rule), writes, gated), packing("both"), rand(B, H, K, V, seed=15)
    spec = TraceSpec(level="gates")
    o, final = delta_rule(**x, state=state, rule=rule, **pack)
    trace = memory_trace(**x, o=o, state=state, final=final, spec=spec, rule=rule, **pack)
    for got, want in zip(
        (trace.collision, trace.read_conf, trace.fro_norm), memory_oracle(x, state, rule, pack), strict=True
    ):
        torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)
    strength = x["write"].mean(-1) if gated else x["beta"]
    strength = strength.mean(2) if writes > 1 else strength
    blank = ~pack["mask"][..., None].expand(B, T, H)
    torch.testing.assert_close(trace.write, strength.masked_fill(blank, torch.nan), equal_nan=True)
    assert trace.reads.tolist() == pack["mask"].sum(1).tolist()
    assert trace.writes.tolist() == (writes * pack["mask"].sum(1)).tolist()
    wanted = memory_oracle(x, None, rule, packing("plain"))
    state = None
    for t in range(3):  # a token at a time, from a fresh memory
        token = {name: value[:, t : t + 1] for name, value in x.items()}
        o, after = delta_rule(**token, state=state, rule=rule)
        step = memory_trace(**token, o=o, state=state, final=after, spec=spec, rule=rule)
        for got, want in zip((step.collision, step.read_conf, step.fro_norm), wanted[:, :, t : t + 1], strict=True):
            torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)
        state = after


@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_memory_streamed_equals_full(rule: str) -> None:
    x = memory_inputs(rule)
    spec = TraceSpec(level="gates")
    o, final = delta_rule(*x.values(), rule=rule)
    full = memory_trace(*x.values(), o, None, final, spec, rule=rule)
    state = None
    for t in range(T):
        token = [value[:, t : t + 1] for value in x.values()]
        o, after = delta_rule(*token, state, rule=rule)
        step = memory_trace(*token, o, state, after, spec, rule=rule)
        for name in ("write", "decay", "collision", "read_conf", "fro_norm"):
            torch.testing.assert_close(
                getattr(step, name), getattr(full, name)[:, t : t + 1], equal_nan=True, msg=f"{name} at {t}", **CLOSE
            )
        state = after


def test_collision_and_read_confidence_of_known_memories() -> None:
    key = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    other = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    value, one = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2), torch.ones(1, 1, 1)
    k, v = torch.cat([key, key, other], 1), value.expand(1, 3, 1, 2)
    beta = one.expand(1, 3, 1)
    o, final = delta_rule(k, k, v, beta)
    trace = memory_trace(k, k, v, beta, None, o, None, final, TraceSpec(level="gates"))
    assert trace.to_dict()["collision"] == [[[None], [1.0], [0.0]]]
    assert trace.read_conf.flatten().tolist() == pytest.approx([1, 1, 0.5**0.5])
    assert trace.utilisation.flatten().tolist() == pytest.approx([0.5])  # one value under two keys: rank 1 of 2
    assert trace.decay.flatten().tolist() == [1, 1, 1]


def test_utilisation_is_effective_rank() -> None:
    w = rand(B, H, K, V, seed=4)
    w[0, 0] = 0
    w[1, 1] = torch.eye(K, V, dtype=torch.float64)
    x = memory_inputs("delta")
    token = [value[:, :1] for value in x.values()]
    trace = memory_trace(*token, token[2], w, w, TraceSpec(level="gates"))
    expected = torch.zeros(B, H, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            s = torch.linalg.eigvalsh(w[b, h].T @ w[b, h]).clamp(min=0).sqrt()
            if s.sum() > 0:
                p = [float(value / s.sum()) for value in s]
                expected[b, h] = math.exp(-sum(y * math.log(y) for y in p if y > 0)) / V
    torch.testing.assert_close(trace.utilisation, expected, rtol=1e-6, atol=1e-6)
    assert trace.utilisation[1, 1] == pytest.approx(1)
    assert trace.utilisation[0, 0] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_utilisation_of_what_is_not_finite_is_undefined(value: float) -> None:
    w = rand(B, H, K, V, seed=4)
    token = [x[:, :1] for x in memory_inputs("delta").values()]
    sound = memory_trace(*token, token[2], w, w, TraceSpec(level="gates")).utilisation
    w[0, 1, 1, 0] = value
    found = memory_trace(*token, token[2], w, w, TraceSpec(level="gates")).utilisation
    expected = sound.clone()
    expected[0, 1] = torch.nan
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def cell_inputs() -> dict[str, Tensor]:
    return {
        "q": rand(B, T, H, K, seed=20),
        "k": rand(B, T, H, K, seed=21),
        "v": rand(B, T, H, V, seed=22),
        "i": 4 * rand(B, T, H, seed=23),
        "f": 2 * rand(B, T, H, seed=24) + 3,
    }


def cell_oracle(
    x: dict[str, Tensor], state: MLSTMState | None, pack: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """ln ||C|| and age of every token (B, T, H), with the true, unstabilised C."""
    norms = torch.full((B, T, H), torch.nan, dtype=torch.float64)
    ages = norms.clone()
    for b in range(B):
        for h in range(H):
            c, mass, aged = torch.zeros(K, V, dtype=torch.float64), 0.0, 0.0
            if state is not None:
                c = state.C[b, h] * state.m[b, h].exp()
                mass = norm(c)
            for t, begins in visits(b, **pack):
                if begins:
                    c, mass, aged = torch.zeros_like(c), 0.0, 0.0
                k, v = x["k"][b, t, h], x["v"][b, t, h]
                i, f = math.exp(x["i"][b, t, h]), 1 / (1 + math.exp(-x["f"][b, t, h]))
                aged = f * (aged + mass)
                mass = f * mass + i * norm(k) * norm(v)
                c = f * c + i * torch.outer(k, v)
                norms[b, t, h], ages[b, t, h] = math.log(norm(c)), aged / mass
    return norms, ages


def traced(x: dict[str, Tensor], o: Tensor, state, final, mass=None, age=None, **pack: Tensor | None):
    spec = TraceSpec(level="gates")
    log_f = F.logsigmoid(x["f"])
    return gate_trace(x["k"], x["v"], x["i"], log_f, o, state, final, spec, mass=mass, age=age, **pack)


@pytest.mark.parametrize("kind", ["plain", "segments", "mask", "both"])
@pytest.mark.parametrize("fresh", [True, False])
def test_gates(kind: str, fresh: bool) -> None:
    x, pack = cell_inputs(), packing(kind)
    state = None
    if not fresh:
        state = MLSTMState(rand(B, H, K, V, seed=25), rand(B, H, K, seed=26), 3 * rand(B, H, seed=27))
    o = rand(B, T, H, V, seed=28).sigmoid()
    _, final = mlstm(*x.values(), state, **pack)
    trace, mass, age = traced(x, o, state, final, **pack)
    norms, ages = cell_oracle(x, state, pack)
    torch.testing.assert_close(trace.log_C_norm, norms, equal_nan=True, **CLOSE)
    torch.testing.assert_close(trace.C_norm, norms.exp(), equal_nan=True, rtol=1e-7, atol=0)
    torch.testing.assert_close(trace.age_tokens, ages, equal_nan=True, **CLOSE)
    mask = pack["mask"]
    blank = torch.zeros(B, T, H, dtype=torch.bool) if mask is None else ~mask[..., None].expand(B, T, H)
    for got, want in ((trace.log_i, x["i"]), (trace.log_f, x["f"].sigmoid().log()), (trace.o_mean, o.mean(-1))):
        torch.testing.assert_close(got, want.masked_fill(blank, torch.nan), equal_nan=True)
    torch.testing.assert_close(torch.exp(trace.log_f * trace.half_life), torch.full_like(norms, 0.5).masked_fill(
        blank, torch.nan), equal_nan=True)  # fmt: skip
    last = [[ages[b, t] for t in range(T) if not ages[b, t].isnan().any()][-1] for b in range(B)]
    torch.testing.assert_close(age, torch.stack(last), **CLOSE)
    assert mass.shape == (B, H)


@pytest.mark.parametrize("kind", ["plain", "segments", "mask", "both"])
@pytest.mark.parametrize("sizes", [[1] * T, [33, 1, 36]])
def test_gates_streamed_equals_full(kind: str, sizes: list[int]) -> None:
    x, pack = cell_inputs(), packing(kind)
    if kind in ("segments", "both"):  # an incoming state belongs to the first token: cut inside segments only
        sizes = [20, 1, 1, 13, 35]
        pack["segment_ids"] = torch.tensor([[0] * 20 + [1] * 15 + [2] * 35] * B)
    o = torch.ones(B, T, H, V, dtype=torch.float64)
    norms, ages = cell_oracle(x, None, pack)
    state = mass = age = None
    start = 0
    for size in sizes:
        cut = slice(start, start + size)
        part = {name: value[:, cut] for name, value in x.items()}
        here = {name: None if value is None else value[:, cut] for name, value in pack.items()}
        if kind in ("segments", "both") and start in (20, 35):  # a new document opens with a fresh state
            state = mass = age = None
        _, final = mlstm(*part.values(), state, **here)
        trace, mass, age = traced(part, o[:, cut], state, final, mass, age, **here)
        torch.testing.assert_close(trace.log_C_norm, norms[:, cut], equal_nan=True, **CLOSE)
        torch.testing.assert_close(trace.age_tokens, ages[:, cut], equal_nan=True, **CLOSE)
        state, start = final, start + size


def test_tracing_begun_on_a_used_state_counts_old_content_as_new() -> None:
    x = cell_inputs()
    before = {name: value[:, :30] for name, value in x.items()}
    after = {name: value[:, 30:] for name, value in x.items()}
    o = torch.ones(B, T, H, V, dtype=torch.float64)
    _, state = mlstm(*before.values())
    _, final = mlstm(*after.values(), state)
    late, _, _ = traced(after, o[:, 30:], state, final)
    first, mass, age = traced(before, o[:, :30], None, state)
    true, _, _ = traced(after, o[:, 30:], state, final, mass, age)
    assert (first.age_tokens >= 0).all()
    assert (late.age_tokens <= true.age_tokens).all()


def test_empty_cell_has_no_age() -> None:
    x = cell_inputs()
    x["v"] = torch.zeros_like(x["v"])
    for length in (1, T):
        part = {name: value[:, :length] for name, value in x.items()}
        _, final = mlstm(*part.values())
        trace, mass, age = traced(part, torch.ones(B, length, H, V), None, final)
        assert trace.age_tokens.isnan().all()
        assert (trace.log_C_norm == -torch.inf).all()
        assert mass.tolist() == age.tolist() == [[0.0] * H] * B
        assert trace.to_dict()["age_tokens"] == [[[None] * H] * length] * B


def test_extreme_gates_stay_finite_in_float32() -> None:
    x = {name: value.float() for name, value in cell_inputs().items()}
    x["i"] = x["i"].abs() * 40
    x["f"] = x["f"] * 20 - 60
    _, final = mlstm(*x.values())
    trace, mass, age = traced(x, torch.ones(B, T, H, V), None, final)
    for field in (trace.log_C_norm, trace.age_tokens, mass, age):
        assert field.isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "both"])
def test_float32_keeps_four_digits(kind: str) -> None:
    pack = packing(kind)
    x = cell_inputs() | {"i": 15 * torch.tanh(cell_inputs()["i"] / 4)}
    narrow = {name: value.float() for name, value in x.items()}
    norms, ages = cell_oracle(x, None, pack)
    _, final = mlstm(*narrow.values(), **pack)
    gates, _, _ = traced(narrow, torch.ones(B, T, H, V), None, final, **pack)
    torch.testing.assert_close(gates.log_C_norm, norms.float(), equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gates.age_tokens, ages.float(), equal_nan=True, rtol=1e-4, atol=1e-4)
    y = memory_inputs("delta")
    o, final = delta_rule(*(value.float() for value in y.values()), **pack)
    memory = memory_trace(*(value.float() for value in y.values()), o, None, final, TraceSpec(level="gates"), **pack)
    for got, want in zip(
        (memory.collision, memory.read_conf, memory.fro_norm), memory_oracle(y, None, "delta", pack), strict=True
    ):
        torch.testing.assert_close(got, want.float(), equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "segments", "mask", "both"])
def test_stabilizer_is_the_running_maximum(kind: str) -> None:
    x, pack = cell_inputs(), packing(kind)
    log_f, start = F.logsigmoid(x["f"]), rand(B, H, seed=30)
    m, previous = mlstm_stabilizer(x["i"], log_f, start, **pack)
    for b in range(B):
        level = start[b]
        for t, begins in visits(b, **pack):
            want = x["i"][b, t] if begins else torch.maximum(log_f[b, t] + level, x["i"][b, t])
            torch.testing.assert_close(m[b, t], want, rtol=0, atol=1e-10)
            if not begins:
                torch.testing.assert_close(previous[b, t], level, rtol=0, atol=1e-10)
            level = want
