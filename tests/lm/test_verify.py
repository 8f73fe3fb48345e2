"""Rules on toy models whose logits are any function of the text so far."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loci.errors import BadInput
from loci.lm import verify
from loci.lm.draft import TokenTree
from loci.lm.sampling import Noise, Sampling, draw, greedy, warp
from loci.lm.verify import Acceptance, walk

VOCABULARY = 6
RUNS = 1500
SAMPLED = Sampling(temperature=1.0)


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


# Recursive rejection


def random_pairs(count: int, *, zeros: bool, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distributions over 8 tokens; with zeros in both, never everywhere."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        pair = []
        for scale in (1.0, 2.0):
            mass = np.exp(scale * generator.standard_normal(8))
            if zeros:
                mass[generator.permutation(8)[: generator.integers(0, 7)]] = 0.0
            pair.append(mass / mass.sum())
        pairs.append((pair[0], pair[1]))
    return pairs


def norm(mass: np.ndarray) -> np.ndarray:
    return mass / mass.sum() if mass.sum() > 0 else mass


def removed(q: np.ndarray, token: int) -> np.ndarray:
    rest = q.copy()
    rest[token] = 0.0
    return rest


# What must not pass for the rule: functions of `verify` that stand in for the right ones.
MUTANTS = {
    # ratios with q renormalised, residual with q as it was left by the removals
    "residual of the q that was not renormalised": {
        "without": removed,
        "chance": lambda p, q, token: min(1.0, p[token] / norm(q)[token]),
    },
    "no residual": {"residual": lambda p, q: p},
    "q not renormalised after a removal": {"without": removed},
}


@pytest.mark.parametrize("law", ["iid", "without_replacement"])
def test_summed_over_all_drafts_the_output_is_the_models_distribution(law):
    for p, q in [*random_pairs(50, zeros=False), *random_pairs(50, zeros=True, seed=1)]:
        for siblings in (1, 2, 3, 4) if law == "iid" else (1, 2, 3):
            output, accepted = verify.exact_output(p, q, siblings, law)
            np.testing.assert_allclose(output, p, atol=1e-12)
            assert -1e-12 <= accepted <= 1 + 1e-12


def test_four_siblings_without_replacement_are_exact_too():
    for p, q in [*random_pairs(50, zeros=False, seed=2), *random_pairs(50, zeros=True, seed=3)]:
        output, _ = verify.exact_output(p, q, 4, "without_replacement")
        np.testing.assert_allclose(output, p, atol=1e-12)


def test_mean_acceptance_without_replacement_is_above_independent_draws():
    """40 pairs, logits of p of standard deviation 1, of q 2."""
    pairs = random_pairs(40, zeros=False)

    def mean(siblings: int, law: str) -> float:
        return float(np.mean([verify.exact_output(p, q, siblings, law)[1] for p, q in pairs]))

    assert mean(1, "iid") == pytest.approx(mean(1, "without_replacement"), abs=1e-12)
    assert mean(1, "iid") == pytest.approx(0.401, abs=0.03)
    assert mean(2, "without_replacement") == pytest.approx(0.568, abs=0.03)
    assert mean(2, "iid") == pytest.approx(0.516, abs=0.03)
    assert mean(3, "without_replacement") == pytest.approx(0.665, abs=0.03)
    assert mean(3, "iid") == pytest.approx(0.576, abs=0.03)


@pytest.mark.parametrize(("mutant", "error"), list(zip(MUTANTS, (0.1, 0.25, 0.5), strict=True)), ids=str)
def test_the_enumeration_catches_wrong_rules(monkeypatch, mutant, error):
    for name, wrong in MUTANTS[mutant].items():
        monkeypatch.setattr(verify, name, wrong)
    pairs = random_pairs(40, zeros=False)
    errors = [np.abs(verify.exact_output(p, q, 2, "without_replacement")[0] - p).max() for p, q in pairs]
    assert max(errors) > error


@pytest.mark.parametrize("law", ["iid", "without_replacement"])
def test_a_q_of_one_token_is_a_match(law):
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.0, 1.0, 0.0])
    output, accepted = verify.exact_output(p, q, 3, law)
    np.testing.assert_allclose(output, p, atol=1e-15)
    assert accepted == pytest.approx(0.5)


class Toy:
    """A target and a drafter over 6 tokens whose next token depends on the text so far."""

    def __init__(self, *, target: Sampling, draft: Sampling, branching: tuple[int, ...], law: str) -> None:
        self.target, self.branching, self.law = target, branching, law
        self.q, self.rows = {}, {}
        for length in range(len(branching) + 1):
            for text in itertools.product(range(VOCABULARY), repeat=length):
                self.rows[text] = logits((0, *text))
                other = 0.7 * self.rows[text] + 1.2 * logits((1, *text))  # resembles the target
                support = warp(other.astype(np.float32), draft)
                self.q[text] = np.zeros(VOCABULARY)
                self.q[text][support.tokens] = support.probabilities

    def wanted(self) -> np.ndarray:
        """The probability of every text of three tokens."""
        mass = np.ones((VOCABULARY,) * 3)
        for text in itertools.product(range(VOCABULARY), repeat=2):
            for place in range(3):
                known = text[:place]
                support = warp(self.rows[known], self.target)
                row = np.zeros(VOCABULARY)
                row[support.tokens] = support.probabilities
                if place == len(text):
                    mass[text] *= row
                else:
                    mass[text] *= row[text[place]]
        return mass

    def tree(self, text: tuple[int, ...], generator: np.random.Generator) -> TokenTree:
        tokens, parents, q, q_row, paths = [text[-1] if text else 0], [-1], [], [-1], [text]
        level = [0]
        for count in self.branching[len(text) :]:
            grown = []
            for node in level:
                law = self.q[paths[node]]
                if self.law == "iid":
                    drawn = generator.choice(VOCABULARY, size=count, p=law)
                else:  # keys of tokens without probability are minus infinity
                    with np.errstate(divide="ignore"):
                        keys = np.log(law) + generator.gumbel(size=VOCABULARY)
                    drawn = np.argsort(-keys)[: min(count, np.count_nonzero(law))]
                q_row[node] = len(q)
                q.append(law)
                for token in drawn.tolist():
                    grown.append(len(tokens))
                    tokens.append(token)
                    parents.append(node)
                    q_row.append(-1)
                    paths.append((*paths[node], token))
            level = grown
        self.paths = paths
        return TokenTree(
            tokens=np.array(tokens, dtype=np.int32),
            parents=np.array(parents, dtype=np.int32),
            law=self.law,
            q=np.array(q, dtype=np.float32),
            q_row=np.array(q_row, dtype=np.int32),
        )

    def counts(self, runs: int, seed: int, rule: Acceptance = verify.RECURSIVE_REJECTION) -> tuple[np.ndarray, int]:
        """Texts of three tokens that so many runs of drafting and checking give, and the steps that they took."""
        generator = np.random.default_rng(seed)
        counts, steps = np.zeros((VOCABULARY,) * 3, dtype=int), 0
        for run in range(runs):
            text: tuple[int, ...] = ()
            while len(text) < 3:
                tree, base, steps = self.tree(text, generator), len(text), steps + 1
                noise = Noise(seed=seed, row=run, position=base)
                walked = rule.walk(tree, lambda node: self.rows[self.paths[node]], sampling=self.target, noise=noise)
                for _, token in walked:
                    text = (*text, token)
                    if len(text) == 3:
                        break
            counts[text] += 1
        return counts, steps


def p_value(counts: np.ndarray, wanted: np.ndarray) -> float:
    """Chi-square; texts that cannot be must not have come, rare ones (fewer than 5 expected) are pooled."""
    stats = pytest.importorskip("scipy.stats")
    expected = wanted.ravel() * counts.sum()
    found = counts.ravel()
    assert not found[expected == 0].any()
    rare = expected < 5
    expected, found = (
        np.append(cells[~rare], cells[rare].sum()) if expected[rare].sum() > 0 else cells[~rare]
        for cells in (expected, found)
    )
    return float(stats.chisquare(found, expected).pvalue)


LAWS_AND_OPTIONS = [
    ("without_replacement", Sampling(temperature=1.0), Sampling(temperature=1.0), (3, 2, 1)),
    ("without_replacement", Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=1.3, top_p=0.8), (3, 3, 1)),
    ("iid", Sampling(temperature=1.0), Sampling(temperature=1.0), (3, 2, 1)),
    ("iid", Sampling(temperature=1.2, top_k=4), Sampling(temperature=0.7, top_p=0.95), (4, 2, 2)),
]


@pytest.mark.parametrize(("law", "target", "draft", "branching"), LAWS_AND_OPTIONS)
def test_whole_trees_give_the_models_texts(law, target, draft, branching):
    toy = Toy(target=target, draft=draft, branching=branching, law=law)
    counts, steps = toy.counts(RUNS, 0)
    assert p_value(counts, toy.wanted()) > 1e-4
    assert steps < 2.5 * RUNS
    assert toy.counts(20, 5)[0].tolist() == toy.counts(20, 5)[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("law", "target", "draft", "branching"), LAWS_AND_OPTIONS)
def test_whole_trees_give_the_models_texts_in_200_000_runs(law, target, draft, branching):
    toy = Toy(target=target, draft=draft, branching=branching, law=law)
    assert p_value(toy.counts(200_000, 0)[0], toy.wanted()) > 1e-4


@pytest.mark.parametrize("mutant", MUTANTS)
def test_whole_trees_betray_wrong_rules(monkeypatch, mutant):
    toy = Toy(
        target=Sampling(temperature=1.0),
        draft=Sampling(temperature=0.6),
        branching=(4, 3, 2),
        law="without_replacement",
    )
    for name, wrong in MUTANTS[mutant].items():
        monkeypatch.setattr(verify, name, wrong)
    assert p_value(toy.counts(800, 1)[0], toy.wanted()) < 1e-9


def sampled_tree(tokens, parents, q, q_row, law="without_replacement") -> TokenTree:
    return TokenTree(
        tokens=np.array(tokens, dtype=np.int32),
        parents=np.array(parents, dtype=np.int32),
        law=law,
        q=np.array(q, dtype=np.float32),
        q_row=np.array(q_row, dtype=np.int32),
    )


def walked(tree: TokenTree, rows, *, seed: int = 0, allowed=None) -> list[tuple[int, int]]:
    rows = np.array(rows, dtype=np.float32)
    noise = Noise(seed=seed, row=0, position=1)
    rule = verify.RECURSIVE_REJECTION
    return list(rule.walk(tree, lambda node: rows[node], sampling=SAMPLED, noise=noise, allowed=allowed))


@pytest.mark.parametrize(
    ("q", "q_row", "says"),
    [
        ([[0.0, 0.5, 0.5]], [0, -1, -1], "token, 0, has probability 0"),
        ([[0.5, 0.5, 0.0]], [-1, -1, -1], "needs the drafter's distribution at node 0"),
        ([[0.5, 0.5]], [0, -1, -1], "speaks 2 tokens and the model 3"),
        ([[0.0, 0.0, 0.0]], [0, -1, -1], "is empty"),
    ],
)
def test_a_tree_that_cannot_have_been_drawn_is_refused(q, q_row, says):
    with pytest.raises(BadInput, match=says):
        walked(sampled_tree([2, 0, 1], [-1, 0, 0], q, q_row), np.zeros((3, 3)))


def test_the_law_point_has_nothing_to_enumerate():
    with pytest.raises(BadInput, match="draws nothing"):
        verify.exact_output(np.ones(2) / 2, np.ones(2) / 2, 1, "point")


def test_a_list_longer_than_the_drafters_support_ends_early():
    tree = sampled_tree([2, 0, 1], [-1, 0, 0], [[1.0, 0.0, 0.0]], [0, -1, -1])
    for seed in range(20):
        ((node, token), *_) = walked(tree, [[-9.0, 0.0, 0.0]] * 3, seed=seed)
        assert (node, token) in ((0, 1), (0, 2))  # token 1 is what plain p gives, not the draft that q forbids


def test_independent_siblings_with_one_token_share_what_was_drafted_below_them():
    """Both drafts begin with token 0; only the second one goes on with the token that the model wants."""
    q = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]
    tree = sampled_tree([2, 0, 1, 0, 2], [-1, 0, 1, 0, 3], q, [0, 1, -1, 2, -1], law="iid")
    rows = [[50.0, 0, 0], [0, 0, 50.0], [0, 50.0, 0], [0, 0, 50.0], [0, 50.0, 0]]
    assert walked(tree, rows) == [(0, 0), (3, 2), (4, 1)]


def test_what_a_constraint_forbids_counts_neither_for_the_model_nor_for_the_drafter():
    stats = pytest.importorskip("scipy.stats")
    mask = np.array([True, True, False, True])
    p, q = np.array([0.1, 0.2, 0.6, 0.1]), np.array([0.5, 0.2, 0.2, 0.1])
    counts = np.zeros(4, dtype=int)
    for seed in range(2000):
        drawn = np.argsort(-(np.log(q) + np.random.default_rng(seed).gumbel(size=4)))[:3]
        kept = [token for token in drawn.tolist() if mask[token]]
        tree = sampled_tree([2, *kept], [-1, *[0] * len(kept)], [q], [0, *[-1] * len(kept)])
        first = walked(tree, np.log([p] * 4), seed=seed, allowed=lambda node: mask)[0]
        counts[first[1]] += 1
    assert counts[2] == 0
    assert stats.chisquare(counts[mask], 2000 * p[mask] / p[mask].sum()).pvalue > 1e-4


def test_greedy_and_match_check_trees_however_they_were_drawn():
    toy = Toy(target=SAMPLED, draft=SAMPLED, branching=(3, 2, 1), law="without_replacement")
    counts, _ = toy.counts(1000, 3, verify.MATCH)
    assert p_value(counts, toy.wanted()) > 1e-4
    tree = toy.tree((), np.random.default_rng(0))
    noise = Noise(seed=0, row=0, position=1)
    for node, token in verify.GREEDY.walk(
        tree, lambda node: toy.rows[toy.paths[node]], sampling=Sampling(), noise=noise
    ):
        assert token == int(np.argmax(toy.rows[toy.paths[node]]))


def test_the_exact_rule_depends_on_law_and_temperature():
    assert verify.exact_rule("iid", Sampling()) is verify.GREEDY
    assert verify.exact_rule("point", SAMPLED) is verify.MATCH
    assert verify.exact_rule("iid", SAMPLED) is verify.RECURSIVE_REJECTION
    assert all(isinstance(rule, Acceptance) for rule in (verify.GREEDY, verify.MATCH, verify.RECURSIVE_REJECTION))
