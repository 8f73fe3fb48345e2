"""The walk on a toy model whose logits are any function of the text so far."""

from __future__ import annotations

import numpy as np
import pytest

from loci.lm.draft import TokenTree
from loci.lm.sampling import Sampling, draw, greedy, warp
from loci.lm.verify import walk

VOCABULARY = 6


def logits(text: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([7, *text]).standard_normal(VOCABULARY).astype(np.float32) * 2


def choose(text: tuple[int, ...], sampling: Sampling, seed: int) -> int:
    if sampling.greedy:
        return greedy(logits(text))
    return draw(warp(logits(text), sampling), seed=seed, row=0, position=len(text))


def plain(length: int, sampling: Sampling, seed: int) -> list[int]:
    text = [0]
    while len(text) < length:
        text.append(choose(tuple(text), sampling, seed))
    return text[:length]


def random_tree(root: int, generator: np.random.Generator) -> TokenTree:
    edges: dict[tuple[int, int], None] = {}
    for _ in range(int(generator.integers(0, 14))):
        edges[(int(generator.integers(0, len(edges) + 1)), int(generator.integers(0, VOCABULARY)))] = None
    return TokenTree(
        tokens=np.array([root, *(token for _, token in edges)], dtype=np.int32),
        parents=np.array([-1, *(parent for parent, _ in edges)], dtype=np.int32),
    )


def drafted(length: int, sampling: Sampling, seed: int) -> tuple[list[int], int]:
    generator = np.random.default_rng(seed + 1000)
    text, steps = [0], 0
    while len(text) < length:
        tree = random_tree(text[-1], generator)
        base, steps = len(text), steps + 1

        def after(node: int, tree=tree, base=base) -> int:
            path = tree.tokens[np.flatnonzero(tree.ancestors[node])].tolist()
            return choose((*text[: base - 1], *path), sampling, seed)

        for _, token in walk(tree, after):
            text.append(token)
    return text[:length], steps


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.5, top_p=0.8)])
def test_any_draft_gives_the_tokens_of_plain_decoding(sampling):
    steps = 0
    for seed in range(30):
        text, taken = drafted(40, sampling, seed)
        assert text == plain(40, sampling, seed)
        steps += taken
    assert steps < 0.9 * 30 * 39  # some drafts were accepted


def test_sequences_have_the_models_frequencies_whatever_is_drafted():
    stats = pytest.importorskip("scipy.stats")
    sampling = Sampling(temperature=1.0)
    wanted = np.zeros((VOCABULARY, VOCABULARY))
    for first in range(VOCABULARY):
        before = warp(logits((0,)), sampling).probabilities[first]
        wanted[first] = before * warp(logits((0, first)), sampling).probabilities
    counts = np.zeros_like(wanted)
    for seed in range(1500):
        text, _ = drafted(3, sampling, seed)
        counts[text[1], text[2]] += 1
    assert stats.chisquare(counts.ravel(), wanted.ravel() * 1500).pvalue > 1e-4


def test_the_walk_draws_once_per_node_and_stops_when_nobody_asks():
    asked = []

    def after(node: int) -> int:
        asked.append(node)
        return node + 1

    chain = TokenTree.chain([0, 1, 2, 3])
    assert list(walk(chain, after)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert asked == [0, 1, 2, 3]
    asked.clear()
    for node, _ in walk(chain, after):
        if node == 1:
            break
    assert asked == [0, 1]
