from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")
stats = pytest.importorskip("scipy.stats")

from loci.decoding import names, rapid  # noqa: E402
from loci.decoding.draft_model import DraftLM  # noqa: E402
from loci.decoding.rapid import ContextRetriever, RagDrafter, ShiftedTarget, prompt  # noqa: E402
from loci.decoding.rsd import RSD, RSDS  # noqa: E402
from loci.errors import BadInput, ContextTooLong, Unsupported  # noqa: E402
from loci.lm import Sampling, Stop, generate, verify  # noqa: E402
from loci.lm.draft import DraftState, PrefillResult, TokenTree  # noqa: E402
from loci.lm.sampling import Noise, warp  # noqa: E402

VOCABULARY, LENGTH, GAMMA = 5, 2, 1
SAMPLED = Sampling(temperature=1.0)
ETA = 10.0


def pair(seed: int, size: int = 8, scale: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.exp(scale * np.random.default_rng(seed).standard_normal((2, size)))
    return p / p.sum(), q / q.sum()


# The laws at one node.


@pytest.mark.parametrize("eta", [0.0, 1.0, 10.0, 50.0])
def test_the_shifted_law_gives_its_own_target_to_the_last_digit(eta):
    for seed in range(40):
        p, q = pair(seed)
        rule = ShiftedTarget(eta=eta)
        target = rule.moved(p, q)
        found, accepted = verify.exact_output(target, q, 1, "iid")
        np.testing.assert_allclose(found, target, rtol=0, atol=1e-12)
        wanted, share = rule.output(p, q)
        np.testing.assert_allclose(wanted, target, rtol=0, atol=1e-12)
        assert accepted == pytest.approx(share, abs=1e-12)
        assert target.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("siblings", "law"), [(2, "iid"), (3, "iid"), (2, "without_replacement")])
def test_siblings_give_the_shifted_target_too(siblings, law):
    for seed in range(10):
        p, q = pair(seed, size=5)
        target = ShiftedTarget(eta=ETA).moved(p, q)
        found, _ = verify.exact_output(target, q, siblings, law)
        np.testing.assert_allclose(found, target, rtol=0, atol=1e-12)


def enumerated(rule: ShiftedTarget, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What the paper's rule gives, summed over the drafted tokens, from its acceptance and its leftover."""
    target, out = rule.moved(p, q), np.zeros(len(p))
    for token, drawn in enumerate(q):
        taken = drawn * verify.chance(target, q, token)
        out[token] += taken
        out += (drawn - taken) * rapid.leftover(p, q, target)
    return out


def test_the_papers_law_is_its_closed_form_which_is_not_the_target():
    distances = []
    for seed in range(40):
        p, q = pair(seed, size=50, scale=1.0)
        rule = ShiftedTarget(eta=ETA, law="paper")
        found, _ = rule.output(p, q)
        np.testing.assert_allclose(enumerated(rule, p, q), found, rtol=0, atol=1e-12)
        assert found.sum() == pytest.approx(1.0, abs=1e-12)
        distances.append(0.5 * np.abs(found - p).sum())
        still, _ = ShiftedTarget(eta=0.0, law="paper").output(p, q)
        np.testing.assert_allclose(still, p, rtol=0, atol=1e-12)
    assert np.mean(distances) > 0.05


def test_the_lossless_law_is_the_target():
    p, q = pair(3)
    found, accepted = ShiftedTarget(eta=ETA, law="lossless").output(p, q)
    np.testing.assert_array_equal(found, p)
    assert accepted == pytest.approx(np.minimum(p, q).sum())


def test_the_step_is_one_down_the_gradient_of_distillation():
    for seed, temperature in itertools.product(range(5), (0.5, 1.0, 1.7)):
        generator = np.random.default_rng(seed)
        logits, (_, q) = 2 * generator.standard_normal(8), pair(seed)

        def divergence(z, q=q, temperature=temperature):
            scores = z / temperature - (z / temperature).max()
            logp = scores - np.log(np.exp(scores).sum())
            return temperature**2 * (q * (np.log(q) - logp)).sum()

        step = 1e-5
        slope = np.array(
            [(divergence(logits + step * one) - divergence(logits - step * one)) / (2 * step) for one in np.eye(8)]
        )
        np.testing.assert_allclose(
            rapid.distillation_gradient(logits, q, temperature=temperature), slope, rtol=0, atol=1e-6
        )
        moved = rapid.shifted_logits(logits, q, eta=ETA, temperature=temperature)
        np.testing.assert_allclose(moved, logits - ETA * slope, rtol=0, atol=1e-5)
        p, wanted = (np.exp((z - z.max()) / temperature) for z in (logits, moved))
        found = rapid.shifted(p / p.sum(), q, eta=ETA)
        np.testing.assert_allclose(found, wanted / wanted.sum(), rtol=0, atol=1e-12)


def test_a_step_moves_towards_the_drafter_and_never_to_what_the_target_excludes():
    p, q = pair(1)
    nearer = [float((q * np.log(q / rapid.shifted(p, q, eta=eta))).sum()) for eta in (0.0, 0.1, 0.5)]
    assert nearer[0] > nearer[1] > nearer[2]
    assert ShiftedTarget(eta=1.0).output(p, q)[1] > ShiftedTarget(eta=0.0).output(p, q)[1]
    p[2] = 0.0
    for eta in (1.0, 50.0, 1e6):
        moved = ShiftedTarget(eta=eta).moved(p / p.sum(), q)
        assert moved[2] == 0.0
        assert np.isfinite(moved).all()


def test_the_guard_gives_the_tail_back_its_own_probability():
    p, moved = np.array([0.6, 0.3, 0.1]), np.array([0.01, 0.9, 0.095])
    np.testing.assert_array_equal(rapid.guarded(moved, p, tail=0.1), [0.6, 0.9, 0.095])
    np.testing.assert_array_equal(rapid.guarded(moved, p, tail=0.2), [0.6, 0.9, 0.1])
    np.testing.assert_array_equal(rapid.guarded(moved, p, tail=0.0), moved)


# Whole texts through the walk.


def row(text: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *text]).standard_normal(VOCABULARY).astype(np.float32) * 1.5


def dense(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    kept = warp(logits, sampling)
    q = np.zeros(len(logits))
    q[kept.tokens] = kept.probabilities
    return q


class Toy:
    """Target and drafter over five tokens, each distribution a function of the text so far."""

    def __init__(self, sampling: Sampling = SAMPLED) -> None:
        self.sampling = sampling
        self.texts = [
            text for size in range(LENGTH + GAMMA) for text in itertools.product(range(VOCABULARY), repeat=size)
        ]
        self.rows = {text: row(text, 1) for text in self.texts}
        self.q = {text: dense(row(text, 2), sampling).astype(np.float32) for text in self.texts}

    def after(self, start: tuple[int, ...]):
        """The drafter's distribution after a node of a tree that stands behind `start`."""
        return lambda tree, node, sampling: self.q[(*start, *path(tree, node))]

    def tree(self, start: tuple[int, ...], generator: np.random.Generator) -> TokenTree:
        tokens, rows = [0], []
        for _ in range(GAMMA):
            q = self.q[(*start, *tokens[1:])]
            rows.append(q)
            tokens.append(rapid.drawn(q, generator.random()))
        q_row = np.array([*range(GAMMA), -1], dtype=np.int32)
        return dataclasses.replace(TokenTree.chain(tokens), law="iid", q=np.stack(rows), q_row=q_row)

    def counts(self, rule: ShiftedTarget, runs: int, *, bonus: bool = True, seed: int = 0) -> np.ndarray:
        counts, generator = np.zeros((VOCABULARY,) * LENGTH, dtype=int), np.random.default_rng(seed)
        for run in range(runs):
            text: tuple[int, ...] = ()
            while len(text) < LENGTH:
                start = text
                beyond = self.after(start) if bonus else lambda tree, node, sampling: None
                tree = self.tree(start, generator) if len(start) % 2 == 0 else TokenTree.root(0)
                walked = dataclasses.replace(rule, beyond=beyond).walk(
                    tree,
                    lambda node, tree=tree, start=start: self.rows[(*start, *path(tree, node))],
                    sampling=self.sampling,
                    noise=Noise(seed=seed, row=run, position=len(start)),
                )
                for _, token in itertools.islice(walked, LENGTH - len(start)):
                    text = (*text, token)
            counts[text] += 1
        return counts

    def wanted(self, rule: ShiftedTarget, *, drafted: Sequence[bool] = (True, True)) -> np.ndarray:
        """The law of two tokens; places that no drafter speaks for are the target's own."""
        mass = np.ones((VOCABULARY,) * LENGTH)
        for text in itertools.product(range(VOCABULARY), repeat=LENGTH):
            for place, moved in enumerate(drafted):
                p, q = dense(self.rows[text[:place]], self.sampling), self.q[text[:place]].astype(np.float64)
                mass[text] *= (rule.output(p, q / q.sum())[0] if moved else p)[text[place]]
        return mass


def path(tree: TokenTree, node: int) -> tuple[int, ...]:
    return tuple(tree.tokens[tree.ancestors[node]].tolist()[1:])


def p_value(counts: np.ndarray, wanted: np.ndarray) -> float:
    expected, found = wanted.ravel() * counts.sum(), counts.ravel()
    assert not found[expected == 0].any()
    rare = expected < 5
    expected, found = (np.append(cells[~rare], cells[rare].sum()) for cells in (expected, found))
    return float(stats.chisquare(found[expected > 0], expected[expected > 0] * found.sum() / expected.sum()).pvalue)


OPTIONS = [SAMPLED, Sampling(temperature=0.8, top_p=0.9)]
RUNS = 400


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_whole_texts_follow_the_shifted_target_and_not_the_plain_one(sampling):
    toy, rule = Toy(sampling), ShiftedTarget(eta=ETA)
    counts = toy.counts(rule, RUNS)
    assert p_value(counts, toy.wanted(rule)) > 1e-4
    plain = toy.wanted(ShiftedTarget(law="lossless"))
    assert p_value(counts[plain > 0], plain[plain > 0]) < 1e-9


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_whole_texts_follow_the_plain_target_without_the_shift(sampling):
    toy, rule = Toy(sampling), ShiftedTarget(eta=ETA, law="lossless")
    assert p_value(toy.counts(rule, RUNS), toy.wanted(rule)) > 1e-4


def test_the_papers_rule_follows_its_closed_form_and_not_the_target_at_eta_10():
    toy, rule = Toy(), ShiftedTarget(eta=ETA, law="paper")
    counts = first_tokens(toy, rule, 3 * RUNS)
    (found, plain) = (np.asarray(one).ravel() for one in (rule.output(*first(toy))[0], first(toy)[0]))
    assert p_value(counts, found) > 1e-4
    assert p_value(counts, plain) < 1e-9


def first(toy: Toy) -> tuple[np.ndarray, np.ndarray]:
    q = toy.q[()].astype(np.float64)
    return dense(toy.rows[()], toy.sampling), q / q.sum()


def first_tokens(toy: Toy, rule: ShiftedTarget, runs: int) -> np.ndarray:
    counts, generator = np.zeros(VOCABULARY, dtype=int), np.random.default_rng(0)
    for run in range(runs):
        tree = toy.tree((), generator)
        noise = Noise(seed=3, row=run, position=0)
        walked = rule.walk(tree, lambda node, tree=tree: toy.rows[path(tree, node)], sampling=SAMPLED, noise=noise)
        counts[next(iter(walked))[1]] += 1
    return counts


def test_without_the_drafter_after_a_chain_the_law_would_be_another():
    toy, rule = Toy(), ShiftedTarget(eta=ETA)
    assert p_value(toy.counts(rule, RUNS, bonus=False), toy.wanted(rule)) < 1e-9


def test_the_greedy_form_takes_the_best_token_of_the_shifted_target():
    toy, rule, generator = Toy(), ShiftedTarget(eta=ETA), np.random.default_rng(0)
    for _ in range(20):
        tree = toy.tree((), generator)
        for law in ("shifted", "paper"):
            chosen = list(
                dataclasses.replace(rule, law=law, beyond=toy.after(())).walk(
                    tree,
                    lambda node, tree=tree: toy.rows[path(tree, node)],
                    sampling=Sampling(),
                    noise=Noise(seed=0, row=0, position=0),
                )
            )
            for node, token in chosen:
                text = path(tree, node)
                p, q = dense(toy.rows[text], SAMPLED), toy.q[text].astype(np.float64)
                alone = law == "paper" and node == GAMMA
                assert token == (p if alone else rule.moved(p, q / q.sum())).argmax()


def test_what_a_constraint_forbids_is_never_drawn():
    toy, rule = Toy(), ShiftedTarget(eta=ETA, beyond=Toy().after(()))
    mask = np.array([True, False, True, False, True])
    generator = np.random.default_rng(0)
    for run in range(60):
        tree = toy.tree((), generator)
        tree = tree.pruned(np.array([True, *mask[tree.tokens[1:]]]))
        for sampling in (SAMPLED, Sampling()):
            walked = rule.walk(
                tree,
                lambda node, tree=tree: toy.rows[path(tree, node)],
                sampling=sampling,
                noise=Noise(seed=0, row=run, position=0),
                allowed=lambda node: mask,
            )
            assert all(mask[token] for _, token in walked)


def test_rules_say_what_they_are_and_refuse_nonsense():
    assert ShiftedTarget().name == "shifted, eta 10"
    assert not ShiftedTarget().exact
    assert not ShiftedTarget(law="paper").exact
    assert ShiftedTarget(law="lossless").exact
    assert ShiftedTarget(eta=0.0).exact
    assert isinstance(ShiftedTarget(), verify.Acceptance)
    for wrong, says in (
        ({"eta": -1.0}, "eta is -1"),
        ({"tail": 2.0}, "tail is 2"),
        ({"eta": float("inf")}, "eta is inf"),
    ):
        with pytest.raises(BadInput, match=says):
            ShiftedTarget(**wrong)
    toy = Toy()
    tree = toy.tree((), np.random.default_rng(0))
    with pytest.raises(BadInput, match=r"beyond=drafter\.after"):
        list(ShiftedTarget().walk(
            TokenTree.root(0), lambda node: toy.rows[()], sampling=SAMPLED, noise=Noise(seed=0, row=0, position=0)
        ))  # fmt: skip
    twins = TokenTree(
        tokens=np.array([0, 1, 2], dtype=np.int32),
        parents=np.array([-1, 0, 0], dtype=np.int32),
        law="iid",
        q=tree.q,
        q_row=np.array([0, -1, -1], dtype=np.int32),
    )
    with pytest.raises(Unsupported, match="checks chains"):
        list(ShiftedTarget(law="paper").walk(
            twins, lambda node: toy.rows[()], sampling=SAMPLED, noise=Noise(seed=0, row=0, position=0)
        ))  # fmt: skip


# Retrieval.


class Letters:
    """Embeds a text as how often each letter stands in it."""

    name, dimension = "letters", 26

    def __init__(self) -> None:
        self.texts = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += len(texts)
        rows = np.array([[text.count(chr(97 + place)) for place in range(26)] for text in texts], dtype=np.float32)
        return (rows + 1e-6) / np.linalg.norm(rows + 1e-6, axis=1, keepdims=True)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(97 + token) for token in tokens)


def retriever(**options) -> ContextRetriever:
    settings = {"chunk_tokens": 4, "budget": (8, 0.0), "threshold": 0.3, **options}
    return ContextRetriever(Letters(), text_of, **settings)


CONTEXT = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 4, 4, 5, 5, 5, 5, 1, 2]


def test_passages_come_in_the_order_of_the_context_within_the_budget():
    chosen = retriever()
    chosen.build(CONTEXT)
    found = chosen.select("c")
    assert found.spans == ((4, 8), (12, 16))  # the last chunk has the same score and stands later
    assert found.ids == (1, 1, 2, 2, 2, 2, 4, 4)
    assert found.above
    assert chosen.select("c", most=4).spans == ((4, 8),)
    assert chosen.select("ad").spans == ((0, 4), (8, 12))
    joined = retriever(gap=(25,), budget=(10, 0.0))
    joined.build(CONTEXT)
    assert joined.select("ad").ids == (0, 0, 0, 0, 25, 3, 3, 3, 3)
    assert joined.select("ab").spans == ((0, 8),)  # neighbours are one span


def test_a_chunk_scores_by_its_better_part():
    halves, whole = retriever(), retriever(parts=1)
    for one in (halves, whole):
        one.build(CONTEXT)
    assert halves.scores("c")[1] == pytest.approx(1.0, abs=1e-5)
    assert whole.scores("c")[1] == pytest.approx(np.sqrt(0.5), abs=1e-5)


def test_where_nothing_is_similar_the_best_chunk_comes_alone():
    chosen = retriever()
    chosen.build(CONTEXT)
    found = chosen.select("z")
    assert not found.above
    assert found.spans == ((20, 22),)


def test_a_context_that_goes_on_is_read_from_its_last_whole_chunk():
    grown, fresh = retriever(), retriever()
    grown.build(CONTEXT[:14])
    before = grown.embedder.texts
    grown.append(CONTEXT[14:])
    assert grown.embedder.texts - before == 5  # 3 chunks, the last one half
    fresh.build(CONTEXT)
    np.testing.assert_array_equal(grown.scores("c"), fresh.scores("c"))
    assert grown.select("c").spans == fresh.select("c").spans
    grown.build(CONTEXT)
    assert grown.embedded_tokens == 14 + len(CONTEXT) - 12
    grown.build(CONTEXT[8:])  # another context
    assert grown.select("f").spans == ((8, 12),)
    assert list(grown.tokens) == CONTEXT[8:]


def test_the_budget_is_the_larger_of_a_number_and_a_share():
    chosen = retriever(budget=(8, 0.5))
    chosen.build(CONTEXT)
    assert chosen.budget_tokens == 11
    assert chosen.budget_for(10) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_tokens": 0}, "at least 1"),
        ({"parts": 5}, "at least 1"),
        ({"budget": (2, 0.1)}, "must hold a chunk"),
        ({"budget": (8, 1.5)}, "a share lies between"),
        ({"threshold": 2.0}, "a cosine lies between"),
    ],
)
def test_impossible_retrieval_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        retriever(**options)


def test_a_retriever_needs_a_context():
    with pytest.raises(BadInput, match="empty"):
        retriever().build([])
    with pytest.raises(BadInput, match="call build first"):
        retriever().select("a")


def test_sizes_follow_the_window(tiny_model):
    small = ContextRetriever.fitting(tiny_model, Letters())
    assert (small.chunk_tokens, small.budget) == (16, (64, 1 / 8))
    assert ContextRetriever.fitting(windowed(tiny_model, 8192), Letters()).chunk_tokens == 128
    large = ContextRetriever.fitting(windowed(tiny_model, 65_536), Letters())
    assert (large.chunk_tokens, large.budget, large.threshold) == (512, (4096, 1 / 24), 0.3)


def windowed(model, window: int):
    other = dataclasses.replace(model, model=copy.copy(model.model))
    other.model.config = copy.deepcopy(model.model.config)
    other.model.config.max_position_embeddings = window
    return other


# Drafting on a model.

WORDS = "the cat sat on a mat and the dog ran to a hill where it saw the sea and a ship with red sails going by "
OPTIONS_HF = {
    "engine": "hf",
    "draft_engine": "hf",
    "max_new_tokens": 20,
    "stop": Stop(eos=False),
    "embedder": Letters(),
}


def test_generation_tells_what_was_read_and_what_it_took(tiny_model):
    found = rapid.rapid(tiny_model, WORDS, "ships and sails?", eta=ETA, gamma=4, **OPTIONS_HF)
    assert len(found.tokens) == 20
    assert not found.stats.exact
    assert found.stats.rule == "shifted, eta 10"
    assert found.stats.drafter == "rapid"
    assert 0 < found.rag_tokens <= 64
    assert 0 < found.retrieval_seconds < found.stats.draft_seconds < found.stats.seconds
    assert any(f"reads {found.rag_tokens} of {len(WORDS)} tokens" in note for note in found.stats.notes)
    weights = sum(weight.nbytes for weight in tiny_model.model.parameters())
    assert 0 < found.stats.drafter_bytes < weights  # shared, so not counted again
    assert found.stats.model_bytes == weights


def test_greedy_text_is_the_best_of_the_shifted_target_token_by_token(tiny_model):
    """Against a plain loop over two full forward passes."""
    import torch

    ready = rapid.prepare(tiny_model, WORDS, "ships?", gamma=3, embedder=Letters(), draft_engine="hf")
    found = generate(
        tiny_model, ready.prompt, max_new_tokens=16, drafter=ready.drafter, acceptance=ready.acceptance,
        engine="hf", max_nodes=4, stop=Stop(eos=False),
    )  # fmt: skip
    context = tiny_model.tokenizer.encode(WORDS, add_special_tokens=False)
    long = list(ready.prompt)
    short = prompt(tiny_model, ready.drafter.selection.ids, "ships?")
    for token in found.tokens:
        with torch.inference_mode():
            z, other = (tiny_model.model(torch.tensor([ids])).logits[0, -1].numpy() for ids in (long, short))
        target = ShiftedTarget().moved(dense(z, SAMPLED), dense(other, SAMPLED))
        assert target[token] > target.max() - 1e-5
        long.append(token)
        short.append(token)
    assert long[: len(ready.prompt)] == prompt(tiny_model, context, "ships?")
    assert found.stats.tokens_per_step > 1.0


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_without_the_shift_greedy_text_is_the_models(tiny_model, gamma):
    drafted = rapid.rapid(tiny_model, WORDS, "dogs?", law="lossless", gamma=gamma, **OPTIONS_HF)
    whole = prompt(tiny_model, tiny_model.tokenizer.encode(WORDS, add_special_tokens=False), "dogs?")
    plain = generate(tiny_model, whole, max_new_tokens=20, stop=Stop(eos=False), engine="hf")
    assert drafted.tokens == plain.tokens
    assert drafted.stats.exact
    assert drafted.stats.proposed_nodes > 0


def test_sampled_text_repeats_with_its_seed(
    tiny_model,
):
    first, again = (rapid.rapid(tiny_model, WORDS, "dogs?", sampling=SAMPLED, seed=5, **OPTIONS_HF) for _ in range(2))
    assert first.tokens == again.tokens
    assert first.stats.rule == "shifted, eta 10"


def test_a_drafter_that_reads_all_is_always_accepted_and_passes_once_more_each_time(tiny_model):
    """Where q is p the shift moves nothing: every chain is accepted whole, and both caches stay in step."""
    everything = ContextRetriever(
        Letters(), tiny_model.decode, chunk_tokens=32, budget=(len(WORDS) - 1, 0.0), threshold=-1.0
    )
    context = tiny_model.tokenizer.encode(WORDS, add_special_tokens=False)
    everything.build(context)
    everything.budget = (len(WORDS), 0.0)  # now it would be off, so the drafter is told otherwise

    class All:
        tokens, budget_tokens, nbytes = context, 1, 0

        def select(self, query, *, most=None):
            return everything.select(query)

    drafter = RagDrafter(DraftLM(tiny_model, engine="hf", shared=tiny_model), All(), 4)
    for sampling in (Sampling(), SAMPLED):
        drafter.extra_passes = 0
        found = generate(
            tiny_model, prompt(tiny_model, context, "dogs?"), max_new_tokens=20, sampling=sampling, seed=1,
            drafter=drafter, acceptance=ShiftedTarget(beyond=drafter.after), engine="hf", max_nodes=5,
            stop=Stop(eos=False),
        )  # fmt: skip
        assert found.stats.tokens_per_step == 5.0
        assert drafter.extra_passes == found.stats.steps
        assert drafter.draft.text[-20:] == list(found.tokens)


def test_a_short_context_is_decoded_plainly_and_that_is_said(tiny_model):
    found = rapid.rapid(tiny_model, WORDS[:40], "dogs?", **OPTIONS_HF)
    assert found.stats.exact
    assert found.stats.drafter is None
    assert found.selection is None
    assert found.rag_tokens == 0
    assert any(note.startswith("RAPID is off") for note in found.stats.notes)
    drafter = RagDrafter(DraftLM(tiny_model, engine="hf"), retriever(), 3)
    drafter.retriever.build([1, 2, 3])
    notes: list[str] = []
    state = DraftState(tokens=[1, 2, 3, 4], sampling=SAMPLED, rng=np.random.default_rng(0), budget=8, note=notes.append)
    drafter.start(state, PrefillResult(tokens=(1, 2, 3, 4)))
    assert drafter.propose(state).size == 1
    assert drafter.after(TokenTree.root(4), 0, SAMPLED) is None
    assert notes[0].startswith("RAPID is off")


def test_nothing_similar_is_said_in_the_notes(tiny_model):
    found = rapid.rapid(tiny_model, WORDS, "zzz", **OPTIONS_HF)
    assert any("no chunk is similar" in note for note in found.stats.notes)
    assert found.rag_tokens == 16


def test_one_retriever_and_one_engine_serve_several_questions_about_a_growing_context(tiny_model):
    from loci.lm.engine.choose import choose

    embedder = Letters()
    kept, engine = ContextRetriever.fitting(tiny_model, embedder), choose(tiny_model, name="hf")
    options = {**OPTIONS_HF, "engine": engine, "retriever": kept}
    first = rapid.rapid(tiny_model, WORDS, "dogs?", **options)
    counted = embedder.texts
    second = rapid.rapid(tiny_model, WORDS, "ships?", **options)
    assert embedder.texts == counted + 1  # the query
    assert first.stats.reused_tokens == 0
    assert second.stats.reused_tokens > len(WORDS)
    longer = rapid.rapid(tiny_model, WORDS + "then came the night", "ships?", **options)
    assert embedder.texts <= counted + 7
    assert longer.stats.reused_tokens > len(WORDS)


def test_trees_of_other_shapes_are_drawn_from_it_and_checked_against_the_shifted_target(tiny_model):
    ready = rapid.prepare(tiny_model, WORDS, "ships?", embedder=Letters(), draft_engine="hf")
    found = generate(
        tiny_model, ready.prompt, max_new_tokens=16, drafter=RSD(ready.drafter, RSDS(width=2, length=3)),
        acceptance=ready.acceptance, sampling=SAMPLED, seed=2, engine="hf", max_nodes=8, stop=Stop(eos=False),
    )  # fmt: skip
    assert found.stats.rule == "shifted, eta 10"
    assert found.stats.accepted_nodes > 0


def test_a_drafter_whose_window_ends_leaves_the_target_alone(tiny_model):
    short = windowed(tiny_model, 100)
    found = rapid.rapid(tiny_model, WORDS, "a?", draft_model=short, **{**OPTIONS_HF, "max_new_tokens": 80})
    assert len(found.tokens) == 80
    assert any("window is full" in note for note in found.stats.notes)


def test_what_does_not_fit_together_is_refused(tiny_model):
    from loci.lm.engine.choose import choose

    with pytest.raises(BadInput, match="eta is -1"):
        rapid.rapid(tiny_model, WORDS, "a?", eta=-1.0, **OPTIONS_HF)
    with pytest.raises(BadInput, match="context is empty"):
        rapid.rapid(tiny_model, "", "a?", **OPTIONS_HF)
    with pytest.raises(BadInput, match="query is empty"):
        rapid.rapid(tiny_model, WORDS, " ", **OPTIONS_HF)
    with pytest.raises(ContextTooLong, match=r"rope_scaling.*loci systems --room context"):
        rapid.rapid(tiny_model, WORDS * 3, "a?", **OPTIONS_HF)
    with pytest.raises(BadInput, match="gamma is 0"):
        rapid.rapid(tiny_model, WORDS, "a?", gamma=0, **OPTIONS_HF)
    with pytest.raises(ValueError, match="tokens"):
        rapid.rapid(tiny_model, WORDS, "a?", draft_model=other_tokens(tiny_model), **OPTIONS_HF)
    engine = choose(tiny_model, name="hf")
    with pytest.raises(BadInput, match="one engine"):
        rapid.rapid(tiny_model, WORDS, "a?", **{**OPTIONS_HF, "engine": engine, "draft_engine": engine})
    drafter = RagDrafter(DraftLM(tiny_model, engine="hf"), retriever(), 3)
    drafter.retriever.build(CONTEXT)
    with pytest.raises(BadInput, match="does not hold the 22 tokens"):
        generate(tiny_model, "abc", drafter=drafter, acceptance=ShiftedTarget(beyond=drafter.after), engine="hf")


def other_tokens(model):
    other = windowed(model, 256)
    other.model.config.vocab_size = 300
    return other


def test_its_name_alone_says_what_is_missing(tiny_model):
    with pytest.raises(BadInput, match="--context FILE --drafter rapid"):
        names.drafter("rapid", tiny_model)


@pytest.mark.slow
def test_smollm2_follows_its_shifted_target(default_model, data):
    """Two tokens after a page of a book, 20,000 walks over cached logits, against the law of p'."""
    import torch

    from loci.bench.rapid_recipe import needles
    from loci.lm.embed import load_embedder

    (needle,) = needles(default_model, tokens=900, count=1, books=data / "books")
    sampling = Sampling(temperature=1.0, top_k=6)
    kept = ContextRetriever.fitting(default_model, load_embedder())
    kept.build(needle.context)
    passages = kept.select(needle.question).ids
    long, short = (prompt(default_model, ids, needle.question) for ids in (needle.context, passages))

    @torch.inference_mode()
    def last(ids):
        return default_model.model(torch.tensor([ids])).logits[0, -1].float().numpy()

    firsts = last(long), last(short)
    tokens = sorted({int(token) for one in firsts for token in warp(one, sampling).tokens})
    after = {token: (last([*long, token]), last([*short, token])) for token in tokens}
    seen = sorted({*tokens, *(int(t) for pair in after.values() for one in pair for t in warp(one, sampling).tokens)})
    place = {token: index for index, token in enumerate(seen)}
    rows = {(): firsts[0][seen], **{(place[token],): pair[0][seen] for token, pair in after.items()}}
    qs = {(): firsts[1][seen], **{(place[token],): pair[1][seen] for token, pair in after.items()}}
    p = {text: dense(one, sampling) for text, one in rows.items()}
    q = {text: dense(one, sampling).astype(np.float32) for text, one in qs.items()}
    rule = ShiftedTarget(eta=ETA, beyond=lambda tree, node, sampling: q[path(tree, node)])
    target = {text: rule.moved(p[text], q[text].astype(np.float64) / q[text].astype(np.float64).sum()) for text in p}
    wanted = np.zeros((len(seen), len(seen)))
    for token, mass in enumerate(target[()]):
        if mass > 0:
            wanted[token] = mass * target[(token,)]
    counts, generator = np.zeros_like(wanted, dtype=int), np.random.default_rng(0)
    for run in range(20_000):
        token = rapid.drawn(q[()], generator.random())
        tree = dataclasses.replace(
            TokenTree.chain([0, token]), law="iid", q=q[()][None], q_row=np.array([0, -1], dtype=np.int32)
        )
        noise = Noise(seed=1, row=run, position=0)
        logits = lambda node, token=token: rows[(token,)] if node else rows[()]  # noqa: E731
        text = [one for _, one in rule.walk(tree, logits, sampling=sampling, noise=noise)]
        if len(text) == 1:
            end = text[0]
            tree = TokenTree.root(0)
            alone = dataclasses.replace(rule, beyond=lambda tree, node, sampling, end=end: q[(end,)])
            noise = Noise(seed=1, row=run, position=1)
            text += [
                one for _, one in alone.walk(tree, lambda node, end=end: rows[(end,)], sampling=sampling, noise=noise)
            ]
        counts[tuple(text)] += 1
    assert p_value(counts, wanted) > 1e-4
