"""Generation: drawn as asked, the same as a full pass, stops that never show, states that read what was returned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synapse_arch import ConfigError, Sampling, ShapeError, StateError, SynapseModel, ThalamusConfig, TraceSpec
from synapse_arch.model.generation import StreamedToken, TokenStream, generate, stream
from synapse_arch.model.sampling import StopMatcher, draw_tokens, penalise
from tests.helpers import assert_equal, assert_same
from tests.model.small import VARIANTS, VOCABULARY, read_state, small_model, tokens

GREEDY = Sampling(temperature=0, max_tokens=10)


@pytest.fixture(scope="module")
def model() -> SynapseModel:
    """In float64, so that a full pass and single steps cannot disagree about the likeliest token."""
    torch.manual_seed(3)
    return small_model().double()


@pytest.fixture
def prompt() -> Tensor:
    return tokens(1, 6)


def greedy(count: int, **options: Any) -> Sampling:
    return Sampling(temperature=0, max_tokens=count, **options)


def ids_of(stream_of_tokens: Sequence[StreamedToken] | TokenStream) -> list[int]:
    return [token.id for token in stream_of_tokens]


@torch.no_grad()
def full_pass(model: SynapseModel, prompt: Tensor, count: int) -> tuple[list[int], list[float], list[float]]:
    """The likeliest continuation, by reading everything again for each token; its log-probabilities and entropies."""
    ids, logprobs, entropies = prompt, [], []
    for _ in range(count):
        chances = model(ids).logits[0, -1].float().softmax(-1)
        token = int(chances.argmax())
        logprobs.append(math.log(chances[token]))
        entropies.append(-sum(p * math.log(p) for p in chances.tolist() if p > 0))
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ids[0, prompt.shape[1] :].tolist(), logprobs, entropies


def read(model: SynapseModel, *parts: Tensor | list[int]) -> dict[str, Tensor]:
    """The state after reading the parts one after another, in a single pass."""
    ids = torch.cat([torch.as_tensor(part, dtype=torch.long).reshape(1, -1) for part in parts], dim=1)
    with torch.no_grad():
        return model(ids).state.to_tensors()


def cut(whole: list[int], stop: tuple[tuple[int, ...], ...]) -> tuple[list[int], str]:
    """The part of a finished output before its first stop sequence (the longest, of those that end together)."""
    for end in range(1, len(whole) + 1):
        found = [len(ids) for ids in stop if tuple(whole[max(0, end - len(ids)) : end]) == ids]
        if found:
            return whole[: end - max(found)], "stop"
    return whole, "length"


class TestSampling:
    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": -0.1},
            {"temperature": math.nan},
            {"temperature": math.inf},
            {"temperature": "1"},
            {"top_k": 0},
            {"top_k": 2.0},
            {"top_p": 0.0},
            {"top_p": 1.1},
            {"top_p": math.nan},
            {"temperature": 10**400},
            {"repetition_penalty": 10**400},
            {"repetition_penalty": 0.0},
            {"repetition_penalty": -1.0},
            {"stop": ((),)},
            {"stop": (3,)},
            {"stop": [(3,)]},
            {"stop": ((-1,),)},
            {"seed": -1},
            {"seed": 2**63},
            {"seed": True},
            {"max_tokens": -1},
            {"max_tokens": 1.5},
        ],
    )
    def test_values_out_of_range_are_named(self, options: dict[str, Any]) -> None:
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name}: expected"):
            Sampling(**options)

    def test_temperature_zero_takes_the_likeliest(self) -> None:
        scores = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, -torch.inf]])
        assert draw_tokens(scores, Sampling(temperature=0), torch.zeros(2)).tolist() == [1, 0]

    @pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
    def test_a_tiny_temperature_does_too(self, temperature: float) -> None:
        scores = torch.tensor([[0.0, 3.0, 2.999], [-1e30, 1e30, 0.0]])
        assert draw_tokens(scores, Sampling(temperature=temperature), torch.rand(2)).tolist() == [1, 1]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.5, 0.25, 0.15, 0.1]),
            ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
            ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
            ({"top_k": 99}, [0.5, 0.25, 0.15, 0.1]),
            ({"top_p": 0.4}, [1, 0, 0, 0]),
            ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
            ({"top_p": 0.89}, [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
            ({"top_p": 1.0}, [0.5, 0.25, 0.15, 0.1]),
            ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
            ({"top_p": 1e-9}, [1, 0, 0, 0]),
            ({"top_p": 1e-300}, [1, 0, 0, 0]),
            ({"top_k": 3, "top_p": 1e-300}, [1, 0, 0, 0]),
        ],
    )
    def test_shares_of_a_fine_grid_of_draws(self, options: dict[str, Any], expected: list[float]) -> None:
        """A draw inverts the distribution function, so evenly spaced uniforms give the probabilities themselves."""
        order = torch.tensor([2, 0, 3, 1])
        scores = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()[order].expand(10_000, -1)
        uniforms = (torch.arange(10_000) + 0.5) / 10_000
        counts = draw_tokens(scores, Sampling(**options), uniforms).bincount(minlength=4)
        for place, likelihood in enumerate(order.tolist()):
            assert abs(counts[place].item() / 10_000 - expected[likelihood]) <= 2e-4
            assert expected[likelihood] > 0 or counts[place] == 0

    @given(
        scores=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
        top_k=st.none() | st.integers(1, 13),
        top_p=st.none() | st.floats(0.01, 1.0),
        uniform=st.sampled_from([0.0, 0.3, 0.999, 1 - 2**-24]),
    )
    def test_a_draw_lies_in_the_set_asked_for(
        self, scores: list[float], top_k: int | None, top_p: float | None, uniform: float
    ) -> None:
        x = torch.tensor([scores])
        token = int(draw_tokens(x, Sampling(top_k=top_k, top_p=top_p), torch.tensor([uniform])))
        assert 0 <= token < len(scores)
        above = x[0] > x[0, token]
        assert top_k is None or above.sum() < top_k
        if top_p is not None:
            kept = x[0] if top_k is None else x[0].topk(min(top_k, len(scores))).values
            mass = kept.softmax(-1)[kept > x[0, token]].sum()
            assert mass < top_p + 1e-5

    def test_impossible_tokens_are_never_drawn(self) -> None:
        scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(1001, -1)
        uniforms = torch.linspace(0, 1, 1001)  # 1 itself: what rounding can make of a draw just below it
        for options in ({}, {"top_p": 0.99}, {"top_k": 4}):
            assert set(draw_tokens(scores, Sampling(**options), uniforms).tolist()) == {1, 3}

    def test_penalty_divides_positive_and_multiplies_negative_logits(self) -> None:
        logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0.0]])
        seen = torch.tensor([[True, True, False, False, True]])
        assert penalise(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0, 0.0]]
        for penalty in (1e-300, 1e300):
            extreme = penalise(logits, seen, penalty)
            assert extreme.isfinite().all()
            assert int(draw_tokens(extreme, Sampling(), torch.tensor([0.5]))) == (0 if penalty < 1 else 2)


class TestStream:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_greedy_tokens_equal_a_full_pass_for_each(self, variant: str, prompt: Tensor) -> None:
        model = small_model(**VARIANTS[variant]).double()
        found = list(stream(model, prompt, sampling=GREEDY))
        ids, logprobs, entropies = full_pass(model, prompt, 10)
        assert ids_of(found) == ids
        assert [token.logprob for token in found] == pytest.approx(logprobs, abs=1e-5)
        assert [token.entropy for token in found] == pytest.approx(entropies, abs=1e-5)

    def test_each_state_has_read_the_prompt_and_the_tokens_so_far(self, model: SynapseModel, prompt: Tensor) -> None:
        read_so_far: list[int] = []
        for token in stream(model, prompt, sampling=GREEDY):
            read_so_far.append(token.id)
            assert_same(token.state.to_tensors(), read(model, prompt, read_so_far))

    def test_a_conversation_goes_on_from_a_state(self, model: SynapseModel, prompt: Tensor) -> None:
        *_, last = stream(model, prompt, sampling=greedy(4))
        answer = ids_of(stream(model, prompt, sampling=greedy(4)))
        question = tokens(1, 3)
        before = {name: tensor.clone() for name, tensor in last.state.to_tensors().items()}
        found = ids_of(stream(model, question, last.state, sampling=greedy(5)))
        assert_equal(last.state.to_tensors(), before)
        joined = torch.cat([prompt, torch.tensor([answer]), question], dim=1)
        assert found == full_pass(model, joined, 5)[0]

    def test_only_the_last_token_says_why_it_ends(self, model: SynapseModel, prompt: Tensor) -> None:
        running = stream(model, prompt, sampling=greedy(3))
        assert running.finish is None
        assert [token.finish for token in running] == [None, None, "length"]
        assert running.finish == "length"

    def test_logprob_and_entropy_are_the_models_own(self, model: SynapseModel, prompt: Tensor) -> None:
        options = Sampling(temperature=0.3, top_k=3, repetition_penalty=2.0, seed=5, max_tokens=6)
        ids = prompt
        for token in stream(model, prompt, sampling=options):
            with torch.no_grad():
                own = model(ids).logits[0, -1].log_softmax(-1)
            assert token.logprob == pytest.approx(own[token.id].item(), abs=1e-5)
            assert token.entropy == pytest.approx(-(own.exp() * own).sum().item(), abs=1e-5)
            ids = torch.cat([ids, torch.tensor([[token.id]])], dim=1)

    def test_draws_repeat_with_a_seed_and_differ_between_seeds(self, model: SynapseModel, prompt: Tensor) -> None:
        def draw(seed: int | None) -> list[int]:
            return ids_of(stream(model, prompt, sampling=Sampling(temperature=3.0, seed=seed, max_tokens=12)))

        assert draw(1) == draw(1)
        assert len({tuple(draw(seed)) for seed in range(4)}) == 4
        torch.manual_seed(4)
        first = draw(None)
        assert draw(None) != first
        torch.manual_seed(4)
        assert draw(None) == first

    def test_draws_follow_the_model_distribution(self, model: SynapseModel, prompt: Tensor) -> None:
        """Pearson's chi-square of 2,000 first tokens, over 22 degrees of freedom: above 60 once in 10^5."""
        draws = 2000
        rows = prompt.expand(draws, -1)
        counts = torch.tensor(generate(model, rows, sampling=Sampling(seed=1, max_tokens=1)).ids).flatten()
        with torch.no_grad():
            expected = draws * model(prompt).logits[0, -1].softmax(-1)
        rare = expected < 5
        observed = counts.bincount(minlength=VOCABULARY).double()
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        assert ((observed - expected).square() / expected.clamp(min=1)).sum() < 60

    def test_repetition_penalty_knows_prompt_and_output(self, model: SynapseModel, prompt: Tensor) -> None:
        ids = prompt
        for token in stream(model, prompt, sampling=greedy(12, repetition_penalty=1.7)):
            with torch.no_grad():
                scores = model(ids).logits[0, -1]
            for seen in set(ids[0].tolist()):
                scores[seen] = scores[seen] / 1.7 if scores[seen] > 0 else scores[seen] * 1.7
            assert token.id == int(scores.argmax())
            ids = torch.cat([ids, torch.tensor([[token.id]])], dim=1)
        assert ids[0, 6:].tolist() != full_pass(model, prompt, 12)[0]

    def test_one_pass_over_the_prompt_then_one_step_a_token(self, model: SynapseModel, prompt: Tensor) -> None:
        lengths: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        try:
            running = stream(model, prompt, sampling=greedy(5))
            assert lengths == []
            next(running)
            assert lengths == [6, 1]
            list(running)
            assert lengths == [6, 1, 1, 1, 1, 1]
        finally:
            hook.remove()

    def test_closing_ends_it(self, model: SynapseModel, prompt: Tensor) -> None:
        running = stream(model, prompt, sampling=GREEDY)
        first = next(running)
        running.close()
        assert list(running) == []
        assert running.finish is None
        assert running.state is first.state

    def test_the_models_own_methods_do_the_same(self, model: SynapseModel, prompt: Tensor) -> None:
        expected = ids_of(stream(model, prompt, sampling=GREEDY))
        assert ids_of(model.stream(prompt, sampling=GREEDY)) == expected
        assert ids_of(model.stream(prompt[0].int(), sampling=GREEDY)) == expected
        assert model.generate(prompt, sampling=GREEDY).ids == [expected]

    def test_tracing_changes_no_bit_and_covers_every_pass(self, model: SynapseModel, prompt: Tensor) -> None:
        options = Sampling(seed=2, max_tokens=4)
        plain = list(stream(model, prompt, sampling=options))
        traced = list(stream(model, prompt, sampling=options, trace=TraceSpec(level="gates")))
        assert [token[:3] for token in plain] == [token[:3] for token in traced]
        assert all(token.trace is None for token in plain)
        passes = [token.trace.tokens[0].tolist() for token in traced if token.trace]
        assert passes == [prompt[0].tolist(), *([token.id] for token in traced[:-1])]
        assert "layers.0.xlstm.age" in traced[-1].state.to_tensors()


class TestStops:
    @settings(max_examples=20)
    @given(data=st.data())
    def test_output_ends_before_the_first_stop(self, model: SynapseModel, data: st.DataObject) -> None:
        """Against a search in the finished output; stops are pieces of it, changed pieces, and single tokens."""
        torch.manual_seed(data.draw(st.integers(0, 3)))
        prompt = tokens(1, 3)
        options: dict[str, Any] = {"temperature": 2.0, "seed": data.draw(st.integers(0, 5)), "max_tokens": 9}
        whole = ids_of(stream(model, prompt, sampling=Sampling(**options)))

        def piece() -> tuple[int, ...]:
            start = data.draw(st.integers(0, 8))
            ids = whole[start : start + data.draw(st.integers(1, 4))]
            if data.draw(st.booleans()):
                ids[-1] = (ids[-1] + 1) % VOCABULARY
            return tuple(ids)

        stop = tuple(piece() for _ in range(data.draw(st.integers(1, 3))))
        expected, finish = cut(whole, stop)
        running = stream(model, prompt, sampling=Sampling(**options, stop=stop))
        streamed = list(running)
        assert ids_of(streamed) == expected
        assert running.finish == finish
        assert [token.finish for token in streamed[:-1]] == [None] * (len(streamed) - 1)
        assert not streamed or streamed[-1].finish == finish
        assert_same(running.state.to_tensors(), read(model, prompt, expected))
        out = generate(model, prompt, sampling=Sampling(**options, stop=stop))
        assert (out.ids, out.finish) == ([expected], [finish])
        assert out.logprobs[0] == pytest.approx([token.logprob for token in streamed], abs=1e-6)
        assert_same(out.state.to_tensors(), read(model, prompt, expected))

    def test_a_stop_at_once_gives_no_token_but_a_state(self, model: SynapseModel, prompt: Tensor) -> None:
        first = full_pass(model, prompt, 1)[0][0]
        running = stream(model, prompt, sampling=greedy(5, stop=((first,),)))
        assert list(running) == []
        assert running.finish == "stop"
        assert_same(running.state.to_tensors(), read(model, prompt))

    def test_no_token_of_a_stop_is_handed_out_early(self, model: SynapseModel, prompt: Tensor) -> None:
        """While a stop sequence may be under way its tokens are held back, and released when it was none."""
        ids = full_pass(model, prompt, 6)[0]
        never = (ids[1], ids[2], (ids[3] + 1) % VOCABULARY)
        assert ids_of(stream(model, prompt, sampling=greedy(6, stop=(never,)))) == ids
        passes: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
        try:
            running = stream(model, prompt, sampling=greedy(6, stop=(never,)))
            next(running)
            assert len(passes) == 4  # the prompt, and the three tokens that could have been the stop or came before
        finally:
            hook.remove()

    def test_stops_in_the_prompt_do_not_count(self, model: SynapseModel, prompt: Tensor) -> None:
        ids = full_pass(model, prompt, 4)[0]
        across = (*prompt[0, -2:].tolist(), ids[0])
        assert cut(ids, (across,)) == (ids, "length")
        assert ids_of(stream(model, prompt, sampling=greedy(4, stop=(across,)))) == ids

    @pytest.mark.parametrize(
        ("stop", "output", "matched", "begun"),
        [
            (((1, 2, 3),), (1, 2), 0, 2),
            (((1, 2, 3),), (1, 2, 3), 3, 0),
            (((1, 1, 2),), (1, 1, 1), 0, 2),
            (((1, 1, 2),), (1, 1, 1, 2), 3, 0),
            (((2,), (1, 2)), (1, 2), 2, 0),
            (((5, 6), (6, 7, 8)), (5, 6), 2, 1),
            ((), (1, 2), 0, 0),
        ],
    )
    def test_matcher(
        self, stop: tuple[tuple[int, ...], ...], output: tuple[int, ...], matched: int, begun: int
    ) -> None:
        matcher = StopMatcher(stop)
        found = [matcher.push(token) for token in output]
        assert found[-1] == (matched, begun)
        assert not any(earlier.matched for earlier in found[:-1])


class TestGenerate:
    def test_rows_draw_by_seed_and_number_whatever_stands_beside_them(self, model: SynapseModel) -> None:
        ids, others = tokens(3, 5), tokens(3, 5)
        options = Sampling(temperature=2.0, seed=7, max_tokens=8)
        whole = generate(model, ids, sampling=options)
        for row in range(3):
            mixed = others.clone()
            mixed[row] = ids[row]
            assert generate(model, mixed, sampling=options).ids[row] == whole.ids[row]
        assert generate(model, ids[:2], sampling=options).ids == whole.ids[:2]
        assert ids_of(stream(model, ids[0], sampling=options)) == whole.ids[0]
        same = generate(model, ids[:1].expand(3, -1), sampling=options).ids
        assert len(set(map(tuple, same))) == 3

    @pytest.mark.parametrize("side", ["left", "right", "both"])
    def test_padded_prompts_equal_each_prompt_alone(self, model: SynapseModel, side: str) -> None:
        lengths = (2, 5, 7)
        ids, mask = tokens(3, 9), torch.zeros(3, 9, dtype=torch.bool)
        for row, length in enumerate(lengths):
            start = {"left": 9 - length, "right": 0, "both": 1}[side]
            mask[row, start : start + length] = True
        options = greedy(6, repetition_penalty=1.3)
        batch = generate(model, ids, mask=mask, sampling=options)
        for row in range(3):
            alone = generate(model, ids[row : row + 1, mask[row]], sampling=options)
            assert batch.ids[row] == alone.ids[0]
            assert batch.logprobs[row] == pytest.approx(alone.logprobs[0], abs=1e-6)
            assert_same(batch.state.select([row]).to_tensors(), alone.state.to_tensors())
        assert ids_of(stream(model, ids[0], mask=mask[0], sampling=options)) == batch.ids[0]

    def test_rows_end_separately_and_their_states_stay_put(self, model: SynapseModel) -> None:
        ids = tokens(5, 5)
        options: dict[str, Any] = {"temperature": 3.0, "seed": 3, "max_tokens": 9}
        whole = generate(model, ids, sampling=Sampling(**options)).ids
        stop = (tuple(whole[0][:1]), tuple(whole[1][2:5]), tuple(whole[2][4:6]), tuple(whole[3][5:9]))
        out = generate(model, ids, sampling=Sampling(**options, stop=stop))
        assert list(zip(out.ids, out.finish, strict=True)) == [cut(row, stop) for row in whole]
        assert {"stop", "length"} == set(out.finish)
        assert len(set(map(len, out.ids))) > 2
        assert out.state.position.tolist() == [5 + len(row) for row in out.ids]
        for row in range(5):
            assert len(out.logprobs[row]) == len(out.ids[row])
            assert_same(out.state.select([row]).to_tensors(), read(model, ids[row], out.ids[row]))

    def test_a_state_of_several_rows_goes_on(self, model: SynapseModel) -> None:
        first, second = tokens(2, 4), tokens(2, 3)
        with torch.no_grad():
            state = model(first).state
        out = generate(model, second, state, sampling=GREEDY)
        assert out.ids == generate(model, torch.cat([first, second], 1), sampling=GREEDY).ids

    def test_a_row_of_values_that_are_not_finite_does_not_reach_the_others(self, model: SynapseModel) -> None:
        state = read_state(model, 2)
        state.layers[0].memory.weights[1] = torch.nan
        with pytest.raises(StateError, match="logits of row 1: expected finite values"):
            generate(model, tokens(2, 3), state, sampling=GREEDY)
        ids = tokens(1, 3)
        alone = generate(model, ids, state.select([0]), sampling=GREEDY)
        assert all(map(math.isfinite, alone.logprobs[0]))


class TestModes:
    def test_a_model_in_training_mode_generates_without_noise_and_stays_in_its_mode(self, prompt: Tensor) -> None:
        model = small_model(thalamus=ThalamusConfig(d_state=4, head_dim=8, noise=10.0))
        expected = ids_of(stream(model, prompt, sampling=GREEDY))
        model.train()
        model.layers[1].eval()
        modes = {name: module.training for name, module in model.named_modules()}
        found = []
        for token in stream(model, prompt, sampling=GREEDY):
            found.append(token.id)
            assert {name: module.training for name, module in model.named_modules()} == modes
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert found == expected
        assert generate(model, prompt, sampling=GREEDY).ids == [expected]
        assert {name: module.training for name, module in model.named_modules()} == modes

    def test_modes_come_back_after_an_error(self, prompt: Tensor) -> None:
        model = small_model().train()
        with torch.no_grad():
            model.norm.weight.fill_(torch.nan)
        with pytest.raises(StateError, match="log-probability nan"):
            next(stream(model, prompt))
        assert all(module.training for module in model.modules())

    def test_what_was_generated_can_be_trained_on(self, prompt: Tensor) -> None:
        model = small_model().train()
        *_, last = stream(model, prompt, sampling=greedy(3))
        assert not any(tensor.requires_grad for tensor in last.state.to_tensors().values())
        model(prompt, last.state, targets=prompt).loss.backward()
        assert model.embedding.weight.grad is not None


class TestRefusals:
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(0, dtype=torch.long), "at least one token"),
            (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
            (torch.tensor(3), r"\(B, T\)"),
            (torch.zeros(1, 2, 3, dtype=torch.long), r"\(B, T\)"),
            (torch.zeros(2, 3, dtype=torch.long), "use generate for a batch"),
            (torch.zeros(1, 3), "int64 or int32, got torch.float32"),
            (torch.zeros(1, 3, dtype=torch.bool), "int64 or int32"),
            (torch.tensor([[0, VOCABULARY]]), f"expected 0 to {VOCABULARY - 1}, got 0 to {VOCABULARY}"),
            (torch.tensor([[-1, 0]]), "-1 to 0"),
            ([[1, 2]], "a tensor of token ids, got list"),
        ],
    )
    def test_prompts(self, model: SynapseModel, ids: Any, message: str) -> None:
        with pytest.raises(ShapeError, match=f"ids: .*{message}"):
            stream(model, ids)

    def test_prompts_of_a_batch(self, model: SynapseModel) -> None:
        for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 3)):
            with pytest.raises(ShapeError, match="ids"):
                generate(model, ids)

    def test_masks(self, model: SynapseModel, prompt: Tensor) -> None:
        for mask in (torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 6)):
            with pytest.raises(ShapeError, match=r"mask: expected \(1, 6\) torch\.bool"):
                stream(model, prompt, mask=mask)
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[1] = False
        with pytest.raises(ShapeError, match=r"at least one real token in every row, got none in rows \[1\]"):
            generate(model, prompt.expand(3, -1), mask=mask)

    def test_states(self, model: SynapseModel, prompt: Tensor) -> None:
        with pytest.raises(StateError, match="batch size 1, got 3"):
            stream(model, prompt, read_state(model))
        with pytest.raises(StateError, match=r"state\.layers\.0\.memory"):
            stream(model, prompt, read_state(small_model(memory=None), 1))

    def test_stops_outside_the_vocabulary(self, model: SynapseModel, prompt: Tensor) -> None:
        with pytest.raises(ConfigError, match=f"stop: expected token ids below {VOCABULARY}"):
            stream(model, prompt, sampling=greedy(3, stop=((1,), (2, VOCABULARY))))


def test_threads_that_read_one_model_in_training_mode() -> None:
    """The first that ends leaves the others in evaluation mode, without the router's noise."""
    model = small_model(thalamus=ThalamusConfig(d_state=4, head_dim=8, noise=50.0)).train()
    lengths, ids = [2, 30, 7, 30], tokens(1, 5)
    alone = [generate(model, ids, sampling=Sampling(max_tokens=n, seed=1)).ids for n in lengths]
    with ThreadPoolExecutor(len(lengths)) as pool:
        for _ in range(3):
            drawn = pool.map(lambda n: generate(model, ids, sampling=Sampling(max_tokens=n, seed=1)).ids, lengths)
            assert list(drawn) == alone
    assert all(module.training for module in model.modules())


def test_a_row_that_has_ended_does_not_break_the_others() -> None:
    torch.manual_seed(0)
    model, ids = small_model(), tokens(2, 4)
    first, second = generate(model, ids, sampling=Sampling(temperature=0, max_tokens=4)).ids
    assert first[0] not in second
    assert first[0] not in ids
    with torch.no_grad():
        model.embedding.weight[first[0]] = torch.nan
    stopped = Sampling(temperature=0, max_tokens=4, stop=((first[0],),))
    assert generate(model, ids, sampling=stopped).ids == [[], second]


@pytest.mark.parametrize("count", [1, 4])
def test_what_was_generated_can_be_trained_on(model: SynapseModel, prompt: Tensor, count: int) -> None:
    after = generate(model, prompt, sampling=greedy(count)).state
    out = model(tokens(1, 5), after, targets=tokens(1, 5))
    out.loss.backward()
    assert all(p.grad is not None for p in model.layers[0].parameters() if p.requires_grad)
    model.zero_grad()
    for x in after.to_tensors().values():
        assert not x.is_inference()
