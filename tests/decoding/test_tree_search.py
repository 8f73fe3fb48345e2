from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.decoding.tree_search import (
    NOTHING,
    accuracies,
    best_dense_tree,
    best_tree,
    dense_tree,
    expected_tokens,
    random_tree,
    targets_ahead,
)
from loci.errors import BadInput

MEASURED = np.array(
    [
        [0.40, 0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
        [0.24, 0.09, 0.05, 0.04, 0.03, 0.02, 0.02, 0.02, 0.01, 0.01],
        [0.16, 0.07, 0.05, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01],
        [0.11, 0.06, 0.04, 0.03, 0.02, 0.02, 0.02, 0.01, 0.01, 0.01],
    ]
)


def falling(draw_rows: list[list[int]]) -> np.ndarray:
    rows = np.sort(np.array(draw_rows, dtype=np.float64) + 1.0, axis=1)[:, ::-1]
    return rows / (rows.sum() + 1.0)


tables = st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=2, max_size=3).map(falling)


def value(path: tuple[int, ...], table: np.ndarray) -> float:
    return float(np.prod([table[level, rank] for level, rank in enumerate(path)]))


def grown_by_the_best_neighbour(table: np.ndarray, nodes: int) -> set[tuple[int, ...]]:
    """The greedy search of the official code: begin with the best guess, add the best next sibling or first child."""
    chosen = [(0,)]
    while len(chosen) < nodes - 1:
        near = {(*path[:-1], path[-1] + 1) for path in chosen if path[-1] + 1 < table.shape[1]}
        near |= {(*path, 0) for path in chosen if len(path) < len(table)}
        chosen.append(max(near - set(chosen), key=lambda path: value(path, table)))
    return set(chosen)


@given(tables, st.integers(2, 20))
def test_the_best_tree_holds_the_largest_products(table, nodes):
    tree = best_tree(table, nodes=nodes)
    every = [
        path for depth in range(1, len(table) + 1) for path in itertools.product(range(table.shape[1]), repeat=depth)
    ]
    largest = sorted((value(path, table) for path in every), reverse=True)[: nodes - 1]
    assert sorted((value(path, table) for path in tree.ranks), reverse=True) == pytest.approx(largest)
    assert expected_tokens(tree, table) == pytest.approx(1.0 + sum(largest))


@pytest.mark.parametrize("nodes", [2, 5, 16, 64])
def test_the_largest_products_are_what_growing_by_the_best_neighbour_gives(nodes):
    table = MEASURED + np.linspace(1e-4, 0, MEASURED.size).reshape(MEASURED.shape)  # no two values alike
    assert set(best_tree(table, nodes=nodes).ranks) == grown_by_the_best_neighbour(table, nodes)


def test_sizes_count_the_root():
    assert best_tree(MEASURED, nodes=1).size == 1
    assert best_tree(MEASURED, nodes=16).size == 16
    assert random_tree(nodes=16, depth=4, ranks=10, generator=np.random.default_rng(0)).size == 16
    assert dense_tree((3, 2)).size == 1 + 3 + 6


def test_a_tree_is_no_deeper_than_asked():
    assert max(map(len, best_tree(MEASURED, nodes=64, depth=2).ranks)) == 2


def test_a_guess_without_a_chance_takes_no_node():
    table = np.array([[0.5, 0.0], [0.3, 0.0]])
    assert best_tree(table, nodes=16).ranks == ((0,), (0, 0))


def test_a_rank_that_is_better_than_the_one_before_it_goes_first():
    assert best_tree(np.array([[0.1, 0.4]]), nodes=2).ranks == ((1,),)


def test_a_chain_is_a_dense_tree():
    assert dense_tree((1, 1, 1)).ranks == ((0,), (0, 0), (0, 0, 0))


@pytest.mark.parametrize("nodes", [16, 64])
def test_the_calibrated_tree_expects_more_than_any_dense_one_and_than_random_ones(nodes):
    best = expected_tokens(best_tree(MEASURED, nodes=nodes), MEASURED)
    dense = best_dense_tree(MEASURED, nodes=nodes)
    assert dense.size <= nodes
    drawn = [random_tree(nodes=nodes, depth=4, ranks=10, generator=np.random.default_rng(seed)) for seed in range(5)]
    assert best > expected_tokens(dense, MEASURED) > expected_tokens(dense_tree((1,)), MEASURED)
    assert best > 1.05 * np.mean([expected_tokens(tree, MEASURED) for tree in drawn])


def test_accuracies_count_hits_by_depth_and_rank():
    guesses = np.array([[[5, 7], [1, 2]], [[5, 7], [1, 2]], [[5, 7], [1, 2]]])
    targets = np.array([[5, 2], [7, NOTHING], [9, NOTHING]])
    assert accuracies(guesses, targets) == pytest.approx(np.array([[1 / 3, 1 / 3], [0.0, 1.0]]))


def test_accuracies_need_a_target_at_every_depth():
    with pytest.raises(BadInput, match="more text"):
        accuracies(np.zeros((1, 1, 2), dtype=int), np.full((1, 1), NOTHING))


def test_a_guess_at_depth_d_is_about_the_token_d_behind_the_next_one():
    tokens = np.array([10, 11, 12, 13, 14, 15])
    written = np.array([False, True, True, True, False, True])
    ahead = targets_ahead(tokens, written, depth=3)
    assert ahead.tolist() == [
        [12, 13, NOTHING],  # 14 was not written by the model
        [13, NOTHING, NOTHING],
        [NOTHING] * 3,
        [NOTHING] * 3,  # 15 was, and lies behind something that was not
        [NOTHING] * 3,
        [NOTHING] * 3,
    ]


@pytest.mark.parametrize("table", [np.zeros((0, 3)), np.array([[1.2]]), np.array([[0.7, 0.7]]), np.array([[-0.1]])])
def test_accuracies_that_cannot_be_are_refused(table):
    with pytest.raises(BadInput, match="accuracies"):
        best_tree(table, nodes=4)


def test_trees_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="root"):
        best_tree(MEASURED, nodes=0)
    with pytest.raises(BadInput, match="depths 1 to 4"):
        best_tree(MEASURED, nodes=4, depth=5)
    with pytest.raises(BadInput, match="depth 5"):
        expected_tokens(dense_tree((1,) * 5), MEASURED)
    with pytest.raises(BadInput, match="child"):
        dense_tree((2, 0))
