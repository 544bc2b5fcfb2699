"""Other people's architectures in one frame: embedding, (mixer, SwiGLU) blocks around a residual stream, norm.

The recurrent mixers are the library's own modules; here are only what the library has no use for: attention, and the
fast-weight rule of this project's predecessor. B batch, T time, D model width, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, explain
from synapse_arch.model.accounting import active_parameters
from synapse_arch.model.model import SynapseModel
from synapse_arch.model.state import named_tensors
from synapse_arch.modules import (
    XLSTM,
    FastWeightMemory,
    FastWeightState,
    Mamba,
    MambaConfig,
    MemoryConfig,
    MixerOutput,
    XLSTMConfig,
)
from synapse_arch.modules.common import HeadNorm, RMSNorm, ShortConv, linear, unit, wide
from synapse_arch.ops import delta_rule
from synapse_arch.ops.gating import gate

TOLERANCE = 0.02
"""How far apart the parameters of matched models may be, as a share."""
MOST_STATE = 1.5
"""How much more state than the reference a matched model may have."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of causal attention.

    Attributes:
        n_heads: H; each is D / H wide.
        d_conv: positions a short convolution over queries, keys and values sees; 0 for none.
        theta: base of the rotary wavelengths.
    """

    n_heads: int = 4
    d_conv: int = 0
    theta: float = 10_000.0


class Attention(nn.Module):
    """Causal softmax attention with rotary positions (Su et al. 2021), as in Llama (Touvron et al. 2023).

    Args:
        d_model: D.
        config: sizes.
        residual_branches: the output projection starts 1/sqrt of this smaller.
    """

    def __init__(self, d_model: int, config: AttentionConfig, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.d_model, self.config = d_model, config
        self.in_proj = linear(d_model, 3 * d_model)
        self.conv = ShortConv(3 * d_model, config.d_conv) if config.d_conv else None
        self.out_proj = linear(d_model, d_model, scale=residual_branches**-0.5)

    def forward(self, x: Tensor) -> MixerOutput:
        """(B, T, D) -> MixerOutput; sequences are read whole, without a state."""
        mixed = self.in_proj(x)
        if self.conv is not None:
            mixed, _ = self.conv(mixed, None)
        q, k, v = mixed.unflatten(-1, (3, self.config.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, K) each
        turn = angles(x.shape[1], q.shape[-1], self.config.theta).to(x.device)
        y = F.scaled_dot_product_attention(rotate(q, turn), rotate(k, turn), v, is_causal=True)
        return MixerOutput(self.out_proj(y.transpose(1, 2).flatten(2)), None)

    def state_numbers(self, length: int) -> int:
        """Keys and values of `length` positions, and the convolution's last inputs."""
        return 2 * self.d_model * length + max(self.config.d_conv - 1, 0) * 3 * self.d_model


def angles(length: int, width: int, theta: float = 10_000.0) -> Tensor:
    """(T, width / 2) angles t · theta^(-2 i / width), of rotary or sinusoidal positions."""
    return torch.arange(length)[:, None] / theta ** (torch.arange(0, width, 2) / width)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + K/2}) by its angle; x is (..., T, K)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass(frozen=True, kw_only=True)
class HebbianConfig:
    """The predecessor's fast weights.

    Attributes:
        n_heads: H.
        d_key: K.
        d_value: V.
        d_conv: positions the short convolution sees.
        decay: what a token leaves of the weights.
        rate: the most that a write adds of its outer product.
    """

    n_heads: int = 4
    d_key: int = 32
    d_value: int = 32
    d_conv: int = 4
    decay: float = 0.95
    rate: float = 0.1


class Hebbian(nn.Module):
    """Decaying outer products, S ← 0.95 S + 0.1 σ(g) k vᵀ and o = Sᵀ q: what this project's predecessor wrote.

    Its rule alone; convolution, unit keys, head norm and output gate are those of FastWeightMemory, so that the two
    differ by the rule.

    Args:
        d_model: D.
        config: sizes and constants.
        residual_branches: the output projection starts 1/sqrt of this smaller.
    """

    def __init__(self, d_model: int, config: HebbianConfig, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.config = c = config
        keys, hidden = c.n_heads * c.d_key, c.n_heads * c.d_value
        self.mixed, self.gates = (keys, keys, hidden), (hidden, c.n_heads)
        self.in_proj = linear(d_model, sum(self.mixed))
        self.gate_proj = linear(d_model, sum(self.gates))
        self.conv = ShortConv(sum(self.mixed), c.d_conv)
        self.norm = HeadNorm(c.n_heads, c.d_value)
        self.out_proj = linear(hidden, d_model, scale=residual_branches**-0.5)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> FastWeightState:
        """The empty memory."""
        c, conv = self.config, self.conv.init_state(batch_size, device=device)
        return FastWeightState(conv, conv.new_zeros(batch_size, c.n_heads, c.d_key, c.d_value))

    def forward(self, x: Tensor, state: FastWeightState | None = None) -> MixerOutput:
        """(B, T, D) -> MixerOutput with a FastWeightState."""
        c = self.config
        opening, strength = self.gate_proj(x).split(self.gates, dim=-1)
        mixed, conv = self.conv(self.in_proj(x), state and state.conv)
        q, k, v = (z.unflatten(-1, (c.n_heads, -1)) for z in mixed.split(self.mixed, dim=-1))
        beta = c.rate * torch.sigmoid(wide(strength))
        decay = torch.full_like(beta, math.log(c.decay))
        q, k = unit(wide(q)), unit(wide(k))
        o, weights = delta_rule(q, k, v, beta, decay, state and state.weights, rule="hebbian")
        y = self.out_proj(gate(self.norm(o).flatten(2), opening, "silu"))
        return MixerOutput(y, FastWeightState(conv, weights))


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ∘ W_up x), three matrices without biases (Shazeer 2020).

    Args:
        d_model: D.
        d_ff: hidden width.
        residual_branches: the output projection starts 1/sqrt of this smaller.
    """

    def __init__(self, d_model: int, d_ff: int, *, residual_branches: int = 1) -> None:
        super().__init__()
        self.gate_proj = linear(d_model, d_ff)
        self.up_proj = linear(d_model, d_ff)
        self.out_proj = linear(d_ff, d_model, scale=residual_branches**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        y: Tensor = self.out_proj(gate(self.up_proj(x), self.gate_proj(x), "silu"))
        return y


class Block(nn.Module):
    """x + mixer(norm x), then x + SwiGLU(norm x)."""

    def __init__(self, d_model: int, mixer: nn.Module, d_ff: int, residual_branches: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = RMSNorm(d_model), mixer
        self.mlp_norm, self.mlp = RMSNorm(d_model), SwiGLU(d_model, d_ff, residual_branches=residual_branches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        x = x + self.mixer(self.mixer_norm(x)).y
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An architecture to compare with.

    Attributes:
        description: one line.
        mixer: builds its mixer from (d_model, sizes, residual_branches=...).
        sizes: for a d_model, the mixer's sizes to choose from, the preferred ones first.
    """

    description: str
    mixer: Callable[..., nn.Module]
    sizes: Callable[[int], Iterator[Any]]


class Decoder(nn.Module):
    """Embedding, blocks of a peer's mixer and a SwiGLU, norm; the head is the caller's.

    Args:
        vocab_size: token ids run from 0 to vocab_size - 1.
        d_model: D.
        n_layers: blocks.
        peer: whose mixers.
        sizes: of each mixer.
        d_ff: hidden width of each SwiGLU.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, peer: Peer, sizes: Any, d_ff: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight)  # the library's own initialisation, see LOG.md
        branches = 2 * n_layers
        self.blocks = nn.ModuleList(
            Block(d_model, peer.mixer(d_model, sizes, residual_branches=branches), d_ff, branches)
            for _ in range(n_layers)
        )
        self.norm = RMSNorm(d_model)
        self.config = {"d_model": d_model, "n_layers": n_layers, "d_ff": d_ff, "mixer": asdict(sizes)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, D) features."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.norm(x)
        return y

    def state_numbers(self, length: int) -> int:
        """Numbers remembered of a sequence; of `length` positions where they are all kept."""
        return sum(_state_numbers(cast(Block, block).mixer, length) for block in self.blocks)


def _state_numbers(mixer: nn.Module, length: int) -> int:
    if isinstance(mixer, Attention):
        return mixer.state_numbers(length)
    return state_numbers(mixer.init_state(1, device="meta"))  # type: ignore[operator]


def state_numbers(state: object) -> int:
    """Numbers in a tree of tensors."""
    return sum(tensor.numel() for _, tensor in named_tensors(state))


def matched(name: str, reference: SynapseModel, n_layers: int, *, by: str = "total") -> Decoder:
    """A peer as large as a SynapseModel: in parameters by the width of its SwiGLU, in state by its mixers' sizes.

    Args:
        name: a key of PEERS.
        reference: what to match; it may lie on the meta device.
        n_layers: blocks of the peer.
        by: "total" parameters, or "active" ones (a token visits top_k of the experts).

    Raises:
        ConfigError: the peer cannot be made as large, or is larger without any SwiGLU.
    """
    peer, c = PEERS[name], reference.config
    sizes = _sizes(peer, reference, n_layers)
    goal, each = _body(reference, by), 3 * c.d_model * n_layers  # a unit of d_ff
    with torch.device("meta"):
        thinnest = Decoder(1, c.d_model, n_layers, peer, sizes, d_ff=1)
    blocks = sum(p.numel() for p in thinnest.parameters()) - thinnest.embedding.weight.numel() - each
    d_ff = next((w for w in _widths((goal - blocks) / each) if abs(blocks + each * w - goal) <= TOLERANCE * goal), None)
    if d_ff is None:
        remedy = "use fewer blocks, or a wider reference"
        raise ConfigError(explain(f"{name} parameters", f"{goal} outside embedding and head", blocks, remedy))
    return Decoder(c.vocab_size, c.d_model, n_layers, peer, sizes, d_ff)


def _widths(exact: float) -> Iterator[int]:
    """Widths of a SwiGLU near `exact`, the ones that suit the machine first."""
    yield from (width for width in (8 * round(exact / 8), round(exact)) if width > 0)


def _sizes(peer: Peer, reference: SynapseModel, n_layers: int) -> Any:
    """The first of the peer's sizes whose state is no smaller than the reference's, and not much larger."""
    d, goal = reference.config.d_model, state_numbers(reference.init_state(1, device="meta").layers)
    tried = []
    for sizes in peer.sizes(d):
        with torch.device("meta"):
            mixer = peer.mixer(d, sizes, residual_branches=1)
        if isinstance(mixer, Attention):  # its state grows with the text
            return sizes
        tried.append(n_layers * _state_numbers(mixer, 0))
        if goal <= tried[-1] <= MOST_STATE * goal:
            return sizes
    remedy = "use another number of blocks"
    found = f"from {min(tried)} to {max(tried)}, none of {len(tried)} sizes within"
    raise ConfigError(explain("a peer's state", f"{goal} to {MOST_STATE * goal:.0f} numbers", found, remedy))


def _body(reference: SynapseModel, by: str) -> int:
    """Parameters of the reference without embedding and head, which the peer has too."""
    head = reference.head.weight.numel()
    if by == "active":
        return active_parameters(reference) - head
    outside = head if reference.config.tie_embeddings else head + reference.embedding.weight.numel()
    return sum(p.numel() for p in reference.parameters()) - outside


def _head_width(d_model: int) -> int:
    return min(64, max(32, d_model // 4))


def _attention(d_conv: int) -> Callable[[int], Iterator[AttentionConfig]]:
    def sizes(d_model: int) -> Iterator[AttentionConfig]:
        yield AttentionConfig(n_heads=max(1, d_model // _head_width(d_model)), d_conv=d_conv)

    return sizes


def _mamba2(d_model: int) -> Iterator[MambaConfig]:
    """Twice the model's width, as published; the state grows by N."""
    for d_state in range(16, 513, 4):
        yield MambaConfig(expand=2, head_dim=_head_width(d_model), d_state=d_state)


def _mlstm(d_model: int) -> Iterator[XLSTMConfig]:
    """As many heads as can be; keys from half the width of the values (xLSTM-7B) to all of it (xLSTM)."""
    for n_heads in (4, 2, 1):
        for d_hidden in (d_model, 2 * d_model):
            width = d_hidden // n_heads
            for d_key in range(math.ceil(width / 16) * 8, width + 1, 8):
                yield XLSTMConfig(d_hidden=d_hidden, n_heads=n_heads, qk_ratio=d_key / width)


def _square(config: Callable[..., Any], **constants: Any) -> Callable[[int], Iterator[Any]]:
    """Fast weights of the head count that the reference has, with square matrices of growing width."""

    def sizes(d_model: int) -> Iterator[Any]:
        for width in range(8, 513, 4):
            yield config(n_heads=max(1, d_model // _head_width(d_model)), d_key=width, d_value=width, **constants)

    return sizes


PEERS: dict[str, Peer] = {
    "transformer": Peer(
        description="Transformer++: rotary attention, RMSNorm, SwiGLU (Touvron et al. 2023)",
        mixer=Attention, sizes=_attention(0),
    ),
    "transformer-conv": Peer(
        description="the same with a short convolution over queries, keys and values",
        mixer=Attention, sizes=_attention(4),
    ),
    "mamba2": Peer(description="Mamba-2 (Dao & Gu 2024)", mixer=Mamba, sizes=_mamba2),
    "mlstm": Peer(description="mLSTM (Beck et al. 2024)", mixer=XLSTM, sizes=_mlstm),
    "gated-deltanet": Peer(
        description="Gated DeltaNet, writing strengths up to 1 (Yang et al. 2024b)",
        mixer=FastWeightMemory, sizes=_square(MemoryConfig, beta_max=1.0, n_householder=1),
    ),
    "deltanet-negative": Peer(
        description="Gated DeltaNet, writing strengths up to 2 (Grazzi et al. 2024)",
        mixer=FastWeightMemory, sizes=_square(MemoryConfig, beta_max=2.0, n_householder=1),
    ),
    "hebbian": Peer(
        description="decaying outer products, the predecessor's rule", mixer=Hebbian, sizes=_square(HebbianConfig)
    ),
}  # fmt: skip
"""The architectures compared with, by name."""
