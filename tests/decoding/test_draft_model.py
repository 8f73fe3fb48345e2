from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding.draft_model import Draft, DraftLM, DraftSource, HeadSource, shallow, warped  # noqa: E402
from loci.errors import BadInput, ModelNotFound, Unsupported  # noqa: E402
from loci.lm import Needs, Sampling, generate  # noqa: E402
from loci.lm.draft import DraftState, PrefillResult, StepResult, TokenTree  # noqa: E402
from loci.lm.sampling import warp  # noqa: E402


def in_sequence(model, tokens: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        return model.model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def path(draft: Draft, node: int) -> list[int]:
    tokens = []
    while node >= 0:
        tokens.append(draft.tokens[node])
        node = draft.parents[node]
    return tokens[::-1]


class Counted:
    """Passes everything on to an engine and keeps the sizes of its steps and the number of its prefills."""

    def __init__(self, engine) -> None:
        self.inner, self.sizes, self.prefills = engine, [], 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self, trees, *, want):
        self.sizes.append(trees[0].size)
        return self.inner.step(trees, want=want)

    def prefill(self, prompts, *, want):
        self.prefills += 1
        return self.inner.prefill(prompts, want=want)


@pytest.mark.parametrize("engine", ["hf", "packed"])
def test_levels_and_catching_up_give_what_the_text_in_sequence_gives(tiny_model, engine):
    generator = np.random.default_rng(0)
    drafter = DraftLM(tiny_model, engine=engine)
    text = generator.integers(0, 256, 20).tolist()
    drafter.begin(text)
    for _ in range(12):
        draft = Draft([text[-1]])
        level = [0]
        for _ in range(int(generator.integers(1, 4))):
            rows = drafter.logits(draft, level)
            for node, row in zip(level, rows, strict=True):
                wanted = in_sequence(tiny_model, [*text[:-1], *path(draft, node)])[-1]
                np.testing.assert_allclose(row, wanted, atol=2e-4)
            level = [draft.add(node, int(token)) for node in level for token in generator.integers(0, 3, 2)]
            level = level[: int(generator.integers(1, 5))]
        # Now a path that was drafted, or the start of one, and then something else; or something else at once.
        node, new = int(generator.integers(0, len(draft.tokens))), []
        new = [*path(draft, node)[1:], int(generator.integers(100, 256))]
        drafter.extend(new)
        text.extend(new)
        assert drafter.text == text
        assert drafter.engine.lengths[0] < len(text)


def test_an_accepted_path_is_not_read_again_and_what_is_missing_rides_along(tiny_model):
    from loci.lm.engine.hf import HFEngine

    drafter = DraftLM(tiny_model, engine=Counted(HFEngine(tiny_model)))
    drafter.begin([1, 2, 3, 4])
    draft = Draft([4])
    drafter.logits(draft, [0])
    first, second = draft.add(0, 50), draft.add(0, 51)
    drafter.logits(draft, [first, second])
    leaf = draft.add(second, 52)
    assert drafter.engine.sizes == [1, 3]
    drafter.extend([51, 52, 53])  # the leaf was accepted too, but never read
    assert leaf == 3
    assert drafter.engine.lengths == (5,)
    drafter.logits(Draft([53]), [0])
    assert drafter.engine.sizes == [1, 3, 2]
    assert drafter.engine.prefills == 1
    drafter.extend(list(range(60, 80)))  # many at once, as when drafting was off: read like a prompt
    np.testing.assert_allclose(
        drafter.logits(Draft([79]), [0])[0],
        in_sequence(tiny_model, [1, 2, 3, 4, 51, 52, 53, *range(60, 80)])[-1],
        atol=2e-4,
    )
    assert drafter.engine.prefills == 2


def test_a_new_text_that_begins_like_the_last_one_is_read_where_it_is_new(tiny_model):
    from loci.lm.engine.hf import HFEngine

    drafter = DraftLM(tiny_model, engine=HFEngine(tiny_model))
    drafter.begin(list(range(30)))
    drafter.logits(Draft([29]), [0])  # left unfinished
    drafter.begin([*range(25), 99])
    np.testing.assert_allclose(
        drafter.logits(Draft([99]), [0])[0], in_sequence(tiny_model, [*range(25), 99])[-1], atol=2e-4
    )


def test_twins_are_one_node_to_the_model(tiny_model):
    from loci.lm.engine.hf import HFEngine

    drafter = DraftLM(tiny_model, engine=Counted(HFEngine(tiny_model)))
    drafter.begin([5, 6])
    draft = Draft([6])
    drafter.logits(draft, [0])
    twins = [draft.add(0, 7), draft.add(0, 7)]
    rows = drafter.logits(draft, twins)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert drafter.engine.sizes == [1, 2]


def test_a_shallow_model_shares_its_weights_and_leaves_the_whole_as_it_was(default_model):
    before = in_sequence(default_model, [1, 2, 3])
    draft = DraftLM.from_layers(default_model, layers=3, engine="hf")
    few = shallow(default_model, layers=3, own=True)
    assert few.model.model.layers[0].mlp.up_proj.weight is not default_model.model.model.layers[0].mlp.up_proj.weight
    assert few.model.lm_head.weight is default_model.model.lm_head.weight
    assert draft.nbytes == draft.engine.nbytes  # nothing of its own
    own = DraftLM(few, engine="hf", shared=default_model)
    assert 0 < own.nbytes < 0.2 * own.read_bytes + draft.engine.nbytes + 3 * 4 * 4_000_000
    np.testing.assert_array_equal(in_sequence(default_model, [1, 2, 3]), before)
    hidden = default_model.model.model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[3]
    wanted = default_model.model.lm_head(default_model.model.model.norm(hidden))[0, -1].detach().numpy()
    draft.begin([1, 2, 3])
    np.testing.assert_allclose(draft.logits(Draft([3]), [0])[0], wanted, atol=1e-3)
    assert draft.name == "default, first 3 layers" or draft.name.endswith("first 3 layers")


def test_distributions_are_warped_as_when_sampling(tiny_model):
    rows = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 3
    options = ({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 4})
    for sampling in (Sampling(**some) for some in options):
        for q, row in zip(warped(rows, sampling), rows, strict=True):
            support = warp(row, sampling)
            np.testing.assert_allclose(q[support.tokens], support.probabilities, rtol=1e-5)
            assert q.sum() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(BadInput, match="nothing is drawn"):
        warped(rows, Sampling())


def test_wrong_use_says_what_is_wrong(tiny_model, default_model, tmp_path):
    drafter = DraftLM(tiny_model, engine="hf")
    with pytest.raises(BadInput, match="before it was begun"):
        drafter.extend([1])
    with pytest.raises(BadInput, match="at least one token"):
        drafter.begin([])
    drafter.begin([1, 2])
    with pytest.raises(BadInput, match="root 9"):
        drafter.logits(Draft([9]), [0])
    draft = Draft([2])
    deep = draft.add(draft.add(0, 3), 4)
    with pytest.raises(BadInput, match="before its parent"):
        drafter.logits(draft, [deep])
    with pytest.raises(BadInput, match=r"speaks 258 tokens and .* 49,152"):
        drafter.check(default_model)
    with pytest.raises(BadInput, match=r"9 layers was asked for; .* has 2"):
        DraftLM.from_layers(tiny_model, layers=9)
    with pytest.raises(ModelNotFound):
        DraftLM.from_layers(tiny_model, adapter=tmp_path / "none.safetensors")


def test_a_tokenizer_with_other_tokens_is_refused_though_the_size_is_the_same(tiny_model):
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {}

    drafter = DraftLM(dataclasses.replace(tiny_model, tokenizer=Other()), engine="hf")
    with pytest.raises(BadInput, match="not the same ones"):
        drafter.check(tiny_model)
    DraftLM(tiny_model, engine="hf").check(tiny_model)


def test_a_model_that_cannot_check_trees_cannot_draft_them(tiny_model):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=6)
    model = dataclasses.replace(tiny_model, model=MistralForCausalLM(config).eval())
    with pytest.raises(Unsupported, match="cannot draft trees"):
        DraftLM(model, engine="hf")


class TwoHeads:
    """Heads whose depth d prefers token 10 + d, the more the larger the state's first number."""

    heads, vocabulary, nbytes = 2, 258, 0

    def distributions(self, hidden, *, temperature: float = 1.0) -> np.ndarray:
        rows = np.zeros((2, self.vocabulary), dtype=np.float32)
        rows[[0, 1], [10, 11]] = abs(float(hidden[0])) + 1
        return warped(rows, Sampling(temperature=temperature))


def test_heads_give_every_node_of_a_depth_one_distribution():
    source = HeadSource(TwoHeads())
    assert isinstance(source, DraftSource)
    state = DraftState(tokens=[1], sampling=Sampling(temperature=1.0), rng=np.random.default_rng(0), budget=9)
    source.start(state, PrefillResult(tokens=(1,)))
    assert source.horizon == 0
    with pytest.raises(BadInput, match="first step"):
        source.distribution(Draft([1]), [0], sampling=state.sampling)
    hidden = torch.ones(1, 2, 4)
    result = StepResult(
        tree=TokenTree.root(1), logits=lambda node: np.zeros(258), accepted=(0,), bonus=2, committed=(2,), hidden=hidden
    )
    source.observe(result)
    assert source.horizon == 2
    draft = Draft([2])
    below = [draft.add(0, 3), draft.add(0, 4)]
    root, first, second = (source.distribution(draft, [node], sampling=state.sampling)[0] for node in (0, *below))
    np.testing.assert_array_equal(first, second)
    assert (root.argmax(), first.argmax()) == (10, 11)
    few = source.distribution(Draft([2]), [0], sampling=Sampling(temperature=1.0, top_k=1))[0]
    assert few[10] == 1.0
    with pytest.raises(BadInput, match="hidden state"):
        source.observe(dataclasses.replace(result, hidden=None))


def test_a_model_that_drafts_for_itself_is_always_right(tiny_model):
    from loci.decoding.rsd import RSD, Chain

    drafter = RSD(DraftLM(tiny_model, engine="hf"), Chain(length=4))
    plain = generate(tiny_model, "abc", max_new_tokens=40, engine="hf")
    drafted = generate(tiny_model, "abc", max_new_tokens=40, engine="hf", drafter=drafter)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_step > 4.5
    sampled = generate(
        tiny_model, "abc", max_new_tokens=40, engine="hf", drafter=drafter, sampling=Sampling(temperature=1.0), seed=0
    )
    assert sampled.stats.acceptance > 0.95
    assert drafter.needs == Needs()
