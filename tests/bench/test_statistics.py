import math

import numpy as np
import pytest

from loci.bench import statistics
from loci.bench.statistics import median, paired_bootstrap, standard_error
from loci.errors import BadInput


def test_equal_systems_do_not_differ() -> None:
    found = paired_bootstrap([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.above


def test_a_steady_gap_is_certain_and_its_p_is_the_smallest_there_is() -> None:
    found = paired_bootstrap([0.75] * 20, [0.5] * 20, resamples=999)
    assert (found.difference, found.low, found.high) == (0.25, 0.25, 0.25)
    assert found.p == 2 / 1000
    assert found.above


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(0.3, 1, 400), random.normal(0, 1, 400)
    found = paired_bootstrap(first.tolist(), second.tolist())
    gap = first - second
    half = 1.96 * gap.std(ddof=1) / math.sqrt(gap.size)
    assert found.difference == pytest.approx(gap.mean())
    assert found.low == pytest.approx(gap.mean() - half, abs=0.02)
    assert found.high == pytest.approx(gap.mean() + half, abs=0.02)


def test_pairing_sees_what_means_alone_would_not() -> None:
    hard = np.linspace(0, 1, 50)
    assert paired_bootstrap((hard + 0.02).tolist(), hard.tolist()).above


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    held = 0
    for seed in range(200):
        gap = random.normal(0.2, 1, 60)
        found = paired_bootstrap(gap.tolist(), [0.0] * 60, resamples=500, seed=seed)
        held += found.low <= 0.2 <= found.high
    assert 180 <= held <= 199


def test_a_seed_gives_the_same_interval_and_sides_can_be_swapped() -> None:
    first, second = [0.1, 0.9, 0.4, 0.8], [0.3, 0.2, 0.4, 0.1]
    found = paired_bootstrap(first, second, seed=3)
    assert found == paired_bootstrap(first, second, seed=3)
    swapped = paired_bootstrap(second, first, seed=3)
    assert (swapped.difference, swapped.low) == pytest.approx((-found.difference, -found.high))


def test_resamples_in_several_rounds_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_INDICES_AT_ONCE", 25)
    found = paired_bootstrap([1.0] * 10, [0.0] * 10, resamples=7)
    assert found.p == 2 / 8


@pytest.mark.parametrize(("first", "second", "resamples"), [([1.0], [1.0, 2.0], 10), ([], [], 10), ([1.0], [1.0], 0)])
def test_what_cannot_be_compared_is_an_error(first: list[float], second: list[float], resamples: int) -> None:
    with pytest.raises(BadInput):
        paired_bootstrap(first, second, resamples=resamples)


def test_standard_error_and_median() -> None:
    assert standard_error([0.0, 1.0, 0.0, 1.0]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert math.isnan(standard_error([1.0]))
    assert median([3.0, 1.0, 2.0, 10.0]) == 2.5
    assert math.isnan(median([]))
