"""A model on this machine behind the `ChatModel` seam.

Ours  an answer to a schema is drawn under a mask, so it cannot be invalid; only `max_tokens` can cut it off. The cache
      of the last answer is kept, so that a conversation that goes on is not read again from its beginning, and so is
      the drafter, which knows the conversation better with every turn. Options are compared in one pass over a tree of
      their tokens, on top of the messages that they share.
Near  `endpoint` asks a remote model, and has to check and repair.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from loci.errors import BadOutput, ContextTooLong, Unsupported
from loci.lm.chat import (
    Completion,
    Message,
    Schema,
    Usage,
    check_options,
    check_request,
    check_task,
    parse_answer,
)
from loci.lm.constrain import JsonSchema
from loci.lm.draft import Drafter, Needs, TokenTree, named_drafter
from loci.lm.engine.choose import choose
from loci.lm.generate import Stop, generate, stream
from loci.lm.ledger import Ledger
from loci.lm.sampling import Sampling

if TYPE_CHECKING:
    from loci.lm.engine.base import StepEngine
    from loci.lm.model import LanguageModel

DESCRIBES = 1_000_000_000  # parameters from which descriptions of notes are worth having; ours
SCHEMAS_KEPT = 32  # grammars of schemas kept ready


class LocalChat:
    """A loaded model that answers messages.

    Args:
        seed: makes sampled answers repeatable: the same messages and options give the same answers.
        drafter: name of who guesses ahead, as `loci.lm.generate` takes it. It changes the speed, not the answers.
    """

    def __init__(
        self, model: LanguageModel, *, ledger: Ledger | None = None, seed: int | None = None, drafter: str = "auto"
    ) -> None:
        self.model = model
        self.name = model.name
        self.ledger = ledger or Ledger()
        self.seed = seed
        self._lock = threading.Lock()
        self.drafter = drafter
        self._kept: _Kept | None = None  # with the cache of the last single answer
        self._schemas_lock = threading.Lock()
        self._schemas: OrderedDict[str, JsonSchema] = OrderedDict()

    def complete(
        self,
        messages: Sequence[Message],
        *,
        schema: Schema | None = None,
        tools: Sequence[Schema] = (),
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        max_tokens: int = 256,
        logprobs: bool = False,
        purpose: str = "chat",
    ) -> list[Completion]:
        check_request(messages, n=n, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        if tools:
            raise Unsupported(f"{self.name} runs here and calls no tools. Ask for the call as JSON, with schema=...")
        begun = time.perf_counter()
        with self.ledger.call(purpose, self.name) as call, self._engine(single=n == 1) as kept:
            answers = generate(
                self.model,
                [list(messages)] * n,
                max_new_tokens=max_tokens,
                sampling=Sampling(temperature=temperature, top_p=top_p),
                seed=self.seed,
                stop=Stop(strings=tuple(stop)),
                constraint=None if schema is None else self._constraint(schema),
                drafter=self.drafter if kept is None else kept.drafters(n),
                engine="auto" if kept is None else kept.engine,
                logprobs=logprobs,
            )
            seconds = time.perf_counter() - begun
            call.tokens_in = answers[0].stats.prompt_tokens
            call.tokens_out = sum(answer.stats.new_tokens for answer in answers)
            if schema is not None and any(answer.finish_reason != "eos" for answer in answers):
                raise BadOutput(
                    f"{self.name} was cut off before its JSON was whole (max_tokens={max_tokens}, "
                    f"stop={list(stop)!r}). Allow more tokens, or bound the schema with maxLength and maxItems."
                )
            return [
                Completion(
                    text=answer.text,
                    finish_reason=answer.finish_reason,
                    usage=Usage(tokens_in=answer.stats.prompt_tokens, tokens_out=answer.stats.new_tokens),
                    seconds=seconds,
                    tokens=answer.tokens,
                    logprobs=answer.logprobs,
                    data=None if schema is None else parse_answer(answer.text, schema),
                )
                for answer in answers
            ]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        max_tokens: int = 256,
        purpose: str = "chat",
    ) -> Iterator[str]:
        check_request(messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        return self._pieces(
            list(messages),
            Sampling(temperature=temperature, top_p=top_p),
            Stop(strings=tuple(stop)),
            max_tokens,
            purpose,
        )

    def choose(self, messages: Sequence[Message], options: Sequence[str], *, purpose: str = "choose") -> list[float]:
        """How probable each option is: the softmax over options of their tokens' mean log-probability as the answer, so
        that a long option is not held against itself."""
        check_request(messages)
        check_options(options)
        prompt = self.model.encode(messages)
        answers = [list(self.model.tokenizer.encode(option, add_special_tokens=False)) for option in options]
        longest = len(prompt) + max(map(len, answers))
        if longest > self.model.window:
            raise ContextTooLong(
                f"the messages with their longest option have {longest:,} tokens, and {self.name} reads at most "
                f"{self.model.window:,}. Send fewer messages."
            )
        with self.ledger.call(purpose, self.name) as call, self._engine(single=True) as kept:
            call.tokens_in = len(prompt) + sum(map(len, answers))
            means = np.array([np.mean(row) for row in self._scores((kept or self._new()).engine, prompt, answers)])
        shares = np.exp(means - means.max())
        return [float(share) for share in shares / shares.sum()]

    def can(self, task: str) -> bool:
        check_task(task)
        return task != "describe" or self.model.parameters >= DESCRIBES

    def _pieces(
        self, messages: list[Message], sampling: Sampling, stop: Stop, max_tokens: int, purpose: str
    ) -> Iterator[str]:
        with self.ledger.call(purpose, self.name) as call, self._engine(single=True) as kept:
            chunks = stream(
                self.model,
                messages,
                max_new_tokens=max_tokens,
                sampling=sampling,
                seed=self.seed,
                stop=stop,
                drafter=self.drafter if kept is None else kept.drafter,
                engine="auto" if kept is None else kept.engine,
            )
            for chunk in chunks:
                call.tokens_in, call.tokens_out = chunk.stats.prompt_tokens, chunk.stats.new_tokens
                if chunk.text:
                    yield chunk.text

    @contextmanager
    def _engine(self, *, single: bool) -> Iterator[_Kept | None]:
        """The engine with the last answer's cache, when one text is asked for and no other thread has it."""
        if not (single and self._lock.acquire(blocking=False)):
            yield None
            return
        try:
            if self._kept is None:
                self._kept = self._new()
            yield self._kept
        except BaseException:
            self._kept = None  # an interrupted step may have left it halfway
            raise
        finally:
            self._lock.release()

    def _new(self) -> _Kept:
        drafter = named_drafter(self.drafter, self.model)
        engine = choose(self.model, needs=Needs() if drafter is None else drafter.needs)
        if self.drafter == "auto" and engine.capabilities.max_nodes == 1:
            drafter = None  # this model's memory cannot check guesses
        return _Kept(engine, drafter)

    def _constraint(self, schema: Schema) -> JsonSchema:
        key = json.dumps(schema, sort_keys=True)
        with self._schemas_lock:
            found = self._schemas.get(key)
            if found is None:
                found = self._schemas[key] = JsonSchema(self.model, schema)
            self._schemas.move_to_end(key)
            while len(self._schemas) > SCHEMAS_KEPT:
                self._schemas.popitem(last=False)
            return found

    def _scores(self, engine: StepEngine, prompt: list[int], answers: Sequence[list[int]]) -> list[list[float]]:
        """The log-probability of each token of each answer after the prompt."""
        engine.prefill([prompt], want=Needs())
        if engine.capabilities.max_nodes == 1:
            return [self._followed(engine, prompt, answer) for answer in answers]
        scores: list[list[float]] = []
        for group in grouped(answers, nodes=engine.capabilities.max_nodes):
            tree, paths = shared_tree(prompt[-1], group)
            output = engine.step([tree], want=Needs())
            rows = {node: log_softmax(output.logits(0, node)) for path in paths for node in path}
            engine.commit([[]])
            scores += [
                [float(rows[node][token]) for node, token in zip(path, answer, strict=True)]
                for path, answer in zip(paths, group, strict=True)
            ]
        return scores

    def _followed(self, engine: StepEngine, prompt: list[int], answer: list[int]) -> list[float]:
        """The same, token by token, for models whose memory cannot hold a tree."""
        engine.prefill([prompt], want=Needs())
        scores = []
        for before, token in zip([prompt[-1], *answer], answer, strict=False):
            output = engine.step([TokenTree.root(before)], want=Needs())
            scores.append(float(log_softmax(output.logits(0, 0))[token]))
            engine.commit([[0]])
        return scores


@dataclass(frozen=True)
class _Kept:
    """What goes on from one answer to the next."""

    engine: StepEngine
    drafter: Drafter | None

    def drafters(self, count: int) -> list[Drafter] | None:
        return None if self.drafter is None else [self.drafter] * count


def shared_tree(root: int, answers: Sequence[list[int]]) -> tuple[TokenTree, list[list[int]]]:
    """Answers as one tree, common beginnings once, and for each answer the nodes that its tokens follow. An answer's
    last token follows a node and needs none of its own."""
    tokens, parents, paths = [root], [-1], []
    known: dict[tuple[int, int], int] = {}  # parent and token: node
    for answer in answers:
        path = [0]
        for token in answer[:-1]:
            node = known.setdefault((path[-1], token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(path[-1])
            path.append(node)
        paths.append(path)
    return TokenTree(tokens=np.array(tokens, dtype=np.int32), parents=np.array(parents, dtype=np.int32)), paths


def grouped(answers: Sequence[list[int]], *, nodes: int) -> Iterator[list[list[int]]]:
    """Answers in order, as many at once as a tree of so many nodes surely holds.

    Raises:
        Unsupported: one answer alone is larger.
    """
    group: list[list[int]] = []
    size = 1
    for answer in answers:
        if len(answer) > nodes:
            raise Unsupported(f"an option has {len(answer)} tokens; at most {nodes} can be compared. Shorten it.")
        if size + len(answer) - 1 > nodes:
            yield group
            group, size = [], 1
        group.append(answer)
        size += len(answer) - 1
    yield group


def log_softmax(logits: Float32[np.ndarray, " vocabulary"]) -> Float32[np.ndarray, " vocabulary"]:
    """Log-probabilities of logits, in float32."""
    top = logits.max()
    return np.asarray(logits - top - np.log(np.exp(logits - top).sum()), dtype=np.float32)
