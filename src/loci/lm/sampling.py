"""From logits to one token: temperature, top-k, top-p, min-p, and noise that depends on the place, not on the path.

Source  the warpers of `transformers`, in its order and with its semantics; the Gumbel-max trick (Maddison et al. 2014,
        arXiv:1411.0030); Philox, a counter-based generator (Salmon et al. 2011).
Ours    the noise at a position is a function of (seed, row, position, token). Whoever draws there, after whatever
        drafts, in whatever batch, draws the same token, so drafting can be tested by equality.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt64

from loci.errors import BadInput

# Tokens looked at first when the smallest set of mass top_p is sought; nearly always enough, and far cheaper to sort.
_LIKELY = 1024


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. The defaults are greedy decoding over all tokens.

    temperature: 0 takes the most probable token (the lowest id of several); 1 draws from the model's distribution.
    top_p: keep the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
    top_k: keep this many tokens; 0 keeps all.
    min_p: drop tokens less probable than this share of the most probable one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf")):
            raise BadInput(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not (0.0 < self.top_p <= 1.0):
            raise BadInput(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.top_k < 0:
            raise BadInput(f"top_k is {self.top_k}; it must be 0 (all tokens) or a number of tokens.")
        if not (0.0 <= self.min_p <= 1.0):
            raise BadInput(f"min_p is {self.min_p}; it must lie between 0 and 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = Sampling()


@dataclass(frozen=True)
class Support:
    """The tokens that may be drawn, in rising order, and their log-probabilities up to a constant."""

    tokens: Int64[np.ndarray, " kept"]
    scores: Float64[np.ndarray, " kept"]

    @property
    def probabilities(self) -> Float64[np.ndarray, " kept"]:
        mass = np.exp(self.scores - self.scores.max())
        return np.asarray(mass / mass.sum(), dtype=np.float64)


def warp(
    logits: Float32[np.ndarray, " vocabulary"],
    sampling: Sampling,
    *,
    allowed: Bool[np.ndarray, " vocabulary"] | None = None,
) -> Support:
    """What `sampling` leaves of a distribution: temperature, then top-k, top-p and min-p.

    Args:
        allowed: tokens that a constraint permits; the others are as if their logits were minus infinity.

    Raises:
        BadInput: `sampling` is greedy, which leaves nothing to draw.
    """
    if sampling.greedy:
        raise BadInput("temperature is 0: greedy decoding draws nothing. Use `greedy`.")
    scores = logits.astype(np.float64) / sampling.temperature
    tokens = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    scores = scores[tokens]
    present = scores > -np.inf
    if not present.all():
        tokens, scores = tokens[present], scores[present]
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        kept = scores >= least
        tokens, scores = tokens[kept], scores[kept]
    if sampling.top_p < 1.0:
        kept = _nucleus(scores, sampling.top_p)
        tokens, scores = tokens[kept], scores[kept]
    if sampling.min_p > 0.0:
        kept = scores >= scores.max() + np.log(sampling.min_p)
        tokens, scores = tokens[kept], scores[kept]
    return Support(tokens.astype(np.int64), scores)


def _nucleus(scores: Float64[np.ndarray, " token"], top_p: float) -> Int64[np.ndarray, " kept"]:
    """Indices, rising, of the smallest set whose mass reaches `top_p`; at least one."""
    mass = np.exp(scores - scores.max())
    mass /= mass.sum()
    likely = np.arange(len(mass))
    if len(mass) > _LIKELY:
        top = np.argpartition(mass, -_LIKELY)[-_LIKELY:]
        if mass[top].sum() >= top_p:
            likely = top
    order = likely[np.lexsort((likely, -mass[likely]))]
    before = np.cumsum(mass[order]) - mass[order]  # what more probable tokens hold
    return np.sort(order[before < top_p])


def greedy(
    logits: Float32[np.ndarray, " vocabulary"], *, allowed: Bool[np.ndarray, " vocabulary"] | None = None
) -> int:
    """The most probable token; of equals the lowest id."""
    return int(np.argmax(logits if allowed is None else np.where(allowed, logits, -np.inf)))


# The fourth word of Philox's counter keeps the streams of one place apart.
_GUMBEL, _UNIFORM = 0, 1


def gumbel(tokens: Int64[np.ndarray, " token"], *, seed: int, row: int, position: int) -> Float64[np.ndarray, " token"]:
    """Gumbel noise for these tokens at one place. Philox is keyed by seed and row, starts at the position, and gives
    token t its t-th number, whichever other tokens are asked for."""
    raw = _philox(_GUMBEL, seed=seed, row=row, position=position).random_raw(int(tokens.max()) + 1)[tokens]
    uniform = _open_interval(raw)
    return np.asarray(-np.log(-np.log(uniform)), dtype=np.float64)


def _philox(stream: int, *, seed: int, row: int, position: int) -> np.random.Philox:
    counter = np.array([0, 0, position, stream], dtype=np.uint64)
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, row], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _open_interval(raw: UInt64[np.ndarray, " number"]) -> Float64[np.ndarray, " number"]:
    """Numbers between 0 and 1, never 0, never 1."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw(support: Support, *, seed: int, row: int, position: int) -> int:
    """One token, with the probabilities of `support`; the same token for the same seed, row and position."""
    if len(support.tokens) == 1:
        return int(support.tokens[0])
    noise = gumbel(support.tokens, seed=seed, row=row, position=position)
    return int(support.tokens[np.argmax(support.scores + noise)])


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The randomness of one row along a tree. What is drawn somewhere depends on seed, row and position alone, so that
    runs repeat; a drafter has a generator of its own and never sees this one.

    position: place in the text of the token that follows the tree's root.
    """

    seed: int
    row: int
    position: int

    def draw(self, support: Support, *, depth: int) -> int:
        """The token after a node at this depth: what plain sampling draws at its place."""
        return draw(support, seed=self.seed, row=self.row, position=self.position + depth)

    def uniforms(self, count: int, *, depth: int) -> Float64[np.ndarray, " attempt"]:
        """Numbers between 0 and 1 for the attempts to accept a child of a node at this depth, and for the draw that
        follows when none is; independent of `draw`."""
        source = _philox(_UNIFORM, seed=self.seed, row=self.row, position=self.position + depth)
        return _open_interval(source.random_raw(count))
