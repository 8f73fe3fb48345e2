"""Checking a draft so that nothing changes but the speed.

Source  greedy: the usual walk. Match: at each node that is reached, one token is drawn from the model's own
        distribution; a child that carries it is taken, else the token ends the walk. For proposals that are fixed by
        the past no exact rule accepts more. Recursive rejection: Jeon et al. 2024, arXiv:2402.14160, section 3.2
        (siblings without replacement), and Miao et al. 2023, arXiv:2305.09781, section 4.3 (independent siblings).
Letters  p: the model's distribution after a node, sampling options and constraint applied; q: the drafter's.
Ours     one draw per *node*, with noise keyed by the position. A draw per path gives a node that several paths share
         several chances, which biases the output. With fixed proposals the output equals plain sampling with the same
         seed, token for token; with sampled ones it has the same distribution, and repeats with the seed. Independent
         siblings that carry the same token are one way to go on: the drafts below all of them are tried.

A rule that is not exact implements `Acceptance` with `exact = False` and is handed to `generate` by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64

from loci.errors import BadInput
from loci.lm.draft import Law, TokenTree
from loci.lm.sampling import Noise, Sampling, greedy, warp

# One node's outputs, and what a constraint permits after it (None: everything).
Logits = Callable[[int], Float32[np.ndarray, " vocabulary"]]
Allowed = Callable[[int], Bool[np.ndarray, " vocabulary"] | None]

LAWS: frozenset[Law] = frozenset(("point", "iid", "without_replacement"))


@runtime_checkable
class Acceptance(Protocol):
    """A rule by which drafted tokens become text.

    exact: the text is distributed as the model's own.
    laws: the laws of trees that it can check.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def laws(self) -> frozenset[Law]: ...

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        """Go from the root along accepted nodes; yield each node that is reached and the token chosen there.

        Each node but the first carries the token yielded before it; the last token is no node's and ends the walk. The
        walk is lazy: whoever stops taking pairs (at an end token, a stop string) draws no further.

        Args:
            logits: a node's row. Not every engine holds them all, so ask only for what is needed.
            noise: all randomness there is. The position of a node's next token is `noise.position + depth`.
            allowed: what a constraint permits after a node. Children that it forbids are not in the tree.
        """
        ...


def walk(tree: TokenTree, choose: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Walk from the root: yield each node that is reached and the token chosen there, lazily.

    Args:
        choose: the token after a node: its argmax when greedy, the draw at its position when sampling.
    """
    node: int | None = 0
    while node is not None:
        token = choose(node)
        yield node, token
        node = tree.child(node, token)


@dataclass(frozen=True)
class Greedy:
    """The most probable token at every node; of equals the lowest id. However the tree was drawn."""

    name: str = "greedy"
    exact: bool = True
    laws: frozenset[Law] = LAWS

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        return walk(tree, lambda node: greedy(logits(node), allowed=None if allowed is None else allowed(node)))


@dataclass(frozen=True)
class Match:
    """One token is drawn from p per node. Exact however the tree was drawn, and the best exact rule for the law
    "point"; for the sampled laws `RecursiveRejection` accepts more."""

    name: str = "match"
    exact: bool = True
    laws: frozenset[Law] = LAWS

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        def drawn(node: int) -> int:
            support = warp(logits(node), sampling, allowed=None if allowed is None else allowed(node))
            return noise.draw(support, depth=int(tree.depth[node]))

        return walk(tree, drawn)


@dataclass(frozen=True)
class RecursiveRejection:
    """Children are tried in the order in which they were drawn from q. One that is rejected leaves behind what of p is
    not explained by q, and the next is tried against that; the last remainder is drawn from."""

    name: str = "recursive rejection"
    exact: bool = True
    laws: frozenset[Law] = frozenset(("iid", "without_replacement"))

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        same = [0]  # nodes with one path of tokens; more than one only under the law "iid"
        while True:
            node, depth = same[0], int(tree.depth[same[0]])
            mask = None if allowed is None else allowed(node)
            row = logits(node)
            support = warp(row, sampling, allowed=mask)
            children = [child for twin in same for child in tree.children[twin] if not tree.is_probe[child]]
            if not children:
                yield node, noise.draw(support, depth=depth)
                return
            p = np.zeros(len(row))
            p[support.tokens] = support.probabilities
            q = distribution(tree, node, size=len(row), mask=mask)
            tokens = tree.tokens[children].tolist()
            uniforms = noise.uniforms(len(children) + 1, depth=depth)
            accepted, rest = first_accepted(p, q, tokens, law=tree.law, uniforms=uniforms[:-1])
            if accepted is None:
                reached = rest.cumsum()
                yield node, int(np.searchsorted(reached, uniforms[-1] * reached[-1], side="right"))
                return
            yield int(tree.parents[children[accepted]]), tokens[accepted]
            same = [child for child, token in zip(children, tokens, strict=True) if token == tokens[accepted]]
            same.sort(key=lambda child, first=children[accepted]: child != first)  # type: ignore[misc]


GREEDY = Greedy()
MATCH = Match()
RECURSIVE_REJECTION = RecursiveRejection()


def exact_rule(law: Law, sampling: Sampling) -> Acceptance:
    """The exact rule that accepts the most."""
    if sampling.greedy:
        return GREEDY
    return MATCH if law == "point" else RECURSIVE_REJECTION


def distribution(
    tree: TokenTree, node: int, *, size: int, mask: Bool[np.ndarray, " vocabulary"] | None = None
) -> Float64[np.ndarray, " vocabulary"]:
    """The drafter's q after a node, in float64 and summing to 1. Under a mask it is q of the permitted tokens: draws
    that are kept only where permitted are draws from that.

    Raises:
        BadInput: the tree has no q there, another vocabulary, or nothing permitted.
    """
    if tree.q is None or tree.q_row is None or tree.q_row[node] < 0:
        raise BadInput(f'the law "{tree.law}" needs the drafter\'s distribution at node {node}, which has children.')
    if tree.q.shape[1] != size:
        raise BadInput(f"the drafter speaks {tree.q.shape[1]:,} tokens and the model {size:,}; they must be the same.")
    q = tree.q[tree.q_row[node]].astype(np.float64)
    if mask is not None:
        q[~mask] = 0.0
    total = q.sum()
    if not total > 0:
        raise BadInput(f"the drafter's distribution at node {node} is empty, and yet the node has children.")
    return np.asarray(q / total, dtype=np.float64)


def first_accepted(
    p: Float64[np.ndarray, " vocabulary"],
    q: Float64[np.ndarray, " vocabulary"],
    tokens: list[int],
    *,
    law: Law,
    uniforms: Float64[np.ndarray, " attempt"],
) -> tuple[int | None, Float64[np.ndarray, " vocabulary"]]:
    """The place of the first accepted token, or None; and the p of the last attempt: what to draw from after None.

    Args:
        tokens: drawn one after another from q, independently ("iid") or each without the ones before it.
        uniforms: one number between 0 and 1 per token.
    """
    for place, (token, uniform) in enumerate(zip(tokens, uniforms.tolist(), strict=True)):
        if uniform < chance(p, q, token):
            return place, p
        p, q = residual(p, q), (q if law == "iid" else without(q, token))
        if not q.any():  # the drafter had no more tokens to give
            break
    return None, p


def chance(p: Float64[np.ndarray, " vocabulary"], q: Float64[np.ndarray, " vocabulary"], token: int) -> float:
    """The probability of accepting a token drawn from q: min(1, p / q).

    Raises:
        BadInput: q gives the token no probability, so it cannot have been drawn from q.
    """
    if not q[token] > 0:
        raise BadInput(f"a drafted token, {token}, has probability 0 in the distribution that it was drawn from.")
    return float(min(1.0, p[token] / q[token]))


def residual(
    p: Float64[np.ndarray, " vocabulary"], q: Float64[np.ndarray, " vocabulary"]
) -> Float64[np.ndarray, " vocabulary"]:
    """What of p is not explained by q: norm(max(p - q, 0))."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    if not total > 0:  # by rounding alone: where p equals q, nothing is rejected
        return p
    return np.asarray(rest / total, dtype=np.float64)


def without(q: Float64[np.ndarray, " vocabulary"], token: int) -> Float64[np.ndarray, " vocabulary"]:
    """q after one of its tokens was drawn: norm of the others; all zeros if there are none."""
    rest = q.copy()
    rest[token] = 0.0
    total = rest.sum()
    return np.asarray(rest / total, dtype=np.float64) if total > 0 else rest


def exact_output(
    p: Float64[np.ndarray, " vocabulary"], q: Float64[np.ndarray, " vocabulary"], siblings: int, law: Law
) -> tuple[Float64[np.ndarray, " vocabulary"], float]:
    """What recursive rejection gives at one node, summed over every list of drafts: the distribution of the token, and
    the probability that it is a drafted one. For tests: the first must be p, whatever q is.

    Cost: vocabulary ** siblings terms; 4 siblings of 8 tokens take 20 ms.
    """
    if law == "point":
        raise BadInput('the law "point" draws nothing from q; recursive rejection checks the sampled laws.')
    output = np.zeros(len(p))

    def tried(p: np.ndarray, q: np.ndarray, drawn: np.ndarray, left: int, weight: float) -> float:
        """Add what comes of a state that has this probability; return the part of it that is accepted. `drawn` is what
        the drafter draws from, worked out here again: the verifier must come to the same."""
        if left == 0 or not q.any():
            output[:] += weight * p
            return 0.0
        accepted = rejected = 0.0
        for token in np.flatnonzero(drawn).tolist():
            before = weight * drawn[token]
            taken = before * chance(p, q, token)
            output[token] += taken
            accepted += taken
            if law == "iid" or left == 1:  # the last draft's identity changes nothing in what remains of p
                rejected += before - taken
            elif before > taken:
                others = np.where(np.arange(len(drawn)) == token, 0.0, drawn)
                others /= max(others.sum(), np.finfo(np.float64).tiny)
                accepted += tried(residual(p, q), without(q, token), others, left - 1, before - taken)
        if rejected > 0:
            accepted += tried(residual(p, q), q, drawn, left - 1, rejected)
        return accepted

    return output, tried(p, q, q, siblings, 1.0)
