"""The models of the comparison: every one trains, ablations lack what they say, records tell the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.quality.models import ABLATIONS, MODELS, Autoencoder, Learner, build, description
from benchmarks.quality.peers import PEERS
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.base import Batch, Protocol, Task
from recipes.optim import parameter_groups
from synapse_arch import SynapseModel
from synapse_arch.errors import ConfigError
from synapse_arch.modules import Mamba, Thalamus
from synapse_arch.modules.common import HeadNorm, RMSNorm

VOCABULARY, CLASSES, LENGTH = 13, 7, 12
TINY = Protocol(
    train_examples=None, test_examples=4, batch_size=2, steps=1, lrs=(1e-3,), weight_decays=(0.0,), d_model=32,
    n_layers=2, stop_at=None, eval_every=1,
)  # fmt: skip


def tiny(length: int = LENGTH, **changes: Any) -> Task:
    def make(n: int, generator: torch.Generator) -> Batch:
        ids = torch.randint(VOCABULARY, (n, length), generator=generator)
        return Batch(ids, ids % CLASSES, torch.ones_like(ids, dtype=torch.bool))

    fields: dict[str, Any] = {
        "name": "tiny", "vocab_size": VOCABULARY, "n_classes": CLASSES, "make": make, "protocols": {"cpu": TINY},
        "metric": "micro", "published": {}, "description": "", "bar": None,
    }  # fmt: skip
    return Task(**(fields | changes))


def learner(name: str = "synapse", protocol: Protocol = TINY, **changes: Any) -> Learner:
    return build(name, task=tiny(**changes), protocol=protocol)


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH))


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_every_model(name: str) -> None:
    model, x = learner(name).train(), ids()
    logits, auxiliary = model(x)
    assert logits.shape == (2, LENGTH, CLASSES)
    assert auxiliary.shape == ()
    (nn.functional.cross_entropy(logits.flatten(0, 1), (x % CLASSES).flatten()) + auxiliary).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    model.after_step()
    assert model.eval()(x)[1] == 0


@pytest.mark.parametrize(("blocks", "d_model"), [(1, 32), (2, 32), (3, 32), (2, 64), (1, 128), (2, 128)])
def test_every_region_is_in_the_default(blocks: int, d_model: int) -> None:
    protocol = dataclasses.replace(TINY, n_layers=blocks, d_model=d_model)
    config = learner(protocol=protocol).body.config
    assert all((config.xlstm, config.thalamus, config.experts, config.memory))
    assert config.n_layers == blocks
    assert config.memory.n_heads > 1 or d_model == 32
    assert learner("mamba2", protocol).body.config["n_layers"] == blocks


LACKS: dict[str, Callable[[SynapseModel], bool]] = {
    "no-xlstm": lambda m: all(layer.xlstm is None for layer in m.layers),
    "no-memory": lambda m: all(layer.memory is None for layer in m.layers),
    "no-experts": lambda m: all(layer.experts is None and not layer.thalamus.n_experts for layer in m.layers),
    "no-thalamus": lambda m: not any(isinstance(module, Mamba) for module in m.modules()),
    "token-router": lambda m: not _context_moves_routing(m),
    "dense-experts": lambda m: all(layer.experts.w_in.shape[0] == 1 for layer in m.layers),
    "hebbian": lambda m: m.config.memory.rule == "hebbian",
    "beta-1": lambda m: m.config.memory.beta_max == 1.0,
    "decay-free-heads": lambda m: all(layer.memory.A_log.exp().max() < 1e-5 for layer in m.layers),
    "householder-1": lambda m: all(sum(layer.memory.mixed) == 3 * 32 for layer in m.layers),
    "write-gate": lambda m: all(len(layer.memory.gates) == 4 for layer in m.layers),
    "input-gate-minus-2": lambda m: all((layer.xlstm.input_gate_bias == -2).all() for layer in m.layers),
    "input-gate-minus-5": lambda m: all((layer.xlstm.input_gate_bias == -5).all() for layer in m.layers),
    "input-gate-minus-10": lambda m: all((layer.xlstm.input_gate_bias == -10).all() for layer in m.layers),
    "no-balance": lambda m: m.config.thalamus.load_balance == 0 and m.config.thalamus.bias_rate == 0,
    "bias-balance": lambda m: m.config.thalamus.load_balance == 0 and m.config.thalamus.bias_rate == 1e-3,
}
"""What is true of an ablation and not of the whole."""


def _context_moves_routing(model: SynapseModel) -> bool:
    """Whether the token before changes a token's router logits in the first layer."""
    thalamus: Thalamus = model.layers[0].thalamus
    x = torch.randn(1, 6, 32)
    other = torch.cat([torch.randn(1, 5, 32), x[:, 5:]], dim=1)
    logits = [thalamus(z).routing.logits[:, -1] for z in (x, other)]
    return not torch.allclose(*logits)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_lack_what_they_say(name: str) -> None:
    whole, changed = learner().body, learner(f"synapse:{name}").body
    assert LACKS[name](changed)
    assert not LACKS[name](whole)
    fields = [f.name for f in dataclasses.fields(whole.config)]
    differing = [f for f in fields if getattr(whole.config, f) != getattr(changed.config, f)]
    assert len(differing) == (2 if name == "dense-experts" else 1)


def test_dense_experts_do_as_much_work() -> None:
    whole, dense = (description(learner(name))["active_parameters"] for name in ("synapse", "synapse:dense-experts"))
    assert dense == pytest.approx(whole, rel=0.02)  # the router is gone


def test_features_are_what_the_models_own_head_sees() -> None:
    model = learner().train()
    torch.manual_seed(1)
    whole = SynapseModel(model.body.config).train()
    whole.load_state_dict(model.body.state_dict(), strict=False)
    x = ids()
    out = whole(x, targets=x)
    features, auxiliary = model.features(x)
    assert_close(whole.head(features), out.logits)
    assert_close(auxiliary, out.losses["balance"] + out.losses["z"])
    assert auxiliary > 0


@pytest.mark.parametrize("autoencodes", [False, True])
@pytest.mark.parametrize("name", ["synapse", "transformer"])
def test_the_head_runs_where_it_is_asked_to(name: str, autoencodes: bool) -> None:
    model, x = learner(name, autoencodes=autoencodes).eval(), ids()
    positions = torch.rand(2, LENGTH) < 0.4
    assert_close(model(x, positions)[0], model(x)[0][positions])


def test_the_autoencoder_knows_the_last_feature_and_the_position() -> None:
    head, features = Autoencoder(16, CLASSES), torch.randn(2, 9, 16)
    other = features.clone()
    other[:, :-1] = torch.randn(2, 8, 16)
    assert torch.equal(head(features), head(other))
    other[:, -1] += 0.1
    assert (head(features) - head(other)).abs().amin((0, 2)).max() > 0
    assert torch.pdist(head(features)[0]).min() > 1e-3
    assert isinstance(learner(autoencodes=True).head, Autoencoder)


@pytest.mark.parametrize("name", ["synapse", *PEERS])
def test_weight_decay_spares_what_must_not_decay(name: str) -> None:
    model = learner(name, autoencodes=True)
    decayed, spared = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    norms = [m.weight for m in model.modules() if isinstance(m, RMSNorm | HeadNorm)]
    kept = [model.body.embedding.weight, *norms, *(p for n, p in model.named_parameters() if n.endswith(SPARED))]
    assert {names[id(p)] for p in kept} == {names[i] for i in spared}
    assert len(decayed) + len(spared) == len(names)


SPARED = ("bias", "A_log", ".D", "router.weight")


def test_the_balancing_bias_follows_the_training_load() -> None:
    model = learner("synapse:bias-balance")
    with torch.no_grad():  # expert 0 wins always
        for layer in model.body.layers:
            layer.thalamus.router_bias[0] = 100.0
    before = [layer.thalamus.router_bias.clone() for layer in model.body.layers]
    model.eval()(ids())
    model.after_step()
    assert all(torch.equal(b, layer.thalamus.router_bias) for b, layer in zip(before, model.body.layers, strict=True))
    model.train()(ids())
    model.after_step()
    for bias, layer in zip(before, model.body.layers, strict=True):
        moved = layer.thalamus.router_bias - bias
        assert moved[0].item() == pytest.approx(-1e-3, rel=0.01)
        assert moved[1:].max().item() == pytest.approx(1e-3, rel=0.01)


def test_balance_losses_can_be_switched_off() -> None:
    torch.manual_seed(0)
    whole, x = learner().train(), ids()
    torch.manual_seed(0)
    without = learner("synapse:no-balance").train()
    assert whole(x)[1] > without(x)[1] > 0  # the z-loss stays


@pytest.mark.parametrize("name", ["synapse", "synapse:no-memory", "mamba2", "transformer"])
def test_descriptions_count(name: str) -> None:
    model = learner(name, length=20)
    told = description(model)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    idle = model.body.embedding.weight.numel()
    if name.startswith("synapse"):
        idle += sum(layer.experts.w_in[2:].numel() + layer.experts.w_out[2:].numel() for layer in model.body.layers)
        state = model.body.init_state(1).to_tensors()
        assert told["state_numbers"] == sum(x.numel() for key, x in state.items() if key != "position")
    assert told["active_parameters"] == told["parameters"] - idle
    if name == "transformer":
        assert told["state_numbers"] == 2 * 20 * 2 * 32  # keys and values of the longest example


def test_attention_is_counted_at_the_longest_text() -> None:
    per_token = 2 * TINY.n_layers * TINY.d_model  # a key and a value a block
    for model in (
        learner("transformer", test_make=tiny(length=50).make),
        learner("transformer", dataclasses.replace(TINY, test_lengths=(20, 50)), test_make=tiny(length=70).make),
    ):
        assert description(model)["state_numbers"] == 50 * per_token


@pytest.mark.parametrize(("metric", "counted"), [("micro", "parameters"), ("bits", "active_parameters")])
@pytest.mark.parametrize("name", PEERS)
def test_what_is_held_equal(name: str, metric: str, counted: str) -> None:
    """All parameters on the tasks, head and embedding included; active ones on text."""
    protocol = dataclasses.replace(TINY, d_model=64, n_layers=1)
    ours, theirs = (description(learner(n, protocol, metric=metric)) for n in ("synapse", name))
    assert theirs[counted] == pytest.approx(ours[counted], rel=0.02)


@pytest.mark.parametrize("name", PEERS)
def test_every_task_has_its_peers(name: str) -> None:
    """`matched` raises where parameters or state cannot be made equal."""
    done = set()
    for task in TASKS.values():
        for protocol in task.protocols.values():
            size = (task.vocab_size, protocol.d_model, protocol.n_layers, task.metric)
            if size not in done:
                with torch.device("meta"):
                    build(name, task=task, protocol=protocol)
            done.add(size)


def test_unknown_models() -> None:
    with pytest.raises(ConfigError, match="model: expected one of synapse, transformer"):
        learner("transfomer")


def test_a_seed_is_a_model() -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(learner("mamba2").state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])


@pytest.mark.parametrize("name", ["synapse", "mamba2"])
def test_tied_heads_are_the_embedding_and_start_at_unit_scale(name: str) -> None:
    torch.manual_seed(0)
    free = learner(name, n_classes=VOCABULARY)
    tied = learner(name, n_classes=VOCABULARY, tied=True)
    assert isinstance(tied.head, nn.Linear)
    assert tied.head.weight is tied.body.embedding.weight
    batch = ids()
    features, _ = tied.eval().features(batch)
    expected = features @ tied.body.embedding.weight.T * features.shape[-1] ** -0.5
    assert_close(tied(batch)[0], expected)
    assert 0.3 < float(expected.detach().std()) < 3
    one, other = description(free), description(tied)
    assert one["parameters"] - other["parameters"] == tied.head.weight.numel()
    assert one["active_parameters"] == other["active_parameters"]
