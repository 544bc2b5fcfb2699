"""AdamW, what it decays, and a learning rate that follows the share of the budget used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synapse_arch.errors import ConfigError, explain

DecayRule = Callable[[float, float], float]


def cosine(progress: float, decay: float) -> float:
    """From 1 to 0 along half a cosine; `decay` is not used."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, decay: float) -> float:
    """Stays at 1, then falls as 1 - sqrt over the last `decay` of the way (Hägele et al. 2024)."""
    return 1 - math.sqrt(max(0.0, (progress - 1 + decay) / decay))


def linear(progress: float, decay: float) -> float:
    """From 1 to 0 in a straight line; `decay` is not used."""
    return 1 - progress


SHAPES: dict[str, DecayRule] = {"cosine": cosine, "wsd": wsd, "linear": linear}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the share of the budget used, be it steps or minutes: warm-up, then a fall to `final`.

    Attributes:
        peak: the highest learning rate.
        final: the last one, as a share of `peak`.
        warmup: share of the budget in which it rises from 0 to `peak`.
        shape: "cosine", "wsd" or "linear".
        decay: with "wsd", the share of the time after the warm-up in which it falls.
    """

    peak: float
    final: float = 0.0
    warmup: float = 0.05
    shape: str = "cosine"
    decay: float = 0.3

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(explain("schedule", f"one of {', '.join(SHAPES)}", repr(self.shape)))
        if not (self.peak > 0 and math.isfinite(self.peak)):
            raise ConfigError(explain("lr", "a positive number", self.peak))
        for name, value, low, high in (
            ("final", self.final, 0.0, 1.0), ("warmup", self.warmup, 0.0, 0.9), ("decay", self.decay, 0.01, 1.0)
        ):  # fmt: skip
            if not low <= value <= high:
                raise ConfigError(explain(name, f"a share from {low} to {high}", value))

    def lr(self, used: float) -> float:
        """Learning rate when the share `used` of the budget is behind.

        >>> Schedule(peak=1.0, warmup=0.1, final=0.1).lr(0.1), Schedule(peak=1.0, final=0.1).lr(1.0)
        (1.0, 0.1)
        """
        used = min(max(used, 0.0), 1.0)
        if used < self.warmup:
            return self.peak * used / self.warmup
        level = SHAPES[self.shape]((used - self.warmup) / (1 - self.warmup), self.decay)
        return self.peak * (self.final + (1 - self.final) * level)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and everything that must not.

    Spared are parameters of fewer than two dimensions (biases, D, dt and gate biases), embeddings, norms, and those
    with a true attribute `_no_weight_decay`. Frozen parameters are in neither group.
    """
    whole = [m for m in model.modules() if isinstance(m, nn.Embedding) or type(m).__name__.endswith("Norm")]
    exempt = {id(parameter) for module in whole for parameter in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            keep = parameter.ndim < 2 or id(parameter) in exempt or getattr(parameter, "_no_weight_decay", False)
            (spared if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its learning rate is set before every step."""
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under names of the parameters: "layers.0.norm.weight/exp_avg" and so on."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took out, on each parameter's device.

    Raises:
        ConfigError: the names or shapes are not those of this model.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        state.setdefault(name, {})[field] = value
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := sorted(state.keys() - parameters.keys()):
        raise ConfigError(explain("optimizer state", "the parameters of this model", unknown[0]))
    for name, values in state.items():
        parameter = parameters[name]
        for field, value in values.items():
            if value.ndim and value.shape != parameter.shape:
                raise ConfigError(explain(f"{name}/{field}", tuple(parameter.shape), tuple(value.shape)))
        optimizer.state[parameter] = {field: value.to(parameter.device) for field, value in values.items()}
