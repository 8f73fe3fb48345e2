from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import BadInput, ContextTooLong, Unsupported  # noqa: E402
from loci.lm import Message, Needs, Sampling, Stop, TokenTree, generate, stream  # noqa: E402
from loci.lm.draft import DraftState, PrefillResult, StepResult  # noqa: E402
from loci.lm.engine.hf import HFEngine  # noqa: E402

PROMPTS = [
    "The capital of France is",
    "One two three four five six seven eight one two three four",
    "def add(a, b):\n",
]
SAMPLED = Sampling(temperature=1.0, top_p=0.95)


class Lookup:
    """A drafter that finds the latest earlier place of the last token and proposes what followed, and beside it a
    wrong guess, so that kept paths are not always contiguous."""

    name = "lookup"
    law = "point"
    nbytes = 0

    def __init__(self, needs: Needs = Needs(topk=2)) -> None:  # noqa: B008 (frozen)
        self.needs = needs
        self.seen: list[StepResult] = []
        self.starts: list[PrefillResult] = []

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self.starts.append(prefill)

    def propose(self, state: DraftState) -> TokenTree:
        tokens = list(state.tokens)
        root = tokens[-1]
        wrong = TokenTree.chain([root, (root + 1) % 200, 7])
        places = [place for place in range(len(tokens) - 1) if tokens[place] == root]
        if not places:
            return TokenTree.merge(wrong, wrong, budget=state.budget)
        found = TokenTree.chain([root, *tokens[places[-1] + 1 : places[-1] + 6]])
        return TokenTree.merge(wrong, found, budget=state.budget)

    def observe(self, result: StepResult) -> None:
        self.seen.append(result)


def reference(model, prompt: str | Sequence[Message], count: int) -> list[int]:
    ids = torch.tensor([model.encode(prompt)])
    with torch.inference_mode():
        found = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return found[0, ids.shape[1] :].tolist()


def test_greedy_tokens_equal_those_of_transformers(default_model):
    prompts = [*PROMPTS, [Message(role="user", content="Name three colours.")]]
    for prompt in prompts:
        assert list(generate(default_model, prompt, max_new_tokens=24).tokens) == reference(default_model, prompt, 24)


def test_a_batch_with_drafts_equals_single_plain_runs_on_the_default_model(default_model):
    for sampling in (Sampling(), SAMPLED):
        single = [generate(default_model, text, max_new_tokens=10, sampling=sampling, seed=5) for text in PROMPTS]
        options = {"max_new_tokens": 10, "sampling": sampling, "seed": [5, 5, 5]}
        drafted = generate(default_model, PROMPTS, drafter=[Lookup(), Lookup(), Lookup()], **options)
        assert [one.tokens for one in drafted] == [one.tokens for one in single]
        assert [one.text for one in drafted] == [one.text for one in single]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, Sampling(temperature=0.8, top_k=5)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_with_a_draft_and_without_the_tokens_are_the_same(tiny_model, sampling, seed):
    prompt = "abcabcabc and so on and so on"
    plain = generate(tiny_model, prompt, max_new_tokens=60, sampling=sampling, seed=seed)
    drafter = Lookup()
    drafted = generate(tiny_model, prompt, max_new_tokens=60, sampling=sampling, seed=seed, drafter=drafter)
    assert drafted.tokens == plain.tokens
    assert drafted.text == plain.text
    assert drafted.finish_reason == plain.finish_reason
    assert [token for result in drafter.seen for token in result.committed] == list(drafted.tokens)
    assert drafted.stats.steps == len(drafter.seen)
    assert drafted.stats.new_tokens == len(drafted.tokens)


class Oracle(Lookup):
    """Knows the text: proposes a wrong token first, and the next four right ones beside it."""

    name = "oracle"

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__(Needs())
        self.text = list(text)

    def propose(self, state: DraftState) -> TokenTree:
        root, place = state.tokens[-1], state.position
        wrong = TokenTree.chain([root, (self.text[place] + 1) % 200] if place < len(self.text) else [root])
        right = TokenTree.chain([root, *self.text[place : place + 4]])
        return TokenTree.merge(wrong, right, budget=state.budget)


def test_a_right_draft_saves_steps_and_is_counted(tiny_model):
    options = {"max_new_tokens": 100, "stop": Stop(eos=False)}
    plain = generate(tiny_model, "abc", **options)
    drafter = Oracle([*tiny_model.encode("abc"), *plain.tokens])
    drafted = generate(tiny_model, "abc", drafter=drafter, **options)
    assert drafted.tokens == plain.tokens
    assert (plain.stats.steps, drafted.stats.steps) == (100, 20)
    assert drafted.stats.tokens_per_step == 5.0
    assert drafted.stats.accepted_by_depth == [20, 20, 20, 20]
    assert drafted.stats.accepted_nodes == 80
    assert drafted.stats.proposed_nodes == 20 * 5
    assert drafted.stats.tree_kv_bytes > 0
    assert drafted.stats.drafter == "oracle"


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=str)
@pytest.mark.parametrize("draft", [False, True])
def test_a_batch_of_mixed_lengths_equals_single_runs(tiny_model, sampling, draft):
    generator = np.random.default_rng(3)
    prompts = [generator.integers(0, 256, size).tolist() for size in (1, 40, 3, 17, 8, 8, 25, 2)]
    stop = Stop(token_ids=(5, 6, 7, 8, 9, 10))  # rows end at different steps
    options = {"max_new_tokens": 30, "sampling": sampling, "stop": stop}
    single = [generate(tiny_model, prompt, seed=9, **options) for prompt in prompts]
    drafters = [Lookup() for _ in prompts] if draft else None
    batch = generate(tiny_model, prompts, seed=[9] * 8, drafter=drafters, max_nodes=64, **options)
    assert [one.tokens for one in batch] == [one.tokens for one in single]
    assert len({len(one.tokens) for one in batch}) > 2


def test_one_seed_gives_rows_of_a_batch_their_own_noise_and_makes_it_again(tiny_model):
    first = generate(tiny_model, ["same"] * 3, max_new_tokens=20, sampling=SAMPLED, seed=1)
    again = generate(tiny_model, ["same"] * 3, max_new_tokens=20, sampling=SAMPLED, seed=1)
    assert [one.tokens for one in first] == [one.tokens for one in again]
    assert len({one.tokens for one in first}) == 3


def test_a_seed_that_the_system_chose_is_told_and_makes_the_text_again(tiny_model):
    first = generate(tiny_model, "x", max_new_tokens=20, sampling=SAMPLED)
    assert generate(tiny_model, "x", max_new_tokens=20, sampling=SAMPLED, seed=first.seed).tokens == first.tokens
    assert generate(tiny_model, "x", max_new_tokens=20, sampling=SAMPLED).tokens != first.tokens


def test_chunks_make_the_text_and_the_last_one_tells_why_it_ended(tiny_model):
    prompt = "Ünïcödé €𝄞 "
    whole = generate(tiny_model, prompt, max_new_tokens=80, sampling=SAMPLED, seed=2)
    chunks = list(stream(tiny_model, prompt, max_new_tokens=80, sampling=SAMPLED, seed=2))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.tokens) == whole.tokens
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason


def test_a_stop_string_over_token_borders_ends_the_text_before_it(tiny_model):
    whole = generate(tiny_model, "hello", max_new_tokens=60, sampling=SAMPLED, seed=4, stop=Stop(eos=False))
    place = next(
        i for i in range(5, 50) if whole.text[i : i + 3].isprintable() and len(whole.text[i : i + 3].encode()) == 3
    )
    wanted = whole.text[place : place + 3]
    for drafter in (None, Lookup()):
        stop = Stop(strings=("never in there", wanted), eos=False)
        options = {"max_new_tokens": 60, "sampling": SAMPLED, "seed": 4, "stop": stop, "drafter": drafter}
        stopped = generate(tiny_model, "hello", **options)
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole.text[: whole.text.find(wanted)]
        assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
        given = "".join(chunk.text for chunk in stream(tiny_model, "hello", **options))
        assert given == stopped.text


def test_end_tokens_stop_ids_and_limits_each_name_their_reason(tiny_model):
    text = generate(tiny_model, "q", max_new_tokens=10, stop=Stop(eos=False))
    assert (len(text.tokens), text.finish_reason) == (10, "length")
    third = text.tokens[2]
    first = text.tokens.index(third)
    stopped = generate(tiny_model, "q", max_new_tokens=10, stop=Stop(token_ids=(third,), eos=False))
    assert (stopped.tokens, stopped.finish_reason) == (text.tokens[: first + 1], "stop")


def test_the_models_end_token_ends_the_text_and_is_not_in_it(default_model):
    question = [Message(role="user", content="What is the capital of France?")]
    answer = generate(default_model, question, max_new_tokens=40)
    assert answer.finish_reason == "eos"
    assert answer.tokens[-1] in default_model.end_tokens
    assert "<|im_end|>" not in answer.text


def test_a_closed_stream_leaves_engine_and_drafter_usable(tiny_model):
    engine, drafter = HFEngine(tiny_model), Lookup()
    chunks = stream(tiny_model, "abcabcabc", max_new_tokens=50, engine=engine, drafter=drafter)
    for _ in range(3):
        next(chunks)
    chunks.close()
    after = generate(tiny_model, "abcabcabc", max_new_tokens=50, engine=engine, drafter=drafter)
    assert after.tokens == generate(tiny_model, "abcabcabc", max_new_tokens=50).tokens


def test_an_engine_reads_a_continued_prompt_only_once(tiny_model):
    engine = HFEngine(tiny_model)
    first = generate(tiny_model, "a long beginning", max_new_tokens=10, engine=engine, stop=Stop(eos=False))
    assert first.stats.reused_tokens == 0
    longer = [*tiny_model.encode("a long beginning"), *first.tokens, *tiny_model.encode(" and more")]
    second = generate(tiny_model, longer, max_new_tokens=10, engine=engine)
    assert second.stats.reused_tokens == len(tiny_model.encode("a long beginning")) + 9
    assert second.tokens == generate(tiny_model, longer, max_new_tokens=10).tokens


def test_log_probabilities_are_the_models_own(tiny_model):
    result = generate(
        tiny_model, "abc", max_new_tokens=8, sampling=SAMPLED, seed=0, logprobs=True, stop=Stop(eos=False)
    )
    ids = [*tiny_model.encode("abc"), *result.tokens]
    with torch.inference_mode():
        scores = tiny_model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [scores[place - 1, ids[place]].item() for place in range(3, len(ids))]
    assert result.logprobs == pytest.approx(wanted, abs=1e-4)


class OnlyLetters:
    """Between 3 and 6 letters of a small set, then the end."""

    def __init__(self, model) -> None:
        self.model = model

    def start(self) -> OnlyLetters:
        fresh = OnlyLetters(self.model)
        fresh.count = 0
        return fresh

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.model.vocabulary, dtype=bool)
        mask[self.model.encode("xyz")] = self.count < 6
        mask[list(self.model.end_tokens)] = self.count >= 3
        return mask

    def accept(self, token: int) -> None:
        if not self.allowed()[token]:
            raise BadInput("forbidden")
        self.count += 1

    @property
    def finished(self) -> bool:
        return self.count >= 6


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=str)
def test_a_constraint_holds_with_and_without_a_draft(tiny_model, sampling):
    options = {"sampling": sampling, "constraint": OnlyLetters(tiny_model), "seed": 3}
    plain = generate(tiny_model, "zyzyzyxx", **options)
    assert 3 <= len(plain.text) <= 6
    assert set(plain.text) <= set("xyz")
    assert plain.finish_reason == "eos"
    assert generate(tiny_model, "zyzyzyxx", drafter=Lookup(), **options).tokens == plain.tokens
    batch = generate(tiny_model, ["zyzyzyxx", "x"], sampling=sampling, constraint=OnlyLetters(tiny_model), seed=[3, 3])
    assert batch[0].tokens == plain.tokens


def test_a_memory_of_the_callers_is_used(tiny_model):
    from transformers import DynamicCache

    memory = DynamicCache(config=tiny_model.model.config)
    result = generate(tiny_model, "abc", max_new_tokens=5, memory=memory, stop=Stop(eos=False))
    assert result.tokens == generate(tiny_model, "abc", max_new_tokens=5, stop=Stop(eos=False)).tokens
    assert memory.get_seq_length() == 3 + 5 - 1
    lazy = DynamicCache()  # makes its layers when it is first written
    options = {"max_new_tokens": 20, "stop": Stop(eos=False)}
    drafted = generate(tiny_model, "abcabc", memory=lazy, drafter=Lookup(), **options)
    assert drafted.tokens == generate(tiny_model, "abcabc", **options).tokens


def test_a_batch_with_a_memory_is_refused(tiny_model):
    from transformers import DynamicCache

    with pytest.raises(Unsupported, match="holds one text"):
        generate(tiny_model, ["a", "b"], memory=DynamicCache())


def test_messages_need_a_chat_template(tiny_model):
    tokenizer = copy.copy(tiny_model.tokenizer)
    tokenizer.chat_template = None
    model = dataclasses.replace(tiny_model, tokenizer=tokenizer)
    with pytest.raises(Unsupported, match="chat template"):
        generate(model, [Message(role="user", content="hello")])


def test_a_model_whose_layers_forget_runs_a_batch_one_by_one(tiny_model):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    model = dataclasses.replace(tiny_model, model=MistralForCausalLM(config).eval())
    batch = generate(model, ["some text", "x"], max_new_tokens=8, sampling=SAMPLED, seed=[1, 2])
    single = [
        generate(model, text, max_new_tokens=8, sampling=SAMPLED, seed=seed)
        for text, seed in (("some text", 1), ("x", 2))
    ]
    assert [one.tokens for one in batch] == [one.tokens for one in single]
    with pytest.raises(Unsupported, match="drafts cannot be checked here"):
        generate(model, "x", drafter=Lookup())


def test_a_prompt_longer_than_the_window_says_both_sizes(tiny_model):
    with pytest.raises(ContextTooLong, match=r"256 tokens .* at most 256"):
        generate(tiny_model, "a" * 256)
    at_the_end = generate(tiny_model, "a" * 250, max_new_tokens=50, drafter=Lookup(), stop=Stop(eos=False))
    assert (len(at_the_end.tokens), at_the_end.finish_reason) == (6, "length")


def test_statistics_add_up(tiny_model):
    one, two = generate(tiny_model, ["abc", "defgh"], max_new_tokens=12, stop=Stop(eos=False))
    total = one.stats + two.stats
    assert total.new_tokens == 24
    assert total.prompt_tokens == 8
    assert total.seconds == pytest.approx(one.stats.seconds + two.stats.seconds)
    assert one.stats.tokens_per_step == 1.0
    assert one.stats.engine == "hf"
    assert 0 < one.stats.first_token_seconds <= total.seconds * 2
    assert one.stats.decode_tokens_per_second > one.stats.total_tokens_per_second > 0
    assert one.stats.model_bytes == sum(weight.nbytes for weight in tiny_model.model.parameters())


def test_an_empty_batch_is_an_empty_list(tiny_model):
    assert generate(tiny_model, []) == []


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prompt": ""}, BadInput, "prompt is empty"),
        ({"prompt": [999]}, BadInput, "not in the vocabulary"),
        ({"max_new_tokens": 0}, BadInput, "at least 1"),
        ({"max_nodes": 0}, BadInput, "max_nodes"),
        ({"prompt": ["a", "b"], "seed": [1]}, BadInput, "2 prompts were given 1 seeds"),
        ({"prompt": ["a", "b"], "drafter": [Lookup()]}, BadInput, "2 texts were given 1 drafters"),
        ({"drafter": Lookup(Needs(hooks=True))}, Unsupported, "hooks"),
    ],
)
def test_wrong_options_are_refused(tiny_model, options, error, says):
    prompt = options.pop("prompt", "abc")
    with pytest.raises(error, match=says):
        generate(tiny_model, prompt, **options)


def test_a_stream_refuses_at_once(tiny_model):
    with pytest.raises(BadInput, match="prompt is empty"):
        stream(tiny_model, "")


def test_sampled_laws_are_refused_when_sampling(tiny_model):
    drafter = Lookup()
    drafter.law = "iid"
    with pytest.raises(Unsupported, match="law"):
        generate(tiny_model, "abc", sampling=SAMPLED, drafter=drafter)


def test_a_draft_under_another_root_is_refused(tiny_model):
    drafter = Lookup()
    drafter.propose = lambda state: TokenTree.root(3)
    with pytest.raises(BadInput, match="root"):
        generate(tiny_model, "abc", drafter=drafter)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(BadInput, match="empty"):
        Stop(strings=("",))
