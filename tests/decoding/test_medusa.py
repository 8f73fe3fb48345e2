from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding import medusa  # noqa: E402
from loci.decoding.distill import DistilledText, TeacherPass, teacher_pass  # noqa: E402
from loci.decoding.medusa import (  # noqa: E402
    Medusa,
    Medusa2Recipe,
    MedusaHeads,
    MedusaRecipe,
    TypicalAcceptance,
    baselines,
    calibrate,
    frequent_tokens,
    heads_loss,
    train_medusa1,
    train_medusa2,
)
from loci.decoding.tree_search import NOTHING, dense_tree, targets_ahead  # noqa: E402
from loci.errors import BadInput, BadModel, ModelNotFound  # noqa: E402
from loci.lm import Sampling, generate  # noqa: E402
from loci.lm.draft import TokenTree, TreeTemplate  # noqa: E402
from loci.lm.sampling import Noise  # noqa: E402
from loci.lm.train import attach, fingerprint  # noqa: E402

# Heads of their own, so that they can learn the texts of a random model by heart.
RECIPE = MedusaRecipe(
    heads=3, epochs=40, positions=64, draft_vocab=None, share_lm_head=False, learning_rate=3e-2, warmup=0.0
)
# peft asks transformers for something that it renamed
QUIET = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
GUESSED = np.array([[0.4, 0.2, 0.1], [0.3, 0.1, 0.05], [0.2, 0.1, 0.05]])


@pytest.fixture(scope="module")
def texts(tiny_model) -> list[DistilledText]:
    """Greedy continuations by the tiny model."""
    found = []
    for number in range(8):
        prompt = tiny_model.encode(f"{number} say: ")
        new = generate(tiny_model, prompt, max_new_tokens=60, engine="hf").tokens
        tokens = np.array([*prompt, *new], dtype=np.int32)
        found.append(DistilledText(tokens=tokens, written=np.arange(len(tokens)) >= len(prompt), temperature=0.0))
    return found


@pytest.fixture(scope="module")
def teacher(tiny_model, texts, tmp_path_factory) -> TeacherPass:
    return teacher_pass(tiny_model, texts, tmp_path_factory.mktemp("teacher"), progress=False)


@pytest.fixture(scope="module")
def heads(tiny_model, teacher, tmp_path_factory) -> MedusaHeads:
    found = train_medusa1(tiny_model, teacher, recipe=RECIPE, folder=tmp_path_factory.mktemp("heads"), progress=False)
    assert found is not None
    return found[0]


# --- heads


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_before_training_every_head_is_the_models_own(default_model, share, blocks):
    ids = torch.tensor([default_model.encode("The quick brown fox jumps over the lazy dog.")])
    with torch.inference_mode():
        hidden = default_model.model.base_model(ids).last_hidden_state[0]
    draft = None if share else np.arange(0, default_model.vocabulary, 7)
    heads = MedusaHeads.of(default_model, heads=2, blocks=blocks, share_lm_head=share, draft_tokens=draft)
    matrix = default_model.model.get_output_embeddings().weight.detach()
    rows = matrix if draft is None else matrix[torch.from_numpy(draft)]
    with torch.inference_mode():
        assert all(torch.equal(features, hidden) for features in heads.features(hidden))
        found = heads.double()(hidden[-4:].double())  # so that the order of summation does not matter
        for head in found:
            torch.testing.assert_close(head, hidden[-4:].double() @ rows.double().T, atol=1e-5, rtol=0.0)


def test_blocks_have_their_own_weights(tiny_model):
    heads = MedusaHeads.of(tiny_model, heads=2, blocks=2)
    assert heads.blocks_weight.shape[0] == 2
    state = torch.randn(5, heads.width)
    with torch.no_grad():
        heads.blocks_weight[1, 0] = torch.eye(heads.width)
        features = heads.features(state)
    torch.testing.assert_close(features[0], state + torch.nn.functional.silu(state))
    torch.testing.assert_close(features[1], state)


def test_the_loss_is_the_mean_cross_entropy_of_known_targets(tiny_model):
    heads = MedusaHeads.of(tiny_model, heads=2, share_lm_head=False)
    heads.randomize(0)
    hidden = torch.randn(300, heads.width)
    targets = torch.randint(0, tiny_model.vocabulary, (300, 2))
    targets[::3, 1] = NOTHING
    scales = torch.tensor([0.8, 0.64])
    loss = heads_loss(heads, hidden, targets, scales)
    expected = sum(
        scale * torch.nn.functional.cross_entropy(logits, target, ignore_index=NOTHING)
        for scale, logits, target in zip(scales, heads(hidden), targets.T, strict=True)
    )
    torch.testing.assert_close(loss, expected)
    parameters = list(heads.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_loss_of_heads_that_share_the_models_head_has_the_same_gradients(tiny_model):
    heads = MedusaHeads.of(tiny_model, heads=2)
    hidden, targets = torch.randn(200, heads.width), torch.randint(0, tiny_model.vocabulary, (200, 2))
    targets[:50, 0] = NOTHING
    scales = torch.tensor([1.0, 0.5])
    loss = heads_loss(heads, hidden, targets, scales)
    expected = sum(
        scale * torch.nn.functional.cross_entropy(logits, target, ignore_index=NOTHING)
        for scale, logits, target in zip(scales, heads(hidden), targets.T, strict=True)
    )
    parameters = list(heads.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_distance_of_two_models_is_their_kl(tiny_model):
    matrix = tiny_model.model.get_output_embeddings().weight.detach()
    student, teacher = torch.randn(200, matrix.shape[1], requires_grad=True), torch.randn(200, matrix.shape[1])
    weights = torch.rand(200)
    found = medusa._LinearKL.apply(student, teacher, matrix, weights)
    wanted, own = (teacher @ matrix.T).log_softmax(-1), (student @ matrix.T).log_softmax(-1)
    expected = ((wanted.exp() * (wanted - own)).sum(-1) * weights).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, student)[0], torch.autograd.grad(expected, student)[0], atol=1e-6, rtol=1e-4
    )


def test_heads_know_the_tokens_that_the_model_writes_most(texts, tiny_model):
    known = frequent_tokens(texts, count=40, vocabulary=tiny_model.vocabulary)
    assert len(known) == 40
    assert np.all(np.diff(known) > 0)
    written = np.concatenate([text.tokens[text.written] for text in texts])
    values, counts = np.unique(written, return_counts=True)
    assert values[counts.argmax()] in known
    heads = MedusaHeads.of(tiny_model, draft_tokens=known)
    assert heads.drafts(np.array([known[3], NOTHING]))[0] == 3
    assert heads.drafts(np.array([NOTHING]))[0] == NOTHING
    assert heads.ids(np.array([3])) == known[3]


def test_distributions_cover_the_vocabulary_and_sum_to_one(tiny_model):
    known = np.array([1, 5, 200])
    whole = MedusaHeads.of(tiny_model, heads=2, draft_tokens=known).distributions(torch.randn(32), temperature=0.7)
    assert whole.shape == (2, tiny_model.vocabulary)
    assert np.flatnonzero(whole[1]).tolist() == known.tolist()
    np.testing.assert_allclose(whole.sum(axis=1), 1.0, rtol=1e-6)


# --- training


def test_only_targets_that_the_model_wrote_are_learned(tiny_model, tmp_path):
    tokens = np.arange(20, dtype=np.int32)
    given = DistilledText(tokens=tokens, written=np.zeros(20, dtype=bool), temperature=0.0)
    with pytest.raises(BadInput, match="wrote"):
        train_medusa1(tiny_model, [given], recipe=RECIPE, folder=tmp_path, progress=False)


def test_training_teaches_heads_what_comes_later(tiny_model, teacher, heads):
    fresh = calibrate(MedusaHeads.of(tiny_model, heads=3), teacher)
    trained = calibrate(heads, teacher)
    assert np.all(trained[:, 0] > fresh[:, 0] + 0.2)
    assert np.all(trained.sum(axis=1) <= 1.0 + 1e-9)


def test_head_k_learns_the_token_k_behind_the_next_one(tiny_model, teacher, heads):
    ahead = targets_ahead(teacher.tokens, teacher.written, depth=3)
    where = np.flatnonzero((ahead != NOTHING).all(axis=1))
    with torch.inference_mode():
        best = heads(teacher.hidden[torch.from_numpy(where)].float()).argmax(dim=-1).numpy()
    for head in range(3):
        hits = [(best[head] == ahead[where, depth]).mean() for depth in range(3)]
        assert int(np.argmax(hits)) == head


def test_an_interrupted_training_ends_like_one_in_one_piece(tiny_model, teacher, heads, tmp_path):
    options = {"folder": tmp_path, "progress": False}
    assert train_medusa1(tiny_model, teacher, recipe=RECIPE, stop_after=30, **options) is None
    with pytest.raises(BadInput, match="recipe"):
        train_medusa1(tiny_model, teacher, recipe=replace(RECIPE, decay=1.0), **options)
    found = train_medusa1(tiny_model, teacher, recipe=RECIPE, **options)
    assert found is not None
    assert torch.equal(found[0].blocks_weight, heads.blocks_weight)


def test_a_random_start_is_drawn_from_the_seed(tiny_model):
    heads = [MedusaHeads.of(tiny_model, share_lm_head=False) for _ in range(3)]
    for one, seed in zip(heads, (0, 0, 1), strict=True):
        one.randomize(seed)
    assert torch.equal(heads[0].output, heads[1].output)
    assert not torch.equal(heads[0].output, heads[2].output)
    with pytest.raises(BadInput, match="share_lm_head=False"):
        MedusaRecipe(start="random")


def test_heads_beat_guessing_without_a_model(teacher, texts, heads):
    plain = baselines(texts, teacher, depth=3)
    trained = calibrate(heads, teacher)
    assert np.all(plain["bigram"][:, 0] >= plain["unigram"][:, 0])
    assert np.all(trained[:, 0] > plain["unigram"][:, 0])


def test_the_bigram_baseline_counts_what_followed_the_same_root():
    tokens = np.array([9, 1, 2, 1, 2, 1, 3], dtype=np.int32)
    text = DistilledText(tokens=tokens, written=np.arange(7) > 0, temperature=0.0)
    states = TeacherPass(
        texts=(text,), starts=np.array([0, 7]), tokens=tokens, written=text.written, hidden=torch.zeros(7, 2)
    )
    found = baselines([text], states, depth=1, ranks=2)
    # Roots 1, 2, 1, 2, 1 are followed by 2, 1, 2, 1, 3: after 1 mostly 2, after 2 always 1.
    assert found["bigram"][0].tolist() == pytest.approx([0.8, 0.2])
    assert found["unigram"][0].tolist() == pytest.approx([0.4, 0.4])


def test_what_was_trained_comes_back_from_the_disk(tiny_model, teacher, heads, tmp_path):
    accuracies = calibrate(heads, teacher)
    fitted = medusa.Fitted(losses=(1.0, 0.5), seconds=30.0)
    artifact = medusa.save(
        tmp_path, model=tiny_model, heads=heads, recipe=RECIPE, fitted=fitted, data="loops", accuracies=accuracies
    )
    assert artifact.base == fingerprint(tiny_model.model)
    drafter = medusa.load(tmp_path, tiny_model)
    np.testing.assert_allclose(drafter.accuracies, accuracies, atol=1e-4)
    torch.testing.assert_close(drafter.heads.blocks_weight, heads.blocks_weight.bfloat16().float())
    with pytest.raises(ModelNotFound):
        medusa.load(tmp_path / "nowhere", tiny_model)


def test_heads_of_another_model_are_refused(tiny_model, heads, default_model, tmp_path):
    fitted = medusa.Fitted(losses=(1.0,), seconds=1.0)
    medusa.save(tmp_path, model=tiny_model, heads=heads, recipe=RECIPE, fitted=fitted, data="loops", accuracies=GUESSED)
    with pytest.raises(BadModel, match="trained for"):
        medusa.load(tmp_path, default_model)
    with pytest.raises(BadModel, match="32 numbers"):
        MedusaHeads.load(tmp_path / "medusa.safetensors", default_model)


# --- drafting


@pytest.mark.parametrize("draft", [None, 100])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("share", [True, False])
def test_the_fast_form_ranks_like_the_readable_one(tiny_model, draft, blocks, share):
    known = None if draft is None else np.arange(draft) * 2
    heads = MedusaHeads.of(tiny_model, heads=3, blocks=blocks, share_lm_head=share, draft_tokens=known)
    torch.manual_seed(1)
    with torch.no_grad():
        heads.blocks_weight.normal_()
        heads.blocks_bias.normal_()
    state = torch.randn(heads.width)
    found = medusa._Fast(heads, torch.float32).ranked(state)
    with torch.no_grad():
        expected = heads.ids(heads(state).topk(10, dim=-1).indices.numpy())
    assert found.tolist() == expected.tolist()


SAMPLINGS = [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.7, top_p=0.9)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "T=1", "T=0.7"])
def test_drafting_changes_no_token(tiny_model, heads, sampling):
    drafter = Medusa(heads, accuracies=GUESSED)
    for number in range(4):
        options = {"max_new_tokens": 50, "sampling": sampling, "seed": number, "engine": "hf"}
        plain = generate(tiny_model, f"{number} say: ", **options)
        drafted = generate(tiny_model, f"{number} say: ", drafter=drafter, **options)
        assert drafted.tokens == plain.tokens
        assert drafted.stats.exact
    assert drafted.stats.steps <= plain.stats.steps


def test_trained_heads_save_steps(tiny_model, heads):
    drafter = Medusa(heads, accuracies=GUESSED)
    found = generate(tiny_model, "0 say: ", max_new_tokens=60, drafter=drafter, engine="hf")
    assert found.stats.tokens_per_step > 1.5
    assert found.stats.drafter_bytes == drafter.nbytes > 0


def test_each_row_of_a_batch_has_a_drafter_of_its_own(tiny_model, heads):
    prompts = ["0 say: ", "5 say: ", "a longer beginning of something: "]
    drafters = [Medusa(heads, accuracies=GUESSED) for _ in prompts]
    options = {"max_new_tokens": 30, "engine": "hf", "max_nodes": 24}
    batch = generate(tiny_model, prompts, drafter=drafters, **options)
    assert [row.tokens for row in batch] == [generate(tiny_model, prompt, **options).tokens for prompt in prompts]


def test_a_tree_never_exceeds_the_budget(tiny_model, heads):
    for template in ("auto", dense_tree((3, 2, 2))):
        drafter = Medusa(heads, accuracies=GUESSED, template=template)
        for budget in (2, 5, 16):
            found = generate(tiny_model, "1 say: ", max_new_tokens=20, drafter=drafter, max_nodes=budget, engine="hf")
            assert found.stats.proposed_nodes <= (budget - 1) * found.stats.steps


def test_a_template_deeper_than_there_are_heads_is_refused(heads):
    with pytest.raises(BadInput, match="3 heads"):
        Medusa(heads, template=dense_tree((1, 1, 1, 1)))
    with pytest.raises(BadInput, match="accuracies"):
        Medusa(heads)
    with pytest.raises(BadInput, match="3 heads"):
        Medusa(heads, accuracies=np.full((4, 2), 0.1))


def test_guesses_for_a_blend_are_the_same_tree(tiny_model, heads):
    from loci.lm.draft import DraftState

    drafter = Medusa(heads, accuracies=GUESSED)
    state = DraftState(tokens=[1, 2, 3], sampling=Sampling(), rng=np.random.default_rng(0), budget=8)
    assert drafter.guesses(state).tokens == [3]
    drafter._hidden = torch.randn(heads.width)
    tree, guesses = drafter.propose(state), drafter.guesses(state)
    assert (tree.tokens.tolist(), tree.parents.tolist()) == (guesses.tokens, guesses.parents)
    assert all(key in drafter.priors for key in guesses.keys[1:])


# --- typical acceptance


def rows_of(*rows: list[float]):
    tables = [np.log(np.array(row, dtype=np.float32)) for row in rows]
    return lambda node: tables[node]


SURE, FLAT = [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]
T1 = Sampling(temperature=1.0)


def walked(rule, tree, logits, sampling=T1, seed=0):
    return list(rule.walk(tree, logits, sampling=sampling, noise=Noise(seed=seed, row=0, position=0)))


def test_a_typical_token_is_accepted_and_an_unlikely_one_is_not():
    for token, accepted in ((0, True), (2, False)):
        found = walked(TypicalAcceptance(), TokenTree.chain([3, token]), rows_of(SURE, FLAT))
        assert len(found) == (2 if accepted else 1)
        if accepted:
            assert found[0] == (0, token)


def test_where_the_model_is_unsure_less_is_asked():
    # H = ln 4, so that 0.3 exp(-H) = 0.075 is the bar, not 0.09; 0.08 passes below it only with a flat rest.
    row = [0.08, 0.30667, 0.30667, 0.30666]
    entropy = -sum(p * math.log(p) for p in row)
    assert 0.3 * math.exp(-entropy) < 0.087
    tree = TokenTree.chain([3, 0])
    assert len(walked(TypicalAcceptance(epsilon=0.079, delta=1.0), tree, rows_of(row, FLAT))) == 2
    assert len(walked(TypicalAcceptance(epsilon=0.09, delta=1.0), tree, rows_of(row, FLAT))) == 1


def test_of_accepted_paths_the_longest_wins_then_the_likeliest():
    tree = TokenTree.from_template(TreeTemplate(((0,), (1,), (0, 0), (1, 0))), [3, 0, 1, 2, 2])
    half, low = [0.6, 0.38, 0.01, 0.01], [0.05, 0.05, 0.45, 0.45]
    longer = rows_of(half, SURE, low, FLAT, FLAT)  # node 1 does not go on to 2, node 2 does
    assert [node for node, _ in walked(TypicalAcceptance(), tree, longer)] == [0, 2, 4]
    both = rows_of(half, low, low, FLAT, FLAT)
    assert [node for node, _ in walked(TypicalAcceptance(), tree, both)] == [0, 1, 3]


def test_the_last_token_is_drawn_from_the_model():
    drawn = [walked(TypicalAcceptance(), TokenTree.root(3), rows_of(FLAT), seed=seed)[0][1] for seed in range(400)]
    assert np.bincount(drawn, minlength=4).min() > 60


def test_tokens_outside_top_k_are_never_typical():
    found = walked(TypicalAcceptance(), TokenTree.chain([3, 1]), rows_of([0.4, 0.3, 0.2, 0.1], FLAT),
                   Sampling(temperature=1.0, top_k=1))  # fmt: skip
    assert found == [(0, 0)]


def test_typical_acceptance_leaves_greedy_decoding_alone(tiny_model, heads):
    drafter = Medusa(heads, accuracies=GUESSED)
    plain = generate(tiny_model, "2 say: ", max_new_tokens=30, engine="hf")
    found = generate(
        tiny_model, "2 say: ", max_new_tokens=30, drafter=drafter, acceptance=TypicalAcceptance(), engine="hf"
    )
    assert found.tokens == plain.tokens


def test_typical_acceptance_says_that_it_is_not_exact(tiny_model, heads):
    options = {"max_new_tokens": 40, "sampling": Sampling(temperature=0.7), "seed": 1, "engine": "hf"}
    drafter = Medusa(heads, accuracies=GUESSED)
    found = generate(tiny_model, "2 say: ", drafter=drafter, acceptance=TypicalAcceptance(), **options)
    assert not found.stats.exact
    assert len(found.tokens) == 40


def test_typical_acceptance_is_caught_by_the_test_that_match_passes():
    """The chi-square test of exact sampling: one node whose child is its likeliest token."""
    from loci.lm.verify import MATCH

    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = rows_of(p.tolist(), p.tolist())
    tree = TokenTree.chain([3, 0])
    runs = 600
    for rule, passes in ((MATCH, True), (TypicalAcceptance(), False)):
        first = [walked(rule, tree, logits, seed=seed)[0][1] for seed in range(runs)]
        counts = np.bincount(first, minlength=4)
        statistic = float(((counts - runs * p) ** 2 / (runs * p)).sum())
        assert (statistic < 21.1) == passes  # 3 degrees of freedom, p-value 1e-4


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.3), (1.1, 0.3), (0.1, 0.0), (0.1, 2.0)])
def test_thresholds_outside_their_range_are_refused(epsilon, delta):
    with pytest.raises(BadInput, match="at most 1"):
        TypicalAcceptance(epsilon=epsilon, delta=delta)


# --- the model trained along


@QUIET
def test_training_along_makes_a_different_model_and_leaves_the_given_one(tiny_model, teacher, tmp_path):
    pytest.importorskip("peft", reason="needs the extra loci-lm[train]")
    before = fingerprint(tiny_model.model)
    recipe = Medusa2Recipe(rank=4, texts_per_step=2, epochs=2)
    heads = MedusaHeads.of(tiny_model, heads=2)
    found = train_medusa2(tiny_model, heads, teacher, recipe=recipe, folder=tmp_path, progress=False)
    assert found is not None
    _, artifact, fitted = found
    assert fingerprint(tiny_model.model) == before
    assert np.isfinite(fitted.losses).all()
    changed = attach(tiny_model, artifact)
    assert fingerprint(changed.model) != before
    assert heads.blocks_weight.abs().max() > 0


@QUIET
def test_the_models_own_distribution_protects_it(tiny_model, teacher, tmp_path):
    pytest.importorskip("peft", reason="needs the extra loci-lm[train]")
    drift = {}
    for protect in (True, False):
        recipe = Medusa2Recipe(rank=4, texts_per_step=2, epochs=4, learning_rate=1e-3, protect=protect)
        folder = tmp_path / str(protect)
        found = train_medusa2(
            tiny_model, MedusaHeads.of(tiny_model, heads=2), teacher, recipe=recipe, folder=folder, progress=False
        )
        assert found is not None
        changed = attach(tiny_model, found[1])
        text = torch.from_numpy(teacher.texts[0].tokens).long()[None]
        with torch.inference_mode():
            was, now = (model.model(text).logits[0].log_softmax(-1) for model in (tiny_model, changed))
        drift[protect] = float((was.exp() * (was - now)).sum(-1).mean())
    assert drift[False] > 3 * drift[True]
