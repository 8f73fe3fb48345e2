from __future__ import annotations

import copy
import dataclasses
import sys
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
        found = generate(default_model, prompt, max_new_tokens=24, engine="hf")
        assert list(found.tokens) == reference(default_model, prompt, 24)


def test_a_batch_with_drafts_equals_single_plain_runs_on_the_default_model(default_model):
    for sampling in (Sampling(), SAMPLED):
        options = {"max_new_tokens": 10, "sampling": sampling, "engine": "hf"}
        single = [generate(default_model, text, seed=5, **options) for text in PROMPTS]
        drafters = [Lookup(), Lookup(), Lookup()]
        drafted = generate(default_model, PROMPTS, drafter=drafters, seed=[5, 5, 5], **options)
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

    def fork(self) -> OnlyLetters:
        return copy.copy(self)

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
    one, two = generate(tiny_model, ["abc", "defgh"], max_new_tokens=12, stop=Stop(eos=False), engine="hf")
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
        ({"drafter": Lookup(Needs(hooks=True))}, BadInput, "no `injections`"),
    ],
)
def test_wrong_options_are_refused(tiny_model, options, error, says):
    prompt = options.pop("prompt", "abc")
    with pytest.raises(error, match=says):
        generate(tiny_model, prompt, **options)


def test_a_stream_refuses_at_once(tiny_model):
    with pytest.raises(BadInput, match="prompt is empty"):
        stream(tiny_model, "")


def test_a_draft_under_another_root_is_refused(tiny_model):
    drafter = Lookup()
    drafter.propose = lambda state: TokenTree.root(3)
    with pytest.raises(BadInput, match="root"):
        generate(tiny_model, "abc", drafter=drafter)


class Dice:
    """Draws children without replacement (or independently) from a distribution of its own over a few tokens."""

    name = "dice"
    needs = Needs()
    nbytes = 0

    def __init__(self, tokens: Sequence[int], vocabulary: int, law: str) -> None:
        self.law = law
        self.q = np.zeros((1, vocabulary), dtype=np.float32)
        self.q[0, list(tokens)] = np.arange(1, len(tokens) + 1) / sum(range(1, len(tokens) + 1))
        self.seen: list[StepResult] = []

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        state.note("rolled")

    def propose(self, state: DraftState) -> TokenTree:
        tokens, parents, q_row = [state.tokens[-1]], [-1], [-1]
        for parent in (0, 1):
            if parent == len(tokens):
                break
            if self.law == "iid":
                drawn = state.rng.choice(self.q.shape[1], size=3, p=self.q[0] / self.q[0].sum())
            else:
                with np.errstate(divide="ignore"):
                    drawn = np.argsort(-(np.log(self.q[0]) + state.rng.gumbel(size=self.q.shape[1])))[:3]
            q_row[parent] = 0
            tokens.extend(drawn.tolist())
            parents.extend([parent] * len(drawn))
            q_row.extend([-1] * len(drawn))
        return TokenTree(
            tokens=np.array(tokens, dtype=np.int32),
            parents=np.array(parents, dtype=np.int32),
            law=self.law,
            q=self.q,
            q_row=np.array(q_row, dtype=np.int32),
        )

    def observe(self, result: StepResult) -> None:
        self.seen.append(result)


def two_tokens(model, prompt: str, kept: list[list[int]]) -> tuple[np.ndarray, list[int]]:
    """Probabilities of the next two tokens at temperature 3 among those kept at each place."""
    ids = model.encode(prompt)
    wanted = np.ones((len(kept[0]), len(kept[1])))
    with torch.inference_mode():
        first = (model.model(torch.tensor([ids])).logits[0, -1, kept[0]].double() / 3).softmax(-1).numpy()
        for place, token in enumerate(kept[0]):
            second = (
                (model.model(torch.tensor([[*ids, token]])).logits[0, -1, kept[1]].double() / 3).softmax(-1).numpy()
            )
            wanted[place] = first[place] * second
    return wanted, ids


class Turns:
    """Letters of one set, then of the other, in turn; for ever."""

    def __init__(self, vocabulary: int, sets: list[list[int]], place: int = 0) -> None:
        self.vocabulary, self.sets, self.place = vocabulary, sets, place

    def start(self) -> Turns:
        return Turns(self.vocabulary, self.sets)

    def fork(self) -> Turns:
        return copy.copy(self)

    def allowed(self) -> np.ndarray:
        mask = np.zeros(self.vocabulary, dtype=bool)
        mask[self.sets[self.place % 2]] = True
        return mask

    def accept(self, token: int) -> None:
        if token not in self.sets[self.place % 2]:
            raise BadInput("forbidden")
        self.place += 1

    @property
    def finished(self) -> bool:
        return False


@pytest.mark.parametrize("law", ["iid", "without_replacement"])
def test_sampled_drafts_leave_the_distribution_as_it_is_under_a_constraint(tiny_model, law):
    stats = pytest.importorskip("scipy.stats")
    sets = [[97, 98, 99], [100, 101, 102]]
    wanted, ids = two_tokens(tiny_model, "abcd", sets)
    drafter = Dice([97, 98, 99, 100, 101, 102, 103], tiny_model.vocabulary, law)
    engine, runs = HFEngine(tiny_model), 250
    counts = np.zeros_like(wanted)
    options = {"max_new_tokens": 2, "sampling": Sampling(temperature=3.0), "engine": engine, "drafter": drafter}
    for seed in range(runs):
        result = generate(tiny_model, ids, constraint=Turns(tiny_model.vocabulary, sets), seed=seed, **options)
        counts[sets[0].index(result.tokens[0]), sets[1].index(result.tokens[1])] += 1
    expected = wanted.ravel() * runs
    rare = expected < 5
    cells = [np.append(some[~rare], some[rare].sum()) for some in (counts.ravel(), expected)]
    assert stats.chisquare(*cells).pvalue > 1e-4
    assert any(len(result.accepted) > 1 for result in drafter.seen)
    for result in drafter.seen:  # what the constraint forbids never ran
        for node in range(1, result.tree.size):
            place = int(result.tree.depth[node]) - 1
            assert result.tree.tokens[node] in (*sets[0], *sets[1])
            assert place > 0 or result.tree.tokens[node] in sets[0] or result.tree.tokens[0] in sets[0]


@pytest.mark.parametrize("law", ["iid", "without_replacement"])
def test_sampled_drafts_repeat_with_the_seed_and_are_counted(tiny_model, law):
    tokens = tiny_model.encode("abcdef")
    options = {"max_new_tokens": 40, "sampling": Sampling(temperature=1.0, top_k=8), "stop": Stop(eos=False)}
    first, again, other = (
        generate(tiny_model, "abc", drafter=Dice(tokens, tiny_model.vocabulary, law), seed=seed, **options)
        for seed in (3, 3, 4)
    )
    assert first.tokens == again.tokens != other.tokens
    assert first.stats.rule == "recursive rejection"
    assert first.stats.exact
    assert first.stats.notes == ["rolled"]
    assert (first.stats + other.stats).notes == ["rolled"]


def test_at_temperature_0_drafts_of_any_law_give_the_greedy_text(tiny_model):
    plain = generate(tiny_model, "abc", max_new_tokens=40)
    tokens = list(dict.fromkeys(plain.tokens))
    for law in ("iid", "without_replacement"):
        drafter = Dice(tokens, tiny_model.vocabulary, law)
        drafted = generate(tiny_model, "abc", max_new_tokens=40, drafter=drafter)
        assert drafted.tokens == plain.tokens
        assert drafted.stats.rule == "greedy"


def test_guesses_that_a_constraint_forbids_are_dropped_with_all_that_follows(tiny_model):
    sets = [[97, 98], [99, 100]]
    drafter = Lookup()
    tree = TokenTree(
        tokens=np.array([4, 97, 99, 99, 98, 98, 100], dtype=np.int32),
        parents=np.array([-1, 0, 0, 1, 1, 0, 4], dtype=np.int32),
    )
    drafter.propose = lambda state: dataclasses.replace(
        tree, tokens=np.array([state.tokens[-1], *tree.tokens[1:]], dtype=np.int32)
    )
    options = {"max_new_tokens": 12, "constraint": Turns(tiny_model.vocabulary, sets), "seed": 0, "sampling": SAMPLED}
    plain = generate(tiny_model, "abc", **options)
    drafted = generate(tiny_model, "abc", drafter=drafter, **options)
    assert drafted.tokens == plain.tokens
    checked = drafter.seen[0].tree
    assert checked.tokens.tolist()[1:] == [97, 99, 98]
    assert checked.parents.tolist() == [-1, 0, 1, 0]


class Blind:
    """Accepts whatever was guessed first, to show that a rule may be lossy and says so."""

    name = "blind"
    exact = False
    laws = frozenset({"point"})

    def walk(self, tree, logits, *, sampling, noise, allowed=None):
        for node in tree.paths[0]:
            children = tree.children[node]
            yield node, int(tree.tokens[children[0]]) if children else int(np.argmax(logits(node)))


def test_a_rule_that_is_not_exact_says_so(tiny_model):
    result = generate(tiny_model, "abcabc", max_new_tokens=12, drafter=Lookup(), acceptance=Blind())
    assert not result.stats.exact
    assert result.stats.rule == "blind"
    assert generate(tiny_model, "abcabc", max_new_tokens=12, drafter=Lookup()).stats.exact
    dice = Dice([97, 98], tiny_model.vocabulary, "iid")
    with pytest.raises(Unsupported, match='blind cannot check drafts of the law "iid"'):
        generate(tiny_model, "abc", drafter=dice, acceptance=Blind(), sampling=SAMPLED)


class Offered:
    """An entry point as an installed package would offer it."""

    name = "mine"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def load(self):
        def make(model, argument: str) -> Lookup:
            self.asked.append(argument)
            return Lookup()

        return make


def test_a_drafter_by_name_is_made_anew_for_each_row(tiny_model, monkeypatch):
    offered = Offered()
    monkeypatch.setattr("loci.lm.draft.entry_points", lambda group: [offered])
    batch = generate(tiny_model, ["abcabc", "x"], max_new_tokens=8, drafter="mine:some:where", seed=0)
    assert offered.asked == ["some:where", "some:where"]
    assert [one.stats.drafter for one in batch] == ["lookup", "lookup"]
    assert generate(tiny_model, "abc", max_new_tokens=2, drafter="none").stats.drafter is None
    with pytest.raises(BadInput, match=r"no drafter is called 'mime'. Did you mean 'mine'\? Known: mine, none"):
        generate(tiny_model, "abc", drafter="mime")


def test_auto_drafts_only_where_drafts_can_be_checked(tiny_model, monkeypatch):
    from transformers import MistralConfig, MistralForCausalLM

    offered = Offered()
    offered.name = "auto"
    monkeypatch.setattr("loci.lm.draft.entry_points", lambda group: [offered])
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    model = dataclasses.replace(tiny_model, model=MistralForCausalLM(config).eval())
    assert generate(model, "abc", max_new_tokens=3, drafter="auto").stats.drafter is None
    assert generate(tiny_model, "abc", max_new_tokens=3, drafter="auto").stats.drafter == "lookup"


class Budgets(Lookup):
    """Remembers the budgets that it is given, and may tell what its trees are worth."""

    def __init__(self) -> None:
        super().__init__(Needs())
        self.budgets: list[int] = []

    def propose(self, state: DraftState) -> TokenTree:
        self.budgets.append(state.budget)
        return TokenTree.root(state.tokens[-1])


def test_the_budget_comes_from_measured_costs_where_there_are_some(tiny_model, monkeypatch):
    from loci.lm.cost import StepCost, Where

    engine = HFEngine(tiny_model)
    options = {"max_new_tokens": 3, "engine": engine, "stop": Stop(eos=False)}
    stored: list[StepCost] = []
    monkeypatch.setattr(sys.modules["loci.lm.generate"], "known", lambda: stored)
    drafter = Budgets()
    generate(tiny_model, "abc", drafter=drafter, **options)
    generate(tiny_model, ["abc"] * 4, drafter=[drafter, Budgets(), Budgets(), Budgets()], **options)
    assert set(drafter.budgets) == {16, 4}
    seconds = ((1.0, 1.0, 1.0, 4.0, 30.0),)  # from 9 nodes on a step costs far more
    stored.append(
        StepCost(
            nodes=(1, 4, 8, 16, 64), contexts=(256,), seconds=seconds, spread=0.0, where=Where.of(tiny_model, engine)
        )
    )
    drafter = Budgets()
    generate(tiny_model, "abc", drafter=drafter, **options)
    generate(tiny_model, ["abc"] * 2, drafter=[drafter, Budgets()], **options)
    assert set(drafter.budgets) == {8, 4}
    worthless = Budgets()
    worthless.expected_tokens = lambda nodes: 1.0
    generate(tiny_model, "abc", drafter=worthless, **options)
    assert worthless.budgets == []  # not even asked: plain decoding is best


@pytest.mark.parametrize("engine", ["auto", "hf", "packed"])
def test_the_engine_can_be_named_and_tells_its_name(tiny_model, engine):
    found = generate(tiny_model, "abc", max_new_tokens=8, engine=engine)
    assert found.stats.engine == engine or engine == "auto"
    assert found.tokens == generate(tiny_model, "abc", max_new_tokens=8, engine="hf").tokens


def test_a_drafter_that_fails_in_the_middle_leaves_the_engine_usable(tiny_model):
    engine, drafter = HFEngine(tiny_model), Lookup()

    def fail(result: StepResult) -> None:
        raise KeyboardInterrupt

    drafter.observe = fail
    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model, "abcabcabc", engine=engine, drafter=drafter)
    after = generate(tiny_model, "abcabcabc", max_new_tokens=20, engine=engine, drafter=Lookup())
    assert after.tokens == generate(tiny_model, "abcabcabc", max_new_tokens=20, engine="hf").tokens


def test_an_empty_stop_string_is_refused():
    with pytest.raises(BadInput, match="empty"):
        Stop(strings=("",))
