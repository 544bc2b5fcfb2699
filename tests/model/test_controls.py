"""Controls: neutral ones change no bit, each does what it says, and no row feels another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synapse_arch import ConfigError, Controls, MemoryConfig, ShapeError, SynapseModel, SynapseOutput, TraceSpec
from tests.helpers import assert_equal, assert_same
from tests.model.small import VARIANTS, small_model, tokens

FULL = TraceSpec(level="full")


@torch.no_grad()
def read(model: SynapseModel, ids: Tensor, controls: Controls | None, **options: Any) -> SynapseOutput:
    return model(ids, controls=controls, **options)


def everything(out: SynapseOutput) -> dict[str, Tensor]:
    """Outputs, state and trace of a pass, by name."""
    found = {"logits": out.logits} | out.state.to_tensors()
    for layer in out.trace.layers if out.trace else ():
        for part in (layer.routing, layer.experts, layer.gates, layer.memory):
            for name, value in vars(part).items() if part else ():
                if isinstance(value, Tensor):
                    found[f"{layer.index}.{type(part).__name__}.{name}"] = value
    return found


def in_last_layer(model: SynapseModel, batch: int, **values: Any) -> Controls:
    """Neutral but for the given entries of the last layer, the same in all rows."""
    controls = Controls.neutral(model.config, batch)
    for name, value in values.items():
        getattr(controls, name)[:, -1] = value
    return controls


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral_controls_change_no_bit(variant: str, length: int) -> None:
    model, ids = small_model(**VARIANTS[variant]), tokens(3, length)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, 0] = False
    neutral = Controls.neutral(model.config, 3)
    for options in ({}, {"mask": mask}, {"trace": FULL}):
        without = read(model, ids, None, **options)
        assert_equal(everything(read(model, ids, neutral, **options)), everything(without))


def test_a_row_does_not_feel_anothers_controls() -> None:
    model, ids = small_model(), tokens(3, 6)
    plain, controls = everything(read(model, ids, None)), Controls.neutral(model.config, 3)
    controls.router_bias[1, :, 2] = torch.inf
    controls.memory_read[1], controls.memory_write[1] = 0.0, 0.5
    controls.steer[1], controls.patch[1], controls.patch_on[1, 0] = torch.nan, torch.nan, True
    changed = everything(read(model, ids, controls))
    rest = torch.tensor([0, 2])
    assert_equal({n: x[rest] for n, x in changed.items()}, {n: x[rest] for n, x in plain.items()})
    assert changed["logits"][1].isnan().all()


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_cutting_a_controlled_sequence_changes_nothing(cut: int) -> None:
    model, ids = small_model(), tokens(2, 8)
    controls = Controls.neutral(model.config, 2)
    controls.router_bias[0, 0, 1], controls.router_bias[1, 1, 3] = 0.7, -torch.inf
    controls.memory_read[:, 0], controls.memory_write[1] = 0.3, 0.4
    controls.steer[:] = torch.randn_like(controls.steer)
    whole = read(model, ids, controls)
    first = read(model, ids[:, :cut], controls)
    second = read(model, ids[:, cut:], controls, state=first.state)
    logits = torch.cat([first.logits, second.logits], 1)
    assert_same({"logits": logits} | second.state.to_tensors(), {"logits": whole.logits} | whole.state.to_tensors())


class TestRouterBias:
    def test_experts_are_forced_and_banned(self) -> None:
        model, ids = small_model(), tokens(2, 40)
        plain = read(model, ids, None, trace=FULL).trace.layers[1].routing
        assert {int(e) for e in plain.experts.flatten()} == {0, 1, 2, 3}
        controls = Controls.neutral(model.config, 2)
        controls.router_bias[0, 1, 3] = torch.inf
        controls.router_bias[1, 1, :2] = -torch.inf
        routing = read(model, ids, controls, trace=FULL).trace.layers[1].routing
        assert (routing.experts[0] == 3).any(-1).all()
        assert set(routing.experts[1].flatten().tolist()) == {2, 3}

    def test_weights_are_those_of_the_unbiased_logits(self) -> None:
        model, ids = small_model(), tokens(2, 9)
        bias = torch.tensor([0.8, -0.5, 0.0, torch.inf])
        routing = read(model, ids, in_last_layer(model, 2, router_bias=bias), trace=FULL).trace.layers[1].routing
        ranked = (routing.logits + bias).clamp(max=torch.finfo(torch.float32).max)
        assert torch.equal(routing.experts, ranked.topk(2).indices)
        torch.testing.assert_close(routing.weights, routing.logits.gather(-1, routing.experts).softmax(-1))

    def test_the_margin_is_that_of_what_was_ranked(self) -> None:
        model, ids = small_model(), tokens(1, 9)
        bias = torch.tensor([1.5, -torch.inf, 0.2, 0.0])
        routing = read(model, ids, in_last_layer(model, 1, router_bias=bias), trace=FULL).trace.layers[1].routing
        ranked = (routing.logits.double() + bias).softmax(-1).sort(-1, descending=True).values
        torch.testing.assert_close(routing.margin.double(), ranked[..., 1] - ranked[..., 2], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("forced", [1, 2])
    def test_the_margin_of_a_forced_choice_is_a_number(self, forced: int) -> None:
        model, bias = small_model(), torch.zeros(4)
        bias[:forced] = torch.inf
        routing = (
            read(model, tokens(1, 4), in_last_layer(model, 1, router_bias=bias), trace=FULL).trace.layers[1].routing
        )
        assert torch.equal(routing.margin, torch.full((1, 4), 0.5 if forced == 2 else 0.0))

    @pytest.mark.parametrize(
        ("bias", "message"), [(-torch.inf, "2 experts left a layer, got 1"), (torch.inf, "forced")]
    )
    def test_what_leaves_no_choice_is_refused(self, bias: float, message: str) -> None:
        model = small_model()
        controls = Controls.neutral(model.config, 2)
        controls.router_bias[1, 0, :3] = bias
        with pytest.raises(ConfigError, match=message):
            read(model, tokens(2, 3), controls)


class TestMemory:
    @pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
    def test_the_answer_is_scaled(self, scale: float) -> None:
        model, ids, seen = small_model(), tokens(2, 7), {}
        layer = model.layers[-1]
        hooks = [
            layer.memory_norm.register_forward_pre_hook(lambda module, args: seen.update(before=args[0])),
            layer.memory.register_forward_hook(lambda module, args, out: seen.update(answer=out.y)),
            model.norm.register_forward_pre_hook(lambda module, args: seen.update(after=args[0])),
        ]
        read(model, ids, in_last_layer(model, 2, memory_read=scale))
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(seen["after"], seen["before"] + scale * seen["answer"])

    @pytest.mark.parametrize("rule", ["delta", "hebbian"])
    @pytest.mark.parametrize("gated", [False, True])
    def test_a_frozen_memory_stays_as_it_is(self, rule: Any, gated: bool) -> None:
        memory = MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=2, rule=rule, write_gate=gated)
        model = small_model(memory=memory)
        before = read(model, tokens(2, 6), None).state
        for length in (1, 9):
            after = read(model, tokens(2, length), in_last_layer(model, 2, memory_write=0.0), state=before).state
            torch.testing.assert_close(after.layers[1].memory.weights, before.layers[1].memory.weights)
            assert not torch.equal(after.layers[0].memory.weights, before.layers[0].memory.weights)
            assert not torch.equal(after.layers[1].memory.conv, before.layers[1].memory.conv)

    @pytest.mark.parametrize("gated", [False, True])
    def test_strengths_and_log_decays_are_scaled(self, gated: bool) -> None:
        """Against the recurrence, written out for one token: W <- a^s W - s b k (kᵀ a^s W) + s w k vᵀ."""
        memory = MemoryConfig(n_heads=2, d_key=4, d_value=6, n_householder=1, write_gate=gated)
        model, ids, scale, seen = small_model(memory=memory), tokens(2, 1), 0.25, {}
        region = model.layers[-1].memory
        before = read(model, tokens(2, 6), None).state
        hook = region.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], state=args[1]))
        after = read(model, ids, in_last_layer(model, 2, memory_write=scale), state=before).state
        hook.remove()
        _, strength, step, *amount = region.gate_proj(seen["x"]).split(region.gates, dim=-1)
        mixed, _ = region.conv(region.in_proj(seen["x"]), seen["state"].conv)
        _, k, v = (z[:, 0].unflatten(-1, (2, -1)) for z in mixed.split(region.mixed, dim=-1))
        k = k / (k.square().sum(-1, keepdim=True) + 4 * 1e-6).sqrt()
        b = scale * 2 * strength[:, 0].sigmoid()[..., None, None]
        w = scale * amount[0][:, 0].sigmoid().unflatten(-1, (2, -1))[..., None, :] if gated else b
        kept = (scale * -region.A_log.exp() * F.softplus(step[:, 0] + region.dt_bias)).exp()
        W = kept[..., None, None] * seen["state"].weights
        expected = W - b * k[..., None] * (k[..., None] * W).sum(-2, keepdim=True) + w * k[..., None] * v[..., None, :]
        torch.testing.assert_close(after.layers[-1].memory.weights, expected, rtol=1e-5, atol=1e-6)


class TestStream:
    def test_steering_adds_to_the_stream_behind_the_layer(self) -> None:
        model, ids, vector = small_model(), tokens(2, 5), torch.randn(16)
        seen: list[Tensor] = []
        hook = model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        read(model, ids, None)
        read(model, ids, in_last_layer(model, 2, steer=vector))
        hook.remove()
        torch.testing.assert_close(seen[1], seen[0] + vector)

    def test_a_patch_takes_the_streams_place(self) -> None:
        model, ids, vector = small_model(), tokens(2, 5), torch.randn(16)
        controls = in_last_layer(model, 2, patch=vector, patch_on=True, steer=0.5)
        controls.patch_on[1] = False
        logits = read(model, ids, controls).logits
        expected = model.head(model.norm(vector + 0.5))
        torch.testing.assert_close(logits[0], expected.expand(5, -1))
        assert not torch.allclose(logits[1], expected.expand(5, -1))

    def test_a_patch_hides_what_is_not_finite(self) -> None:
        model, ids = small_model(), tokens(1, 5)
        with torch.no_grad():
            model.embedding.weight[ids[0, 2]] = torch.nan
        assert read(model, ids, in_last_layer(model, 1, patch=1.0, patch_on=True)).logits.isfinite().all()


def test_gradients_flow_through_controls() -> None:
    model, ids = small_model(), tokens(2, 5)
    controls = Controls.neutral(model.config, 2)
    controls.steer.requires_grad_()
    model(ids, controls=controls).logits.square().sum().backward()
    assert controls.steer.grad is not None
    assert (controls.steer.grad.abs().sum(-1) > 0).all()


def test_wrong_tensors_are_named() -> None:
    model = small_model()
    controls = Controls.neutral(model.config, 2)
    with pytest.raises(ShapeError, match=r"controls.router_bias: expected \(3, 2, 4\)"):
        read(model, tokens(3, 2), controls)
    with pytest.raises(ShapeError, match=r"controls.patch_on: expected \(2, 2\) torch.bool"):
        read(model, tokens(2, 2), controls._replace(patch_on=torch.zeros(2, 2)))


def test_pathways_act_like_consolidated_ones_on_their_row_alone() -> None:
    model, consolidated, ids = small_model(), small_model(), tokens(2, 30)
    consolidated.load_state_dict(model.state_dict())
    lift = 3 * torch.randn(2, 4, 4)  # strong enough to change routes
    for layer, pathways in zip(consolidated.layers, lift, strict=True):
        layer.thalamus.pathways.copy_(pathways)
    controls = Controls.neutral(model.config, 2)
    controls.pathways[1] = lift
    led = read(model, ids, controls, trace=FULL)
    plain, other = (read(one, ids, None, trace=FULL) for one in (model, consolidated))
    assert torch.equal(led.logits[0], plain.logits[0])
    assert torch.equal(led.logits[1], other.logits[1])
    assert not torch.equal(led.logits[1], plain.logits[1])
    assert torch.equal(led.trace.layer(1).routing.margin[1], other.trace.layer(1).routing.margin[1])
    assert not model.layers[0].thalamus.pathways.any()  # weights never change
