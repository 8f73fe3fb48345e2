"""Parallel Prompt Decoding: learns on the real model, changes no output, guesses in generation as in training."""

from __future__ import annotations

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.decoding import ppd  # noqa: E402
from loci.decoding.blend import BlendedDrafter, Guessing  # noqa: E402
from loci.decoding.distill import DistilledText  # noqa: E402
from loci.decoding.ppd import PPD, PromptTokens, calibrate, load, train, train_prompt_tokens, tune  # noqa: E402
from loci.decoding.probe_trees import DynamicTrees  # noqa: E402
from loci.decoding.probes import Chains, FrozenModel, ProbeRecipe  # noqa: E402
from loci.decoding.prompt_lookup import PromptLookup  # noqa: E402
from loci.errors import BadInput, BadModel, ModelNotFound  # noqa: E402
from loci.lm.generate import generate  # noqa: E402
from loci.lm.sampling import Sampling  # noqa: E402

# What an untrained drafter hopes for; any figures that fall do.
HOPES = [[0.3, 0.2, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01, 0.01, 0.01]] * 3


def written(model, prompt: str, tokens: int) -> DistilledText:
    start = model.encode(prompt)
    made = generate(model, start, max_new_tokens=tokens)
    ids = np.array([*start, *made.tokens], dtype=np.int32)
    return DistilledText(tokens=ids, written=np.arange(len(ids)) >= len(start), temperature=0.0)


@pytest.fixture(scope="module")
def texts(default_model) -> list[DistilledText]:
    """A text that repeats itself: what comes can be learned in a few steps."""
    ids = np.array(
        default_model.encode("One, two, three, four, five, six, seven, eight, nine, ten. " * 3), dtype=np.int32
    )
    return [DistilledText(tokens=ids, written=np.arange(len(ids)) >= 5, temperature=0.0)]


@pytest.fixture(scope="module")
def noisy(tiny_model) -> list[DistilledText]:
    return [written(tiny_model, start, 80) for start in ("one", "two", "three")]


class Watched(PPD):
    """Remembers what each step's guesses were and how long the text was."""

    def observe(self, result) -> None:
        super().observe(result)
        self.seen = [*getattr(self, "seen", []), (len(result.committed), self._chain.found)]


def test_an_untrained_drafter_changes_no_token_of_the_default_model(default_model) -> None:
    start = default_model.encode("A list of European capitals: Paris, London,")
    plain = generate(default_model, start, max_new_tokens=16)
    drafter = PPD(PromptTokens.from_words(default_model), DynamicTrees.build(HOPES, 16))
    drafted = generate(default_model, start, max_new_tokens=16, drafter=drafter, max_nodes=16)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.exact
    assert drafter.nbytes >= 6_912


def test_a_drawn_text_is_the_same_with_and_without_the_drafter(tiny_model) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9)
    for seed in range(2):
        plain = generate(tiny_model, "hello", max_new_tokens=40, sampling=sampling, seed=seed)
        drafter = PPD(PromptTokens.from_words(tiny_model, ensemble=2), DynamicTrees.build(HOPES, 30, ensemble=2))
        drafted = generate(
            tiny_model, "hello", max_new_tokens=40, sampling=sampling, seed=seed, drafter=drafter, max_nodes=30
        )
        assert drafted.tokens == plain.tokens


def test_in_a_blend_it_shares_the_tree_and_changes_no_token(tiny_model) -> None:
    plain = generate(tiny_model, "hello hello", max_new_tokens=40)
    part = PPD(PromptTokens.from_words(tiny_model), DynamicTrees.build(HOPES, 16))
    assert isinstance(part, Guessing)
    blend = BlendedDrafter([PromptLookup(), part], switch_off=False)
    drafted = generate(tiny_model, "hello hello", max_new_tokens=40, drafter=blend, max_nodes=16)
    assert drafted.tokens == plain.tokens
    assert len(part._chain.found) > 0


@pytest.mark.parametrize("ensemble", [1, 2])
def test_generation_guesses_what_training_saw(tiny_model, ensemble) -> None:
    prompt = PromptTokens.from_words(tiny_model, ensemble=ensemble)
    drafter = Watched(prompt, DynamicTrees.build(HOPES, 30, ensemble=ensemble))
    start = tiny_model.encode("some bytes to begin with")
    made = generate(tiny_model, start, max_new_tokens=40, drafter=drafter, max_nodes=30)
    tokens = np.array([*start, *made.tokens], dtype=np.int64)
    length, checked = len(start), 0
    with FrozenModel(tiny_model) as frozen, torch.no_grad():
        for committed, found in drafter.seen:
            length += committed
            if not len(found) or length > len(tokens):
                continue
            text = tokens[: length - 1]  # the newest token is pending
            reading = frozen.read(text, np.zeros(1, dtype=np.int64))
            chains = Chains(parents=np.array([len(text) - 1]), k=3, ensemble=ensemble)
            logits = frozen.guess(reading, chains, prompt)[0, : len(found)]
            np.testing.assert_array_equal(found, logits.topk(10).indices.numpy())
            checked += 1
    assert checked > 10


def test_a_tiny_training_lowers_the_loss_of_the_real_model_and_guesses_better(default_model, texts) -> None:
    recipe = ProbeRecipe(steps=6, inserts=12, texts_per_step=1)
    prompt, fitted = train_prompt_tokens(default_model, texts, recipe=recipe, progress=False)
    assert sum(fitted.losses[-2:]) < 0.9 * sum(fitted.losses[:2])
    before = calibrate(default_model, PromptTokens.from_words(default_model), texts)
    after = calibrate(default_model, prompt, texts)
    assert after.shape == (3, 10)
    assert after.sum() > before.sum() + 0.1
    assert np.all(np.diff(after, axis=1) <= 0)


def test_a_trained_part_is_saved_loaded_and_drafts_longer_steps(tiny_model, noisy, tmp_path) -> None:
    artifact = train(
        tiny_model, noisy, noisy, folder=tmp_path, recipe=ProbeRecipe(steps=60, inserts=16, learning_rate=0.1),
        progress=False,
    )  # fmt: skip
    assert artifact.path.name == "ppd.safetensors"
    assert artifact.score["steps"] == 60
    assert len(artifact.score["top10"]) == 3
    drafter = load(tmp_path, tiny_model, limit=24)
    again = load(artifact.path, tiny_model, limit=24)
    np.testing.assert_array_equal(drafter.prompt.numbers, again.prompt.numbers)
    assert drafter.trees == again.trees
    plain = generate(tiny_model, "one", max_new_tokens=60)
    drafted = generate(tiny_model, "one", max_new_tokens=60, drafter=drafter, max_nodes=24)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_step > 1.05


def test_the_size_is_chosen_by_the_measured_cost_and_kept_for_this_machine(
    tiny_model, noisy, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("LOCI_CACHE", str(tmp_path / "cache"))
    train(tiny_model, noisy, noisy, folder=tmp_path, recipe=ProbeRecipe(steps=1, inserts=2), progress=False)
    largest = load(tmp_path, tiny_model).trees.limit
    tune(tmp_path, tiny_model, engine="packed", cost=lambda rows: float(rows))
    assert load(tmp_path, tiny_model).trees.limit == 8 < largest
    chosen = tune(tmp_path, tiny_model, engine="native", cost=lambda rows: 1.0 if rows <= 24 else 9.0)
    assert load(tmp_path, tiny_model).trees == chosen
    assert load(tmp_path, tiny_model, limit=12).trees.limit == 12


def test_prompt_tokens_hold_what_the_paper_says(default_model) -> None:
    prompt = PromptTokens.from_words(default_model)
    assert sum(weight.numel() for weight in prompt.parameters()) == 1_728
    assert prompt.nbytes == 6_912
    table = default_model.model.get_input_embeddings().weight
    words = default_model.encode(ppd.WORDS)
    np.testing.assert_allclose(prompt.numbers[:, 0], table[words[:3]].float().detach().numpy())


def test_strangers_and_nonsense_are_refused(tiny_model, default_model, noisy, tmp_path, caplog) -> None:
    train(tiny_model, noisy, noisy, folder=tmp_path, recipe=ProbeRecipe(steps=1, inserts=2), progress=False)
    with pytest.raises(BadModel, match="was trained for tiny"):
        load(tmp_path, default_model)
    with pytest.raises(ModelNotFound, match="no trained part"):
        load(tmp_path / "nowhere", tiny_model)
    with pytest.raises(BadModel, match="32 numbers each"):
        calibrate(default_model, PromptTokens(32), noisy)
    with pytest.raises(BadInput, match="at least 1"):
        PromptTokens(32, 0)
    trees = DynamicTrees.build(HOPES[:2], 16)
    with pytest.raises(BadInput, match="trees for 2 probes"):
        PPD(PromptTokens(32), trees)
    with pytest.raises(BadInput, match="too small"):
        load(tmp_path, tiny_model, limit=4)
    with caplog.at_level(logging.WARNING):
        PPD(PromptTokens(32, 3, 4), DynamicTrees.build(HOPES, 40, ensemble=4))
    assert "12 rows instead of 3" in caplog.text
