"""Models that say what was laid down beforehand: `ScriptedModel` by a script, `ReplayModel` from a recording.

For tests of control flow, where it matters what a program does with an answer and not how good the answer is. Both keep
the contract of `ChatModel`: an answer that does not fit its schema is `BadOutput` here too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loci.errors import BadInput, BadModel, ModelNotFound
from loci.lm.chat import (
    ChatModel,
    Completion,
    Message,
    Schema,
    ToolCall,
    Usage,
    check_options,
    check_request,
    check_task,
    parse_answer,
)
from loci.lm.ledger import Ledger

Answer = str | Completion | Exception  # an exception is raised instead of an answer
VERSION = 1  # of the lines that ReplayModel writes


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One call as a scripted model saw it; `options` are those of `choose`."""

    messages: tuple[Message, ...]
    schema: Schema | None = None
    tools: tuple[Schema, ...] = ()
    options: tuple[str, ...] = ()
    purpose: str = "chat"


class ScriptedModel:
    """Gives prepared answers, in order, or those of a function of the messages. Tokens are counted as words.

    Args:
        answers: one for each text that `complete` or `stream` gives.
        choices: for `choose`: the probabilities of each call, in order, or a function of the messages and options.
        tasks: what `can` affirms.

    Every call is kept in `asked`. A script that is at its end raises `BadInput`, with the question it has no answer to.
    """

    def __init__(
        self,
        answers: Sequence[Answer] | Callable[[Sequence[Message]], Answer] = (),
        *,
        choices: Sequence[Sequence[float]] | Callable[[Sequence[Message], Sequence[str]], Sequence[float]] = (),
        tasks: Sequence[str] = ("chat", "describe"),
        name: str = "scripted",
        ledger: Ledger | None = None,
    ) -> None:
        self.name = name
        self.ledger = ledger or Ledger()
        self.asked: list[Asked] = []
        self._answers = answers if callable(answers) else list(answers)
        self._choices = choices if callable(choices) else list(choices)
        self._tasks = frozenset(tasks)
        self._given = self._chosen = 0
        self._lock = threading.Lock()

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
        with self.ledger.call(purpose, self.name) as call:
            asked = Asked(messages=tuple(messages), schema=schema, tools=tuple(tools), purpose=purpose)
            with self._lock:
                self.asked.append(asked)
                answers = [self._next(messages) for _ in range(n)]
            completions = []
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
                completion = answer if isinstance(answer, Completion) else said(messages, answer)
                if schema is not None and not completion.tool_calls:
                    completion = replace(completion, data=parse_answer(completion.text, schema))
                completions.append(completion)
            call.tokens_in = completions[0].usage.tokens_in
            call.tokens_out = sum(completion.usage.tokens_out for completion in completions)
            return completions

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
        """The next answer, word by word."""
        check_request(messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        return self._pieces(messages, purpose)

    def choose(self, messages: Sequence[Message], options: Sequence[str], *, purpose: str = "choose") -> list[float]:
        check_request(messages)
        check_options(options)
        with self.ledger.call(purpose, self.name) as call, self._lock:
            self.asked.append(Asked(messages=tuple(messages), options=tuple(options), purpose=purpose))
            call.tokens_in = words(messages)
            if callable(self._choices):
                return list(self._choices(messages, options))
            if self._chosen == len(self._choices):
                raise self._at_its_end("choices", self._chosen, messages)
            self._chosen += 1
            return list(self._choices[self._chosen - 1])

    def can(self, task: str) -> bool:
        check_task(task)
        return task in self._tasks

    def _pieces(self, messages: Sequence[Message], purpose: str) -> Iterator[str]:
        with self.ledger.call(purpose, self.name) as call:
            with self._lock:
                self.asked.append(Asked(messages=tuple(messages), purpose=purpose))
                answer = self._next(messages)
            if isinstance(answer, Exception):
                raise answer
            call.tokens_in = words(messages)
            for piece in pieces(answer if isinstance(answer, str) else answer.text):
                call.tokens_out += 1
                yield piece

    def _next(self, messages: Sequence[Message]) -> Answer:
        if callable(self._answers):
            return self._answers(messages)
        if self._given == len(self._answers):
            raise self._at_its_end("answers", self._given, messages)
        self._given += 1
        return self._answers[self._given - 1]

    def _at_its_end(self, what: str, count: int, messages: Sequence[Message]) -> BadInput:
        return BadInput(
            f"the script {self.name!r} has {count} {what} and was asked for one more: {messages[-1].content[:200]!r}. "
            f"Add to its {what}."
        )


class ReplayModel:
    """Records the calls of another model in a file of JSON lines, and gives them again without it.

    A call is found again by everything that decides its answer: messages, schema, tools and options, not its purpose.
    The same call made several times replays its recordings in order.

    Args:
        record: the model to ask for what the file does not hold; each answer is appended to it. None: replay only.

    Raises:
        ModelNotFound: no such file, and no model to record.
        BadModel: a line of the file is no recording; its number is told.
        BadInput, from a call: nothing recorded fits; the message names the first message that differs from the
            recording that is nearest.
    """

    def __init__(self, path: str | Path, *, record: ChatModel | None = None, ledger: Ledger | None = None) -> None:
        self.path = Path(path)
        self.ledger = ledger or Ledger()
        self._record = record
        self._lock = threading.RLock()
        self._lines = self._read()
        self._used: dict[str, int] = {}
        self.name = record.name if record is not None else self._lines[0]["model"] if self._lines else "replay"

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
        request = {
            "method": "complete",
            "messages": [asdict(message) for message in messages],
            "schema": schema,
            "tools": list(tools),
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "stop": list(stop),
            "max_tokens": max_tokens,
            "logprobs": logprobs,
        }

        def ask(model: ChatModel) -> Any:
            answers = model.complete(
                messages,
                schema=schema,
                tools=tools,
                n=n,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                max_tokens=max_tokens,
                logprobs=logprobs,
                purpose=purpose,
            )
            return [asdict(answer) for answer in answers]

        with self.ledger.call(purpose, self.name) as call:
            completions = [completion_of(entry) for entry in self._answer(request, ask)]
            call.tokens_in = completions[0].usage.tokens_in
            call.tokens_out = sum(completion.usage.tokens_out for completion in completions)
            return completions

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
        """The recorded pieces. While recording, the whole answer is taken down before its first piece is given."""
        check_request(messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        request = {
            "method": "stream",
            "messages": [asdict(message) for message in messages],
            "temperature": temperature,
            "top_p": top_p,
            "stop": list(stop),
            "max_tokens": max_tokens,
        }

        def ask(model: ChatModel) -> Any:
            return list(
                model.stream(
                    messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens, purpose=purpose
                )
            )

        return self._pieces(request, ask, messages, purpose)

    def choose(self, messages: Sequence[Message], options: Sequence[str], *, purpose: str = "choose") -> list[float]:
        check_request(messages)
        check_options(options)
        request = {
            "method": "choose",
            "messages": [asdict(message) for message in messages],
            "options": list(options),
        }
        with self.ledger.call(purpose, self.name):
            found = self._answer(request, lambda model: model.choose(messages, options, purpose=purpose))
            return [float(share) for share in found]

    def can(self, task: str) -> bool:
        check_task(task)
        return bool(
            self._answer({"method": "can", "task": task, "messages": []}, lambda model: model.can(task), once=True)
        )

    def _pieces(
        self, request: dict[str, Any], ask: Callable[[ChatModel], Any], messages: Sequence[Message], purpose: str
    ) -> Iterator[str]:
        with self.ledger.call(purpose, self.name) as call:
            call.tokens_in = words(messages)
            for piece in self._answer(request, ask):
                call.tokens_out += 1
                yield piece

    def _answer(self, request: dict[str, Any], ask: Callable[[ChatModel], Any], *, once: bool = False) -> Any:
        """What was recorded for this request, or else what the model says now. `once`: one recording serves always."""
        request = json.loads(json.dumps(request))  # as it will be read back: tuples as lists
        key = json.dumps(request, sort_keys=True)
        with self._lock:
            fitting = [line for line in self._lines if line["request"] == request]
            used = 0 if once else self._used.get(key, 0)
            if used < len(fitting):
                self._used[key] = used + 1
                return fitting[used]["answer"]
            if self._record is None:
                raise self._mismatch(request, len(fitting))
            line = {"version": VERSION, "model": self.name, "request": request, "answer": ask(self._record)}
            text = json.dumps(line, ensure_ascii=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
            self._lines.append(json.loads(text))
            self._used[key] = used + 1
            return self._lines[-1]["answer"]

    def _read(self) -> list[Mapping[str, Any]]:
        if not self.path.exists():
            if self._record is None:
                raise ModelNotFound(
                    f"{self.path} is not there to be replayed. Record it: ReplayModel(path, record=model)."
                )
            return []
        lines = []
        # Not `splitlines`: it would also split at line separators inside of texts.
        for number, text in enumerate(self.path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
            try:
                line = json.loads(text)
                known = line["version"] == VERSION and {"model", "request", "answer"} <= line.keys()
            except (json.JSONDecodeError, TypeError, KeyError):
                known = False
            if not known:
                raise BadModel(f"line {number} of {self.path} is no recording of version {VERSION}. Record it again.")
            lines.append(line)
        return lines

    def _mismatch(self, request: dict[str, Any], used: int) -> BadInput:
        mend = "Record it again: ReplayModel(path, record=model) on a new file."
        if used:
            return BadInput(f"{self.path} holds this call {used} times, and all were replayed already. {mend}")
        same = [line for line in self._lines if line["request"]["method"] == request["method"]]
        if not same:
            return BadInput(f"{self.path} holds no call of {request['method']!r}. {mend}")
        nearest = max(same, key=lambda line: agreeing(line["request"]["messages"], request["messages"]))
        number = self._lines.index(nearest) + 1
        before, now = nearest["request"]["messages"], request["messages"]
        place = agreeing(before, now)
        if place == len(before) == len(now):
            names = [name for name in request if nearest["request"].get(name) != request[name]]
            return BadInput(f"no call in {self.path} fits; line {number} differs in {', '.join(names)}. {mend}")
        recorded, asked = (
            repr(rows[place]["content"][:200]) if place < len(rows) else "nothing" for rows in (before, now)
        )
        return BadInput(
            f"no call in {self.path} fits; the nearest, line {number}, differs in message {place + 1}: "
            f"recorded {recorded}, asked {asked}. {mend}"
        )


def said(messages: Sequence[Message], text: str) -> Completion:
    """A text as the completion that a model would have given, tokens counted as words."""
    usage = Usage(tokens_in=words(messages), tokens_out=len(text.split()))
    return Completion(text=text, finish_reason="eos", usage=usage, seconds=0.0)


def words(messages: Sequence[Message]) -> int:
    """How many words the messages hold."""
    return sum(len(message.content.split()) for message in messages)


def pieces(text: str) -> Iterator[str]:
    """The words of a text, each with the white space after it."""
    start = 0
    for place in range(1, len(text)):
        if text[place - 1].isspace() and not text[place].isspace():
            yield text[start:place]
            start = place
    if text:
        yield text[start:]


def agreeing(before: Sequence[Any], now: Sequence[Any]) -> int:
    """How many messages at the beginning are the same."""
    same = 0
    for recorded, asked in zip(before, now, strict=False):
        if recorded != asked:
            break
        same += 1
    return same


def completion_of(entry: Mapping[str, Any]) -> Completion:
    """A completion as it was before it was written as JSON."""
    return Completion(
        **{
            **entry,
            "usage": Usage(**entry["usage"]),
            "tokens": tuple(entry["tokens"]),
            "logprobs": tuple(entry["logprobs"]),
            "tool_calls": tuple(ToolCall(**call) for call in entry["tool_calls"]),
        }
    )
