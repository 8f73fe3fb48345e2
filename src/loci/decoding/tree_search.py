"""Which tree of guesses to check: the best shape for what each guess is worth.

Source  the calibrated sparse tree of Medusa (Cai et al. 2024, arXiv:2401.10774, section 2.3.3): the value of a node is
        the product of the accuracies on its path, and the tree grows by the best neighbour.
Letters depth: tokens ahead of the root, from 1; row d - 1 of `accuracies` belongs to depth d. Rank: place in a list of
        guesses, 0 the best. `accuracies[d - 1, r]` is the share of positions where guess r was the token at depth d.
Ours    the largest products are taken directly. While accuracies fall with the rank that is what growing by the best
        neighbour gives, and where a measured figure breaks the order it is the better tree.

All sizes count the root, as budgets do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Integer

from loci.errors import BadInput
from loci.lm.draft import TreeTemplate

NOTHING = -1  # the target of a guess that lies beyond the text


def best_tree(accuracies: Float[np.ndarray, "depth rank"], *, nodes: int, depth: int | None = None) -> TreeTemplate:
    """The template of at most `nodes` nodes, root included, whose expected tokens per step are highest.

    It is smaller where nothing else has a chance. Of equal values the shorter path, then the better rank, goes first.

    Args:
        depth: of the deepest node; as deep as there are accuracies unless given.

    Raises:
        BadInput: accuracies outside 0..1, rows that sum to more than 1, or no node for the root.
    """
    values = _checked(accuracies)
    if nodes < 1:
        raise BadInput(f"a tree has at least 1 node, its root; {nodes} were asked for.")
    if depth is not None and not 1 <= depth <= len(values):
        raise BadInput(f"a tree of depth {depth} was asked for; accuracies are known for depths 1 to {len(values)}.")
    deepest = len(values) if depth is None else depth
    # Ranks by falling accuracy: after a node come its first child and its next sibling, both worth no more.
    order = np.argsort(-values, axis=1, kind="stable")
    chosen: list[tuple[int, ...]] = []
    waiting: list[tuple[float, int, tuple[int, ...], tuple[int, ...]]] = []

    def offer(worth: float, parent: tuple[int, ...], places: tuple[int, ...]) -> None:
        level, place = len(parent), places[-1]
        if level < deepest and place < values.shape[1]:
            rank = int(order[level, place])
            value = worth * float(values[level, rank])
            if value > 0.0:
                heapq.heappush(waiting, (-value, level + 1, (*parent, rank), places))

    worths: dict[tuple[int, ...], float] = {(): 1.0}
    offer(1.0, (), (0,))
    while waiting and len(chosen) < nodes - 1:
        value, _, path, places = heapq.heappop(waiting)
        chosen.append(path)
        worths[path] = -value
        offer(-value, path, (*places, 0))
        offer(worths[path[:-1]], path[:-1], (*places[:-1], places[-1] + 1))
    return TreeTemplate(tuple(chosen))


def dense_tree(branching: Sequence[int]) -> TreeTemplate:
    """The whole product: under every node of depth d its best `branching[d]` guesses. `(1, 1, 1)` is a chain of three.

    Raises:
        BadInput: a branching below 1.
    """
    if any(width < 1 for width in branching):
        raise BadInput(f"a dense tree has at least 1 child per node at each depth; found {tuple(branching)}.")
    paths: list[tuple[int, ...]] = []
    for depth in range(1, len(branching) + 1):
        paths += product(*(range(width) for width in branching[:depth]))
    return TreeTemplate(tuple(paths))


def best_dense_tree(accuracies: Float[np.ndarray, "depth rank"], *, nodes: int) -> TreeTemplate:
    """Of all dense trees that fit into `nodes`, the one with the most expected tokens: the strongest rival."""
    values = _checked(accuracies)
    found: list[tuple[int, ...]] = [()]

    def widen(branching: tuple[int, ...], level: int, size: int) -> None:
        if len(branching) == len(values):
            return
        for width in range(1, values.shape[1] + 1):
            if size + level * width > nodes:
                return
            found.append((*branching, width))
            widen(found[-1], level * width, size + level * width)

    widen((), 1, 1)
    return max((dense_tree(branching) for branching in found), key=lambda tree: expected_tokens(tree, values))


def random_tree(*, nodes: int, depth: int, ranks: int, generator: np.random.Generator) -> TreeTemplate:
    """A tree that grows by a random neighbour, the first child of a node or its next sibling, to `nodes` nodes."""
    if nodes < 1 or depth < 1 or ranks < 1:
        raise BadInput(f"a random tree needs nodes, depth and ranks of at least 1; found {nodes}, {depth}, {ranks}.")
    chosen: list[tuple[int, ...]] = []
    neighbours: list[tuple[int, ...]] = [(0,)]
    while neighbours and len(chosen) < nodes - 1:
        path = neighbours.pop(int(generator.integers(len(neighbours))))
        chosen.append(path)
        if len(path) < depth:
            neighbours.append((*path, 0))
        if path[-1] + 1 < ranks:
            neighbours.append((*path[:-1], path[-1] + 1))
    return TreeTemplate(tuple(chosen))


def expected_tokens(template: TreeTemplate, accuracies: Float[np.ndarray, "depth rank"]) -> float:
    """Tokens per step if each depth's hit were independent of the others: 1 and every node's chance to be reached.

    Raises:
        BadInput: the template is deeper or wider than the accuracies.
    """
    values = _checked(accuracies)
    depth = max(map(len, template.ranks), default=0)
    widest = max((rank for path in template.ranks for rank in path), default=-1) + 1
    if depth > values.shape[0] or widest > values.shape[1]:
        raise BadInput(
            f"a template of depth {depth} and {widest} ranks needs accuracies for them; there are"
            f" {values.shape[0]} depths and {values.shape[1]} ranks."
        )
    return 1.0 + sum(
        float(np.prod([values[level, rank] for level, rank in enumerate(path)])) for path in template.ranks
    )


def accuracies(
    guesses: Integer[np.ndarray, "position depth rank"], targets: Integer[np.ndarray, "position depth"]
) -> Float[np.ndarray, "depth rank"]:
    """Share of positions where each guess was right, to be measured on text that the model itself wrote greedily.

    Args:
        guesses: ranked tokens for each depth ahead of a position.
        targets: the tokens that came; `NOTHING` where the text had ended, which counts for nothing.

    Raises:
        BadInput: a depth without a single target.
    """
    known = targets != NOTHING
    counts = known.sum(axis=0)
    if not len(targets) or not counts.all():
        raise BadInput("accuracies need at least one target at every depth; give more text.")
    hits = (guesses == targets[:, :, None]) & known[:, :, None]
    return np.asarray(hits.sum(axis=0) / counts[:, None], dtype=np.float64)


def targets_ahead(
    tokens: Integer[np.ndarray, " token"], written: Bool[np.ndarray, " token"], *, depth: int
) -> Integer[np.ndarray, "token depth"]:
    """For each position t the tokens at t + 2, t + 3, ..., which the guesses of depths 1, 2, ... are about.

    Position t's own head gives t + 1, the root of the next tree, so depth d is the token at t + 1 + d. `NOTHING` unless
    all tokens from t + 1 to there were `written` by the model: drafts never reach from one answer into another.
    """
    ahead = np.full((len(tokens), depth), NOTHING, dtype=np.int64)
    unbroken = written[1:]
    for level in range(depth):
        unbroken = unbroken[: max(0, len(tokens) - level - 2)] & written[level + 2 :]
        ahead[: len(unbroken), level] = np.where(unbroken, tokens[level + 2 :], NOTHING)
    return ahead


def _checked(values: Float[np.ndarray, "depth rank"]) -> Float[np.ndarray, "depth rank"]:
    if values.ndim != 2 or not values.size:
        raise BadInput(f"accuracies have a row per depth and a column per rank; found the shape {values.shape}.")
    if not np.all((values >= 0.0) & (values <= 1.0)) or np.any(values.sum(axis=1) > 1.0 + 1e-6):
        raise BadInput("accuracies are shares between 0 and 1, and those of one depth sum to at most 1.")
    return values
