from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.errors import BadInput
from loci.lm.sampling import Sampling, Support, draw, greedy, gumbel, warp


def noise(size: int, *, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


@pytest.mark.parametrize("size", [40, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 10},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.999},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 25, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_what_is_kept_and_its_probabilities_equal_the_warpers_of_transformers(options, size):
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for seed in range(5):
        logits = noise(size, seed=seed)
        scores = TemperatureLogitsWarper(options["temperature"])(None, torch.from_numpy(logits)[None].double())
        if "top_k" in options:
            scores = TopKLogitsWarper(options["top_k"])(None, scores)
        if "top_p" in options:
            scores = TopPLogitsWarper(options["top_p"])(None, scores)
        if "min_p" in options:
            scores = MinPLogitsWarper(options["min_p"])(None, scores)
        wanted = scores.softmax(dim=-1)[0].numpy()
        support = warp(logits, Sampling(**options))
        found = np.zeros(size)
        found[support.tokens] = support.probabilities
        np.testing.assert_allclose(found, wanted, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(seed, top_p):
    logits = noise(60, seed=seed)
    mass = np.exp(logits.astype(np.float64))
    mass /= mass.sum()
    support = warp(logits, Sampling(temperature=1.0, top_p=top_p))
    kept = mass[support.tokens]
    assert kept.sum() >= top_p - 1e-12
    assert kept.sum() - kept.min() < top_p
    assert kept.min() >= np.delete(mass, support.tokens).max(initial=0.0)


def test_forbidden_tokens_are_never_kept():
    allowed = np.zeros(50, dtype=bool)
    allowed[[3, 7, 20]] = True
    support = warp(noise(50), Sampling(temperature=2.0, top_k=2), allowed=allowed)
    assert set(support.tokens.tolist()) <= {3, 7, 20}
    assert len(support.tokens) == 2
    assert greedy(noise(50), allowed=allowed) in {3, 7, 20}


def test_greedy_takes_the_lowest_of_equals():
    assert greedy(np.array([0.0, 2.0, 2.0, 1.0], dtype=np.float32)) == 1


def test_the_noise_of_a_token_does_not_depend_on_which_others_are_asked_for():
    everything = gumbel(np.arange(1000), seed=5, row=2, position=9)
    some = np.array([0, 17, 400, 999])
    np.testing.assert_array_equal(gumbel(some, seed=5, row=2, position=9), everything[some])


@pytest.mark.parametrize("other", [{"seed": 6}, {"row": 3}, {"position": 10}])
def test_seed_row_and_position_each_change_the_noise(other):
    place = {"seed": 5, "row": 2, "position": 9}
    tokens = np.arange(100)
    assert not np.any(gumbel(tokens, **place) == gumbel(tokens, **(place | other)))


def test_the_noise_is_the_same_on_every_machine():
    np.testing.assert_allclose(
        gumbel(np.arange(3), seed=1, row=0, position=0), [-0.17575800360186303, 1.8076498398198795, -0.6189814975417193]
    )


def test_draws_have_the_frequencies_of_the_distribution():
    stats = pytest.importorskip("scipy.stats")
    support = warp(noise(12, spread=1.0), Sampling(temperature=0.8, top_k=8))
    draws = [draw(support, seed=3, row=0, position=position) for position in range(20_000)]
    counts = np.array([draws.count(token) for token in support.tokens.tolist()])
    assert counts.sum() == 20_000
    assert stats.chisquare(counts, support.probabilities * 20_000).pvalue > 1e-4


def test_the_same_place_gives_the_same_token_and_negative_seeds_work():
    support = Support(np.arange(100), np.zeros(100))
    assert draw(support, seed=-1, row=0, position=4) == draw(support, seed=-1, row=0, position=4)
    assert len({draw(support, seed=seed, row=0, position=4) for seed in range(-20, 20)}) > 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        Sampling(**wrong)


def test_nothing_is_drawn_at_temperature_zero():
    with pytest.raises(BadInput, match="greedy"):
        warp(noise(5), Sampling())
