from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from loci.decoding.blend import BlendedDrafter, Experience, guesses_of
from loci.decoding.prompt_lookup import PromptLookup
from loci.decoding.token_recycling import Table, TokenRecycling
from loci.errors import BadInput
from loci.lm.draft import (
    Drafter,
    DraftState,
    Forecasting,
    Law,
    Needs,
    PrefillResult,
    StepResult,
    TokenTree,
)
from loci.lm.generate import generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Sampling

VOCABULARY = 40


@dataclass(eq=False)
class Says:
    """Proposes one tree, always, and keeps what it is shown."""

    tree: TokenTree
    name: str = "says"
    needs: Needs = field(default_factory=Needs)
    law: Law = "point"
    nbytes: int = 5
    seen: list[StepResult] = field(default_factory=list)
    begun: list[PrefillResult] = field(default_factory=list)

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self.begun.append(prefill)

    def propose(self, state: DraftState) -> TokenTree:
        return self.tree

    def observe(self, result: StepResult) -> None:
        self.seen.append(result)


def tree(tokens: Sequence[int], parents: Sequence[int]) -> TokenTree:
    return TokenTree(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32))


def state(*tokens: int, budget: int = 16) -> DraftState:
    return DraftState(tokens=list(tokens), sampling=GREEDY, rng=np.random.default_rng(0), budget=budget)


def checked(proposed: TokenTree, text: Sequence[int], *, ranks: int = 8) -> StepResult:
    """The step in which the model wanted to write `text`."""
    node, accepted, committed = 0, [0], []
    for token in text:
        committed.append(token)
        child = proposed.child(node, token)
        if child is None:
            break
        node = child
        accepted.append(node)
    ids = np.tile(np.arange(ranks, dtype=np.int32), (proposed.size, 1))
    return StepResult(
        tree=proposed,
        logits=lambda node: np.full(VOCABULARY, node, dtype=np.float32),
        accepted=tuple(accepted),
        bonus=committed[-1],
        committed=tuple(committed),
        topk_ids=ids,
        topk_logits=ids.astype(np.float32),
        hidden=None,
    )


def paths(proposed: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(proposed.tokens[list(path)].tolist()) for path in proposed.paths}


def test_trees_are_joined_and_what_both_guess_is_one_node() -> None:
    first, second = Says(tree([1, 2, 3], [-1, 0, 1]), "a"), Says(tree([1, 2, 4], [-1, 0, 1]), "b")
    assert paths(BlendedDrafter([first, second]).propose(state(1))) == {(1, 2, 3), (1, 2, 4)}


def test_the_budget_is_kept_and_no_node_lacks_its_parent() -> None:
    says = Says(tree(range(1, 20), [-1, *range(18)]))
    recycling = TokenRecycling(VOCABULARY, table=full())
    for budget in range(1, 24):
        proposed = BlendedDrafter([says, recycling]).propose(state(1, budget=budget))
        assert proposed.size == budget


def full() -> Table:
    rows = (np.arange(VOCABULARY)[:, None] * 7 + np.arange(8)[None] + 3) % VOCABULARY
    return Table(VOCABULARY, ranked=rows.astype(np.int32))


def test_recycling_continues_below_what_others_guess() -> None:
    table = Table(VOCABULARY)
    table.write(np.array([5], np.int32), np.array([[9, 8, 7, 6, 4, 3, 2, 1]], np.int32))
    blend = BlendedDrafter([Says(tree([1, 5], [-1, 0])), TokenRecycling(VOCABULARY, table=table)])
    assert (1, 5, 9) in paths(blend.propose(state(1)))


def test_what_earns_more_gets_the_nodes() -> None:
    good, bad = Says(tree([1, 2, 3], [-1, 0, 1]), "good"), Says(tree([1, 7, 8], [-1, 0, 1]), "bad")
    blend = BlendedDrafter([bad, good], switch_off=False)
    for _ in range(30):
        blend.observe(checked(blend.propose(state(1)), [2, 3, 9]))
    assert paths(blend.propose(state(1, budget=3))) == {(1, 2, 3)}


def test_a_guess_outside_the_tree_is_learned_from_too() -> None:
    good, bad = Says(tree([1, 2], [-1, 0]), "good"), Says(tree([1, 7], [-1, 0]), "bad")
    blend = BlendedDrafter([bad, good], switch_off=False)
    for _ in range(10):
        proposed = blend.propose(state(1, budget=2))
        blend.observe(checked(proposed, [2, 9]))
    assert paths(proposed) == {(1, 2)}


def test_what_was_learned_fades_with_its_half_life() -> None:
    known = Experience(half_life=10.0)
    for _ in range(50):
        known.saw("kind", True)
    before = known.tries["kind"] / known._weight
    for _ in range(10):
        known.tick()
    assert known.tries["kind"] / known._weight == pytest.approx(before / 2)
    for _ in range(5_000):  # far beyond what a float holds, were it not scaled down
        known.saw("kind", False)
        known.tick()
    assert known.rate("kind", 0.5) < 0.2
    assert np.isfinite(known._weight)


def test_each_drafter_is_shown_what_it_asked_for() -> None:
    ranks, nothing = Says(TokenTree.root(1), "ranks", Needs(topk=3, prefill=True)), Says(TokenTree.root(1), "nothing")
    blend = BlendedDrafter([ranks, nothing, TokenRecycling(VOCABULARY)])
    assert blend.needs == Needs(topk=8, prefill=True)
    ids = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    blend.start(state(1, 2, 1), PrefillResult(tokens=(1, 2, 1), topk_ids=ids, topk_logits=ids.astype(np.float32)))
    assert ranks.begun[0].topk_ids is not None
    assert ranks.begun[0].topk_ids.shape == (2, 3)
    assert nothing.begun[0].topk_ids is None
    blend.observe(checked(blend.propose(state(1)), [3]))
    assert ranks.seen[0].topk_ids is not None
    assert ranks.seen[0].topk_ids.shape == (1, 3)
    assert nothing.seen[0].topk_ids is None


def test_hidden_states_are_told_apart_by_layer() -> None:
    torch = pytest.importorskip("torch")
    last, two = (
        Says(TokenTree.root(1), "last", Needs(hidden=(-1,))),
        Says(TokenTree.root(1), "two", Needs(hidden=(5, 2))),
    )
    blend = BlendedDrafter([last, two])
    hidden = torch.arange(3).float().reshape(3, 1, 1)
    step = checked(blend.propose(state(1)), [3])
    blend.observe(StepResult(**{**vars(step), "hidden": hidden}))
    given = {layer: float(hidden[place, 0, 0]) for place, layer in enumerate(blend.needs.hidden)}
    assert last.seen[0].hidden.flatten().tolist() == [given[-1]]
    assert two.seen[0].hidden.flatten().tolist() == [given[5], given[2]]


def probed(token: int, value: float) -> TokenTree:
    """A guess with a probe under it and one under the root."""
    return TokenTree(
        tokens=np.array([1, token, -1, -1], np.int32),
        parents=np.array([-1, 0, 0, 1], np.int32),
        kind=np.array([0, 0, 1, 1], np.int32),
        embeds=np.full((2, 4), value, np.float32),
    )


def test_probes_keep_their_inputs_and_each_drafter_sees_only_its_own() -> None:
    first, second = Says(probed(2, 0.5), "a"), Says(probed(2, 0.25), "b")
    blend = BlendedDrafter([first, second])
    proposed = blend.propose(state(1))
    assert proposed.size == 6
    assert proposed.embeds is not None
    assert sorted(proposed.embeds[:, 0].tolist()) == [0.25, 0.25, 0.5, 0.5]
    blend.observe(checked(proposed, [2, 9]))
    for says, value in ((first, 0.5), (second, 0.25)):
        seen = says.seen[0]
        assert seen.tree.embeds is not None
        assert seen.tree.embeds[:, 0].tolist() == [value, value]
        assert seen.tree.tokens[list(seen.accepted)].tolist() == [1, 2]
        probes = [node for node in range(seen.tree.size) if seen.tree.is_probe[node]]
        assert sorted(seen.tree.parents[probes].tolist()) == [0, seen.accepted[-1]]


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sizes(*, tokens_at_once: int, plain: float, drafted: float, steps: int) -> list[int]:
    """The sizes of the trees where a drafted step takes `drafted` seconds and gives `tokens_at_once`."""
    clock = Clock()
    blend = BlendedDrafter([Says(tree([1, 2, 3], [-1, 0, 1]))], clock=clock)
    found = []
    for _ in range(steps):
        proposed = blend.propose(state(1))
        clock.now += plain if proposed.size == 1 else drafted
        blend.observe(checked(proposed, [2, 3, 4][:tokens_at_once] if proposed.size > 1 else [2]))
        found.append(proposed.size)
    return found


def test_drafting_stays_on_while_it_pays_but_for_a_few_plain_steps() -> None:
    found = sizes(tokens_at_once=3, plain=1.0, drafted=1.4, steps=300)
    assert found.count(1) <= 5


def test_drafting_switches_itself_off_where_it_does_not_pay_and_tries_again() -> None:
    found = sizes(tokens_at_once=1, plain=1.0, drafted=1.4, steps=600)
    assert found[:20].count(3) > 15
    assert found[30:].count(1) > 0.85 * len(found[30:])
    assert 3 in found[40:]


def test_with_known_costs_the_tree_has_the_size_that_gives_most_tokens_a_second() -> None:
    long = tree(range(1, 17), [-1, *range(15)])
    cheap = BlendedDrafter([Says(long)], cost=lambda nodes: 1.0 + 0.001 * nodes)
    steep = BlendedDrafter([Says(long)], cost=lambda nodes: float(nodes))
    stairs = BlendedDrafter([Says(long)], cost=lambda nodes: 1.0 if nodes <= 4 else 3.0)
    assert cheap.propose(state(1)).size > 4
    assert steep.propose(state(1)).size == 1
    assert stairs.propose(state(1)).size == 4


def test_what_a_tree_of_any_size_is_worth_is_told_from_what_guesses_earned() -> None:
    blend = BlendedDrafter([Says(tree([1, 2, 3], [-1, 0, 1]))], switch_off=False)
    assert isinstance(blend, Forecasting)
    assert blend.expected_tokens(1) == 1.0
    for _ in range(60):  # the first guess always comes true, the second never
        blend.observe(checked(blend.propose(state(1)), [2, 9]))
    assert blend.expected_tokens(2) == pytest.approx(2.0, abs=0.2)
    assert blend.expected_tokens(3) == pytest.approx(2.0, abs=0.25)
    assert blend.expected_tokens(3) <= blend.expected_tokens(16) < 3.0


def test_a_step_without_a_proposal_is_not_clocked() -> None:
    blend = BlendedDrafter([Says(tree([1, 2], [-1, 0]))])
    blend.observe(checked(TokenTree.root(1), [2]))
    assert blend.experience.seconds == {}


def test_drafters_that_cannot_share_a_tree_are_refused() -> None:
    with pytest.raises(BadInput, match="without_replacement"):
        BlendedDrafter([Says(TokenTree.root(1), law="without_replacement")])
    with pytest.raises(BadInput, match="names of their own"):
        BlendedDrafter([PromptLookup(), PromptLookup()])
    with pytest.raises(BadInput, match="at least one"):
        BlendedDrafter([])


def test_it_is_a_drafter_named_and_counted_after_its_parts() -> None:
    blend = BlendedDrafter([Says(TokenTree.root(1), "a"), Says(TokenTree.root(1), "b")])
    assert isinstance(blend, Drafter)
    assert (blend.name, blend.nbytes) == ("a+b", 10)


def test_a_trees_guesses_are_known_by_their_ranks() -> None:
    guesses = guesses_of(tree([1, 2, 3, 4, 5], [-1, 0, 0, 1, 2]))
    assert guesses.keys == [(), (0,), (1,), (0, 0), (1, 0)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("max_nodes", [4, 16])
def test_drafts_change_no_token(tiny_model: LanguageModel, sampling: Sampling, max_nodes: int) -> None:
    blend = BlendedDrafter([PromptLookup(), TokenRecycling(tiny_model.vocabulary)])
    for prompt in ("abcabcab", "xyz", "abcabcabcd"):
        plain = generate(tiny_model, prompt, max_new_tokens=60, engine="hf", sampling=sampling, seed=3)
        drafted = generate(
            tiny_model,
            prompt,
            max_new_tokens=60,
            engine="hf",
            sampling=sampling,
            seed=3,
            drafter=blend,
            max_nodes=max_nodes,
        )
        assert drafted.tokens == plain.tokens


def test_the_model_writes_the_same_with_and_without(default_model: LanguageModel) -> None:
    prompt = default_model.encode("One two three four. One two three four. One two")
    plain = generate(default_model, prompt, max_new_tokens=32, engine="hf")
    blend = BlendedDrafter([PromptLookup(), TokenRecycling(default_model.vocabulary)], switch_off=False)
    drafted = generate(default_model, prompt, max_new_tokens=32, engine="hf", drafter=blend)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_step > 1.5
