from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from loci.decoding.prompt_lookup import PromptLookup
from loci.errors import BadInput
from loci.lm.draft import Drafter, DraftState, PrefillResult, TokenTree
from loci.lm.generate import generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Sampling


def state(tokens: list[int], budget: int = 16) -> DraftState:
    return DraftState(tokens=tokens, sampling=GREEDY, rng=np.random.default_rng(0), budget=budget)


def draft(tokens: list[int], *, budget: int = 16, branches: int = 3, shortest: int = 1) -> TokenTree:
    drafter = PromptLookup(branches=branches, shortest=shortest)
    drafter.start(state(tokens), PrefillResult(tokens=tuple(tokens)))
    return drafter.propose(state(tokens, budget))


def texts(tree: TokenTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[list(path)].tolist()) for path in tree.paths}


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    assert texts(draft([1, 2, 3, 4, 5, 6, 1, 2, 3], branches=1, budget=4)) == {(3, 4, 5, 6)}


def test_a_longer_match_comes_before_a_more_recent_one() -> None:
    # After 1 2 3 came 4; after 9 3, more recently, came 5.
    tree = draft([1, 2, 3, 4, 9, 3, 5, 1, 2, 3], branches=1, budget=2)
    assert texts(tree) == {(3, 4)}


def test_of_equal_matches_the_most_recent_comes_first() -> None:
    assert texts(draft([7, 3, 4, 8, 3, 5, 9, 3], branches=1, budget=2)) == {(3, 5)}


def test_different_continuations_become_branches() -> None:
    tree = draft([7, 3, 4, 8, 3, 5, 9, 3], branches=3, budget=16)
    assert {path[1] for path in texts(tree)} == {4, 5}


def test_a_short_match_drafts_less_than_a_long_one() -> None:
    text = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]
    long = draft([*text, 99, *text[:8]], branches=1, budget=9)
    assert len(max(texts(long), key=len)) == 9


def test_nothing_is_drafted_where_nothing_matches() -> None:
    assert draft([1, 2, 3, 4]).tokens.tolist() == [4]
    assert draft([1]).tokens.tolist() == [1]


def test_matches_below_the_shortest_do_not_count() -> None:
    assert draft([1, 2, 3, 9, 2, 4, 7, 2], shortest=2).size == 1
    assert draft([1, 2, 3, 9, 1, 2], shortest=2).tokens.tolist()[:2] == [2, 3]


@given(some.lists(some.integers(0, 4), min_size=1, max_size=60), some.integers(1, 59), some.integers(1, 20))
def test_a_text_read_piece_by_piece_drafts_what_it_drafts_when_read_at_once(
    tokens: list[int], cut: int, budget: int
) -> None:
    drafter = PromptLookup()
    drafter.start(state(tokens[:cut]), PrefillResult(tokens=tuple(tokens[:cut])))
    for end in range(cut, len(tokens) + 1):
        if end:
            drafter.propose(state(tokens[:end], budget))
    pieces, whole = drafter.propose(state(tokens, budget)), draft(tokens, budget=budget)
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    assert pieces.parents.tolist() == whole.parents.tolist()
    assert whole.size <= budget


@given(some.lists(some.integers(0, 3), min_size=2, max_size=50))
def test_every_guess_stands_in_the_text_behind_its_match(tokens: list[int]) -> None:
    tree = draft(tokens)
    pairs = set(itertools.pairwise(tokens))
    for node in range(1, tree.size):
        assert (int(tree.tokens[tree.parents[node]]), int(tree.tokens[node])) in pairs


def test_a_conversation_that_goes_on_keeps_its_index_and_another_text_does_not() -> None:
    drafter = PromptLookup()
    first = [1, 2, 3, 4, 1, 2]
    drafter.start(state(first), PrefillResult(tokens=tuple(first)))
    longer = [*first, 3, 9, 9, 1, 2]
    drafter.start(state(longer), PrefillResult(tokens=tuple(longer)))
    assert drafter.propose(state(longer)).tokens.tolist() == draft(longer).tokens.tolist()
    other = [5, 6, 7, 5]
    drafter.start(state(other), PrefillResult(tokens=tuple(other)))
    assert drafter.propose(state(other)).tokens.tolist() == draft(other).tokens.tolist()


@pytest.mark.parametrize(("branches", "shortest"), [(0, 1), (1, 0), (1, 4)])
def test_options_out_of_range_are_refused(branches: int, shortest: int) -> None:
    with pytest.raises(BadInput, match=f"branches is {branches}"):
        PromptLookup(branches=branches, shortest=shortest)


def test_it_is_a_drafter_and_counts_its_index() -> None:
    drafter = PromptLookup()
    assert isinstance(drafter, Drafter)
    before = drafter.nbytes
    drafter.start(state(list(range(500))), PrefillResult(tokens=tuple(range(500))))
    assert drafter.nbytes > before + 500 * 3 * 8


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
def test_drafts_change_no_token(tiny_model: LanguageModel, sampling: Sampling) -> None:
    plain = generate(tiny_model, "abcabcab", max_new_tokens=60, engine="hf", sampling=sampling, seed=3)
    drafted = generate(
        tiny_model, "abcabcab", max_new_tokens=60, engine="hf", sampling=sampling, seed=3, drafter=PromptLookup()
    )
    assert drafted.tokens == plain.tokens
