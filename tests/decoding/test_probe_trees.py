"""Trees with probes: shapes, the pruning and the Markov chain against brute force, and bad input."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loci.decoding.probe_trees import (
    DynamicTrees,
    LastChain,
    ProbedTree,
    _ends,
    _pruned,
    _tau,
    _values,
    chains_under,
    falling,
    with_chains,
)
from loci.decoding.tree_search import best_tree
from loci.errors import BadInput
from loci.lm.draft import DraftState, StepResult, TokenTree, TreeTemplate
from loci.lm.sampling import GREEDY

ACCURACIES = np.array(
    [
        [0.40, 0.12, 0.07, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
        [0.28, 0.09, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
        [0.20, 0.07, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01],
    ]
)


@st.composite
def accuracies(draw, k: int = 3, ranks: int = 4) -> np.ndarray:
    raw = draw(st.lists(st.lists(st.floats(0.01, 1.0), min_size=ranks, max_size=ranks), min_size=k, max_size=k))
    share = draw(st.floats(0.1, 0.99))
    values = -np.sort(-np.array(raw), axis=1)
    return share * values / values.sum(axis=1, keepdims=True)


def state(tokens, budget: int) -> DraftState:
    return DraftState(tokens=tokens, sampling=GREEDY, rng=np.random.default_rng(0), budget=budget)


def test_probes_hang_in_chains_under_their_candidates_and_every_row_is_counted() -> None:
    probed = ProbedTree(TreeTemplate(((0,), (1,), (0, 0))), (2, 1, 0, 3), ensemble=2)
    embeds = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
    guesses = np.array([[10, 11], [20, 21]], dtype=np.int32)
    tree = probed.tree(7, guesses, probed.inputs(embeds))
    assert tree.size == probed.size == 4 + 2 * 6
    assert tree.tokens[:4].tolist() == [7, 10, 11, 20]
    for node, length in enumerate((2, 1, 0, 3)):
        chains = chains_under(tree, node)
        assert [len(chain) for chain in chains] == [length] * (2 if length else 0)
        for member, chain in enumerate(chains):
            for step, probe in enumerate(chain):
                place = int(tree.is_probe[:probe].sum())
                np.testing.assert_array_equal(tree.embeds[place], embeds[step, member])
                assert tree.depth[probe] == tree.depth[node] + step + 1
    again = TokenTree(tokens=tree.tokens, parents=tree.parents, kind=tree.kind, embeds=tree.embeds)
    np.testing.assert_array_equal(again.ancestors, tree.ancestors)
    np.testing.assert_array_equal(again.depth, tree.depth)
    assert again.children == tree.children


def test_members_of_an_ensemble_see_only_their_own_chain_and_no_token_sees_a_probe() -> None:
    probed = ProbedTree(TreeTemplate(((0,),)), (2, 2), ensemble=3)
    shape = probed.shape
    for node in range(shape.size):
        seen = np.flatnonzero(shape.ancestors[node])
        if not shape.is_probe[node]:
            assert not shape.is_probe[seen].any()
        else:
            chain = next(c for token in (0, 1) for c in chains_under(shape, token) if node in c)
            assert [int(one) for one in seen if shape.is_probe[one]] == list(chain[: chain.index(node) + 1])


def test_chains_can_be_hung_under_any_tree_of_tokens() -> None:
    tree = TokenTree.merge(TokenTree.chain([1, 2, 3]), TokenTree.chain([1, 4]), budget=9)
    embeds = np.ones((2, 1, 4), dtype=np.float32)
    probed = with_chains(tree, [2, 0, 1, 1], embeds)
    assert [tuple(map(len, chains_under(probed, node))) for node in range(4)] == [(2,), (), (1,), (1,)]
    np.testing.assert_array_equal(probed.tokens[:4], tree.tokens)
    with pytest.raises(BadInput, match="hung under a tree of 4 nodes"):
        with_chains(tree, [1], embeds)
    with pytest.raises(BadInput, match="probes already"):
        with_chains(probed, [0] * probed.size, embeds)


@given(accuracies(), st.integers(2, 9), st.integers(0, 12))
def test_pruning_loses_as_little_as_any_allocation_where_longer_chains_bring_less_and_less(values, size, spare) -> None:
    template = best_tree(values, nodes=size)
    ends = _ends(values, template)[:5]
    gains = np.array([0.0, 0.5, 0.8, 0.9])
    spare = max(spare, len(ends))
    chains = _pruned(ends, gains, spare)
    assert all(1 <= length <= 3 for length in chains)
    assert sum(chains) == min(spare, 3 * len(ends))
    every = [c for c in product((1, 2, 3), repeat=len(ends)) if sum(c) <= spare]
    best = max(sum(end * gains[length] for end, length in zip(ends, c, strict=True)) for c in every)
    assert sum(end * gains[length] for end, length in zip(ends, chains, strict=True)) == pytest.approx(best)


@settings(max_examples=20)
@given(accuracies(k=2, ranks=3))
def test_the_search_finds_the_best_trees_of_a_small_size(values) -> None:
    limit = 6
    best = 0.0
    for sizes in product(range(2, limit // 2 + 1), repeat=2):
        templates = [best_tree(values[:depth], nodes=size) for depth, size in enumerate(sizes, start=1)]
        gains = np.array([0.0, *(_values(values, template)[1:].sum() for template in templates)])
        ends = [_ends(values, template) for template in templates]
        options = [
            [c for c in product((1, 2), repeat=template.size) if template.size + sum(c) <= limit]
            for template in templates
        ]
        for pair in product(*options):
            rows = [np.bincount(c, weights=e, minlength=3) for c, e in zip(pair, ends, strict=True)]
            best = max(best, _tau(gains, np.array([[0.0, 0.0, 1.0], *rows])))
    found = DynamicTrees.build(values, limit)
    assert all(tree.size <= limit for tree in found.trees.values())
    assert 0.999 * best <= found.tau() <= best + 1e-9


def test_the_expected_tokens_are_those_of_a_simulation() -> None:
    trees = DynamicTrees.build(ACCURACIES, 40)
    generator = np.random.default_rng(0)
    at, tokens, steps = trees.k, 0, 40_000
    for _ in range(steps):
        tree = trees.trees[at]
        node, place = 0, 0
        while True:
            below = tree.template.shape.children[node]
            ranks = [tree.template.order[child][-1] for child in below]
            chances = [ACCURACIES[place, rank] for rank in ranks]
            drawn = generator.random()
            hit = int(np.searchsorted(np.cumsum(chances), drawn, side="right")) if below else 0
            tokens += 1
            if hit >= len(below):
                break
            node, place = below[hit], place + 1
        at = tree.chains[node]
    assert tokens / steps == pytest.approx(trees.tau(), rel=0.01)


@settings(max_examples=20)
@given(accuracies())
def test_the_law_is_stationary_and_state_0_is_left_for_good(values) -> None:
    trees = DynamicTrees.build(values, 20)
    np.testing.assert_allclose(trees.law @ trees.transitions, trees.law, atol=1e-9)
    assert trees.law[0] == pytest.approx(0.0)
    assert trees.law.sum() == pytest.approx(1.0)


def test_guesses_that_are_never_right_or_always_right_do_not_break_the_solver() -> None:
    never = DynamicTrees.build(np.zeros((3, 4)), 16)
    assert never.tau() == pytest.approx(1.0)
    always = np.zeros((3, 4))
    always[:, 0] = 1.0
    assert DynamicTrees.build(always, 16).tau() == pytest.approx(4.0)
    first_only = np.zeros((3, 4))
    first_only[0, 0] = 1.0
    assert DynamicTrees.build(first_only, 16).tau() == pytest.approx(2.0)


@pytest.mark.parametrize("limit", [16, 32, 64, 105])
def test_pruned_trees_promise_more_than_equal_chains_and_those_more_than_chance(limit) -> None:
    dynamic = DynamicTrees.build(ACCURACIES, limit).tau()
    naive = DynamicTrees.build(ACCURACIES, limit, allocation="naive").tau()
    chance = [
        DynamicTrees.build(ACCURACIES, limit, allocation="random", generator=np.random.default_rng(seed)).tau()
        for seed in range(5)
    ]
    root = DynamicTrees.build(ACCURACIES, limit, allocation="root").tau()
    assert dynamic > naive
    assert dynamic > np.mean(chance)
    assert dynamic > root


def test_more_rows_never_promise_fewer_tokens_and_the_measured_cost_decides_how_many_pay() -> None:
    limits = (8, 16, 24, 40)
    taus = [DynamicTrees.build(ACCURACIES, limit).tau() for limit in limits]
    assert all(after >= before - 1e-9 for before, after in pairwise(taus))
    flat = DynamicTrees.choose(ACCURACIES, lambda rows: 1.0, limits=limits)
    steep = DynamicTrees.choose(ACCURACIES, lambda rows: float(rows), limits=limits)
    tiles = DynamicTrees.choose(ACCURACIES, lambda rows: float(7 + 3 * np.ceil(rows / 16)), limits=limits)
    assert (flat.limit, steep.limit, tiles.limit) == (40, 8, 16)


def test_smaller_budgets_get_smaller_trees_and_the_smallest_the_root_alone() -> None:
    trees = DynamicTrees.build(ACCURACIES, 64)
    guesses = LastChain(trees, np.zeros((3, 1, 8), dtype=np.float32), ranks=10)
    for budget in range(1, 70):
        guesses.found = np.arange(30, dtype=np.int32).reshape(3, 10)
        tree = guesses.propose(state([3, 5], budget))
        assert tree.size <= budget
        assert (tree.size == 1) == (budget < 5)


def test_the_chain_of_the_last_accepted_candidate_makes_the_next_tree() -> None:
    trees = DynamicTrees.build(ACCURACIES, 16)
    guesses = LastChain(trees, np.zeros((3, 1, 8), dtype=np.float32), ranks=10)
    first = guesses.propose(state([5], 16))
    assert first.size == 4
    assert first.is_probe.sum() == 3
    top = np.arange(first.size * 10, dtype=np.int32).reshape(-1, 10)

    def step(tree, top, accepted, bonus) -> StepResult:
        return StepResult(
            tree=tree, logits=lambda node: np.zeros(4, np.float32), accepted=accepted, bonus=bonus,
            committed=(bonus,), topk_ids=top, topk_logits=top.astype(np.float32),
        )  # fmt: skip

    guesses.observe(step(first, top, (0,), 9))
    np.testing.assert_array_equal(guesses.found, top[1:])
    second = guesses.propose(state([5, 9], 16))
    chosen = trees.trees[3]
    for node, path in enumerate(chosen.template.order[1:], start=1):
        assert second.tokens[node] == top[len(path), path[-1]]
    last = 1
    top = np.arange(second.size * 10, dtype=np.int32).reshape(-1, 10) + 1000
    guesses.observe(step(second, top, (0, last), 77))
    assert len(guesses.found) == chosen.chains[last]
    guesses.forget()
    assert guesses.propose(state([1], 16)).size == 4


def test_an_ensemble_guesses_by_its_mean() -> None:
    trees = DynamicTrees.build(ACCURACIES[:1, :3], 16, ensemble=2)
    guesses = LastChain(trees, np.zeros((1, 2, 8), dtype=np.float32), ranks=3)
    tree = guesses.propose(state([5], 16))
    (left,), (right,) = chains_under(tree, 0)
    rows = {left: np.array([0, 4, 3, 0, 1], np.float32), right: np.array([5, 0, 3, 0, 2], np.float32)}
    result = StepResult(
        tree=tree, logits=rows.__getitem__, accepted=(0,), bonus=1, committed=(1,), topk_ids=None, topk_logits=None
    )
    guesses.observe(result)
    assert guesses.found.tolist() == [[2, 0, 1]]


def test_bad_accuracies_and_too_small_limits_are_refused() -> None:
    for wrong, words in (
        (np.array([[0.2, 0.3]]), "must not rise"),
        (np.array([[1.2, 0.0]]), "between 0 and 1"),
        (np.array([[-0.1, -0.2]]), "between 0 and 1"),
        (np.array([[0.7, 0.6]]), "sum to at most 1"),
        (np.zeros((0, 3)), "a row per probe"),
    ):
        with pytest.raises(BadInput, match=words):
            DynamicTrees.build(wrong, 16)
    with pytest.raises(BadInput, match="limit of 4 rows is too small for 3 probes"):
        DynamicTrees.build(ACCURACIES, 4)
    with pytest.raises(BadInput, match="none of the limits"):
        DynamicTrees.choose(ACCURACIES, lambda rows: 1.0, limits=(2, 3))
    with pytest.raises(BadInput, match="ensemble"):
        DynamicTrees.build(ACCURACIES, 16, ensemble=0)
    with pytest.raises(BadInput, match="chains"):
        ProbedTree(TreeTemplate(((0,),)), (1,))
    np.testing.assert_array_equal(falling(np.array([[0.1, 0.3, 0.2]])), [[0.3, 0.2, 0.1]])
