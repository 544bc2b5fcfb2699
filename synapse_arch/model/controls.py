"""Hands on a running model: tensors that change what its regions do, row by row.

B rows, L layers, E experts, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from synapse_arch.errors import ConfigError, ShapeError, explain
from synapse_arch.model.config import SynapseConfig


class LayerControls(NamedTuple):
    """The controls of one layer; what each does is said at `Controls`."""

    router_bias: Tensor
    """(B, E)."""
    pathways: Tensor
    """(B, E, E)."""
    memory_read: Tensor
    """(B,)."""
    memory_write: Tensor
    """(B,)."""
    steer: Tensor
    """(B, D)."""
    patch: Tensor
    """(B, D)."""
    patch_on: Tensor
    """(B,) bool."""

    def answer(self, y: Tensor) -> Tensor:
        """Scales what the memory (B, T, D) adds to the residual stream."""
        return y * self.memory_read[:, None, None].to(y.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """Patches and steers the residual stream (B, T, D) behind the layer."""
        patched = torch.where(self.patch_on[:, None, None], self.patch[:, None].to(x.dtype), x)
        return patched + self.steer[:, None].to(x.dtype)


class Controls(NamedTuple):
    """What is done to every position of a call, for each row and layer. `neutral` does nothing at all.

    All tensors are always there, so that a compiled step is the same with and without an intervention.

    >>> config = SynapseConfig.preset("tiny", n_layers=2, d_model=64)
    >>> controls = Controls.neutral(config, 1)
    >>> controls.router_bias[0, 1, 3] = -torch.inf  # expert 3 of layer 1 is never chosen
    >>> controls.check(config, 1)
    """

    router_bias: Tensor
    """(B, L, E): added to what ranks the experts, never to their weights; -inf bans one, inf forces it."""
    pathways: Tensor
    """(B, L, E, E): added to the routers' own pathways: where i ranks first, hebbian_gain times row i to all ranks."""
    memory_read: Tensor
    """(B, L): multiplies what the fast-weight memory adds to the residual stream."""
    memory_write: Tensor
    """(B, L): multiplies the memory's writing strengths and log decays; at 0 it stays as it is."""
    steer: Tensor
    """(B, L, D): added to the residual stream behind the layer."""
    patch: Tensor
    """(B, L, D): takes the place of the residual stream behind the layer, before `steer`, where `patch_on`."""
    patch_on: Tensor
    """(B, L) bool."""

    @staticmethod
    def neutral(config: SynapseConfig, batch_size: int, *, device: torch.device | str | None = None) -> Controls:
        """Controls that leave everything as it is, float32."""
        rows = (batch_size, config.n_layers)
        nothing = torch.zeros(*rows, config.d_model, device=device)
        return Controls(
            router_bias=torch.zeros(*rows, config.n_experts, device=device),
            pathways=torch.zeros(*rows, config.n_experts, config.n_experts, device=device),
            memory_read=torch.ones(rows, device=device),
            memory_write=torch.ones(rows, device=device),
            steer=nothing,
            patch=nothing.clone(),
            patch_on=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def layer(self, index: int) -> LayerControls:
        """The controls of one layer."""
        return LayerControls(*(x[:, index] for x in self))

    def check(self, config: SynapseConfig, batch_size: int) -> None:
        """Checks that a model of `config` can do this with `batch_size` rows; the routes are looked at on the CPU only.

        Raises:
            ShapeError: a tensor of other sizes or kind.
            ConfigError: a bias is NaN, a layer is left with fewer than top_k experts, or more than top_k are forced.
        """
        expected = Controls.neutral(config, batch_size, device="meta")
        for name, wanted, got in zip(self._fields, expected, self, strict=True):
            fits = got.shape == wanted.shape and got.is_floating_point() == wanted.is_floating_point()
            if not fits or (not wanted.is_floating_point() and got.dtype != torch.bool):
                found = f"{tuple(got.shape)} {got.dtype}"
                remedy = "begin with Controls.neutral(config, batch_size)"
                raise ShapeError(explain(f"controls.{name}", f"{tuple(wanted.shape)} {wanted.dtype}", found, remedy))
        bias, top_k = self.router_bias, config.thalamus.top_k
        if config.n_experts == 0 or bias.device.type != "cpu" or torch.compiler.is_compiling():
            return
        if bool(bias.isnan().any()):
            raise ConfigError(explain("controls.router_bias", "numbers, or inf and -inf", "NaN"))
        left, forced = int((bias != -torch.inf).sum(-1).min()), int((bias == torch.inf).sum(-1).max())
        if left < top_k:
            raise ConfigError(explain("controls.router_bias", f"top_k={top_k} experts left a layer", left, "ban fewer"))
        if forced > top_k:
            raise ConfigError(explain("controls.router_bias", f"top_k={top_k} experts forced", forced, "force fewer"))
