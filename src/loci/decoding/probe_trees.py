"""Trees with probes: which guesses to check now, and how far ahead to look from each of them.

Source  the dynamic sparse tree of Parallel Prompt Decoding (Chen et al. 2024, arXiv:2405.18628, section 4): a node that
        ends the accepted path hands over the guesses of the probes under it, so the number of probes of that node, the
        *state*, is the depth of the next tree. Probes are taken away where they are worth least, and the states form a
        Markov chain whose stationary law tells how many tokens a step yields.
Letters state: probes whose guesses are at hand, 0 to k; candidate: a token node, the root included; ends[c]: the chance
        that candidate c ends the accepted path; rows: all nodes of a step, probes and root included.
Ours    rows are counted with the root, as budgets are. A rejected step falls on the root's own chain, so state 0 occurs
        only at the start: it proposes the root and a full chain. The stationary law comes from powers of the chain,
        which exist for every chain; no state's share is divided by. Probes are weighed by what all later steps yield,
        not only the next one, and sizes are found state by state instead of on a grid: both by policy iteration.
        Candidates without any probe, which the paper does not allow either, were tried and yield no more.

What probes are (prompt tokens, transferred hidden states) does not matter here. No torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32, Int64

from loci.decoding.blend import Guesses
from loci.decoding.tree_search import best_tree, random_tree
from loci.errors import BadInput
from loci.lm.draft import PROBE, TOKEN, DraftState, StepResult, TokenTree, TreeTemplate

Allocation = Literal["dynamic", "naive", "random", "root"]

# Input lengths that `choose` weighs against their cost; the paper's figure 8 goes on to 600 on a GPU.
LIMITS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 105)
# Rounds of the search; it ends by itself after three or four.
_ROUNDS = 20
_SHARED = ("is_probe", "depth", "ancestors", "children", "paths")


@dataclass(frozen=True)
class ProbedTree:
    """A template with a chain of probes under each candidate.

    chains: probes under each node of `template.order`, the root first.
    ensemble: parallel chains per candidate, all of the same length.
    """

    template: TreeTemplate
    chains: tuple[int, ...]
    ensemble: int = 1

    def __post_init__(self) -> None:
        if len(self.chains) != self.template.size or min(self.chains) < 0 or self.ensemble < 1:
            raise BadInput(
                f"a template of {self.template.size} nodes was given the chains {self.chains} of {self.ensemble}"
                " members; each node needs a length of 0 or more, and an ensemble at least 1 member."
            )

    @property
    def size(self) -> int:
        """Rows: candidates and probes."""
        return self.template.size + self.ensemble * sum(self.chains)

    @cached_property
    def steps(self) -> Int64[np.ndarray, "probe 2"]:
        """For each probe its place in its chain, from 0, and its member of the ensemble."""
        found = [(step, member) for size in self.chains for member in range(self.ensemble) for step in range(size)]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def shape(self) -> TokenTree:
        """A tree of this shape; candidates carry their own numbers, probes have inputs without numbers."""
        below = self.template.shape
        parents = below.parents.tolist()
        for node, size in enumerate(self.chains):
            for _ in range(self.ensemble):
                parents += [node, *range(len(parents), len(parents) + size - 1)][:size]
        probes = len(parents) - below.size
        return TokenTree(
            tokens=np.concatenate([below.tokens, np.full(probes, -1, dtype=np.int32)]),
            parents=np.array(parents, dtype=np.int32),
            kind=np.array([TOKEN] * below.size + [PROBE] * probes, dtype=np.int32),
            embeds=np.zeros((probes, 0), dtype=np.float32) if probes else None,
        )

    @cached_property
    def _ranks(self) -> tuple[Int64[np.ndarray, " guess"], Int64[np.ndarray, " guess"]]:
        """For each candidate but the root its depth - 1 and its rank."""
        paths = self.template.order[1:]
        return np.array([len(path) - 1 for path in paths], int), np.array([path[-1] for path in paths], int)

    def inputs(self, embeds: Float32[np.ndarray, "step member width"]) -> Float32[np.ndarray, "probe width"]:
        """The probes' inputs, in the order of the nodes."""
        return np.ascontiguousarray(embeds[self.steps[:, 0], self.steps[:, 1]])

    def tree(
        self, root: int, guesses: Int32[np.ndarray, "step rank"], inputs: Float32[np.ndarray, "probe width"]
    ) -> TokenTree:
        """The tree of tokens under `root`: a node of depth d and rank r carries `guesses[d - 1, r]`."""
        shape = self.shape
        tokens = shape.tokens.copy()
        tokens[0] = root
        tokens[1 : self.template.size] = guesses[self._ranks]
        tree = TokenTree(tokens=tokens, parents=shape.parents, kind=shape.kind, embeds=inputs if len(inputs) else None)
        for name in _SHARED:  # of the shape, not of the tokens: computed once
            tree.__dict__[name] = getattr(shape, name)
        return tree

    @property
    def nbytes(self) -> int:
        shape = self.shape
        kind = 0 if shape.kind is None else shape.kind.nbytes
        return shape.tokens.nbytes + shape.parents.nbytes + kind + shape.ancestors.nbytes + shape.depth.nbytes


def chains_under(tree: TokenTree, node: int) -> tuple[tuple[int, ...], ...]:
    """The chains of probes that hang under a token: for each its nodes, nearest first."""
    found = []
    for child in tree.children[node]:
        if tree.is_probe[child]:
            chain = [child]
            while tree.children[chain[-1]]:
                chain.append(tree.children[chain[-1]][0])
            found.append(tuple(chain))
    return tuple(found)


def with_chains(tree: TokenTree, chains: Sequence[int], embeds: Float32[np.ndarray, "step member width"]) -> TokenTree:
    """Any tree of tokens with chains of probes hung under its nodes, as many as `chains` says for each.

    Raises:
        BadInput: the tree has probes already, or `chains` has another length.
    """
    if tree.is_probe.any() or len(chains) != tree.size:
        raise BadInput(
            f"chains for {len(chains)} nodes were to be hung under a tree of {tree.size} nodes, of which"
            f" {int(tree.is_probe.sum())} are probes already."
        )
    tokens, parents, inputs = tree.tokens.tolist(), tree.parents.tolist(), []
    for node, size in enumerate(chains):
        for member in range(embeds.shape[1]):
            for step in range(size):
                parents.append(node if step == 0 else len(parents) - 1)
                tokens.append(-1)
                inputs.append(embeds[step, member])
    return TokenTree(
        tokens=np.array(tokens, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        kind=np.array([TOKEN] * tree.size + [PROBE] * len(inputs), dtype=np.int32),
        embeds=np.stack(inputs) if inputs else None,
    )


@dataclass(frozen=True, kw_only=True)
class DynamicTrees:
    """One tree per state, and what they yield together.

    accuracies: row d - 1 holds, for each rank, the chance that this guess of probe d is right.
    limit: rows that a tree may have.
    trees: by state, 0 to k.
    """

    accuracies: tuple[tuple[float, ...], ...]
    limit: int
    trees: Mapping[int, ProbedTree]
    ensemble: int = 1
    _smaller: dict[int, DynamicTrees] = field(default_factory=dict, repr=False, compare=False)

    @property
    def k(self) -> int:
        return len(self.accuracies)

    @classmethod
    def build(
        cls,
        accuracies: Float[np.ndarray, "step rank"] | Sequence[Sequence[float]],
        limit: int,
        *,
        ensemble: int = 1,
        allocation: Allocation = "dynamic",
        generator: np.random.Generator | None = None,
    ) -> DynamicTrees:
        """The best trees of at most `limit` rows.

        Args:
            allocation: "dynamic" is the paper's; "naive" gives every candidate all k probes; "random" draws
                candidates and chains by chance; "root" hangs a chain under the root alone, so that an accepted guess
                is followed by a step without any. The last three are what "dynamic" is measured against.
            generator: for "random".

        Raises:
            BadInput: fewer rows than the root, its chain and one guess need; accuracies outside 0..1 or rising with
                the rank.
        """
        values = _checked(accuracies)
        k = len(values)
        if ensemble < 1:
            raise BadInput(f"an ensemble has at least 1 member; found {ensemble}.")
        smallest = _smallest(k, ensemble)
        if limit < smallest:
            raise BadInput(
                f"a limit of {limit} rows is too small for {k} probes in {ensemble} chain(s); a root, its chain and one"
                f" guess need {smallest}."
            )
        if allocation == "random":
            found = _random(values, limit, ensemble, generator or np.random.default_rng(0))
        elif allocation == "naive":
            found = _naive(values, limit, ensemble)
        elif allocation == "root":
            found = _root(values, limit, ensemble)
        else:
            found = _search(values, limit, ensemble)
        found[0] = ProbedTree(TreeTemplate(()), (k,), ensemble)
        rows = tuple(tuple(map(float, row)) for row in values)
        return cls(accuracies=rows, limit=limit, trees=found, ensemble=ensemble)

    @classmethod
    def choose(
        cls,
        accuracies: Float[np.ndarray, "step rank"] | Sequence[Sequence[float]],
        cost: Callable[[int], float],
        *,
        limits: Sequence[int] = LIMITS,
        ensemble: int = 1,
    ) -> DynamicTrees:
        """The trees of the size that gives the most tokens per second on this machine.

        Args:
            cost: seconds of a step with so many rows, as measured.
        """
        values = _checked(accuracies)
        smallest = _smallest(len(values), ensemble)
        built = [cls.build(values, limit, ensemble=ensemble) for limit in limits if limit >= smallest]
        if not built:
            raise BadInput(f"none of the limits {tuple(limits)} holds the {smallest} rows that a tree needs.")
        return max(built, key=lambda trees: trees.tau() / cost(trees.limit))

    def within(self, budget: int) -> DynamicTrees | None:
        """These trees, or smaller ones where `budget` rows are fewer than `limit`; None where nothing fits."""
        if budget >= self.limit:
            return self
        smallest = _smallest(self.k, self.ensemble)
        if budget < smallest:
            return None
        rows = max((limit for limit in LIMITS if smallest <= limit <= budget), default=smallest)  # few sizes are built
        if rows not in self._smaller:
            self._smaller[rows] = DynamicTrees.build(self.accuracies, rows, ensemble=self.ensemble)
        return self._smaller[rows]

    def gain(self, state: int) -> float:
        """Guesses that are accepted on average in a step that begins in this state."""
        return float(_values(np.array(self.accuracies), self.trees[state].template)[1:].sum())

    @cached_property
    def transitions(self) -> Float64[np.ndarray, "state state"]:
        """Row s: the chances of the state after a step that begins in state s."""
        chances = np.zeros((self.k + 1, self.k + 1))
        for state, tree in self.trees.items():
            ends = _ends(np.array(self.accuracies), tree.template)
            np.add.at(chances[state], np.array(tree.chains), ends)
        chances = np.maximum(chances, 0.0)
        return np.asarray(chances / chances.sum(axis=1, keepdims=True), dtype=np.float64)

    @property
    def law(self) -> Float64[np.ndarray, " state"]:
        """How often each state occurs in the long run, from a start with all k guesses."""
        return _law(self.transitions)

    def tau(self) -> float:
        """Tokens per step: the one that every step gives, and the accepted guesses."""
        return _tau(np.array([self.gain(state) for state in range(self.k + 1)]), self.transitions)

    @property
    def nbytes(self) -> int:
        return sum(tree.nbytes for tree in self.trees.values())


class LastChain:
    """What a drafter with probes remembers between two steps: the ranked guesses of the last accepted token's chain.

    Args:
        embeds: inputs of the probes by place in the chain and member of the ensemble.
    """

    def __init__(self, trees: DynamicTrees, embeds: Float32[np.ndarray, "step member width"], *, ranks: int) -> None:
        self.trees = trees
        self.embeds = embeds
        self.ranks = ranks
        self.found: Int32[np.ndarray, "step rank"] = np.zeros((0, ranks), dtype=np.int32)
        # How often a guess comes true once its parent has, by step and rank; for a blend.
        self.priors: Mapping[Hashable, float] = {
            (step, rank): value for step, row in enumerate(trees.accuracies) for rank, value in enumerate(row)
        }
        self._inputs: dict[tuple[int, int], Float32[np.ndarray, "probe width"]] = {}

    def forget(self) -> None:
        self.found = self.found[:0]

    def propose(self, state: DraftState) -> TokenTree:
        """The tree of the present state; the root alone where the budget holds no more."""
        return self._propose(state)[0]

    def guesses(self, state: DraftState) -> Guesses:
        """The same tree for a blend; kinds of guesses are step and rank."""
        tree, probed = self._propose(state)
        keys: list[Hashable] = [()] * tree.size
        if probed is not None:
            keys[1 : probed.template.size] = [(len(path) - 1, path[-1]) for path in probed.template.order[1:]]
        embeds = None
        if tree.embeds is not None:
            embeds = dict(zip(np.flatnonzero(tree.is_probe).tolist(), tree.embeds, strict=True))
        return Guesses(tokens=tree.tokens.tolist(), parents=tree.parents.tolist(), keys=keys, embeds=embeds)

    def _propose(self, state: DraftState) -> tuple[TokenTree, ProbedTree | None]:
        root = int(state.tokens[-1])
        trees = self.trees.within(state.budget)
        if trees is None:
            return TokenTree.root(root), None
        present = len(self.found)
        key = (trees.limit, present)
        probed = trees.trees[present]
        if key not in self._inputs:
            self._inputs[key] = probed.inputs(self.embeds)
        return probed.tree(root, self.found, self._inputs[key]), probed

    def observe(self, result: StepResult) -> None:
        """Read the chain under the last accepted token."""
        self.forget()
        chains = chains_under(result.tree, result.accepted[-1])
        if not chains:
            return
        if len(chains) == 1 and result.topk_ids is not None:
            self.found = result.topk_ids[list(chains[0]), : self.ranks].astype(np.int32)
            return
        rows = []
        for nodes in zip(*chains, strict=True):
            mean = np.mean([result.logits(node) for node in nodes], axis=0)
            top = np.argpartition(-mean, self.ranks)[: self.ranks]
            rows.append(top[np.lexsort((top, -mean[top]))])
        self.found = np.array(rows, dtype=np.int32)

    @property
    def nbytes(self) -> int:
        smaller = sum(trees.nbytes for trees in self.trees._smaller.values())
        inputs = sum(inputs.nbytes for inputs in self._inputs.values())
        return self.embeds.nbytes + self.trees.nbytes + smaller + inputs + self.found.nbytes


def _smallest(k: int, ensemble: int) -> int:
    """Rows of the smallest trees: a root with a full chain and one guess, or two candidates with a probe each."""
    return max(2 + ensemble * k, 2 + 2 * ensemble)


def _checked(
    accuracies: Float[np.ndarray, "step rank"] | Sequence[Sequence[float]],
) -> Float64[np.ndarray, "step rank"]:
    values = np.asarray(accuracies, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise BadInput(f"accuracies have a row per probe and a column per rank; found the shape {values.shape}.")
    if not np.all((values >= 0.0) & (values <= 1.0)) or np.any(values.sum(axis=1) > 1.0 + 1e-6):
        raise BadInput("accuracies are shares between 0 and 1, and those of one probe sum to at most 1.")
    if np.any(np.diff(values, axis=1) > 1e-9):
        raise BadInput(
            "accuracies must not rise with the rank: rank 0 is the best guess. `falling` puts them in order."
        )
    return values


def falling(accuracies: Float[np.ndarray, "step rank"]) -> Float64[np.ndarray, "step rank"]:
    """Measured accuracies without the small rises that come from counting few cases: each row sorted."""
    return np.asarray(-np.sort(-np.asarray(accuracies, dtype=np.float64), axis=1), dtype=np.float64)


def _values(accuracies: Float64[np.ndarray, "step rank"], template: TreeTemplate) -> Float64[np.ndarray, " candidate"]:
    """The chance that each candidate is reached."""
    values = np.ones(template.size)
    parents = template.shape.parents
    for node, path in enumerate(template.order[1:], start=1):
        values[node] = values[parents[node]] * accuracies[len(path) - 1, path[-1]]
    return values


def _ends(accuracies: Float64[np.ndarray, "step rank"], template: TreeTemplate) -> Float64[np.ndarray, " candidate"]:
    """The chance that each candidate ends the accepted path: its value without its children's."""
    values = _values(accuracies, template)
    ends = values.copy()
    np.subtract.at(ends, template.shape.parents[1:], values[1:])
    return np.asarray(np.maximum(ends, 0.0), dtype=np.float64)


def _pruned(
    ends: Float64[np.ndarray, " candidate"], worth: Float64[np.ndarray, " state"], spare: int
) -> tuple[int, ...]:
    """Chains of k probes under each candidate, cut down to `spare` probes in all, the least valuable first, never
    below 1.

    worth[s]: what it is worth to begin a step in state s. The j-th probe of candidate c is worth ends[c] * (worth[j] -
    worth[j - 1]).
    """
    k = len(worth) - 1
    each, last = np.diff(worth).tolist(), ends.tolist()
    chains = [k] * len(last)
    excess = k * len(last) - spare
    # Of equal losses the later candidate, which is deeper or ranked lower, goes first.
    losses = [(chance * each[k - 1], -node) for node, chance in enumerate(last) if k > 1]
    heapq.heapify(losses)
    while excess > 0 and losses:
        _, place = heapq.heappop(losses)
        chains[-place] -= 1
        excess -= 1
        left = chains[-place]
        if left > 1:
            heapq.heappush(losses, (last[-place] * each[left - 1], place))
    return tuple(chains)


def _search(values: Float64[np.ndarray, "step rank"], limit: int, ensemble: int) -> dict[int, ProbedTree]:
    """The trees of all states that yield most tokens in the long run.

    Begins with what a state's own step yields, which is the paper's measure, and goes on with what the steps after it
    yield too: policy iteration on the Markov decision process whose actions are trees and chains.
    """
    k = len(values)
    options: list[list[tuple[TreeTemplate, Float64[np.ndarray, " candidate"], float]]] = []
    for state in range(1, k + 1):
        options.append([])
        for size in range(2, limit // (1 + ensemble) + 1):
            template = best_tree(values[:state], nodes=size)
            if template.size < size and options[-1]:
                break  # no further candidate has a chance
            options[-1].append((template, _ends(values, template), float(_values(values, template)[1:].sum())))
    worth = np.array([0.0, *(max(gain for _, _, gain in found) for found in options)])
    best: tuple[float, dict[int, ProbedTree]] | None = None
    for _ in range(_ROUNDS):
        trees: dict[int, ProbedTree] = {}
        gains, chances = np.zeros(k + 1), np.zeros((k + 1, k + 1))
        chances[0, k] = 1.0
        for state, found in enumerate(options, start=1):
            chosen = -np.inf
            for template, ends, gain in found:
                chains = _pruned(ends, worth, (limit - template.size) // ensemble)
                promised = gain + float(ends @ worth[list(chains)])
                if promised > chosen + 1e-12:
                    chosen, gains[state] = promised, gain
                    trees[state] = ProbedTree(template, chains, ensemble)
                    chances[state] = np.bincount(chains, weights=ends, minlength=k + 1)
        tau = _tau(gains, chances)
        if best is not None and tau <= best[0] + 1e-12:
            break
        best = tau, trees
        worth = _worth(gains, chances)
    assert best is not None  # the first round sets it
    return best[1]


def _law(chances: Float64[np.ndarray, "state state"]) -> Float64[np.ndarray, " state"]:
    """How often each state occurs in the long run, from a start with all guesses.

    The lazy chain, which stays where it is half of the time, has the same law and no period: its powers converge.
    """
    lazy = 0.5 * (chances / chances.sum(axis=1, keepdims=True) + np.eye(len(chances)))
    for _ in range(48):  # 2^48 steps; rows are normed anew because rounding would add up
        lazy = lazy @ lazy
        lazy /= lazy.sum(axis=1, keepdims=True)
    return np.asarray(lazy[-1], dtype=np.float64)


def _tau(gains: Float64[np.ndarray, " state"], chances: Float64[np.ndarray, "state state"]) -> float:
    """Tokens per step: the one that every step gives, and the accepted guesses."""
    return 1.0 + float(_law(chances) @ gains)


def _worth(
    gains: Float64[np.ndarray, " state"], chances: Float64[np.ndarray, "state state"]
) -> Float64[np.ndarray, " state"]:
    """What beginning in each state yields beyond the average of the long run, all later steps counted; 0 in state k."""
    size = len(gains)
    average = float(_law(chances) @ gains)
    system = np.eye(size) - chances / chances.sum(axis=1, keepdims=True)
    system = np.concatenate([system, np.eye(size)[-1:]])
    found = np.linalg.lstsq(system, np.append(gains - average, 0.0), rcond=None)[0]
    return np.asarray(found, dtype=np.float64)


def _naive(values: Float64[np.ndarray, "step rank"], limit: int, ensemble: int) -> dict[int, ProbedTree]:
    """All k probes under every candidate."""
    k = len(values)
    found = {}
    for state in range(1, k + 1):
        template = best_tree(values[:state], nodes=limit // (1 + ensemble * k))
        found[state] = ProbedTree(template, (k,) * template.size, ensemble)
    return found


def _root(values: Float64[np.ndarray, "step rank"], limit: int, ensemble: int) -> dict[int, ProbedTree]:
    """As many candidates as fit beside the root's chain."""
    k = len(values)
    found = {}
    for state in range(1, k + 1):
        template = best_tree(values[:state], nodes=limit - ensemble * k)
        found[state] = ProbedTree(template, (k, *[0] * (template.size - 1)), ensemble)
    return found


def _random(
    values: Float64[np.ndarray, "step rank"], limit: int, ensemble: int, generator: np.random.Generator
) -> dict[int, ProbedTree]:
    """A random tree of candidates, and the rest of the rows dealt out as probes by chance, at least 1 for each."""
    k, ranks = values.shape
    found = {}
    for state in range(1, k + 1):
        fewest = max(2, limit // (1 + ensemble * k))
        size = int(generator.integers(fewest, limit // (1 + ensemble) + 1))
        template = random_tree(nodes=size, depth=state, ranks=ranks, generator=generator)
        chains = np.ones(template.size, dtype=np.int64)
        spare = (limit - template.size) // ensemble - template.size
        while spare > 0 and np.any(chains < k):
            chains[generator.choice(np.flatnonzero(chains < k))] += 1
            spare -= 1
        found[state] = ProbedTree(template, tuple(chains.tolist()), ensemble)
    return found
