"""RAPID: a drafter that reads retrieved passages of a long context, and a target that leans towards it.

Source  Chen et al. 2025, arXiv:2502.20330: drafting from a short context (section 3.1), the shifted target and its
        acceptance (section 3.2, equations 8 to 10).
Letters p: the target's distribution given the whole context; q: the drafter's given the passages; z: the target's
        logits; T: temperature; eta: how far p is moved; p': p after the move.
        p' = softmax((z + eta * T * (q - p)) / T), one step down the gradient T * (p - q) of T^2 * KL(q || p); where p'
        is below a tenth of its highest value, p stands instead (the tail guard).
Differs the paper draws what follows a rejection from max(p - min(q, p'), 0) and takes the output to be p. It is not:
        where q and p' both exceed p, more is accepted than p holds. So there are three laws, each known exactly.
        "shifted" makes p', normalised after the guard, the target itself and verifies against it without loss, at every
        place: after a chain that is accepted whole the drafter runs once more, because the next token needs its q too.
        "paper" follows the equations; `ShiftedTarget.output` is the closed form of what comes out. "lossless" does not
        move p: ordinary speculative sampling, with the passages as the drafter's context.
Trap    a long step can pass q: where both find the same token best and p is the surer of the two, the step takes from
        it and a third token may win. On SmolLM2 at temperature 0 that happened at 16 of 133 places with eta 10, at 3 of
        110 with eta 5 and at none of 89 with eta 2 (six questions about 1,200 tokens).
Ours    at temperature 0 p' is taken at T = 1, and its best token is the text. Chunks are read by the embedder in two
        parts, and score by the better one. Models with short windows get shorter chunks and a smaller budget.

The target's prompt holds the context as it stands; the drafter's is the same prompt with the passages in its place. The
drafter may be the target itself: the weights are then in memory once, with a second, short cache.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64

from loci.decoding.draft_model import Draft, DraftLM
from loci.errors import BadInput, ContextTooLong, Unsupported
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.embed import Embedder, load_embedder
from loci.lm.engine.base import StepEngine
from loci.lm.generate import Generation, GenerationStats, Stop, generate
from loci.lm.load import load as load_model
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Noise, Sampling, Support, warp
from loci.lm.verify import Allowed, Logits, chance, distribution, exact_rule, first_accepted, walk

NAME = "rapid"
TargetLaw = Literal["shifted", "lossless", "paper"]
TARGET_LAWS: tuple[TargetLaw, ...] = ("shifted", "lossless", "paper")
Probabilities = Float64[np.ndarray, " vocabulary"]
# q after a node where the tree has none; None where the drafter has nothing to say.
Beyond = Callable[[TokenTree, int, Sampling], Float32[np.ndarray, " vocabulary"] | None]

_PLAIN, _STOP = Sampling(temperature=1.0), Stop()
# Windows up to this size get the small form of retrieval.
SMALL_WINDOW = 16_384
# Of the drafter's window, kept free for the answer: so many tokens, at most a quarter.
_ANSWER = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Passages of a context. `spans` are theirs, first and past-the-last token, in the order of the context;
    neighbouring chunks are one span. `ids` are their tokens, what separates them included. `scores` are the chosen
    chunks' cosines in the order of the context; `above` tells whether they reach the threshold."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    above: bool
    seconds: float


@runtime_checkable
class Retriever(Protocol):
    """What chooses the drafter's passages. `tokens` is the context that it chooses from."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def budget_tokens(self) -> int:
        """Tokens that the passages may have together."""

    def select(self, query: str, *, most: int | None = None) -> Selection:
        """Passages for a query, of at most `most` tokens where that is less than the budget."""
        ...

    @property
    def nbytes(self) -> int: ...


class ContextRetriever:
    """Chunks of a context by their similarity to a query. The index is made once; a text that goes on is read from
    where its last whole chunk ends.

    Args:
        decode: the text of tokens: `LanguageModel.decode`.
        chunk_tokens: the paper's.
        budget: tokens that may be chosen, as the larger of a number and a share of the context; the paper's bounds.
        threshold: the least cosine of a chosen chunk; the paper's.
        parts: in how many pieces a chunk is embedded. 2 bring 512 tokens near the 256 word pieces that all-MiniLM-L6-v2
            reads, and make a single fact in a chunk weigh more.
        gap: tokens between passages that are no neighbours.
    """

    def __init__(
        self,
        embedder: Embedder,
        decode: Callable[[Sequence[int]], str],
        *,
        chunk_tokens: int = 512,
        budget: tuple[int, float] = (4096, 1 / 24),
        threshold: float = 0.3,
        parts: int = 2,
        gap: Sequence[int] = (),
    ) -> None:
        if chunk_tokens < 1 or not 1 <= parts <= chunk_tokens:
            raise BadInput(
                f"chunks of {chunk_tokens} tokens in {parts} parts; both must be at least 1, and a part too."
            )
        if budget[0] < chunk_tokens or not 0.0 <= budget[1] <= 1.0:
            raise BadInput(
                f"a budget of {budget[0]} tokens or {budget[1]} of the context; it must hold a chunk of {chunk_tokens}"
                " tokens, and a share lies between 0 and 1."
            )
        if not -1.0 <= threshold <= 1.0:
            raise BadInput(f"the threshold is {threshold}; a cosine lies between -1 and 1.")
        self.embedder, self.decode, self.gap = embedder, decode, tuple(gap)
        self.chunk_tokens, self.budget, self.threshold, self.parts = chunk_tokens, budget, threshold, parts
        self._tokens: list[int] = []
        self._vectors = np.zeros((0, 0), dtype=np.float32)
        self._owners = np.zeros(0, dtype=np.int64)  # of each vector: the chunk
        self.embedded_tokens = 0  # in all, to show what going on costs

    @classmethod
    def fitting(cls, model: LanguageModel, embedder: Embedder) -> ContextRetriever:
        """With the paper's sizes for long windows; for windows up to 16,384 tokens chunks of 128 tokens, of which 512
        tokens or an eighth of the context are read. Those are ours."""
        gap = model.tokenizer.encode("\n\n", add_special_tokens=False)
        if model.window > SMALL_WINDOW:
            return cls(embedder, model.decode, gap=gap)
        floor = max(4, min(512, model.window // 4))
        chunk = max(1, min(128, floor // 4))
        return cls(embedder, model.decode, chunk_tokens=chunk, budget=(floor, 1 / 8), parts=min(2, chunk), gap=gap)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def budget_tokens(self) -> int:
        return self.budget_for(len(self._tokens))

    def budget_for(self, context: int) -> int:
        """Tokens that are read of a context of so many."""
        return max(self.budget[0], int(self.budget[1] * context))

    @property
    def nbytes(self) -> int:
        return self._vectors.nbytes + self._owners.nbytes + int(getattr(self.embedder, "nbytes", 0))

    def build(self, context_ids: Sequence[int]) -> None:
        """Index a context. Whole chunks that it shares with the last one, from the start, are kept.

        Raises:
            BadInput: no tokens.
        """
        if not len(context_ids):
            raise BadInput("the context is empty; there is nothing to retrieve from.")
        tokens = [int(token) for token in context_ids]
        shared = 0
        for old, new in zip(self._tokens, tokens, strict=False):
            if old != new:
                break
            shared += 1
        if shared == len(tokens) == len(self._tokens):
            return
        whole = shared // self.chunk_tokens
        texts, owners = [], []
        part = -(-self.chunk_tokens // self.parts)
        for start in range(whole * self.chunk_tokens, len(tokens), self.chunk_tokens):
            end = min(start + self.chunk_tokens, len(tokens))
            for first in range(start, end, part):
                texts.append(self.decode(tokens[first : min(first + part, end)]))
                owners.append(start // self.chunk_tokens)
        fresh = self.embedder.embed(texts)
        kept = self._owners < whole
        old_rows = self._vectors[kept] if kept.any() else np.zeros((0, fresh.shape[1]), dtype=np.float32)
        self._vectors = np.concatenate([old_rows, fresh]).astype(np.float32, copy=False)
        self._owners = np.concatenate([self._owners[kept], np.array(owners, dtype=np.int64)])
        self._tokens = tokens
        self.embedded_tokens += len(tokens) - whole * self.chunk_tokens

    def append(self, ids: Sequence[int]) -> None:
        """The context goes on."""
        self.build([*self._tokens, *ids])

    def scores(self, query: str) -> Float32[np.ndarray, " chunk"]:
        """Each chunk's cosine with the query: that of its best part."""
        if not self._tokens:
            raise BadInput("the retriever has no context yet; call build first.")
        found = self._vectors @ self.embedder.embed([query])[0]
        best = np.full(int(self._owners[-1]) + 1, -np.inf, dtype=np.float32)
        np.maximum.at(best, self._owners, found)
        return best

    def select(self, query: str, *, most: int | None = None) -> Selection:
        """The best chunks that reach the threshold and fit the budget, in the order of the context. Where none reaches
        it, the best one alone."""
        began = time.perf_counter()
        scores = self.scores(query)
        room = self.budget_tokens if most is None else min(most, self.budget_tokens)
        order = np.argsort(-scores, kind="stable").tolist()
        above = bool(scores[order[0]] >= self.threshold)
        chosen: list[int] = []
        for chunk in order:
            start, end = self._span(chunk)
            cost = end - start + (len(self.gap) if chosen else 0)
            if chosen and (scores[chunk] < self.threshold or cost > room):
                break
            chosen.append(chunk)
            room -= cost
        return self.passages(sorted(chosen), scores=scores, above=above, seconds=time.perf_counter() - began)

    def passages(
        self, chunks: Sequence[int], *, scores: Float32[np.ndarray, " chunk"], above: bool, seconds: float
    ) -> Selection:
        """These chunks, in rising order, as a selection."""
        spans: list[tuple[int, int]] = []
        for chunk in chunks:
            start, end = self._span(chunk)
            if spans and spans[-1][1] == start:
                spans[-1] = spans[-1][0], end
            else:
                spans.append((start, end))
        ids: list[int] = []
        for start, end in spans:
            ids += [*(self.gap if ids else ()), *self._tokens[start:end]]
        return Selection(
            ids=tuple(ids),
            spans=tuple(spans),
            scores=tuple(float(scores[chunk]) for chunk in chunks),
            above=above,
            seconds=seconds,
        )

    def _span(self, chunk: int) -> tuple[int, int]:
        start = chunk * self.chunk_tokens
        return start, min(start + self.chunk_tokens, len(self._tokens))


class RagDrafter:
    """Drafts a chain of `gamma` tokens, drawn from a model that reads passages in place of the context.

    The prompt that is generated from must hold the retriever's context, token for token; what stands before and after
    it is the drafter's too. At temperature 0 the best guesses take the place of drawn ones, and the chain carries q at
    temperature 1, which the shift needs.

    It is also a source of distributions: trees of other shapes can be drawn from it (`loci.decoding.draft_model`).

    Args:
        draft: with a cache of its own.
        query: what passages are chosen by; the text that follows the context unless given.
    """

    name = NAME
    needs = Needs()
    law: Law = "iid"

    def __init__(self, draft: DraftLM, retriever: Retriever, gamma: int = 10, *, query: str | None = None) -> None:
        if gamma < 1:
            raise BadInput(f"gamma is {gamma}; a chain has at least 1 token.")
        self.draft, self.retriever, self.gamma, self.query = draft, retriever, gamma, query
        self.vocabulary = draft.vocabulary
        self.selection: Selection | None = None  # what it reads now; None while it is off
        self.start_seconds = 0.0  # of choosing passages and reading them
        self.extra_passes = 0  # of the drafter, for the token after a chain that was accepted whole
        self._grown: Draft | None = None
        self._ends = draft.model.end_tokens

    @property
    def nbytes(self) -> int:
        return self.draft.nbytes + self.retriever.nbytes

    @property
    def horizon(self) -> int:
        return 0 if self.selection is None else max(0, self.draft.room)

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        began = time.perf_counter()
        self.selection, self._grown, self.start_seconds = None, None, 0.0
        context = self.retriever.tokens
        if (why := off(len(context), self.retriever.budget_tokens)) is not None:
            state.note(why)
            return
        prompt = list(state.tokens)
        place = found_at(prompt, context)
        if place is None:
            raise BadInput(
                f"the prompt of {len(prompt):,} tokens does not hold the {len(context):,} tokens of the retriever's"
                " context. Put the same token ids into both, not the text encoded twice: `loci.decoding.rapid.prompt`."
            )
        before, after = prompt[:place], prompt[place + len(context) :]
        window = self.draft.model.window
        most = window - len(before) - len(after) - min(_ANSWER, window // 4)
        query = self.query if self.query is not None else self.draft.model.decode(after)
        selection = self.retriever.select(query, most=max(1, most))
        if len(selection.ids) > max(0, most):
            raise ContextTooLong(
                f"{self.draft.name} reads at most {window:,} tokens; the question with its layout has"
                f" {len(before) + len(after):,} and the shortest passage {len(selection.ids):,}. Ask less at once,"
                " or make the retriever's chunks smaller."
            )
        if not selection.above:
            line = f"no chunk is similar to the query; the best of them has a cosine of {max(selection.scores):.2f}"
            state.note(line)
            log.warning("%s", line)
        self.selection = selection
        self.draft.begin([*before, *selection.ids, *after])
        self.start_seconds = time.perf_counter() - began
        pieces = f"{len(selection.spans)} passage{'s' if len(selection.spans) > 1 else ''}"
        state.note(
            f"the drafter reads {len(selection.ids):,} of {len(context):,} tokens in {pieces},"
            f" chosen in {selection.seconds:.3f} s"
        )

    def propose(self, state: DraftState) -> TokenTree:
        root = int(state.tokens[-1])
        length = min(self.gamma, state.budget - 1, self.horizon)
        if self.selection is not None and self.horizon < 1:
            state.note("the drafter's window is full; from there on the target goes on alone")
        if length < 1:
            return TokenTree.root(root)
        sampling = _PLAIN if state.sampling.greedy else state.sampling
        draft, rows = Draft([root]), []
        for node in range(length):
            (q,) = self.distribution(draft, [node], sampling=sampling)
            rows.append(q)
            token = int(q.argmax()) if state.sampling.greedy else drawn(q, state.rng.random())
            draft.add(node, token)
            if token in self._ends:
                break
        size = len(draft.tokens)
        return TokenTree(
            tokens=np.array(draft.tokens, dtype=np.int32),
            parents=np.array(draft.parents, dtype=np.int32),
            law="iid",
            q=np.stack(rows),
            q_row=np.array([*range(size - 1), -1], dtype=np.int32),
        )

    def observe(self, result: StepResult) -> None:
        self._grown = None
        if self.selection is not None:
            self.draft.extend(result.committed)

    def distribution(
        self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling
    ) -> Float32[np.ndarray, "node vocabulary"]:
        """Of the token after each of these nodes."""
        self._grown = draft
        return self.draft.distribution(draft, nodes, sampling=sampling)

    def after(self, tree: TokenTree, node: int, sampling: Sampling) -> Float32[np.ndarray, " vocabulary"] | None:
        """q after a node that was proposed as a leaf, by one more pass; None while the drafter is off, and where its
        window ends."""
        if self.selection is None or self.draft.room < int(tree.depth[node]):
            return None
        draft = self._grown
        fresh = draft is None or draft.tokens[0] != int(tree.tokens[0])
        if draft is None or fresh:
            draft = Draft([int(tree.tokens[0])])
        path = [0]
        for token in tree.tokens[tree.ancestors[node]].tolist()[1:]:
            below = (child for child, parent in enumerate(draft.parents) if parent == path[-1])
            known = next((child for child in below if draft.tokens[child] == token), None)
            path.append(draft.add(path[-1], token) if known is None else known)
        self.extra_passes += 1
        # In a draft of this step all nodes but the leaf have been asked for.
        q: Float32[np.ndarray, " vocabulary"] = self.distribution(
            draft, path if fresh else path[-1:], sampling=sampling
        )[-1]
        return q


@dataclass(frozen=True)
class ShiftedTarget:
    """The rule that checks such drafts: the target's distribution, moved towards the drafter's.

    Under "shifted" and "lossless" it checks trees of any sampled law, under "paper" chains alone.

    Args:
        eta: the paper's for self-speculation, of 5, 10 and 20; 40 or 50 where the drafter is the larger model. Not used
            under "lossless".
        tail: below this share of its highest value p' gives way to p; equation 9.
        beyond: q after a leaf, `RagDrafter.after`. "shifted" needs it.
    """

    eta: float = 10.0
    tail: float = 0.1
    law: TargetLaw = "shifted"
    beyond: Beyond | None = None

    laws = frozenset[Law](("point", "iid", "without_replacement"))  # "point" for the root alone

    def __post_init__(self) -> None:
        if self.law not in TARGET_LAWS:
            raise BadInput(f"the law of a shifted target is one of {', '.join(TARGET_LAWS)}; found {self.law!r}.")
        if not 0.0 <= self.eta < float("inf"):
            raise BadInput(f"eta is {self.eta}; it must be 0 (the target as it is) or a positive number.")
        if not 0.0 <= self.tail <= 1.0:
            raise BadInput(f"tail is {self.tail}; it is a share of the highest probability, between 0 and 1.")

    @property
    def name(self) -> str:
        return self.law if self.law == "lossless" else f"{self.law}, eta {self.eta:g}"

    @property
    def exact(self) -> bool:
        return self.law == "lossless" or self.eta == 0.0

    def moved(self, p: Probabilities, q: Probabilities) -> Probabilities:
        """p' after the tail guard. "shifted" normalises it; as the paper has it, it may hold more than 1 in all."""
        if self.exact:
            return p
        found = guarded(shifted(p, q, eta=self.eta), p, tail=self.tail)
        return found if self.law == "paper" else np.asarray(found / found.sum(), dtype=np.float64)

    def output(self, p: Probabilities, q: Probabilities) -> tuple[Probabilities, float]:
        """What comes out at a node with one child, in closed form, and the probability that it is the drafted token."""
        target = self.moved(p, q)
        taken = np.minimum(q, target)
        accepted = float(taken.sum())
        if self.law != "paper":
            return target, accepted
        return taken + (1.0 - accepted) * leftover(p, q, target), accepted

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        if self.exact:
            yield from exact_rule(tree.law, sampling).walk(
                tree, logits, sampling=sampling, noise=noise, allowed=allowed
            )
            return
        drawing = _PLAIN if sampling.greedy else sampling

        seen = partial(self.distributions, tree, logits, drawing, allowed)
        if sampling.greedy:
            yield from walk(tree, lambda node: int(self._target(*seen(node)).argmax()))
        elif self.law == "paper":
            yield from self._as_in_the_paper(tree, seen, noise)
        else:
            yield from self._without_loss(tree, seen, noise)

    def distributions(
        self, tree: TokenTree, logits: Logits, sampling: Sampling, allowed: Allowed | None, node: int
    ) -> tuple[Probabilities, Probabilities | None]:
        """p and q after a node; q is None where the drafter has nothing to say."""
        mask, row = None if allowed is None else allowed(node), logits(node)
        p = np.zeros(len(row))
        kept = warp(row, sampling, allowed=mask)
        p[kept.tokens] = kept.probabilities
        return p, self._q(tree, node, len(row), sampling, mask)

    def _target(self, p: Probabilities, q: Probabilities | None) -> Probabilities:
        return p if q is None else self.moved(p, q)

    def _q(
        self, tree: TokenTree, node: int, size: int, sampling: Sampling, mask: Bool[np.ndarray, " vocabulary"] | None
    ) -> Probabilities | None:
        """The drafter's distribution; None where the target stands alone."""
        if tree.children[node] or (tree.q_row is not None and tree.q_row[node] >= 0):
            return distribution(tree, node, size=size, mask=mask)
        if self.law == "paper":
            return None
        if self.beyond is None:
            raise BadInput(
                "the shifted target needs the drafter's distribution after a whole chain too. Give it"
                " beyond=drafter.after, or use `loci.decoding.rapid.rapid`."
            )
        row = self.beyond(tree, node, sampling)
        if row is None:
            return None
        q = row.astype(np.float64)
        if mask is not None:
            q[~mask] = 0.0
        total = q.sum()
        return np.asarray(q / total, dtype=np.float64) if total > 0 else None

    def _without_loss(
        self,
        tree: TokenTree,
        seen: Callable[[int], tuple[Probabilities, Probabilities | None]],
        noise: Noise,
    ) -> Iterator[tuple[int, int]]:
        same = [0]  # nodes with one path of tokens; more than one only where independent siblings are alike
        while True:
            node, depth = same[0], int(tree.depth[same[0]])
            p, q = seen(node)
            target = self._target(p, q)
            children = [child for twin in same for child in tree.children[twin]]
            if q is None or not children:
                yield node, noise.draw(support(target), depth=depth)
                return
            tokens = tree.tokens[children].tolist()
            uniforms = noise.uniforms(len(children) + 1, depth=depth)
            accepted, rest = first_accepted(target, q, tokens, law=tree.law, uniforms=uniforms[:-1])
            if accepted is None:
                yield node, drawn(rest, float(uniforms[-1]))
                return
            yield int(tree.parents[children[accepted]]), tokens[accepted]
            same = [child for child, token in zip(children, tokens, strict=True) if token == tokens[accepted]]
            same.sort(key=lambda child, first=children[accepted]: child != first)  # type: ignore[misc]

    def _as_in_the_paper(
        self,
        tree: TokenTree,
        seen: Callable[[int], tuple[Probabilities, Probabilities | None]],
        noise: Noise,
    ) -> Iterator[tuple[int, int]]:
        if any(len(children) > 1 for children in tree.children):
            raise Unsupported('the law "paper" checks chains. Use law="shifted" for trees.')
        node = 0
        while True:
            p, q = seen(node)
            if q is None or not tree.children[node]:
                yield node, noise.draw(support(p), depth=node)
                return
            target, (child,) = self.moved(p, q), tree.children[node]
            token = int(tree.tokens[child])
            first, second = noise.uniforms(2, depth=node).tolist()
            if first >= chance(target, q, token):
                yield node, drawn(leftover(p, q, target), second)
                return
            yield node, token
            node = child


def shifted_logits(
    logits: Probabilities,
    q: Probabilities,
    *,
    eta: float,
    temperature: float,
) -> Probabilities:
    """Equation 8: logits after one step of size eta down the gradient T * (p - q)."""
    return np.asarray(logits - eta * distillation_gradient(logits, q, temperature=temperature), dtype=np.float64)


def distillation_gradient(logits: Probabilities, q: Probabilities, *, temperature: float) -> Probabilities:
    """Of T^2 * KL(q || softmax(logits / T)) by the logits: T * (p - q)."""
    mass = np.exp((logits - logits.max()) / temperature)
    return np.asarray(temperature * (mass / mass.sum() - q), dtype=np.float64)


def shifted(p: Probabilities, q: Probabilities, *, eta: float) -> Probabilities:
    """softmax of the shifted logits over T: p * exp(eta * (q - p)), normalised. What p excludes stays excluded."""
    gain = eta * (q - p)
    mass = p * np.exp(np.minimum(gain - gain[p > 0].max(), 0.0))
    return np.asarray(mass / mass.sum(), dtype=np.float64)


def guarded(moved: Probabilities, p: Probabilities, *, tail: float) -> Probabilities:
    """Equation 9: p where the moved distribution is below this share of its highest value."""
    return np.asarray(np.where(moved < tail * moved.max(), p, moved), dtype=np.float64)


def leftover(
    p: Probabilities,
    q: Probabilities,
    target: Probabilities,
) -> Probabilities:
    """Equation 10, clipped where it is negative: norm(max(p - target, p - q, 0)), what the paper draws from after a
    rejection."""
    rest = np.maximum(p - np.minimum(q, target), 0.0)
    total = rest.sum()
    return np.asarray(rest / total, dtype=np.float64) if total > 0 else p


def support(p: Probabilities) -> Support:
    """The tokens that a distribution can give."""
    tokens = np.flatnonzero(p > 0)
    return Support(tokens.astype(np.int64), np.log(p[tokens]))


def drawn(q: Float32[np.ndarray, " vocabulary"] | Probabilities, uniform: float) -> int:
    """The token that a number between 0 and 1 falls on."""
    reached = q.cumsum(dtype=np.float64)
    return int(np.searchsorted(reached, uniform * reached[-1], side="right"))


def off(context: int, budget: int) -> str | None:
    """Why RAPID does not run; None where it does."""
    if context > budget:
        return None
    return (
        f"RAPID is off, decoding is plain: the context has {context:,} tokens, no more than the {budget:,} that the"
        " drafter would read of it"
    )


def found_at(prompt: Sequence[int], context: Sequence[int]) -> int | None:
    """Where the context begins in a prompt; None if it does not stand there."""
    whole, part = np.asarray(prompt), np.asarray(context)
    last = len(whole) - len(part) + 1
    for place in np.flatnonzero(whole[: max(0, last)] == part[0]).tolist():
        if np.array_equal(whole[place : place + len(part)], part):
            return int(place)
    return None


def prompt(model: LanguageModel, context: Sequence[int], query: str, *, plain: bool = False) -> list[int]:
    """Token ids of a question about a context: the context stands first and is not encoded again.

    Args:
        plain: the bare texts, without the model's chat layout.

    Raises:
        Unsupported: the chat layout changes the message that it is given.
    """
    tokenizer = model.tokenizer
    if plain or not tokenizer.chat_template:
        return [*tokenizer.encode(""), *context, *tokenizer.encode(f"\n\n{query}", add_special_tokens=False)]
    mark = "\u241econtext\u241e"
    rows = [{"role": "user", "content": f"{mark}\n\n{query}"}]
    text = str(tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True))
    before, marked, after = text.partition(mark)
    if not marked:
        raise Unsupported(f"the chat layout of {model.name} changes its messages. Use plain=True.")
    first, second = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
    return [*first, *context, *second]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that `loci.lm.generate` and `loci.lm.stream` need. `drafter` and `acceptance` are None where RAPID is off;
    `note` then says why. `index_seconds` is what indexing the context took."""

    prompt: list[int]
    drafter: RagDrafter | None
    acceptance: ShiftedTarget | None
    max_nodes: int
    index_seconds: float
    note: str | None

    def count(self, stats: GenerationStats) -> None:
        """Add what was done before generation. To be called once, on the statistics of the whole."""
        stats.draft_seconds += self.index_seconds
        stats.seconds += self.index_seconds
        stats.first_token_seconds += self.index_seconds
        if self.note is not None:
            stats.note(self.note)
        if self.drafter is not None:
            stats.note(f"the context was indexed in {self.index_seconds:.2f} s")


@dataclass(frozen=True, kw_only=True)
class RapidGeneration(Generation):
    """One text, and what the drafter read. `selection` is None where RAPID was off; `retrieval_seconds` are those of
    index and choice."""

    selection: Selection | None
    retrieval_seconds: float

    @property
    def rag_tokens(self) -> int:
        """Tokens of the passages that the drafter read."""
        return 0 if self.selection is None else len(self.selection.ids)


def prepare(
    model: LanguageModel,
    context: str | Sequence[int],
    query: str,
    *,
    draft_model: DraftLM | LanguageModel | str | Path | None = None,
    eta: float = 10.0,
    gamma: int = 10,
    law: TargetLaw = "shifted",
    tail: float = 0.1,
    embedder: Embedder | None = None,
    retriever: ContextRetriever | None = None,
    draft_engine: str | StepEngine = "auto",
    plain: bool = False,
) -> Prepared:
    """Index the context and make drafter and rule; arguments and errors as in `rapid`."""
    ids = (
        model.tokenizer.encode(context, add_special_tokens=False)
        if isinstance(context, str)
        else [int(token) for token in context]
    )
    if not ids:
        raise BadInput("the context is empty; there is nothing to retrieve from.")
    if not query.strip():
        raise BadInput("the query is empty; ask something about the context.")
    rule = ShiftedTarget(eta=eta, tail=tail, law=law)
    laid_out = prompt(model, ids, query, plain=plain)
    if len(laid_out) >= model.window:
        raise ContextTooLong(
            f"context and question have {len(laid_out):,} tokens and {model.name} reads at most {model.window:,}, the"
            " answer included. Load it with a `rope_scaling` in its config that stretches the window, or see which"
            " systems read longer contexts: loci systems --room context"
        )
    if retriever is None:
        found = embedder or load_embedder()
        if found is None:
            raise BadInput("RAPID needs an embedder to choose passages by.")
        retriever = ContextRetriever.fitting(model, found)
    began = time.perf_counter()
    if (why := off(len(ids), retriever.budget_for(len(ids)))) is not None:
        return Prepared(prompt=laid_out, drafter=None, acceptance=None, max_nodes=1, index_seconds=0.0, note=why)
    retriever.build(ids)
    seconds = time.perf_counter() - began
    if isinstance(draft_model, str | Path):
        draft_model = load_model(draft_model)
    draft = (
        draft_model
        if isinstance(draft_model, DraftLM)
        else DraftLM(draft_model or model, engine=draft_engine, shared=model)
    )
    draft.check(model)
    drafter = RagDrafter(draft, retriever, gamma, query=query)
    return Prepared(
        prompt=laid_out,
        drafter=drafter,
        acceptance=replace(rule, beyond=drafter.after),
        max_nodes=gamma + 1,
        index_seconds=seconds,
        note=None,
    )


def rapid(
    model: LanguageModel,
    context: str | Sequence[int],
    query: str,
    *,
    draft_model: DraftLM | LanguageModel | str | Path | None = None,
    eta: float = 10.0,
    gamma: int = 10,
    law: TargetLaw = "shifted",
    tail: float = 0.1,
    embedder: Embedder | None = None,
    retriever: ContextRetriever | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    stop: Stop = _STOP,
    engine: str | StepEngine = "auto",
    draft_engine: str | StepEngine = "auto",
    plain: bool = False,
) -> RapidGeneration:
    """Answer a question about a long context.

    Args:
        context: text or token ids. One that is no longer than what the drafter would read is decoded plainly.
        draft_model: the target itself unless given; a larger one makes a small target better at a lower gain in speed.
        eta: how far the target moves towards the drafter; 0 leaves it as it is.
        gamma: tokens drafted per step; the paper's.
        law: see `ShiftedTarget`.
        embedder: of the retriever; the bundled one unless given.
        retriever: keep one to ask several questions about one context, or about one that grows.
        engine: give an engine of your own to read the context once for several questions.
        draft_engine: of the drafter, where `draft_model` is no `DraftLM`; not the target's.
        plain: without the model's chat layout.

    The time of index, choice and the drafter's own prompt is in `stats.draft_seconds`.

    Raises:
        BadInput: eta below 0, a drafter with other tokens, an empty context or query.
        ContextTooLong: the context does not fit into the model's window.
    """
    ready = prepare(
        model,
        context,
        query,
        draft_model=draft_model,
        eta=eta,
        gamma=gamma,
        law=law,
        tail=tail,
        embedder=embedder,
        retriever=retriever,
        draft_engine=draft_engine,
        plain=plain,
    )
    if ready.drafter is not None and ready.drafter.draft.engine is engine:
        raise BadInput("target and drafter have one engine, which holds one text. Give the drafter its own.")
    found = generate(
        model,
        ready.prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        drafter=ready.drafter,
        acceptance=ready.acceptance,
        engine=engine,
        max_nodes=ready.max_nodes,
    )
    ready.count(found.stats)
    selection = None if ready.drafter is None else ready.drafter.selection
    chosen_in = 0.0 if selection is None else selection.seconds
    return RapidGeneration(
        **{item.name: getattr(found, item.name) for item in fields(Generation)},
        selection=selection,
        retrieval_seconds=ready.index_seconds + chosen_in,
    )
