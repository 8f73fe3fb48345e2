"""Prompt lookup: what followed the last few tokens when they occurred before, in the prompt or in the answer so far.

Source  Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding), also in `transformers`.
Ours    the index grows with the text and is never rescanned. Matches are compared by their whole length, the most
        recent of equal ones first, and up to three different continuations become branches. A guess is worth what
        guesses behind matches of its length have earned (`RATES`); the nodes of a step go to the best ones, so that a
        match of one token drafts little and a match of ten drafts far ahead.
Near    `token_recycling` knows one token back, and what other texts taught it.
Cost    three entries of an index per token of the text.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from loci.decoding.blend import Guesses
from loci.errors import BadInput
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree

_SIZES = (3, 2, 1)  # tokens of the index's keys, longest first
_LOOKED_AT = 6  # latest occurrences of a key that are compared; ours
_FARTHEST = 24  # tokens of a match that are told apart; ours
# How often the token behind a match came next, by the length of the match, for the best continuation and for others:
# SmolLM2-135M on instructions.
RATES: Mapping[bool, tuple[float, ...]] = {
    True: (0.17, 0.5, 0.57, 0.62, 0.66, 0.68, 0.7, 0.71, 0.73, 0.75, 0.77, 0.88),
    False: (0.13, 0.35, 0.35, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3),
}


class PromptLookup:
    """Drafts continuations of earlier occurrences.

    Args:
        branches: different continuations tried at once.
        shortest: tokens that must match.
        name: how statistics call it.
    """

    law: Law = "point"
    needs = Needs()

    def __init__(self, *, branches: int = 3, shortest: int = 1, name: str = "lookup") -> None:
        if branches < 1 or not 1 <= shortest <= max(_SIZES):
            raise BadInput(
                f"branches is {branches} and shortest is {shortest}; at least 1 branch and 1 to {max(_SIZES)} matching"
                " tokens are needed."
            )
        self.name = name
        self.branches = branches
        self.shortest = shortest
        self.priors: Mapping[Hashable, float] = {
            (first, length + 1): rate for first, rates in RATES.items() for length, rate in enumerate(rates)
        }
        self._text: list[int] = []
        self._places: dict[Hashable, list[int]] = {}  # tokens: where the token behind them stands, oldest first

    @property
    def nbytes(self) -> int:
        """Of the index: its keys and lists as Python holds them."""
        lists = sum(sys.getsizeof(places) for places in self._places.values())
        return sys.getsizeof(self._places) + lists + sum(map(sys.getsizeof, self._places))

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        known = len(self._text)
        if not known or list(state.tokens[:known]) != self._text:  # a conversation that goes on keeps its index
            self._text, self._places = [], {}
        self._read(state.tokens)

    def observe(self, result: StepResult) -> None:
        pass  # the text itself says all that is needed

    def propose(self, state: DraftState) -> TokenTree:
        guesses = self.guesses(state)
        return TokenTree(
            tokens=np.array(guesses.tokens, dtype=np.int32), parents=np.array(guesses.parents, dtype=np.int32)
        )

    def guesses(self, state: DraftState) -> Guesses:
        """The best continuations as a tree within the budget. A guess's kind is whether it stands on the longest match,
        and how many tokens match before it, those between the text and it included."""
        self._read(state.tokens)
        text = self._text
        tokens, parents = [text[-1]], [-1]
        keys: list[Hashable] = [None]
        matches = self._matches()
        # One candidate per branch: -worth, branch, place in the text of its next token, node that it follows, length.
        waiting: list[tuple[float, int, int, int, int]] = []

        def offer(worth: float, branch: int, place: int, node: int, length: int) -> None:
            if place < len(text):
                rates = RATES[branch == 0]
                rate = rates[min(length, len(rates)) - 1]
                heapq.heappush(waiting, (-worth * rate, branch, place, node, length))

        for branch, (length, place) in enumerate(matches):
            offer(1.0, branch, place, 0, length)
        while waiting and len(tokens) < state.budget:
            minus, branch, place, parent, length = heapq.heappop(waiting)
            tokens.append(text[place])
            parents.append(parent)
            keys.append((branch == 0, min(length, len(RATES[True]))))
            offer(-minus, branch, place + 1, len(tokens) - 1, length + 1)
        return Guesses(tokens=tokens, parents=parents, keys=keys)

    def _read(self, tokens: Sequence[int]) -> None:
        """Take in what the text has got since the last time. A key is indexed once the token behind it is known."""
        text, places = self._text, self._places
        first = max(len(text), 1)
        text.extend(tokens[len(text) :])
        for place in range(first, len(text)):
            last = text[place - 1]
            places.setdefault(last, []).append(place)
            if place > 1:
                two = (text[place - 2], last)
                places.setdefault(two, []).append(place)
                if place > 2:
                    places.setdefault((text[place - 3], *two), []).append(place)

    def _matches(self) -> list[tuple[int, int]]:
        """The best matches with different next tokens: length, and place of the token behind; the longest first."""
        text = self._text
        best: dict[int, tuple[int, int]] = {}
        for size in _SIZES:
            if size > len(text) or size < self.shortest:
                continue
            key: Hashable = text[-1] if size == 1 else tuple(text[-size:])
            for place in reversed(self._places.get(key, [])[-_LOOKED_AT:]):
                length = size
                while length < min(place, _FARTHEST) and text[place - 1 - length] == text[-1 - length]:
                    length += 1
                token = text[place]
                if token not in best or best[token][0] < length:
                    best[token] = (length, place)
            if len(best) >= self.branches:
                break
        return sorted(best.values(), key=lambda match: (-match[0], -match[1]))[: self.branches]
