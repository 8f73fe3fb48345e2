"""Several drafters, one tree: guesses compete for the nodes of a step by what guesses like them have earned.

Letters key: names guesses that are alike, such as "the second best at depth 1" or "follows a match of five tokens".
Ours    each drafter says what it would try; how often guesses of a kind came true once their parent had is a running
        average (half-life 200 steps), and a guess is worth the product along its path. The tree takes the best guesses
        until its nodes are used up; guesses of two drafters that mean the same are one node. A drafter that knows
        followers of any token (`Grows`) continues below the others' guesses.
        What came true is seen for guesses outside the tree too: their tokens are compared with the text that came.
        Drafting switches itself off while it costs more seconds than it saves, and tries again after a while. Seconds
        come from a table of step costs if one is given, else from the running medians of plain and drafted steps. That
        decides how many tokens a step gives, never which.
Near    `TokenTree.merge` joins two trees in the order in which they are given.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32

from loci.errors import BadInput
from loci.lm.draft import PROBE, TOKEN, Drafter, DraftState, Law, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.engine.base import Injecting, Injection

HALF_LIFE = 200.0  # steps
_PRIOR = 4.0  # tries that the first estimate of a kind of guess counts for; ours
_CLOCKED = 32  # latest steps of a size whose median is its cost; ours
_PLAIN_AT = (6, 18)  # the first steps that are made plain to learn what a plain one costs; ours
_PLAIN_EVERY = 128  # steps between two plain ones after that: 1 % of the speed; ours
_ENOUGH = 12  # drafted steps from which the gain is believed; ours
_REST, _LONGEST_REST = 32, 512  # plain steps after a gain below 1, doubled each time; ours
_DEEP = 4  # depths below which grown guesses are alike; ours
_FIRST_WORTH = 0.3  # of a first guess before anything was drafted; ours
_PRIOR_RATE = 0.25  # how often a guess of an unknown kind comes true; ours
# How often a grown guess came true, before anything was learned: the best follower by depth, the others by rank. Both
# are SmolLM2-135M's on instructions.
GROWN_FIRST = (0.35, 0.45, 0.5, 0.55, 0.58)
GROWN_OTHERS = (0.11, 0.05, 0.04, 0.02, 0.02, 0.01, 0.01)
# Worth of a probe, in parts of its parent's: it gives nothing now and lets the next step guess. Ours.
PROBE_WORTH = 0.5


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What a drafter would try, cheaper than a checked `TokenTree`: nodes in topological order, node 0 the root."""

    tokens: list[int]  # -1 for probes
    parents: list[int]
    keys: list[Hashable]  # kinds of guesses; the root's and the probes' are not read
    embeds: Mapping[int, Float32[np.ndarray, " width"]] | None = None  # of the probes, by node


@runtime_checkable
class Guessing(Protocol):
    """A drafter that says more about its guesses than a tree does."""

    name: str
    priors: Mapping[Hashable, float]  # how often a kind of guess comes true, before anything was learned

    def guesses(self, state: DraftState) -> Guesses: ...


@runtime_checkable
class Grows(Protocol):
    """A drafter that knows ranked followers of any token. In a blend it is asked for those alone."""

    name: str

    def after(self, token: int) -> Sequence[int]: ...


@dataclass(eq=False)
class Experience:
    """What guesses earned and steps cost so far. Texts of one model may share it; it holds no text."""

    half_life: float = HALF_LIFE
    hits: dict[Hashable, float] = field(default_factory=dict)
    tries: dict[Hashable, float] = field(default_factory=dict)
    drafted_tokens: float = 0.0  # per drafted step, with the same half-life
    drafted_steps: float = 0.0
    worths: list[float] = field(default_factory=list)  # of the second node of a tree, the third, ...: running averages
    steps: int = 0
    rests_until: int = 0
    rest: int = _REST
    seconds: dict[str, deque[float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _weight: float = 1.0  # of what is seen now; it grows instead of everything else shrinking

    def rate(self, key: Hashable, prior: float) -> float:
        """How often guesses of this kind come true."""
        known = _PRIOR * self._weight
        return (self.hits.get(key, 0.0) + prior * known) / (self.tries.get(key, 0.0) + known)

    def saw(self, key: Hashable, came_true: bool) -> None:
        self.tries[key] = self.tries.get(key, 0.0) + self._weight
        if came_true:
            self.hits[key] = self.hits.get(key, 0.0) + self._weight

    def tick(self) -> None:
        """A step is over: what was seen counts a little less from now on."""
        self.steps += 1
        self._weight *= 2.0 ** (1.0 / self.half_life)
        if self._weight > 1e60:
            for counts in (self.hits, self.tries):
                for key in counts:
                    counts[key] /= self._weight
            self.drafted_tokens /= self._weight
            self.drafted_steps /= self._weight
            self._weight = 1.0

    def drafted(self, tokens: int) -> None:
        self.drafted_tokens += tokens * self._weight
        self.drafted_steps += self._weight

    @property
    def tokens_per_drafted_step(self) -> float:
        return self.drafted_tokens / self.drafted_steps if self.drafted_steps else 1.0

    def grew(self, worths: Sequence[float]) -> None:
        """A tree was drafted whose nodes under the root had these worths."""
        share = max(1.0 - 2.0 ** (-1.0 / self.half_life), 1.0 / (1.0 + self.drafted_steps / self._weight))
        for place, worth in enumerate(worths):
            if place == len(self.worths):
                self.worths.append(worth)
            else:
                self.worths[place] += share * (worth - self.worths[place])

    def expected_tokens(self, nodes: int) -> float:
        """New tokens of a step whose tree has so many nodes. Where so large a tree was never drafted, each further node
        is taken to be worth a tenth less than the one before it."""
        known = self.worths or [_FIRST_WORTH]
        tail = range(1, nodes - len(known))
        return 1.0 + sum(known[: nodes - 1]) + sum(known[-1] * 0.9**place for place in tail)

    def clocked(self, kind: str, seconds: float) -> None:
        self.seconds.setdefault(kind, deque(maxlen=_CLOCKED)).append(seconds)

    def cost(self, kind: str) -> tuple[float, int]:
        """The median seconds of steps of this kind, and how many were clocked."""
        known = self.seconds.get(kind, ())
        return (median(known) if known else 0.0), len(known)


class BlendedDrafter:
    """Drafters that share the nodes of each step.

    Args:
        drafters: of the law "point", each with a name of its own.
        experience: to go on from; a new one unless given.
        cost: seconds of a step with so many nodes, for example `lambda nodes: cost.seconds(nodes, context)`. With it
            every tree has the size that gives the most tokens per second; without it trees fill the budget and the
            drafter clocks its steps.
        switch_off: whether drafting pauses while it costs more than it saves.
        clock: for tests.
    """

    law: Law = "point"

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        experience: Experience | None = None,
        cost: Callable[[int], float] | None = None,
        switch_off: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not drafters:
            raise BadInput("a blend needs at least one drafter.")
        wrong = next((drafter for drafter in drafters if drafter.law != "point"), None)
        if wrong is not None:
            raise BadInput(
                f'{wrong.name} drafts by the law "{wrong.law}"; only drafters of the law "point" share a tree.'
            )
        names = [drafter.name for drafter in drafters]
        if len(set(names)) < len(names):
            raise BadInput(f"drafters of a blend need names of their own; found {', '.join(names)}.")
        self.drafters = tuple(drafters)
        self.name = "+".join(names)
        self.experience = experience if experience is not None else Experience()
        self.cost = cost
        self.switch_off = switch_off
        self._clock = clock
        layers = sorted({layer for drafter in drafters for layer in drafter.needs.hidden})
        self.needs = Needs(
            hidden=tuple(layers),
            topk=max(drafter.needs.topk for drafter in drafters),
            prefill=any(drafter.needs.prefill for drafter in drafters),
            hooks=any(drafter.needs.hooks for drafter in drafters),
        )
        self._layers = [[layers.index(layer) for layer in drafter.needs.hidden] for drafter in drafters]
        # Looked at once: asking a protocol takes longer than drafting a node.
        self._guessing = {place: drafter for place, drafter in enumerate(drafters) if isinstance(drafter, Guessing)}
        self._growing = {
            place: drafter
            for place, drafter in enumerate(drafters)
            if isinstance(drafter, Grows) and place not in self._guessing
        }
        self._growers = [(drafter.name, drafter) for drafter in self._growing.values()]
        self._grown: _Growth | None = None  # the last tree, while it is checked
        self._drafted = False
        self._probing: set[int] = set()  # places of the drafters that sent probes
        self._since: float | None = None  # when the step began that is running

    @property
    def nbytes(self) -> int:
        return sum(drafter.nbytes for drafter in self.drafters)

    @property
    def gain(self) -> float | None:
        """Tokens per second of drafted steps over those of plain steps, as measured; None while too little is known."""
        with self.experience.lock:
            return self._gain()

    def _gain(self) -> float | None:
        known = self.experience
        plain, plain_steps = known.cost("plain")
        drafted, drafted_steps = known.cost("drafted")
        if plain_steps < len(_PLAIN_AT) or drafted_steps < _ENOUGH or drafted <= 0.0:
            return None
        return known.tokens_per_drafted_step * plain / drafted

    def expected_tokens(self, nodes: int) -> float:
        """New tokens per step with a tree of so many nodes, by what guesses have earned."""
        with self.experience.lock:
            return self.experience.expected_tokens(nodes)

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self._grown, self._since = None, None
        for drafter, layers in zip(self.drafters, self._layers, strict=True):
            ranks = drafter.needs.topk if drafter.needs.prefill else 0
            hidden = prefill.hidden
            drafter.start(
                state,
                PrefillResult(
                    tokens=prefill.tokens,
                    start=prefill.start,
                    topk_ids=prefill.topk_ids[:, :ranks] if ranks and prefill.topk_ids is not None else None,
                    topk_logits=prefill.topk_logits[:, :ranks] if ranks and prefill.topk_logits is not None else None,
                    hidden=hidden[layers] if layers and hidden is not None and drafter.needs.prefill else None,
                ),
            )

    def propose(self, state: DraftState) -> TokenTree:
        began = self._clock()
        root = int(state.tokens[-1])
        with self.experience.lock:
            self._drafted = state.budget > 1 and not self._pauses()
            self._grown = self._grow(root, state) if self._drafted else None
        tree = TokenTree.root(root) if self._grown is None else self._grown.tree()
        self._since = began
        return tree

    def observe(self, result: StepResult) -> None:
        known, grown, since = self.experience, self._grown, self._since
        self._grown, self._since = None, None
        with known.lock:
            if since is not None:  # else no proposal was asked for
                known.clocked("drafted" if self._drafted else "plain", self._clock() - since)
            if grown is not None:
                grown.learn(result)
                known.drafted(len(result.committed))
                known.grew(grown.worths[1:])
            known.tick()
        owners = grown.probe_owners if grown is not None else []
        self._probing.update(owners)
        for place, drafter in enumerate(self.drafters):
            drafter.observe(self._seen_by(place, result, owners))

    @property
    def injections(self) -> Sequence[Injection]:
        """What probes become between layers, for the one drafter that needs it."""
        return next(
            (drafter.injections for drafter in self.drafters if drafter.needs.hooks and isinstance(drafter, Injecting)),
            (),
        )

    def _pauses(self) -> bool:
        """Whether this step is plain: to learn what that costs, or because drafting does not pay."""
        known = self.experience
        if not self.switch_off or self.cost is not None:  # with known costs a tree that does not pay is a root
            return False
        if known.steps < known.rests_until or known.steps in _PLAIN_AT or known.steps % _PLAIN_EVERY == 0 < known.steps:
            return True
        gain = self._gain()
        if gain is None:
            return False
        if gain >= 1.0:
            known.rest = _REST
            return False
        known.rests_until = known.steps + known.rest
        known.rest = min(2 * known.rest, _LONGEST_REST)
        known.seconds["drafted"].clear()  # so that the next try is judged by its own steps
        return True

    def _grow(self, root: int, state: DraftState) -> _Growth:
        growth = _Growth(root, self.experience, self._growers)
        for place, drafter in enumerate(self.drafters):
            guessing = self._guessing.get(place)
            if guessing is not None:
                growth.add(place, guessing.name, guessing.guesses(state), guessing.priors)
            elif place not in self._growing:
                growth.add(place, drafter.name, guesses_of(drafter.propose(state)), {})
        growth.run(state.budget, self.cost)
        return growth

    def _seen_by(self, place: int, result: StepResult, owners: Sequence[int]) -> StepResult:
        """The step as one drafter asked for it: its ranks, its layers, and of the probes only its own."""
        drafter = self.drafters[place]
        needs, layers = drafter.needs, self._layers[place]
        if place in self._probing and any(owner != place for owner in owners):
            result = _without_probes_of_others(result, np.array(owners) == place)
        if needs.topk == self.needs.topk and needs.hidden == self.needs.hidden:
            return result
        ids, logits, hidden = result.topk_ids, result.topk_logits, result.hidden
        return replace(
            result,
            topk_ids=ids[:, : needs.topk] if needs.topk and ids is not None else None,
            topk_logits=logits[:, : needs.topk] if needs.topk and logits is not None else None,
            hidden=hidden[layers] if layers and hidden is not None else None,
        )


class _Growth:
    """One tree while it grows, best guess first, and what of it came true."""

    def __init__(self, root: int, known: Experience, growers: Sequence[tuple[str, Grows]]) -> None:
        self.known = known
        self.tokens, self.parents, self.depths, self.worths = [root], [-1], [0], [1.0]
        self.growers = growers
        self.rows: list[list[Sequence[int]]] = [[] for _ in growers]  # per grower and node: ranked followers
        self.sources: list[tuple[str, Guesses]] = []
        self.below: list[list[list[tuple[int, float]]]] = []  # per source and place in it: children, how likely each is
        self.owners: list[int] = []  # per source: the drafter's place in the blend
        self.placed: dict[tuple[int, int], int] = {}  # parent and token: node
        self.probes: list[tuple[int, int, int]] = []  # node, source, place in it
        self.probe_owners: list[int] = []
        # Candidates: -worth, order of finding (which decides ties), parent, token, source, place. Sources behind the
        # last one are growers, whose place is a rank.
        self.waiting: list[tuple[float, int, int, int, int, int]] = []
        self.found = 0

    def add(self, owner: int, name: str, guesses: Guesses, priors: Mapping[Hashable, float]) -> None:
        below: list[list[tuple[int, float]]] = [[] for _ in guesses.tokens]
        for place in range(1, len(guesses.tokens)):
            if guesses.tokens[place] < 0:
                rate = PROBE_WORTH
            else:
                key = guesses.keys[place]
                rate = self.known.rate((name, key), priors.get(key, _PRIOR_RATE))
            below[guesses.parents[place]].append((place, rate))
        self.sources.append((name, guesses))
        self.below.append(below)
        self.owners.append(owner)

    def run(self, budget: int, cost: Callable[[int], float] | None) -> None:
        """Take the best candidates until the nodes are used up, or, with costs, to the size of most tokens a second."""
        placed = self.placed
        for source in range(len(self.sources)):
            self._offer(source, 0, 0)
        self._begin_rows(0)
        best, expected = 1, 1.0
        speed = 0.0 if cost is None else 1.0 / cost(1)
        while self.waiting and len(self.tokens) < budget:
            minus, _, parent, token, source, place = heapq.heappop(self.waiting)
            grown = source >= len(self.sources)
            if grown:
                self._offer_grown(source - len(self.sources), parent, place + 1)
            node = placed.get((parent, token)) if token >= 0 else None
            if node is None:
                node = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(self.depths[parent] + 1)
                self.worths.append(-minus)
                if token < 0:
                    self.probes.append((node, source, place))
                    self.probe_owners.append(self.owners[source])
                    for rows in self.rows:
                        rows.append(())
                else:
                    placed[parent, token] = node
                    self._begin_rows(node)
                    expected -= minus
                if cost is not None and expected / cost(len(self.tokens)) > speed:
                    best, speed = len(self.tokens), expected / cost(len(self.tokens))
            if not grown:
                self._offer(source, place, node)
        if cost is not None and best < len(self.tokens):
            self.tokens, self.parents = self.tokens[:best], self.parents[:best]
            self.probes = [probe for probe in self.probes if probe[0] < best]
            self.probe_owners = self.probe_owners[: len(self.probes)]

    def _offer(self, source: int, place: int, node: int) -> None:
        tokens = self.sources[source][1].tokens
        worth = self.worths[node]
        for child, rate in self.below[source][place]:
            self.found += 1
            heapq.heappush(self.waiting, (-worth * rate, self.found, node, tokens[child], source, child))

    def _begin_rows(self, node: int) -> None:
        for number, (_, grower) in enumerate(self.growers):
            self.rows[number].append(grower.after(self.tokens[node]))
            self._offer_grown(number, node, 0)

    def _offer_grown(self, number: int, node: int, rank: int) -> None:
        row = self.rows[number][node]
        if rank < len(row):
            depth = min(self.depths[node], _DEEP)
            prior = GROWN_FIRST[depth] if rank == 0 else GROWN_OTHERS[min(rank, len(GROWN_OTHERS)) - 1]
            worth = self.worths[node] * self.known.rate((self.growers[number][0], depth, rank), prior)
            self.found += 1
            source = len(self.sources) + number
            heapq.heappush(self.waiting, (-worth, self.found, node, row[rank], source, rank))

    def tree(self) -> TokenTree:
        tokens, parents = np.array(self.tokens, dtype=np.int32), np.array(self.parents, dtype=np.int32)
        if not self.probes:
            return TokenTree(tokens=tokens, parents=parents)
        embeds = []
        for _, source, place in self.probes:
            inputs = self.sources[source][1].embeds
            if inputs is None:
                raise BadInput(f"{self.sources[source][0]} drafted a probe without an embedding.")
            embeds.append(inputs[place])
        kind = np.where(tokens < 0, PROBE, TOKEN).astype(np.int32)
        return TokenTree(tokens=tokens, parents=parents, kind=kind, embeds=np.stack(embeds).astype(np.float32))

    def learn(self, result: StepResult) -> None:
        """Compare every guess with the text that came, whether the tree had room for it or not."""
        for (name, guesses), below in zip(self.sources, self.below, strict=True):
            place: int | None = 0
            for token in result.committed:
                if place is None:
                    break
                hit = None
                for child, _ in below[place]:
                    if guesses.tokens[child] >= 0:
                        came = guesses.tokens[child] == token
                        self.known.saw((name, guesses.keys[child]), came)
                        hit = child if came else hit
                place = hit
        for (name, _), rows in zip(self.growers, self.rows, strict=True):
            node: int | None = 0  # of the tree as it was drafted; a constraint may have cut what was checked
            for token in result.committed:
                if node is None:
                    break
                depth = min(self.depths[node], _DEEP)
                for rank, follower in enumerate(rows[node]):
                    self.known.saw((name, depth, rank), follower == token)
                node = self.placed.get((node, token))


def guesses_of(tree: TokenTree) -> Guesses:
    """A tree as guesses whose kind is their path of ranks among their siblings."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    paths: list[tuple[int, ...]] = [()]
    born = [0] * len(tokens)
    for parent in parents[1:]:
        paths.append((*paths[parent], born[parent]))
        born[parent] += 1
    embeds = None
    if tree.embeds is not None:
        embeds = dict(zip(np.flatnonzero(tree.is_probe).tolist(), tree.embeds, strict=True))
    return Guesses(tokens=tokens, parents=parents, keys=list(paths), embeds=embeds)


def _without_probes_of_others(result: StepResult, own: Bool[np.ndarray, " probe"]) -> StepResult:
    tree = result.tree
    kept = ~tree.is_probe
    kept[tree.is_probe] = own
    nodes = np.flatnonzero(kept)
    moved = np.cumsum(kept) - 1
    parents = np.where(tree.parents[nodes] >= 0, moved[tree.parents[nodes]], -1).astype(np.int32)
    smaller = TokenTree(
        tokens=tree.tokens[nodes],
        parents=parents,
        kind=None if tree.kind is None else tree.kind[nodes],
        embeds=None if tree.embeds is None else tree.embeds[own],
    )
    return replace(
        result,
        tree=smaller,
        logits=lambda node: result.logits(int(nodes[node])),
        accepted=tuple(int(moved[node]) for node in result.accepted),
        topk_ids=None if result.topk_ids is None else result.topk_ids[nodes],
        topk_logits=None if result.topk_logits is None else result.topk_logits[nodes],
        hidden=None if result.hidden is None else result.hidden[:, nodes],
    )
