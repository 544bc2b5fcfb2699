"""The adapter for transformers: the same numbers as the core through generate, Trainer, pipeline, PEFT and files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from synapse_arch import Sampling, SynapseModel, SynapseState
from synapse_arch.errors import CheckpointError, ConfigError, StateError
from tests.helpers import assert_close
from tests.model.small import VARIANTS, small_config, small_model, tokens

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from synapse_arch.hf import SynapseCache, SynapseForCausalLM, SynapseHFConfig, byte_tokenizer

QUIET: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def wrapped(**changes: Any) -> SynapseForCausalLM:
    return SynapseForCausalLM.from_core(small_model(**changes))


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(length - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


def complete(model: SynapseForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    out: Tensor = model.generate(ids, attention_mask=mask, **{"max_new_tokens": 8, **QUIET, **options})
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_wrapped_model_computes_what_the_core_computes(variant: str) -> None:
    core = small_model(**VARIANTS[variant])
    model, ids = SynapseForCausalLM.from_core(core), tokens(2, 9)
    out, expected = model(ids), core(ids)
    assert torch.equal(out.logits, expected.logits)
    after, state = out.past_key_values.state.to_tensors(), expected.state.to_tensors()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(model(ids, return_dict=False)[0], expected.logits)
    assert torch.equal(model(ids, logits_to_keep=1).logits, core(ids, logits_to_keep=1).logits)


def test_labels_are_shifted_and_the_losses_are_the_cores() -> None:
    model, ids = wrapped(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model.model(ids, targets=targets)
    assert torch.equal(model(ids, labels=labels).loss, expected.loss)
    language = cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_close(expected.losses["language"], language)


def test_a_cache_carries_the_state_from_call_to_call() -> None:
    model, ids = wrapped(), tokens(2, 11)
    whole = model(ids)
    cache = SynapseCache()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 1, 6], dim=1)]
    assert_close(torch.cat(parts, dim=1), whole.logits)
    assert cache.get_seq_length() == 11
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None


def test_greedy_generation_is_the_cores() -> None:
    model, ids = wrapped(), tokens(3, 5)
    expected = model.model.generate(ids, sampling=Sampling(temperature=0, max_tokens=8)).ids
    assert complete(model, ids, do_sample=False).tolist() == expected
    assert complete(model, ids, do_sample=False, use_cache=False).tolist() == expected


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_a_prompt_read_in_pieces_generates_the_same(size: int) -> None:
    model, rows = wrapped(), [tokens(1, 9)[0], tokens(1, 6)[0]]
    ids, mask = left_padded(rows)
    whole, pieces = (complete(model, ids, mask, do_sample=False, **how) for how in ({}, {"prefill_chunk_size": size}))
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_a_left_padded_batch_gives_what_each_row_gives_alone(how: dict[str, Any]) -> None:
    model = wrapped()
    rows = [tokens(1, length)[0] for length in (2, 7, 5)]
    ids, mask = left_padded(rows)
    alone = [complete(model, row[None], **how)[0].tolist() for row in rows]
    assert complete(model, ids, mask, **how).tolist() == alone
    padded, single = model(ids, attention_mask=mask).logits[0, -2:], model(rows[0][None]).logits[0]
    assert_close(padded, single)


def test_beam_search_finds_what_scoring_every_continuation_finds() -> None:
    model, ids = wrapped(), tokens(1, 4)
    vocabulary = model.config.vocab_size
    found = complete(model, ids, num_beams=vocabulary, max_new_tokens=2, do_sample=False)[0]
    pairs = torch.cartesian_prod(torch.arange(vocabulary), torch.arange(vocabulary))
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(len(pairs), -1), pairs], dim=1)).logits.log_softmax(-1)
    scores = logits[:, 3:5].gather(2, pairs[..., None]).sum((1, 2))
    assert found.tolist() == pairs[scores.argmax()].tolist()


def test_sampling_draws_with_the_models_probabilities() -> None:
    model, ids = wrapped(), tokens(1, 4)
    drawn = complete(model, ids.expand(4000, -1), do_sample=True, max_new_tokens=1)[:, 0]
    shares = torch.bincount(drawn, minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1)
    assert (shares - expected).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations of a share
    assert complete(model, ids, do_sample=True, num_return_sequences=3).shape == (3, 8)


def test_a_conversation_goes_on_from_its_cache_or_from_a_saved_state(tmp_path: Path) -> None:
    model, ids, more = wrapped(), tokens(1, 6), tokens(1, 5)
    whole = complete(model, torch.cat([ids, more], dim=1), do_sample=False)
    cache = SynapseCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.state is not None
    cache.state.save(tmp_path / "state.safetensors")
    both = torch.cat([ids, more], dim=1)
    assert torch.equal(complete(model, both, do_sample=False, past_key_values=cache), whole)
    remembered = SynapseCache(SynapseState.load(tmp_path / "state.safetensors"))
    assert torch.equal(complete(model, more, do_sample=False, past_key_values=remembered), whole)


@pytest.mark.parametrize("variant", ["whole", "tied", "s6"])
@pytest.mark.parametrize("shard", ["5GB", "5KB"])
def test_saving_and_loading_keeps_every_bit(tmp_path: Path, variant: str, shard: str) -> None:
    model, ids = wrapped(**VARIANTS[variant]), tokens(2, 5)
    model.model.layers[0].thalamus.router_bias.fill_(0.5)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (5 if shard == "5KB" else 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SynapseForCausalLM)
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == (variant == "tied")
    marks = [(p.__dict__.get("_no_weight_decay"), p.__dict__.get("_keep_float32")) for p in loaded.parameters()]
    assert marks == [(p.__dict__.get("_no_weight_decay"), p.__dict__.get("_keep_float32")) for p in model.parameters()]
    assert AutoConfig.from_pretrained(tmp_path).core == model.model.config


def test_loaded_narrower_what_must_stay_float32_stays(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "hf")
    model.model.save_pretrained(tmp_path / "core")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    core = SynapseModel.from_pretrained(tmp_path / "core", dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in core.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()} == dtypes
    assert torch.bfloat16 in dtypes.values()
    assert loaded(tokens(1, 4)).logits.isfinite().all()


def test_folders_convert_both_ways(tmp_path: Path) -> None:
    core, ids = small_model(), tokens(2, 5)
    core.save_pretrained(tmp_path / "core")
    SynapseForCausalLM.from_core(SynapseModel.from_pretrained(tmp_path / "core")).save_pretrained(tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").model.save_pretrained(tmp_path / "again")
    again = SynapseModel.from_pretrained(tmp_path / "again")
    assert again.config == core.config
    assert torch.equal(again(ids).logits, core(ids).logits)


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    wrapped(memory=None).save_pretrained(tmp_path)
    SynapseHFConfig.from_core(small_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing keys .*memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_new_model_starts_as_the_core_starts() -> None:
    torch.manual_seed(3)
    core = SynapseModel(small_config())
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(SynapseHFConfig.from_core(small_config()))
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), model.parameters(), strict=True))


def test_the_model_card_says_what_the_model_is(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| **total** | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert "library_name: transformers" in card
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"


def test_what_has_no_meaning_here_is_refused() -> None:
    model, ids = wrapped(), tokens(1, 4)
    with pytest.raises(ConfigError, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ConfigError, match="no input_ids"):
        model()
    with pytest.raises(StateError, match="SynapseCache"):
        model(ids, past_key_values=model.model.init_state(1))
    with pytest.raises(StateError, match="crop"):
        SynapseCache().crop(1)
    with pytest.raises(ConfigError, match="new_num_tokens"):
        model.resize_token_embeddings(99)
    with pytest.raises(ConfigError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ConfigError, match="did you mean 'd_model'"):
        SynapseHFConfig(synapse={"d_modle": 8})


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    text = "def f(x):\n\treturn  'né€😀' # Āā\r\n"
    assert tokenizer(text).input_ids == [0, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text
    assert sorted(tokenizer.get_vocab().values()) == list(range(256))
    padded = tokenizer(["ab", "c"], padding=True)
    assert padded.input_ids == [[0, 97, 98], [0, 0, 99]]
    assert padded.attention_mask == [[1, 1, 1], [0, 1, 1]]


def test_a_pipeline_completes_text(tmp_path: Path) -> None:
    core = SynapseModel(replace(small_config(), vocab_size=256)).eval()
    SynapseForCausalLM.from_core(core).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    complete_text = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "return_tensors": True}
    found = complete_text(["abc", "a"], batch_size=2, **options)
    for prompt, answer in zip(("abc", "a"), found, strict=True):
        ids = torch.tensor([[0, *prompt.encode()]])
        expected = core.generate(ids, sampling=Sampling(temperature=0, max_tokens=5)).ids[0]
        assert answer[0]["generated_token_ids"][-5:] == expected


def test_trainer_learns_saves_and_resumes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    rows = [tokenizer("abcabcabcabc"[: 6 + n % 6]) for n in range(16)]

    def train(out: str, steps: int, **resume: Any) -> tuple[Trainer, float]:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
            save_steps=10, logging_steps=5, report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
            lr_scheduler_type="constant", dataloader_pin_memory=False,
        )  # fmt: skip
        model = SynapseForCausalLM.from_core(SynapseModel(replace(small_config(tie_embeddings=True), vocab_size=256)))
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trainer.train(**resume)
        return trainer, trainer.evaluate()["eval_loss"]

    trainer, loss = train("whole", 20)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.8 * history[0]
    train("parts", 10)
    resumed, again = train("parts", 20, resume_from_checkpoint=True)
    assert again == pytest.approx(loss, rel=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-20")
    assert torch.equal(loaded.model.head.weight, resumed.model.model.head.weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks for
def test_peft_adapts_generates_and_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, ids = wrapped(), tokens(2, 6)
    model.save_pretrained(tmp_path / "base")
    before = model(ids).logits
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    changed = adapted(input_ids=ids).logits
    assert (changed - before).abs().max() > 1e-2
    written = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **QUIET)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(loaded(input_ids=ids).logits, changed)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, SynapseForCausalLM)
    assert_close(merged(ids).logits, changed)
    mask = torch.ones_like(ids)
    assert torch.equal(merged.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **QUIET), written)


def test_the_core_stays_free_of_transformers() -> None:
    code = "import sys, synapse_arch, synapse_arch.model; print('transformers' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "False"
