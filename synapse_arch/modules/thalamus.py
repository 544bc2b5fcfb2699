"""Thalamus: a Mamba that relays the signal and decides, from the context, which experts each token visits.

B batch, T time, D model width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, StateError, explain
from synapse_arch.introspection.probes import routing_trace
from synapse_arch.introspection.records import RoutingTrace
from synapse_arch.introspection.trace import Recorded, TraceSpec
from synapse_arch.modules.common import (
    RMSNorm,
    check_choice,
    check_flag,
    check_input,
    check_positive,
    check_state,
    keep_float32,
    linear,
    wide_linear,
)
from synapse_arch.modules.mamba import Mamba, MambaConfig, MambaState
from synapse_arch.ops._backends import compute_dtype, no_autocast
from synapse_arch.ops._checks import check_float, check_packing
from synapse_arch.ops._packing import segment_index


@dataclass(frozen=True, kw_only=True)
class ThalamusConfig:
    """How tokens are routed.

    Attributes:
        mamba: the Mamba inside, "ssd" or "s6"; None for none: nothing is relayed, the router reads its input itself.
        context: the router reads what this layer's Mamba makes of the text; False for the Mamba's input, which holds of
            the text what earlier regions and layers made of it.
        d_state, expand, d_conv, head_dim, n_groups: its sizes, see MambaConfig.
        top_k: experts a token visits.
        noise: standard deviation of the Gaussian noise on the router logits, in training mode only.
        load_balance: weight of the Switch load-balance loss (Fedus et al. 2021, eq. 4), shared by the layers.
        z_loss: weight of the router z-loss (Zoph et al. 2022, eq. 5), shared by the layers.
        bias_rate: step of the loss-free balancing bias (DeepSeek-V3, §2.1.2); 0 switches it off.
        hebbian_decay: what a token leaves of the running co-activation average.
        hebbian_gain: how strongly consolidated pathways bias which experts a token visits, by the one that ranks first
            without them.
    """

    mamba: Literal["ssd", "s6"] | None = "ssd"
    context: bool = True
    d_state: int = 64
    expand: int = 2
    d_conv: int = 4
    head_dim: int = 64
    n_groups: int = 1
    top_k: int = 2
    noise: float = 0.0
    load_balance: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.0
    hebbian_decay: float = 0.999
    hebbian_gain: float = 1.0

    def __post_init__(self) -> None:
        if self.mamba is not None:
            check_choice(self, "mamba", ("ssd", "s6"))
        check_flag(self, "context")
        check_positive(self, top_k=1, noise=0.0, load_balance=0.0, z_loss=0.0, bias_rate=0.0, hebbian_gain=0.0)
        check_positive(self, hebbian_decay=0.0)
        if not 0.0 < self.hebbian_decay < 1.0:
            raise ConfigError(explain("ThalamusConfig.hebbian_decay", "between 0 and 1", self.hebbian_decay))
        _ = self.mamba_config  # validates the rest

    @property
    def mamba_config(self) -> MambaConfig | None:
        """The configuration of the Mamba inside, None without one."""
        if self.mamba is None:
            return None
        return MambaConfig(
            variant=self.mamba,
            d_state=self.d_state,
            expand=self.expand,
            d_conv=self.d_conv,
            head_dim=self.head_dim,
            n_groups=self.n_groups,
        )


class Routing(NamedTuple):
    """Which experts each token visits."""

    indices: Tensor
    """(B, T, k) int64; -1 where the mask is False."""
    weights: Tensor
    """(B, T, k) softmax over the chosen logits; sums to 1 over k, to 0 where masked."""
    logits: Tensor
    """(B, T, E) float32 or wider."""


class ThalamusState(NamedTuple):
    """What a thalamus remembers."""

    mamba: MambaState | None
    """None where there is no Mamba."""
    coactivation: Tensor
    """(B, E, E) float32: running average of a aᵀ, a in {0, 1}^E the experts a token visited."""


class ThalamusOutput(NamedTuple):
    """What a thalamus returns."""

    y: Tensor | None
    """(B, T, D) the relayed signal, without the residual; None where there is no Mamba."""
    routing: Routing | None
    """None where there are no experts to route to."""
    state: ThalamusState
    trace: Recorded[RoutingTrace] | None = None


class Thalamus(nn.Module):
    """Relays a sequence through a Mamba and routes each token by what the Mamba makes of its context.

    Two buffers bias the choice of experts, never their weights: `router_bias` (E,), moved by `balance`, and
    `pathways` (E, E), written by `consolidate`. Both are zero until those are called.

    Args:
        d_model: D.
        n_experts: E; 0 makes a plain relay without a router.
        config: routing and sizes.
        residual_branches: the output projection starts 1/sqrt of this smaller.

    Raises:
        ConfigError: top_k exceeds the number of experts.

    >>> thalamus = Thalamus(32, 4, ThalamusConfig(head_dim=16, d_state=8, top_k=2))
    >>> y, routing, state, _ = thalamus(torch.randn(1, 3, 32))
    >>> tuple(routing.indices.shape), tuple(state.coactivation.shape)
    ((1, 3, 2), (1, 4, 4))
    """

    router_bias: Tensor
    pathways: Tensor

    def __init__(
        self, d_model: int, n_experts: int, config: ThalamusConfig | None = None, *, residual_branches: int = 1
    ) -> None:
        super().__init__()
        self.d_model, self.n_experts, self.config = d_model, n_experts, config or ThalamusConfig()
        if n_experts and self.config.top_k > n_experts:
            remedy = "lower top_k or raise n_experts"
            raise ConfigError(
                explain("ThalamusConfig.top_k", f"at most {n_experts} experts", self.config.top_k, remedy)
            )
        inside = self.config.mamba_config
        self.mamba = None if inside is None else Mamba(d_model, inside, residual_branches=residual_branches)
        if n_experts:
            self.router_norm = RMSNorm(d_model)
            keep_float32(self.router_norm.weight)
            self.router = linear(d_model, n_experts, kind=_Router)
            self.router.weight = keep_float32(nn.Parameter(torch.randn(n_experts, d_model) * 0.02))
            self.register_buffer("router_bias", torch.zeros(n_experts))
            self.register_buffer("pathways", torch.zeros(n_experts, n_experts))

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> ThalamusState:
        """The state before the first position."""
        mamba = None if self.mamba is None else self.mamba.init_state(batch_size, device=device)
        if device is None:
            device = next((parameter.device for parameter in self.parameters()), None)
        shape = (batch_size, self.n_experts, self.n_experts)
        return ThalamusState(mamba, torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(
        self,
        x: Tensor,
        state: ThalamusState | None = None,
        *,
        segment_ids: Tensor | None = None,
        mask: Tensor | None = None,
        trace: TraceSpec | None = None,
        rank_bias: Tensor | None = None,
        pathways: Tensor | None = None,
    ) -> ThalamusOutput:
        """Relays and routes a sequence.

        Args:
            x: (B, T, D).
            state: what an earlier call returned, or None; never modified.
            segment_ids: (B, T) ints; nothing crosses a change of id.
            mask: (B, T) bool; False positions are routed nowhere and do not exist for the others.
            trace: what to record.
            rank_bias: (B, E) added to what ranks the experts, as `router_bias` is; inf forces an expert, -inf bans it.
            pathways: (B, E, E) added to the `pathways` of this module, row by row.

        Returns:
            ThalamusOutput.

        Raises:
            ShapeError, StateError: arguments that do not fit.
        """
        check_input("Thalamus", x, self.d_model)
        check_state("Thalamus", state, ThalamusState)
        y, mamba = self._relay(x, state, segment_ids, mask)
        shape = (x.shape[0], self.n_experts, self.n_experts)
        before = x.new_zeros(shape, dtype=torch.float32) if state is None else state.coactivation
        check_float(error=StateError, **{"thalamus coactivation": before})
        if before.shape != shape:
            raise StateError(explain("thalamus coactivation", shape, tuple(before.shape), "use init_state(batch_size)"))
        if not self.n_experts:
            return ThalamusOutput(y, None, ThalamusState(mamba, before))
        read = y if y is not None and self.config.context else x
        with no_autocast(x):
            logits = self.router(self.router_norm(read.to(compute_dtype(read, self.router.weight))))
        routing, ranked = self._choose(logits, mask, rank_bias, pathways)
        after = self._fire_together(routing.indices, before, segment_ids, mask)
        record = None
        if trace is not None:
            record = trace.record(
                lambda: routing_trace(logits, routing.indices, routing.weights, after, trace, mask=mask, ranked=ranked)
            )
        return ThalamusOutput(y, routing, ThalamusState(mamba, after), record)

    def _relay(
        self, x: Tensor, state: ThalamusState | None, segment_ids: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, MambaState | None]:
        """What the Mamba, if any, makes of x, and its state."""
        if state is not None and (state.mamba is None) != (self.mamba is None):
            expected, got = ("a MambaState", "None") if state.mamba is None else ("None", "a MambaState")
            raise StateError(explain("thalamus state.mamba", expected, got, "use init_state(batch_size)"))
        if self.mamba is None:
            check_packing(segment_ids, mask, {"B": x.shape[0], "T": x.shape[1]})
            return None, None
        relayed = self.mamba(x, state and state.mamba, segment_ids=segment_ids, mask=mask)
        return relayed.y, relayed.state

    def _choose(
        self, logits: Tensor, mask: Tensor | None, bias: Tensor | None, pathways: Tensor | None
    ) -> tuple[Routing, Tensor]:
        """Top-k by biased logits, weights by unbiased ones; also returns what was ranked (B, T, E)."""
        c = self.config
        felt = logits
        if self.training and c.noise > 0:
            felt = logits + c.noise * torch.randn_like(logits)
        ranked = felt.detach() + self.router_bias
        if bias is not None:  # finite from above, so that a softmax over what was ranked has its limit
            ranked = (ranked + bias[:, None]).clamp(max=torch.finfo(ranked.dtype).max)
        first = ranked.argmax(-1)  # (B, T)
        led = self.pathways[first]
        if pathways is not None:
            led = led + pathways.gather(1, first[..., None].expand(led.shape)).to(led.dtype)
        ranked = ranked + c.hebbian_gain * led
        indices = ranked.topk(c.top_k, dim=-1).indices
        weights = felt.gather(-1, indices).softmax(-1)
        if mask is not None:
            indices = indices.masked_fill(~mask[..., None], -1)
            weights = weights.masked_fill(~mask[..., None], 0.0)
        return Routing(indices, weights, logits), ranked

    @torch.no_grad()
    def _fire_together(
        self, indices: Tensor, coactivation: Tensor, segment_ids: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Coactivation ← λ · coactivation + (1 − λ) a aᵀ a token, for all tokens at once, in the state's own dtype."""
        with no_autocast(coactivation):
            return self._accumulate(indices, coactivation, segment_ids, mask)

    def _accumulate(
        self, indices: Tensor, coactivation: Tensor, segment_ids: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        decay, experts = self.config.hebbian_decay, self.n_experts
        if indices.shape[1] == 1 and mask is None:
            fired = torch.zeros_like(coactivation[:, :1]).scatter_(-1, indices, 1.0)
            return torch.baddbmm(coactivation, fired.transpose(1, 2), fired, beta=decay, alpha=1 - decay)
        fired = coactivation.new_zeros(*indices.shape[:2], experts + 1)
        fired = fired.scatter(-1, indices.remainder(experts + 1), 1.0)[..., :experts]  # -1 fires the spare column
        real = torch.ones_like(indices[..., 0]) if mask is None else mask.long()
        age = real.sum(1, keepdim=True) - real.cumsum(1)  # tokens still to come
        weight = (1 - decay) * decay ** age.to(coactivation.dtype)
        kept = decay ** real.sum(1).to(coactivation.dtype)
        segments = segment_index(segment_ids, mask)
        if segments is not None:
            weight = weight * (segments == segments[:, -1:])
            kept = kept * (segments[:, -1] == 0)
        return kept[:, None, None] * coactivation + (fired * weight[..., None]).transpose(1, 2) @ fired

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Thalamus:
        """What `.to()` and its like call: biases and pathways, which grow by small steps, stay float32 or wider."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self.get_buffer(name)
            if after.dtype != torch.promote_types(after.dtype, torch.float32):
                setattr(self, name, buffer.to(after.device))
        return self

    @torch.no_grad()
    def consolidate(self, state: ThalamusState) -> None:
        """Turns what fired together, averaged over rows, into pathways; see `pathways_of`.

        From now on, where i ranks first for a token, j's rank is biased by hebbian_gain times pathways[i, j].
        """
        self.pathways.copy_(pathways_of(state.coactivation.mean(0), self.config.top_k))

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Moves router_bias by bias_rate towards the experts that got fewer tokens (DeepSeek-V3, §2.1.2).

        Args:
            load: (E,) tokens each expert received.
        """
        share = load.to(self.router_bias.dtype)
        self.router_bias += self.config.bias_rate * torch.sign(share.mean() - share)


class _Router(nn.Linear):
    """A projection in the precision of what it reads, whatever `.to()` made of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        return wide_linear(input, self.weight.to(input.dtype))


def pathways_of(coactivation: Tensor, top_k: int) -> Tensor:
    """P(j visited | i visited) − P(j visited) of a running co-activation: 0 for independent experts.

    The average started at 0, so that everything in it is as much too small as its diagonal, whose sum is `top_k` once
    enough was read.

    Args:
        coactivation: (E, E) of a state.
        top_k: experts that every token visited.

    Returns:
        (E, E) with a diagonal of 0; 0 where i was never visited.
    """
    alone = coactivation.diagonal()
    share = alone * top_k / alone.sum()
    lift = torch.where(alone[:, None] > 0, coactivation / alone[:, None] - share, 0.0)
    return lift.fill_diagonal_(0.0)


def load_balance_loss(routing: Routing, mask: Tensor | None = None, *, load: Tensor | None = None) -> Tensor:
    """E · Σ_e f_e P_e (Fedus et al. 2021, eq. 4): 1 when perfectly balanced.

    f_e is the share of assignments that went to expert e, P_e its mean router probability.

    Args:
        routing: where the tokens went.
        mask: (B, T) bool; False positions do not count.
        load: (E,) assignments that f is taken from; None means those of `routing`. With the load of all processes, each
            with as many tokens, the mean of their losses is the loss of all tokens together.
    """
    experts = routing.logits.shape[-1]
    share = (expert_load(routing.indices, experts) if load is None else load).to(routing.logits.dtype)
    share = share / share.sum().clamp(min=1)
    return experts * (share * _token_mean(routing.logits.softmax(-1), mask)).sum()


def router_z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)² (Zoph et al. 2022, eq. 5)."""
    return _token_mean(routing.logits.logsumexp(-1, keepdim=True).square(), mask).squeeze()


def expert_load(indices: Tensor, n_experts: int) -> Tensor:
    """(E,) int64: how many assignments each expert received; -1 counts nowhere."""
    return expert_loads(indices[None], n_experts)[0]


def expert_loads(indices: Tensor, n_experts: int) -> Tensor:
    """(L, E) int64: the same of L layers, from their indices (L, ...)."""
    spare = indices.flatten(1).remainder(n_experts + 1)
    counts = torch.zeros(len(indices), n_experts + 1, dtype=torch.long, device=indices.device)
    return counts.scatter_add_(1, spare, torch.ones_like(spare))[:, :n_experts]


def _token_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, K) -> (K,), the mean over unmasked tokens."""
    if mask is None:
        return x.mean((0, 1))
    return torch.where(mask[..., None], x, 0.0).sum((0, 1)) / mask.sum().clamp(min=1)
