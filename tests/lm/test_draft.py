from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.errors import BadInput
from loci.lm.draft import TokenTree, TreeTemplate


def tree(tokens, parents, **more) -> TokenTree:
    return TokenTree(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32), **more)


@st.composite
def trees(draw, root: int = 0, vocabulary: int = 5) -> TokenTree:
    size = draw(st.integers(1, 12))
    edges: dict[tuple[int, int], None] = {}
    for _ in range(size - 1):
        edges[(draw(st.integers(0, len(edges))), draw(st.integers(0, vocabulary - 1)))] = None
    return tree([root, *(token for _, token in edges)], [-1, *(parent for parent, _ in edges)])


@given(trees())
def test_a_node_attends_to_exactly_the_nodes_on_its_way_to_the_root(some):
    for node in range(some.size):
        way, at = set(), node
        while at != -1:
            way.add(at)
            at = int(some.parents[at])
        assert set(np.flatnonzero(some.ancestors[node]).tolist()) == way
        assert some.depth[node] == len(way) - 1


@given(trees())
def test_paths_lead_from_the_root_to_every_leaf(some):
    leaves = {node for node in range(some.size) if not some.children[node]}
    assert {path[-1] for path in some.paths} == leaves
    assert all(path[0] == 0 for path in some.paths)
    assert all(some.parents[after] == before for path in some.paths for before, after in pairwise(path))


@given(trees(), trees(), st.integers(1, 15))
def test_a_merged_tree_holds_only_paths_of_its_parts_and_keeps_to_the_budget(first, second, budget):
    def texts(some: TokenTree) -> set[tuple[int, ...]]:
        return {tuple(some.tokens[np.flatnonzero(row)].tolist()) for row in some.ancestors}

    merged = TokenTree.merge(first, second, budget=budget)
    both = texts(first) | texts(second)
    assert merged.size <= budget
    assert texts(merged) <= both
    if budget >= len(both):
        assert texts(merged) == both
    if budget >= first.size:
        assert texts(first) <= texts(merged)


def test_a_template_numbers_its_nodes_by_depth_and_rank():
    template = TreeTemplate(((0, 0), (1,), (0,), (1, 0)))
    assert template.order == ((), (0,), (1,), (0, 0), (1, 0))
    made = TokenTree.from_template(template, [9, 4, 5, 6, 7])
    assert made.parents.tolist() == [-1, 0, 0, 1, 2]
    assert made.child(0, 5) == 2
    assert made.child(2, 7) == 4
    assert made.depth is template.shape.depth


def test_a_chain_is_one_path():
    chain = TokenTree.chain([3, 3, 3])
    assert chain.paths == ((0, 1, 2),)
    assert TokenTree.root(3).paths == ((0,),)


@pytest.mark.parametrize(
    ("tokens", "parents", "says"),
    [
        ([], [], "root"),
        ([1, 2], [0, 0], "root"),
        ([1, 2, 3], [-1, 2, 0], "before its children"),
        ([1, 2], [-1, -1], "before its children"),
        ([1, 2, 2], [-1, 0, 0], "one child per token"),
        ([1, -1], [-1, 0], "ids of 0 and more"),
    ],
)
def test_trees_that_are_none_are_refused(tokens, parents, says):
    with pytest.raises(BadInput, match=says):
        tree(tokens, parents)


def test_no_token_follows_a_probe():
    kind = np.array([0, 1, 0], dtype=np.int32)
    with pytest.raises(BadInput, match="follows a probe"):
        tree([1, -1, 2], [-1, 0, 1], kind=kind, embeds=np.zeros((1, 4), dtype=np.float32))


def test_probes_need_their_embeddings():
    kind = np.array([0, 1], dtype=np.int32)
    with pytest.raises(BadInput, match="1 probes has 0 embeddings"):
        tree([1, -1], [-1, 0], kind=kind)


def test_sampled_laws_carry_their_distribution():
    with pytest.raises(BadInput, match="q and q_row"):
        tree([1, 2], [-1, 0], law="iid")


@pytest.mark.parametrize("ranks", [((0, 0),), ((0,), (0,)), ((0,), (1, 0))])
def test_templates_with_gaps_or_repeats_are_refused(ranks):
    with pytest.raises(BadInput, match="path"):
        TreeTemplate(ranks)
