from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding import rsd  # noqa: E402
from loci.decoding.draft_model import Draft, DraftLM  # noqa: E402
from loci.decoding.rsd import IID, RSD, RSDC, RSDS, Chain, drawn_tree, gumbel_top_k, truncated  # noqa: E402
from loci.errors import BadInput, BadModel  # noqa: E402
from loci.lm import Sampling, Stop, generate, verify  # noqa: E402
from loci.lm.draft import DraftState, Needs  # noqa: E402
from loci.lm.sampling import Noise, warp  # noqa: E402

stats = pytest.importorskip("scipy.stats")

VOCABULARY, LENGTH = 6, 3
SAMPLED = Sampling(temperature=1.0)
RUNS = 600
SHAPES = [RSDC(branching=(3, 2, 1)), RSDS(width=4, length=3), Chain(length=3), IID(count=3, length=3)]


def logits(text: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *text]).standard_normal(VOCABULARY).astype(np.float32) * 2


def dense(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    support = warp(row, sampling)
    q = np.zeros(len(row))
    q[support.tokens] = support.probabilities
    return q


def path(draft: Draft, node: int) -> tuple[int, ...]:
    tokens = []
    while node > 0:
        tokens.append(draft.tokens[node])
        node = draft.parents[node]
    return tuple(tokens[::-1])


class Toy:
    """A target and a drafter over 6 tokens whose next token depends on the text so far."""

    def __init__(self, *, target: Sampling = SAMPLED, draft: Sampling = SAMPLED) -> None:
        self.target = target
        self.rows, self.q = {}, {}
        for length in range(LENGTH + 1):
            for text in itertools.product(range(VOCABULARY), repeat=length):
                self.rows[text] = logits(text, 1)
                self.q[text] = dense(0.7 * self.rows[text] + 0.8 * logits(text, 2), draft).astype(np.float32)

    def law(self, rows: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
        """The probability of every text of three tokens, given distributions."""
        mass = np.ones((VOCABULARY,) * LENGTH)
        for text in itertools.product(range(VOCABULARY), repeat=LENGTH):
            for place in range(LENGTH):
                mass[text] *= rows[text[:place]][text[place]]
        return mass / mass.sum()

    def wanted(self) -> np.ndarray:
        return self.law({text: dense(row, self.target) for text, row in self.rows.items()})

    def below(self, text: tuple[int, ...]) -> rsd.Rows:
        return lambda draft, nodes: np.stack([self.q[(*text, *path(draft, node))] for node in nodes])

    def counts(self, shape: rsd.Shape, runs: int, seed: int) -> tuple[np.ndarray, int]:
        """Texts of three tokens that so many runs of drafting and checking give, and their steps."""
        generator = np.random.default_rng(seed)
        counts, steps = np.zeros((VOCABULARY,) * LENGTH, dtype=int), 0
        for run in range(runs):
            text: tuple[int, ...] = ()
            while len(text) < LENGTH:
                draft, base, steps = Draft([0]), len(text), steps + 1
                cut = shape.cut(size=shape.size, length=LENGTH - base)
                tree, _ = drawn_tree(draft, self.below(text), cut, generator)
                walked = verify.RECURSIVE_REJECTION.walk(
                    tree,
                    lambda node, draft=draft, before=text: self.rows[(*before, *path(draft, node))],
                    sampling=self.target,
                    noise=Noise(seed=seed, row=run, position=base),
                )
                for _, token in walked:
                    text = (*text, token)
                    if len(text) == LENGTH:
                        break
            counts[text] += 1
        return counts, steps


def p_value(counts: np.ndarray, wanted: np.ndarray) -> float:
    expected, found = wanted.ravel() * counts.sum(), counts.ravel()
    assert not found[expected == 0].any()
    rare = expected < 5
    expected, found = (np.append(cells[~rare], cells[rare].sum()) for cells in (expected, found))
    return float(stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue)


OPTIONS = [(SAMPLED, SAMPLED), (Sampling(temperature=0.8, top_p=0.9), Sampling(temperature=1.3, top_p=0.8))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_trees_give_the_targets_texts(shape):
    for seed, (target, draft) in enumerate(OPTIONS):
        toy = Toy(target=target, draft=draft)
        counts, steps = toy.counts(shape, RUNS // 2, seed)
        assert p_value(counts, toy.wanted()) > 1e-4
        assert steps < 2.4 * RUNS // 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("target", "draft"), OPTIONS, ids=str)
def test_whole_trees_give_the_targets_texts_in_200_000_runs(shape, target, draft):
    toy = Toy(target=target, draft=draft)
    assert p_value(toy.counts(shape, 200_000, 0)[0], toy.wanted()) > 1e-4


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_wrong_rule_is_caught_on_drawn_trees(monkeypatch, shape):
    monkeypatch.setattr(verify, "residual", lambda p, q: p)
    toy = Toy()
    assert p_value(toy.counts(shape, 800, 0)[0], toy.wanted()) < 1e-9


def test_without_replacement_accepts_more_than_independent_draws_and_than_a_chain():
    toy = Toy(draft=Sampling(temperature=0.6))
    steps = [
        toy.counts(shape, 250, 3)[1] for shape in (RSDS(width=3, length=3), IID(count=3, length=3), Chain(length=3))
    ]
    assert steps[0] < 0.97 * steps[1]
    assert steps[1] < 0.97 * steps[2]


def test_gumbel_top_k_draws_in_order_without_replacement():
    generator = np.random.default_rng(0)
    q = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    with np.errstate(divide="ignore"):
        logq = np.log(q)
    counts, firsts = np.zeros((4, 4)), []
    for _ in range(4000):
        ids, keys = gumbel_top_k(logq, 3, generator)
        assert keys[0] > keys[1] > keys[2]
        assert len(set(ids.tolist())) == 3
        counts[ids[0], ids[1]] += 1
        firsts.append(keys[0])
    wanted = np.array([[q[i] * q[j] / (1 - q[i]) if i != j else 0.0 for j in range(4)] for i in range(4)])
    cells = wanted > 0
    assert not counts[~cells].any()
    assert stats.chisquare(counts[cells], wanted[cells] * 4000).pvalue > 1e-4
    assert stats.kstest(firsts, stats.gumbel_r.cdf).pvalue > 1e-4  # the largest key is a standard Gumbel


@pytest.mark.parametrize("k", [4, 9, 40])
def test_a_small_support_gives_a_short_list(k):
    logq = np.full(30, -np.inf)
    logq[[3, 7, 9]] = np.log([0.5, 0.3, 0.2])
    ids, keys = gumbel_top_k(logq, k, np.random.default_rng(0))
    assert sorted(ids.tolist()) == [3, 7, 9]
    assert np.all(np.isfinite(keys))


def test_truncated_keys_are_what_the_formula_gives_and_the_largest_is_the_parents():
    generator = np.random.default_rng(0)
    for _ in range(200):
        raw = np.sort(generator.gumbel(size=6) * 2)[::-1]
        key = float(generator.normal() * 3)
        found = truncated(raw, largest=float(raw[0]), key=key)
        with np.errstate(divide="ignore"):
            plain = -np.log(np.exp(-key) - np.exp(-raw[0]) + np.exp(-raw))
        np.testing.assert_allclose(found, plain, atol=1e-6)
        assert found[0] == pytest.approx(key, abs=1e-6)
        assert np.all(np.diff(found) < 0)
    assert truncated(np.array([800.0, -800.0]), largest=800.0, key=-700.0)[0] == pytest.approx(-700.0, abs=1e-6)


def test_in_a_beam_the_best_child_has_its_parents_key():
    toy = Toy()
    for seed in range(50):
        draft = Draft([0])
        tree, keys = rsd._beam(draft, toy.below(()), 4, 3, np.random.default_rng(seed))
        assert tree.size == 13
        for node, children in enumerate(tree.children):
            if children:
                assert keys[children[0]] == pytest.approx(keys[node], abs=1e-6)
                assert [keys[child] for child in children] == sorted((keys[child] for child in children), reverse=True)


def inclusion(mass: np.ndarray) -> np.ndarray:
    """The probability that each item is among 3 that are drawn without replacement."""
    p = mass.ravel()
    first = p
    rest = p / (1 - p)  # of drawing j first, times what others then gain
    second = p * (rest.sum() - rest)
    pair = p[:, None] * p[None] / (1 - p[:, None])  # j first, k second
    np.fill_diagonal(pair, 0.0)
    gain = pair / (1 - p[:, None] - p[None])
    third = p * (gain.sum() - gain.sum(axis=1) - gain.sum(axis=0))
    return first + second + third


def beams(toy: Toy, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each text came as the best of three, and at all."""
    best, among = np.zeros((VOCABULARY,) * LENGTH, dtype=int), np.zeros((VOCABULARY,) * LENGTH, dtype=int)
    generator = np.random.default_rng(0)
    for _ in range(runs):
        draft = Draft([0])
        tree, keys = rsd._beam(draft, toy.below(()), 3, LENGTH, generator)
        leaves = sorted(np.flatnonzero(tree.depth == LENGTH).tolist(), key=lambda node, keys=keys: -keys[node])
        assert len(leaves) == 3
        best[path(draft, leaves[0])] += 1
        for leaf in leaves:
            among[path(draft, leaf)] += 1
    return best, among


def inclusion_p_value(among: np.ndarray, mass: np.ndarray, runs: int) -> float:
    """Drawing without replacement makes counts vary less than those of a multinomial, so this errs on the safe side."""
    expected, found = inclusion(mass) * runs, among.ravel()
    rare = expected < 5
    expected, found = (np.append(cells[~rare], cells[rare].sum()) for cells in (expected, found))
    return float(stats.chi2.sf(((found - expected) ** 2 / expected).sum(), len(found) - 1))


def test_beams_are_samples_without_replacement_of_whole_texts():
    toy, runs = Toy(), 1500
    mass = toy.law(toy.q)
    assert inclusion(mass).sum() == pytest.approx(3.0)
    best, among = beams(toy, runs)
    assert p_value(best, mass) > 1e-4
    assert inclusion_p_value(among, mass, runs) > 1e-4


def test_beams_with_fresh_keys_at_every_level_are_no_such_samples(monkeypatch):
    monkeypatch.setattr(rsd, "truncated", lambda raw, *, largest, key: raw)
    toy, runs = Toy(), 800
    _, among = beams(toy, runs)
    assert inclusion_p_value(among, toy.law(toy.q), runs) < 1e-9


@pytest.mark.parametrize(
    ("shape", "size", "length"),
    [
        (RSDC(branching=(4, 2, 1)), 20, 3),
        (RSDC(branching=(2, 2, 2, 2)), 30, 4),
        (RSDS(width=3, length=7), 21, 7),
        (Chain(length=5), 5, 5),
        (IID(count=2, length=3), 6, 3),
    ],
)
def test_shapes_count_their_nodes_and_shrink_to_what_fits(shape, size, length):
    assert (shape.size, shape.length) == (size, length)
    assert shape.cut(size=size, length=length) == shape
    for fits in range(1, size):
        assert shape.cut(size=fits, length=length).size <= fits
    assert shape.cut(size=size, length=1).length == 1
    assert shape.cut(size=0, length=3) is None
    assert shape.cut(size=9, length=0) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RSDC(branching=(2, 0)), r"branching is \(2, 0\)"),
        (lambda: RSDC(branching=()), "at least 1 child"),
        (lambda: RSDS(width=0), "no nodes"),
        (lambda: Chain(length=0), "no nodes"),
        (lambda: IID(count=0), "no nodes"),
        (lambda: RSD(Rows(), draft_temperature=0.0), "positive"),
    ],
)
def test_shapes_without_nodes_are_refused(make, says):
    with pytest.raises(BadInput, match=says):
        make()


def state(tokens: Sequence[int], sampling: Sampling, budget: int, notes: list[str]) -> DraftState:
    return DraftState(tokens=tokens, sampling=sampling, rng=np.random.default_rng(0), budget=budget, note=notes.append)


class Rows:
    """A source whose next token prefers the token after the last one."""

    name, needs, vocabulary, horizon, nbytes = "rows", Needs(), 8, None, 0

    def start(self, state, prefill) -> None: ...

    def observe(self, result) -> None: ...

    def distribution(self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling) -> np.ndarray:
        rows = np.stack([-np.abs((draft.tokens[node] + 1 - np.arange(8)) % 8).astype(np.float32) for node in nodes])
        return np.stack([dense(row, sampling) for row in rows]).astype(np.float32)


def test_at_temperature_0_the_best_guesses_are_proposed_under_the_law_point():
    notes: list[str] = []
    tree = RSD(Rows(), RSDC(branching=(2, 1))).propose(state([1, 2], Sampling(), 16, notes))
    assert tree.law == "point"
    assert tree.tokens.tolist() == [2, 3, 2, 4, 3]  # 3 is the most probable, 2 and 4 stand at a distance of 7 and 1
    assert notes == ["temperature 0: the drafter's best guesses are checked, none are drawn"]
    beam = RSD(Rows(), RSDS(width=2, length=2)).propose(state([1, 2], Sampling(), 16, []))
    assert beam.size == 5
    assert beam.tokens[1:3].tolist() == [3, 2]
    assert sorted(beam.tokens[3:].tolist()) == [3, 4]  # after 3 the best is 4, after 2 it is 3
    chains = RSD(Rows(), IID(count=2, length=3)).propose(state([1, 2], Sampling(), 16, []))
    assert chains.law == "point"
    assert [len(path) for path in chains.paths] == [4, 4]


def test_what_does_not_fit_is_said_in_the_notes():
    notes: list[str] = []
    tree = RSD(Rows(), RSDS(width=4, length=4)).propose(state([0], SAMPLED, 10, notes))
    assert tree.size == 9
    assert notes == ["the tree of 17 nodes was cut to the budget of 10"]
    short = RSD(Rows(), RSDC(branching=(5,))).propose(state([0], Sampling(temperature=1.0, top_k=3), 16, notes))
    assert short.size == 4
    assert "fewer tokens than children" in notes[-1]
    assert RSD(Rows()).propose(state([5], SAMPLED, 1, notes)).size == 1


def test_the_drafts_own_temperature_leaves_the_users_options_in_place():
    wide = RSD(Rows(), RSDC(branching=(2,)), draft_temperature=3.0)
    tree = wide.propose(state([0], Sampling(temperature=1.0, top_k=3), 16, []))
    np.testing.assert_allclose(
        tree.q[0],
        dense(-np.abs((1 - np.arange(8)) % 8).astype(np.float32), Sampling(temperature=3.0, top_k=3)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_generation_with_a_draft_model_repeats_and_greedy_text_is_the_models(tiny_model, shape):
    options = {"max_new_tokens": 24, "stop": Stop(eos=False), "engine": "hf"}
    drafter = RSD(DraftLM.from_layers(tiny_model, layers=1, engine="hf"), shape)
    plain = generate(tiny_model, "abc", **options)
    drafted = generate(tiny_model, "abc", drafter=drafter, **options)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.rule == "greedy"
    first, again = (generate(tiny_model, "abc", drafter=drafter, sampling=SAMPLED, seed=3, **options) for _ in range(2))
    assert first.tokens == again.tokens
    assert first.stats.rule == "recursive rejection"
    assert first.stats.exact
    assert first.stats.drafter_bytes > 0


def test_a_batch_drafts_with_a_model_per_row(tiny_model):
    drafters = [RSD(DraftLM.from_layers(tiny_model, layers=1, engine="hf"), RSDS(width=2, length=2)) for _ in range(3)]
    options = {"max_new_tokens": 12, "stop": Stop(eos=False), "engine": "hf"}
    batch = generate(tiny_model, ["abc", "x", "hello there"], drafter=drafters, **options)
    for text, one in zip(["abc", "x", "hello there"], batch, strict=True):
        assert one.tokens == generate(tiny_model, text, **options).tokens


def test_near_the_end_of_the_drafters_window_nothing_more_is_drafted(tiny_model):
    import copy
    import dataclasses

    small = dataclasses.replace(tiny_model, model=copy.copy(tiny_model.model))
    small.model.config = copy.deepcopy(tiny_model.model.config)
    small.model.config.max_position_embeddings = 20
    drafter = RSD(DraftLM(small, engine="hf"), Chain(length=4))
    options = {"max_new_tokens": 40, "stop": Stop(eos=False), "engine": "hf"}
    drafted = generate(tiny_model, "abcdefgh", drafter=drafter, **options)
    assert drafted.tokens == generate(tiny_model, "abcdefgh", **options).tokens
    assert 0 < drafted.stats.proposed_nodes < 20


@pytest.mark.slow
def test_smollm2_verified_50_000_times_gives_its_own_two_tokens(default_model):
    """One prompt; all logits that can be asked for are cached: 20 tokens of the target and 8 of the drafter per place.

    The drafter is most of the model itself: untrained first layers would guess nothing right, and nothing be tested.
    """
    target, drawn = Sampling(temperature=1.0, top_k=20), Sampling(temperature=1.2, top_k=8)
    prompt = default_model.encode("Once upon a time there was a")
    draft_lm = DraftLM.from_layers(default_model, layers=28, engine="hf")
    draft_lm.begin(prompt)
    root = Draft([prompt[-1]])
    q_root = draft_lm.distribution(root, [0], sampling=drawn)[0]
    with torch.inference_mode():
        first = default_model.model(torch.tensor([prompt])).logits[0, -1].float().numpy()
    kept = warp(first, target)
    tokens = sorted({*kept.tokens.tolist(), *np.flatnonzero(q_root).tolist()})
    below = {token: root.add(0, token) for token in tokens}
    q_below = dict(zip(tokens, draft_lm.distribution(root, list(below.values()), sampling=drawn), strict=True))
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, token] for token in tokens])
        rows = dict(zip(tokens, default_model.model(ids).logits[:, -1].float().numpy(), strict=True))
    # The verifier sees a vocabulary of the tokens that can come, renumbered; all others have probability 0.
    seen = sorted(
        {*tokens, *(token for row in rows.values() for token in warp(row, target).tokens.tolist())}
        | {token for q in q_below.values() for token in np.flatnonzero(q).tolist()}
    )
    small = {token: place for place, token in enumerate(seen)}
    first, q_root = first[seen], q_root[seen]
    rows = {small[token]: row[seen] for token, row in rows.items()}
    q_below = {small[token]: q[seen] for token, q in q_below.items()}
    wanted = np.zeros((len(seen), len(seen)))
    for token, probability in enumerate(dense(first, target)):
        if probability > 0:
            wanted[token] = probability * dense(rows[token], target)
    for shape in (RSDC(branching=(3, 2)), RSDS(width=3, length=2)):
        counts, generator = np.zeros_like(wanted, dtype=int), np.random.default_rng(0)
        accepted = 0
        for run in range(50_000):
            draft = Draft([0])
            tree, _ = drawn_tree(
                draft,
                lambda draft, nodes: np.stack([q_below[draft.tokens[node]] if node else q_root for node in nodes]),
                shape,
                generator,
            )
            noise = Noise(seed=1, row=run, position=0)
            text: list[int] = []
            for _, token in verify.RECURSIVE_REJECTION.walk(
                tree,
                lambda node, draft=draft: rows[draft.tokens[node]] if node else first,
                sampling=target,
                noise=noise,
            ):
                text.append(token)
                if len(text) == 2:
                    break
            accepted += len(text) - 1
            if len(text) == 1:
                text.append(Noise(seed=1, row=run, position=1).draw(warp(rows[text[0]], target), depth=0))
            counts[tuple(text)] += 1
        assert 0.2 < accepted / 50_000 < 0.95  # drafts are taken and refused, both often
        assert p_value(counts, wanted) > 1e-4


def test_loading_needs_the_right_model(tiny_model, default_model, tmp_path):
    from loci.decoding.rsd import DraftRecipe, load, train_draft

    texts = [text_of(tiny_model, seed) for seed in range(6)]
    recipe = DraftRecipe(layers=1, epochs=1, tokens_per_step=64)
    train_draft(tiny_model, texts, folder=tmp_path, data="noise", recipe=recipe, progress=False)
    assert all(weight.grad is None for weight in tiny_model.model.parameters())  # the shared embedding among them
    with pytest.raises(BadModel, match="trained for tiny"):
        load(tmp_path, default_model)
    assert isinstance(load(tmp_path, tiny_model), RSD)
    assert load(tmp_path / "rsd.safetensors", tiny_model).draft.model.model.config.num_hidden_layers == 1
    with pytest.raises(BadInput, match="258 tokens"):
        load(tiny_model.folder, default_model)


def text_of(model, seed: int):
    from loci.decoding.distill import DistilledText

    found = generate(
        model, "abc", max_new_tokens=40, sampling=SAMPLED, seed=seed, stop=Stop(eos=False), engine="hf"
    ).tokens
    tokens = np.array([*model.encode("abc"), *found], dtype=np.int32)
    return DistilledText(tokens=tokens, written=np.arange(len(tokens)) >= 3, temperature=1.0)


def test_training_brings_the_drafter_nearer_and_can_be_interrupted(tiny_model, tmp_path):
    from loci.decoding.rsd import DraftRecipe, acceptance, train_draft

    texts = [text_of(tiny_model, seed) for seed in range(8)]
    recipe = DraftRecipe(layers=1, epochs=8, tokens_per_step=128, top=32, learning_rate=1e-2)
    whole = train_draft(tiny_model, texts, folder=tmp_path / "whole", data="noise", recipe=recipe, progress=False)
    options = {"data": "noise", "recipe": recipe, "progress": False}
    assert train_draft(tiny_model, texts, folder=tmp_path / "halves", stop_after=5, **options) is None
    halves = train_draft(tiny_model, texts, folder=tmp_path / "halves", **options)
    for key, tensor in whole.tensors().items():
        torch.testing.assert_close(tensor, halves.tensors()[key], rtol=0, atol=0)
    untrained = DraftLM.from_layers(tiny_model, layers=1, engine="hf")
    trained = DraftLM.from_layers(tiny_model, adapter=whole.path, engine="hf")
    assert acceptance(tiny_model, trained, texts) > 1.1 * acceptance(tiny_model, untrained, texts)
    assert whole.settings["layers"] == 1
    assert acceptance(tiny_model, DraftLM(tiny_model, engine="hf"), texts) == pytest.approx(1.0, abs=1e-4)


def test_the_slope_of_the_divergence_is_that_of_the_formula():
    torch.manual_seed(0)
    hidden, head = torch.randn(150, 8, requires_grad=True), torch.randn(40, 8)
    teacher = (torch.randn(150, 40) * 2).log_softmax(dim=1)
    best, ids = teacher.topk(5, dim=1)
    rest = torch.log1p(-best.exp().sum(dim=1))
    found = rsd.divergence(hidden, head, ids.int(), best, rest)
    (slope,) = torch.autograd.grad(found, hidden)
    q = (hidden @ head.T).log_softmax(dim=1)
    q_top = q.gather(1, ids)
    q_rest = torch.log1p(-q_top.exp().sum(dim=1))
    plain = (best.exp() * (best - q_top)).sum() + (rest.exp() * (rest - q_rest)).sum()
    (wanted,) = torch.autograd.grad(plain, hidden)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-4)


def test_training_checks_its_input(tiny_model, tmp_path):
    from loci.decoding.rsd import DraftRecipe, train_draft

    with pytest.raises(BadInput, match="no texts"):
        train_draft(tiny_model, [], folder=tmp_path, data="none", progress=False)
    with pytest.raises(BadInput, match="epochs is 0"):
        DraftRecipe(epochs=0)
