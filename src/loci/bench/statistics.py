"""How sure a measured difference is: paired bootstrap, standard error, median.

Source  Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6, 13 and 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loci.errors import BadInput

_INDICES_AT_ONCE = 4_000_000  # 32 MB of them


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Mean of the first minus mean of the second over the same examples, with its 95 % interval.

    `p` is two-sided: how often resampling turns the sign, at least 2 / (resamples + 1).
    """

    difference: float
    low: float
    high: float
    p: float
    examples: int
    resamples: int

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two systems on the same examples by drawing the examples again, with replacement.

    Args:
        first: one score per example.
        second: the other system's scores of the same examples, in the same order.
        resamples: 10,000 give an interval that is steady to the second digit.
        seed: the same seed gives the same interval on every machine.

    Raises:
        BadInput: the lengths differ, there is no example, or `resamples` is below 1.
    """
    if len(first) != len(second) or not len(first):
        raise BadInput(f"a paired comparison needs the same examples twice, got {len(first)} and {len(second)} scores.")
    if resamples < 1:
        raise BadInput(f"a bootstrap needs at least one resample, got {resamples}.")
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    random = np.random.default_rng(seed)
    at_once = max(1, _INDICES_AT_ONCE // gaps.size)
    means = np.concatenate(
        [
            gaps[random.integers(gaps.size, size=(min(at_once, resamples - done), gaps.size))].mean(axis=1)
            for done in range(0, resamples, at_once)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    turned = min((means <= 0).sum(), (means >= 0).sum())
    return Comparison(
        difference=float(gaps.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, float(2 * (turned + 1) / (resamples + 1))),
        examples=int(gaps.size),
        resamples=resamples,
    )


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; not a number below two of them."""
    if len(values) < 2:
        return float("nan")
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def median(values: Sequence[float]) -> float:
    """The middle value; not a number where there is none."""
    return float(np.median(values)) if len(values) else float("nan")
