"""Generating text: one text or many, greedy or sampled, with or without a draft, always the same tokens.

Letters  row: one text of a batch.
Ours     plain decoding is a draft of nothing: each step runs a tree whose root is the last token. Noise is keyed by
         seed, row and position, so a drafter whose guesses are fixed by the past changes the speed and never the output
         (in float32; in bfloat16 near-ties may flip with the shape of a product). One that samples its guesses leaves
         the output's distribution as it is, and the same seed gives the same text again. Cutting at end tokens, stop
         strings and limits happens token by token, also inside an accepted path; what lies beyond is neither given
         out, nor cached, nor counted. Under a constraint, guesses that it forbids are dropped before the step.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from jaxtyping import Bool

from loci.errors import BadInput, ContextTooLong, Unsupported
from loci.lm.chat import Message
from loci.lm.constrain import Constraint, ConstraintState
from loci.lm.cost import Where, best_size, known
from loci.lm.draft import Drafter, DraftState, Forecasting, Needs, PrefillResult, StepResult, TokenTree, named_drafter
from loci.lm.engine.base import Injecting, InjectingEngine, StepEngine, StepOutput
from loci.lm.engine.choose import choose
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Noise, Sampling
from loci.lm.text import TextFlow
from loci.lm.verify import GREEDY as GREEDY_RULE
from loci.lm.verify import Acceptance, exact_rule, walk

if TYPE_CHECKING:
    from transformers import Cache

Prompt = str | Sequence[Message] | Sequence[int]  # text, messages for the chat template, or token ids
Prompts = list[str] | list[list[Message]] | list[list[int]]
FinishReason = Literal["eos", "stop", "length"]
Drafters = Drafter | str | Sequence[Drafter]

log = logging.getLogger(__name__)

# Nodes of a step, all rows together, where no cost of steps was measured: where it begins to rise on processors with
# matrix units, and a size at which a small model on an accelerator still waits for its launches.
AUTO_NODES, AUTO_NODES_ACCELERATOR = 16, 32
# The largest tree that "auto" takes, all rows together; larger ones were never worth their cost.
MOST_NODES = 64


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Where to stop besides the limit of tokens.

    strings: the text ends before the first of them; a string may be spread over several tokens.
    token_ids: the text ends with the first of them.
    eos: whether the model's own end tokens end the text.
    """

    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    eos: bool = True

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise BadInput("a stop string is empty; it would stop every text before its first letter.")


@dataclass(kw_only=True)
class GenerationStats:
    """What one text cost. Seconds and bytes that rows of a batch share are divided among them, so that sums over rows
    are true; `first_token_seconds` is from the call to the row's first token.

    `steps` are forward passes after the prompt; `proposed_nodes` and `accepted_nodes` do not count roots;
    `accepted_by_depth[d]` counts the accepted nodes at depth d + 1. `exact`: the tokens are distributed as the model's
    own; `rule` is how drafts were accepted. `kv_bytes_peak` are the cache's bytes at their highest, `tree_kv_bytes` the
    part of it that drafts took. `notes` are what drafters had to say, each line once.
    """

    engine: str
    drafter: str | None = None
    rule: str | None = None
    exact: bool = True
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, already in the engine's cache
    new_tokens: int = 0
    steps: int = 0
    proposed_nodes: int = 0
    accepted_nodes: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    step_seconds: float = 0.0
    verify_seconds: float = 0.0
    commit_seconds: float = 0.0
    first_token_seconds: float = 0.0
    model_bytes: int = 0
    drafter_bytes: int = 0
    kv_bytes_peak: int = 0
    tree_kv_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    @property
    def other_seconds(self) -> float:
        parts = (self.prefill_seconds, self.draft_seconds, self.step_seconds, self.verify_seconds, self.commit_seconds)
        return max(0.0, self.seconds - sum(parts))

    @property
    def tokens_per_step(self) -> float:
        """1 in plain decoding."""
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted_nodes / self.proposed_nodes if self.proposed_nodes else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the prompt."""
        seconds = self.seconds - self.prefill_seconds
        return self.new_tokens / seconds if seconds > 0 else 0.0

    @property
    def total_tokens_per_second(self) -> float:
        """New tokens per second, the prompt's time included."""
        return self.new_tokens / self.seconds if self.seconds > 0 else 0.0

    def __add__(self, other: GenerationStats) -> GenerationStats:
        """Both together: counts and seconds add up; the model's bytes and the peaks do not."""
        total = GenerationStats(engine=self.engine if self.engine == other.engine else "several")
        total.drafter = self.drafter if self.drafter == other.drafter else "several"
        total.rule = self.rule if self.rule == other.rule else "several"
        total.exact = self.exact and other.exact
        total.notes = list(dict.fromkeys([*self.notes, *other.notes]))
        told = ("engine", "drafter", "rule", "exact", "notes")
        for name in (item.name for item in fields(self) if item.name not in told):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "accepted_by_depth":
                size = max(len(mine), len(theirs))
                padded = (list(counts) + [0] * (size - len(counts)) for counts in (mine, theirs))
                setattr(total, name, [sum(pair) for pair in zip(*padded, strict=True)])
            elif name in ("model_bytes", "drafter_bytes", "kv_bytes_peak", "tree_kv_bytes", "first_token_seconds"):
                setattr(total, name, max(mine, theirs))
            else:
                setattr(total, name, mine + theirs)
        return total


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated text. `tokens` end with the token that ended it (an end token is not in `text`); `text` ends
    before a stop string. `logprobs` are the tokens' log-probabilities under the model's own distribution, before
    sampling options and constraints; empty if not asked for. `seed` makes it again."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    seed: int
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StreamChunk:
    """What one step added. `text` is whole characters, and may be empty while a character or a stop string may still
    be completed. `finish_reason` is set on the last chunk."""

    text: str
    tokens: tuple[int, ...]
    stats: GenerationStats
    finish_reason: FinishReason | None = None


@overload
def generate(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling = ...,
    seed: int | None = ...,
    stop: Stop = ...,
    drafter: Drafter | str | None = ...,
    acceptance: Acceptance | None = ...,
    memory: Cache | None = ...,
    constraint: Constraint | None = ...,
    engine: str | StepEngine = ...,
    max_nodes: Literal["auto"] | int = ...,
    logprobs: bool = ...,
) -> Generation: ...


@overload
def generate(
    model: LanguageModel,
    prompt: Prompts,
    *,
    max_new_tokens: int = ...,
    sampling: Sampling = ...,
    seed: int | Sequence[int] | None = ...,
    stop: Stop = ...,
    drafter: str | Sequence[Drafter] | None = ...,
    acceptance: Acceptance | None = ...,
    memory: Cache | None = ...,
    constraint: Constraint | Sequence[Constraint] | None = ...,
    engine: str | StepEngine = ...,
    max_nodes: Literal["auto"] | int = ...,
    logprobs: bool = ...,
) -> list[Generation]: ...


def generate(
    model: LanguageModel,
    prompt: Prompt | Prompts,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int | Sequence[int] | None = None,
    stop: Stop = Stop(),
    drafter: Drafters | None = None,
    acceptance: Acceptance | None = None,
    memory: Cache | None = None,
    constraint: Constraint | Sequence[Constraint] | None = None,
    engine: str | StepEngine = "auto",
    max_nodes: Literal["auto"] | int = "auto",
    logprobs: bool = False,
) -> Generation | list[Generation]:
    """Continue a text, or each text of a list.

    Args:
        prompt: text, messages (laid out by the model's chat template), or token ids. A list of prompts is a batch and
            gives a list.
        max_new_tokens: at most this many; fewer where the model's window ends, with the finish reason "length".
        seed: of the draws; None takes one from the system and tells it in the result. One number gives each row of a
            batch its own noise; a list gives row i what a single run with that seed would draw.
        drafter: guesses ahead: a drafter, or the name of one ("auto", "lookup", "medusa:PATH"; "none"). For a batch, a
            name or one drafter per row. Costs nothing in the output's quality: every guess is checked. "auto" drafts
            where the model and memory allow it.
        acceptance: the rule by which guesses are accepted; by default the exact one. `stats.exact` tells whether it is.
        memory: a `transformers.Cache` to write into; what it holds already stands before the prompt. One text only.
        constraint: what may be said; for a batch, one for all or one per row.
        engine: "auto" takes the fastest that supports the model, the memory and the drafter; "native", "packed", "cuda"
            and "hf" take that one; `stats.engine` tells which ran. An engine of your own keeps its cache between
            calls, so that a prompt that continues the last one is not read again.
        max_nodes: the largest tree, root included, all rows together. "auto" is what the costs of steps that were
            measured on this machine (`loci.lm.cost`) make best for the drafter; 16 where none were measured, 32 on an
            accelerator.
        logprobs: also give each token's log-probability.

    Raises:
        ContextTooLong: the prompt leaves no room in the model's window.
        BadInput: an empty prompt, or options that do not fit together.
        UnknownName: no engine, or no drafter, is called that.
        Unsupported: the model or memory cannot check drafts, or the rule cannot check drafts of this law.
    """
    single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer | Message))
    prompts: list[Prompt] = [prompt] if single else list(prompt)  # type: ignore[list-item, arg-type]
    if not prompts:
        return []
    run = _Run(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        drafter=drafter,
        acceptance=acceptance,
        memory=memory,
        constraint=constraint,
        engine=engine,
        max_nodes=max_nodes,
        logprobs=logprobs,
    )
    for _ in run.steps():
        pass
    results = [row.result() for row in run.rows]
    return results[0] if single else results


def stream(
    model: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    stop: Stop = Stop(),
    drafter: Drafter | str | None = None,
    acceptance: Acceptance | None = None,
    memory: Cache | None = None,
    constraint: Constraint | None = None,
    engine: str | StepEngine = "auto",
    max_nodes: Literal["auto"] | int = "auto",
) -> Iterator[StreamChunk]:
    """Continue one text and give each step's share as it comes. Arguments as in `generate`.

    Closing the iterator ends the run; engine and drafter can be used again. The chunks' texts together are the text
    that `generate` gives. Wrong arguments raise here, not at the first chunk.
    """
    run = _Run(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        drafter=drafter,
        acceptance=acceptance,
        memory=memory,
        constraint=constraint,
        engine=engine,
        max_nodes=max_nodes,
        logprobs=False,
    )
    return _chunks(run)


def _chunks(run: _Run) -> Iterator[StreamChunk]:
    (row,) = run.rows
    given = 0
    for _ in run.steps():
        tokens, given = tuple(row.new[given:]), len(row.new)
        yield StreamChunk(text=row.text.take(), tokens=tokens, stats=row.stats, finish_reason=row.finish_reason)


class _Row:
    """One text while it is generated."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: list[int],
        *,
        stop: Stop,
        limit: int,
        constraint: Constraint | None,
        seed: int,
    ) -> None:
        self.tokens = tokens  # prompt and answer; the last one is pending
        self.new: list[int] = []
        self.logprobs: list[float] = []
        self.text = TextFlow(model.decode, before=tokens, stops=stop.strings)
        self.limit = limit
        self.seed = seed
        self.key = 0  # row of the noise
        self.ends = model.end_tokens if stop.eos else frozenset()
        self.stop_ids = frozenset(stop.token_ids)
        self.constraint = constraint.start() if constraint is not None else None
        self.finish_reason: FinishReason | None = None
        self.stats = GenerationStats(engine="")
        if self.constraint is not None and self.constraint.finished:
            self._finish("eos")

    def push(self, token: int) -> None:
        """Take one more token and see whether the text ends with it."""
        self.tokens.append(token)
        self.new.append(token)
        self.stats.new_tokens += 1
        if token in self.ends:
            self._finish("eos")
            return
        if self.constraint is not None:
            self.constraint.accept(token)
        if token in self.stop_ids or self.text.push(token):
            self._finish("stop")
        elif self.constraint is not None and self.constraint.finished:
            self._finish("eos")
        elif len(self.new) >= self.limit:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        if self.text.flush():  # bytes held back until now may complete a stop string
            reason = "stop"
        self.finish_reason = reason

    def result(self) -> Generation:
        if self.finish_reason is None:
            raise RuntimeError("a row was asked for its result before it ended")
        return Generation(
            text=self.text.text,
            tokens=tuple(self.new),
            finish_reason=self.finish_reason,
            stats=self.stats,
            seed=self.seed,
            logprobs=tuple(self.logprobs),
        )


class _Run:
    """All rows of one call. Checks everything when it is made; `steps` does the work."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | Sequence[int] | None,
        stop: Stop,
        drafter: Drafters | None,
        acceptance: Acceptance | None,
        memory: Cache | None,
        constraint: Constraint | Sequence[Constraint] | None,
        engine: str | StepEngine,
        max_nodes: Literal["auto"] | int,
        logprobs: bool,
    ) -> None:
        self.started = time.perf_counter()
        count = len(prompts)
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if max_nodes != "auto" and max_nodes < 1:
            raise BadInput(f'max_nodes is {max_nodes}; it must be "auto" or at least 1, the root.')
        if memory is not None and count > 1:
            raise Unsupported(f"a memory holds one text; {count} were given. Generate them one by one.")
        self.sampling, self.with_logprobs = sampling, logprobs
        self.acceptance = acceptance
        self.drafters = _drafters(drafter, model, count)
        needs = self.drafters[0].needs if self.drafters else Needs()
        self.engine = _engine(engine, model, memory, needs)
        if drafter == "auto" and self.engine.capabilities.max_nodes == 1:
            log.debug("nothing is drafted: %s", self.engine.capabilities.why)
            self.drafters = None
        if self.drafters is not None:
            self._check_drafters(count)
        self.nodes = max_nodes if max_nodes != "auto" else 1
        self.window = model.window if memory is None else None
        constraints = list(constraint) if isinstance(constraint, Sequence) else [constraint] * count
        if len(constraints) != count:
            raise BadInput(f"{count} prompts were given {len(constraints)} constraints.")
        seeds = _seeds(seed, count)
        self.rows = []
        for prompt, own, wanted in zip(prompts, seeds, constraints, strict=True):
            tokens = _tokens(model, prompt)
            limit = max_new_tokens if self.window is None else min(max_new_tokens, self.window - len(tokens))
            if limit < 1:
                raise ContextTooLong(
                    f"the prompt has {len(tokens):,} tokens and {model.name} reads at most {self.window:,}, the answer"
                    " included. Shorten the prompt, or use a model with a longer window."
                )
            self.rows.append(_Row(model, tokens, stop=stop, limit=limit, constraint=wanted, seed=own))
        if max_nodes == "auto" and self.drafters is not None:
            context = sum(len(row.tokens) for row in self.rows) // count
            self.nodes = _auto_nodes(model, self.engine, self.drafters[0], rows=count, context=context)
        model_bytes = sum(weight.nbytes for weight in model.model.parameters())
        for number, row in enumerate(self.rows):
            row.key = number if isinstance(seed, int | None) else 0
            row.stats = GenerationStats(engine=self.engine.name, prompt_tokens=len(row.tokens), model_bytes=model_bytes)
            if self.drafters is not None:
                row.stats.drafter = self.drafters[number].name
            if acceptance is not None:
                row.stats.rule, row.stats.exact = acceptance.name, acceptance.exact

    def _check_drafters(self, count: int) -> None:
        drafters = self.drafters or []
        if len(drafters) != count:
            raise BadInput(f"{count} texts were given {len(drafters)} drafters; each text needs its own.")
        if len({drafter.needs for drafter in drafters}) > 1:
            raise BadInput("the drafters of a batch read different outputs; give all rows the same kind of drafter.")
        if self.engine.capabilities.max_nodes == 1:
            raise Unsupported(f"drafts cannot be checked here: {self.engine.capabilities.why}. Use drafter=None.")
        for drafter in drafters:
            if drafter.needs.hooks and not isinstance(drafter, Injecting):
                raise BadInput(f"{drafter.name} needs hooks between layers, and has no `injections` for them.")
            lacking = self.engine.capabilities.lacks(drafter.needs)
            if lacking or (drafter.needs.hooks and not isinstance(self.engine, InjectingEngine)):
                raise Unsupported(
                    f"{drafter.name} cannot draft on the engine {self.engine.name}: {lacking or 'it has no hooks'}. Use"
                    ' engine="auto" or "hf".'
                )
            if self.acceptance is not None and drafter.law not in self.acceptance.laws and not self.sampling.greedy:
                raise self._unfit(drafter.law)

    def _unfit(self, law: str) -> Unsupported:
        assert self.acceptance is not None  # the exact rules fit every law
        return Unsupported(
            f'{self.acceptance.name} cannot check drafts of the law "{law}"; it checks'
            f" {', '.join(sorted(self.acceptance.laws))}. Use acceptance=None, which is exact, or another drafter."
        )

    def steps(self) -> Iterator[None]:
        """Generate; a pause after every step. Rows run side by side where the engine can, else one after another.

        Whoever stops in between leaves engine and drafters usable: a step is over before the pause.
        """
        hooked = self.engine if self.drafters and self.drafters[0].needs.hooks else None
        if isinstance(hooked, InjectingEngine) and self.drafters and isinstance(self.drafters[0], Injecting):
            hooked.inject(self.drafters[0].injections)
        try:
            if self.engine.capabilities.batch or len(self.rows) == 1:
                yield from self._together(list(range(len(self.rows))))
            else:
                for number in range(len(self.rows)):
                    yield from self._together([number])
        finally:
            if isinstance(hooked, InjectingEngine):
                hooked.inject(())

    def _together(self, numbers: list[int]) -> Iterator[None]:
        active = [number for number in numbers if self.rows[number].finish_reason is None]
        if not active:
            yield
            return
        clock = _Clock([self.rows[number].stats for number in active])
        want = self.drafters[0].needs if self.drafters else Needs()
        prefilled = self.engine.prefill([self.rows[number].tokens for number in active], want=want)
        clock.lap("prefill_seconds")
        for number, result in zip(active, prefilled, strict=True):
            self.rows[number].stats.reused_tokens = result.start
        streams = self._start(active, prefilled)
        clock.lap("draft_seconds")
        while active:
            proposed = [self._propose(number, len(active), streams) for number in active]
            branches = [
                _Branches(self.rows[number].constraint, tree) for number, tree in zip(active, proposed, strict=True)
            ]
            trees = [branch.tree for branch in branches]
            clock.lap("draft_seconds")
            output = self.engine.step(trees, want=want)
            clock.lap("step_seconds")
            self._count_bytes(active, trees)
            paths = []
            for place, (number, branch) in enumerate(zip(active, branches, strict=True)):
                paths.append(self._verify(number, place, branch, output))
            clock.lap("verify_seconds")
            self.engine.commit(paths)
            clock.lap("commit_seconds")
            self._observe(active, trees, paths, output)
            kept = [place for place, number in enumerate(active) if self.rows[number].finish_reason is None]
            if kept and len(kept) < len(active):
                self.engine.keep(kept)
            active = [active[place] for place in kept]
            clock.lap("draft_seconds")
            yield
            clock.over([self.rows[number].stats for number in active])

    def _state(self, number: int, rows: int, stream: np.random.Generator) -> DraftState:
        tokens = self.rows[number].tokens
        budget = max(1, min(self.nodes // rows, self.engine.capabilities.max_nodes))
        if self.window is not None:  # the deepest node of a chain must have a position
            budget = max(1, min(budget, self.window - len(tokens) + 1))
        note = self.rows[number].stats.note
        return DraftState(tokens=tokens, sampling=self.sampling, rng=stream, budget=budget, note=note)

    def _start(self, active: Sequence[int], prefilled: Sequence[PrefillResult]) -> dict[int, np.random.Generator]:
        streams: dict[int, np.random.Generator] = {}
        for number, result in zip(active, prefilled, strict=True):
            if self.drafters is not None:
                row = self.rows[number]
                streams[number] = np.random.default_rng([row.seed & 0xFFFF_FFFF_FFFF_FFFF, row.key, 1])
                self.drafters[number].start(self._state(number, len(active), streams[number]), result)
        return streams

    def _propose(self, number: int, rows: int, streams: dict[int, np.random.Generator]) -> TokenTree:
        row = self.rows[number]
        if self.drafters is None:
            return TokenTree.root(row.tokens[-1])
        state = self._state(number, rows, streams[number])
        drafter = self.drafters[number]
        tree = drafter.propose(state) if state.budget > 1 else TokenTree.root(row.tokens[-1])
        if tree.tokens[0] != row.tokens[-1] or tree.size > state.budget:
            raise BadInput(
                f"{drafter.name} proposed {tree.size} nodes under the root {tree.tokens[0]}; the budget is"
                f" {state.budget} and the root is {row.tokens[-1]}."
            )
        if self.acceptance is not None and tree.law not in self.acceptance.laws:
            raise self._unfit(tree.law)
        return tree

    def _verify(self, number: int, place: int, branches: _Branches, output: StepOutput) -> list[int]:
        """Walk the tree, take the tokens, and return the nodes whose keys and values stay."""
        row, tree = self.rows[number], branches.tree
        path = []
        for node, token in self._walk(row, place, branches, output):
            path.append(node)
            if self.with_logprobs:
                row.logprobs.append(_logprob(output.logits(place, node), token))
            row.push(token)
            if row.stats.new_tokens == 1:
                row.stats.first_token_seconds = time.perf_counter() - self.started
            if row.finish_reason is not None:
                break
        stats = row.stats
        stats.steps += 1
        stats.proposed_nodes += tree.size - 1
        stats.accepted_nodes += len(path) - 1
        missing = len(path) - 1 - len(stats.accepted_by_depth)
        stats.accepted_by_depth.extend([0] * max(0, missing))
        for depth in range(len(path) - 1):
            stats.accepted_by_depth[depth] += 1
        return path

    def _walk(self, row: _Row, place: int, branches: _Branches, output: StepOutput) -> Iterator[tuple[int, int]]:
        tree, rule = branches.tree, self.acceptance or exact_rule(branches.tree.law, self.sampling)
        if tree.size > 1:
            row.stats.rule = rule.name
        if rule is GREEDY_RULE and row.constraint is None:
            best = output.best()[place]
            return walk(tree, lambda node: int(best[node]))
        return rule.walk(
            tree,
            lambda node: output.logits(place, node),
            sampling=self.sampling,
            noise=Noise(seed=row.seed, row=row.key, position=len(row.tokens)),
            allowed=None if row.constraint is None else branches.allowed,
        )

    def _observe(
        self, active: Sequence[int], trees: Sequence[TokenTree], paths: Sequence[list[int]], output: StepOutput
    ) -> None:
        if self.drafters is None:
            return
        for place, (number, tree, path) in enumerate(zip(active, trees, paths, strict=True)):
            row, drafter = self.rows[number], self.drafters[number]
            committed = tuple(row.new[-len(path) :])
            top = output.topk(place)
            drafter.observe(
                StepResult(
                    tree=tree,
                    logits=lambda node, place=place: output.logits(place, node),  # type: ignore[misc]
                    accepted=tuple(path),
                    bonus=committed[-1]
                    if row.finish_reason is None or tree.child(path[-1], committed[-1]) is None
                    else None,
                    committed=committed,
                    topk_ids=None if top is None else top[0],
                    topk_logits=None if top is None else top[1],
                    hidden=output.hidden(place),
                )
            )
            row.stats.drafter_bytes = max(row.stats.drafter_bytes, drafter.nbytes)

    def _count_bytes(self, active: Sequence[int], trees: Sequence[TokenTree]) -> None:
        held = self.engine.nbytes // len(active)
        size = max(tree.size for tree in trees)
        for number, length in zip(active, self.engine.lengths, strict=True):
            stats = self.rows[number].stats
            stats.kv_bytes_peak = max(stats.kv_bytes_peak, held)
            if size > 1:
                stats.tree_kv_bytes = max(stats.tree_kv_bytes, held * (size - 1) // (length + size))


class _Branches:
    """A proposal without what a constraint forbids, and what it permits after each node that is left.

    The constraint's state moves along the edges of the tree, in copies: the row's own moves on with the text.
    """

    def __init__(self, state: ConstraintState | None, tree: TokenTree) -> None:
        self.tree = tree
        self._masks: dict[int, Bool[np.ndarray, " vocabulary"]] = {}
        if state is None:
            return
        self._states = {0: state if tree.size == 1 else state.fork()}
        keep = np.ones(tree.size, dtype=bool)
        for node in range(1, tree.size):
            parent = int(tree.parents[node])
            keep[node] = keep[parent] and (tree.is_probe[node] or bool(self.allowed(parent)[tree.tokens[node]]))
        left = np.flatnonzero(keep).tolist()
        self.tree = tree.pruned(keep)
        self._states = {place: self._states[node] for place, node in enumerate(left) if node in self._states}
        self._masks = {place: self._masks[node] for place, node in enumerate(left) if node in self._masks}

    def allowed(self, node: int) -> Bool[np.ndarray, " vocabulary"]:
        if node not in self._masks:
            self._masks[node] = self._state(node).allowed()
        return self._masks[node]

    def _state(self, node: int) -> ConstraintState:
        if node not in self._states:
            state = self._state(int(self.tree.parents[node])).fork()
            state.accept(int(self.tree.tokens[node]))
            self._states[node] = state
        return self._states[node]


class _Clock:
    """Divides the time since the last lap equally among the rows that run."""

    def __init__(self, rows: list[GenerationStats]) -> None:
        self.rows = rows
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        for stats in self.rows:
            share = (now - self.last) / len(self.rows)
            setattr(stats, name, getattr(stats, name) + share)
            stats.seconds += share
        self.last = now

    def over(self, rows: list[GenerationStats]) -> None:
        """Begin the next step with these rows; what passed in between, in the caller's hands, counts for nobody."""
        self.rows, self.last = rows, time.perf_counter()


def _engine(engine: str | StepEngine, model: LanguageModel, memory: Cache | None, needs: Needs) -> StepEngine:
    if isinstance(engine, str):
        return choose(model, memory=memory, needs=needs, name=engine)
    if memory is not None:
        raise BadInput("an engine has its own cache; give it the memory when you make it, not to generate.")
    return engine


def _drafters(drafter: Drafters | None, model: LanguageModel, count: int) -> list[Drafter] | None:
    """One for each row; a name is looked up anew for each of them."""
    if isinstance(drafter, str):
        found = [named_drafter(drafter, model) for _ in range(count)]
        named = [one for one in found if one is not None]
        return named or None
    if drafter is None:
        return None
    return [drafter] if isinstance(drafter, Drafter) else list(drafter)


def _auto_nodes(model: LanguageModel, engine: StepEngine, drafter: Drafter, *, rows: int, context: int) -> int:
    """Nodes for all rows together."""
    where = Where.of(model, engine)
    cost = next((stored for stored in known() if stored.where == where), None)
    limit = min(MOST_NODES, engine.capabilities.max_nodes)
    if cost is None or rows > limit:
        return AUTO_NODES if model.device.type == "cpu" else AUTO_NODES_ACCELERATOR
    tau = drafter.expected_tokens if isinstance(drafter, Forecasting) else _unknown_worth
    return rows * best_size(tau, cost, context=context, rows=rows, limit=limit)


def _unknown_worth(nodes: int) -> float:
    """Tokens per step of a drafter that does not tell. Ours, through 2.25 at 16 nodes: what lookup and recycling in one
    tree gave on Spec-Bench."""
    return 1.0 + 0.3125 * math.log2(nodes)


def _tokens(model: LanguageModel, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Message)):
        tokens = model.encode(prompt)  # type: ignore[arg-type]
    else:
        tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
        wrong = next((token for token in tokens if not 0 <= token < model.vocabulary), None)
        if wrong is not None:
            raise BadInput(f"token {wrong} is not in the vocabulary of {model.vocabulary:,} tokens.")
    if not tokens:
        raise BadInput("the prompt is empty. Give at least one word, or one message.")
    return tokens


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise BadInput(f"{count} prompts were given {len(seed)} seeds.")
        return list(seed)
    return [secrets.randbits(63) if seed is None else seed] * count


def _logprob(logits: np.ndarray, token: int) -> float:
    scores = logits.astype(np.float64)
    top = scores.max()
    return float(scores[token] - top - np.log(np.exp(scores - top).sum()))
