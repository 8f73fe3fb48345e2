"""Remote models: any server that speaks the OpenAI protocol (vLLM, SGLang, Ollama, llama.cpp, a vendor).

Source  the `openai` client does the talking: connections, time limits, retries with growing pauses, `Retry-After`.
Ours    its errors become Loci's, each naming the address, the model and the way out, and never the key. Servers differ
        in what they understand: a request that is refused because of an optional parameter is asked again without it,
        and the parameter is left away from then on. Where a schema cannot be sent, it is explained in words; every
        answer to a schema is checked here, and sent back twice at most with what is wrong.
Near    `local_chat` answers on this machine, and never needs a repair.

Importing this module does not load `openai`; the first call does (about 1 s).
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from loci.errors import (
    BadInput,
    BadOutput,
    ContextTooLong,
    EndpointBusy,
    EndpointDown,
    EndpointError,
    EndpointRefused,
)
from loci.lm.chat import (
    Completion,
    FinishReason,
    Message,
    Schema,
    ToolCall,
    Usage,
    check_options,
    check_request,
    check_task,
    parse_answer,
)
from loci.lm.ledger import Ledger, OpenCall

if TYPE_CHECKING:
    from openai import OpenAI

REPAIRS = 2  # times that an answer goes back with what is wrong about it; ours
# Parameters that a server may not know and an answer can do without.
OPTIONAL = ("response_format", "max_tokens", "stream_options", "top_logprobs", "logprobs", "temperature", "top_p", "n")
WINDOW_FULL = re.compile(r"context.{0,10}(length|window|size|limit)|too (many tokens|long)|maximum.{0,20}tokens", re.I)
LETTERS = "ABCDEFGHIJKLMNOPQRST"  # as many as log-probabilities are told of


@dataclass(frozen=True, kw_only=True)
class EndpointLimits:
    """How long and how often an endpoint is asked. A silent server is given up after `attempts * answer_seconds`."""

    connect_seconds: float = 5.0  # ours: a server that listens answers at once
    answer_seconds: float = (
        60.0  # between two pieces of an answer; ours: half a minute to load a model, and as much again
    )
    attempts: int = 3  # of one call; the client's default
    requests_a_minute: float | None = None  # calls are spread evenly below this; None: as they come


class Endpoint:
    """One model at one address: the client, its pace, and its errors in Loci's words.

    Raises:
        BadInput: an address that is no http or https URL.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, limits: EndpointLimits | None = None
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
            raise BadInput(f"{base_url!r} is no address of an endpoint; it looks like 'http://127.0.0.1:11434/v1'.")
        self.model = model
        self.limits = limits or EndpointLimits()
        self._base_url = base_url
        self._api_key = api_key
        self._pace = Pace(self.limits.requests_a_minute)

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r}, {self.model!r})"

    @cached_property
    def shown(self) -> str:
        """The address as it may be printed, without a user and password in it."""
        parts = urlsplit(self._base_url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))

    @cached_property
    def client(self) -> OpenAI:
        from openai import OpenAI, Timeout

        # Without a key given, one from the environment must not go to whatever address was named.
        return OpenAI(
            base_url=self._base_url,
            api_key=self._api_key or "none",
            timeout=Timeout(self.limits.answer_seconds, connect=self.limits.connect_seconds),
            max_retries=self.limits.attempts - 1,
        )

    @contextmanager
    def asked(self) -> Iterator[OpenAI]:
        """The client for one call, when the pace allows it; its errors come out as Loci's."""
        self._pace.wait()
        with self.errors():
            yield self.client

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Whatever the client raises inside comes out as one of Loci's errors."""
        import openai

        try:
            yield
        except openai.OpenAIError as error:
            raise self._mapped(error) from error
        except ValueError as error:
            raise self.malformed(f"its body is no JSON ({error})") from error

    def malformed(self, problem: str) -> EndpointError:
        return EndpointError(
            f"{self.shown} answered for {self.model!r}, but not in the OpenAI protocol: {problem}. "
            "Check the address; it usually ends in /v1."
        )

    def _mapped(self, error: Exception) -> EndpointError | ContextTooLong:
        import openai

        where = f"{self.shown} (model {self.model!r})"
        tries = f"{self.limits.attempts} attempt{'s' if self.limits.attempts > 1 else ''}"
        if isinstance(error, openai.APITimeoutError):
            return EndpointDown(
                f"{where} gave no answer within {self.limits.answer_seconds:g} s in {tries}. See whether it hangs, or "
                "allow more with EndpointLimits(answer_seconds=...)."
            )
        if isinstance(error, openai.APIConnectionError):
            return EndpointDown(
                f"{where} cannot be reached ({self._reason(error.__cause__ or error)}) in {tries}. Start the server, "
                "or name another address by base_url or LOCI_BASE_URL."
            )
        if not isinstance(error, openai.APIStatusError):
            return EndpointError(f"{where} broke the answer off: {self._reason(error)}. Ask again.")
        status, said = error.status_code, self._reason(error)
        if status in (401, 403) or error.code == "insufficient_quota":
            return EndpointRefused(
                f"{where} refuses the {'key' if self._api_key else 'call without a key'} ({status}: {said}). Set "
                "LOCI_API_KEY to a key with rights and credit for this model."
            )
        if status == 404:
            return EndpointError(
                f"{where} answers 404 ({said}). See which models it has with: curl {self.shown.rstrip('/')}/models"
            )
        if status in (429, 503, 529):
            wait = error.response.headers.get("retry-after")
            asks = f" and asks to wait {wait} s" if wait else ""
            return EndpointBusy(
                f"{where} is overloaded or limits its calls ({status}: {said}){asks}. Ask later, or ask "
                "more slowly with EndpointLimits(requests_a_minute=...)."
            )
        if status in (400, 413) and (error.code == "context_length_exceeded" or WINDOW_FULL.search(said)):
            return ContextTooLong(f"{where} has a smaller window than these messages need: {said}. Send fewer of them.")
        if status in (400, 422):
            return Rejected(f"{where} does not accept the request ({status}: {said}).")
        return EndpointError(f"{where} failed ({status}: {said}) in {tries}. Its own log tells why.")

    def _reason(self, error: BaseException) -> str:
        """What the other side said, in one short line without the key."""
        said = str(getattr(error, "message", "") or error) or type(error).__name__
        body = getattr(error, "body", None)
        if isinstance(body, dict) and isinstance(body.get("message"), str):
            said = body["message"]
        if self._api_key:
            said = said.replace(self._api_key, "[key]")
        return " ".join(said.split())[:300].rstrip(".")


class Rejected(EndpointError):
    """The server does not understand the request as it stands."""


class Pace:
    """Spreads calls of all threads evenly, so that no more than so many start in a minute."""

    def __init__(self, requests_a_minute: float | None) -> None:
        if requests_a_minute is not None and requests_a_minute <= 0:
            raise BadInput(f"requests_a_minute is {requests_a_minute}; it must be positive, or None for no limit.")
        self._gap = 60.0 / requests_a_minute if requests_a_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        if not self._gap:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self._gap
        time.sleep(start - now)


class EndpointChat:
    """A model behind an OpenAI-compatible address.

    Args:
        base_url: such as "http://127.0.0.1:11434/v1".
        model: its name there.
        api_key: never printed, and sent nowhere else.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        ledger: Ledger | None = None,
        limits: EndpointLimits | None = None,
    ) -> None:
        self.name = model
        self.ledger = ledger or Ledger()
        self.endpoint = Endpoint(base_url, model, api_key=api_key, limits=limits)
        self._without: frozenset[str] = frozenset()  # optional parameters that this server has refused

    def __repr__(self) -> str:
        return f"EndpointChat({self.endpoint.shown!r}, {self.name!r})"

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
        request = self._request(messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        if schema is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": dict(schema)},
            }
        if tools:
            request["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        if logprobs:
            request["logprobs"] = True
        with self.ledger.call(purpose, self.name) as call:
            answers: list[Completion] = []
            while len(answers) < n:  # a server may know no `n`, and give one
                missing = n - len(answers)
                answers += self._send({**request, "n": missing} if missing > 1 else request, call)[:missing]
            if schema is not None:
                answers = [self._fitting(answer, request, schema, call) for answer in answers]
        return answers

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
        request = self._request(messages, temperature=temperature, top_p=top_p, stop=stop, max_tokens=max_tokens)
        request |= {"stream": True, "stream_options": {"include_usage": True}}
        return self._pieces(request, purpose)

    def choose(self, messages: Sequence[Message], options: Sequence[str], *, purpose: str = "choose") -> list[float]:
        """How probable each option is: by the log-probabilities of their letters, shown as a list to choose from. A
        server that tells none is asked for one option by schema, which then has probability 1."""
        check_request(messages)
        check_options(options)
        with self.ledger.call(purpose, self.name) as call:
            if len(options) <= len(LETTERS) and not {"logprobs", "top_logprobs"} & self._without:
                told = self._letters(messages, options, call)
                if told is not None:
                    return told
            schema = {"enum": list(options)}
            request = self._request(messages, max_tokens=256)
            request["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
            chosen = self._fitting(self._send(request, call)[0], request, schema, call).data
        return [float(option == chosen) for option in options]

    def can(self, task: str) -> bool:
        check_task(task)
        return True

    def _request(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        max_tokens: int,
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.name,
            "messages": [as_row(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if top_p < 1.0:
            request["top_p"] = top_p
        if stop:
            request["stop"] = list(stop)
        return request

    def _send(self, request: dict[str, Any], call: OpenCall) -> list[Completion]:
        begun = time.perf_counter()
        answer = self._understood(request)
        choices = getattr(answer, "choices", None)
        if not choices or any(getattr(choice, "message", None) is None for choice in choices):
            raise self.endpoint.malformed("there is no answer in it")
        used = counted(answer, call)
        usage = replace(used, tokens_out=used.tokens_out // len(choices))
        seconds = time.perf_counter() - begun
        return [self._completion(choice, request, usage, seconds) for choice in choices]

    def _understood(self, request: dict[str, Any]) -> Any:
        """The server's reply to the request, asked again without a parameter that it does not accept."""
        while True:
            known = self._adapted(request)
            try:
                with self.endpoint.asked() as client:
                    return client.chat.completions.create(**known)
            except Rejected as error:
                refused = next((name for name in OPTIONAL if name in request and name in str(error)), None)
                if refused is None and "response_format" in known:
                    refused = "response_format"  # a schema that it cannot take; the answer is checked here anyway
                if refused is None or refused in self._without:
                    raise
                self._without |= {refused}

    def _adapted(self, request: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in request.items() if name not in self._without}
        if "max_tokens" in self._without:
            known["max_completion_tokens"] = request["max_tokens"]  # the newer name for it
        if "response_format" in request and "response_format" in self._without:
            schema = request["response_format"]["json_schema"]["schema"]
            told = f"Answer with JSON alone, valid against this JSON schema: {json.dumps(schema, ensure_ascii=False)}"
            known["messages"] = [{"role": "system", "content": told}, *request["messages"]]
        return known

    def _completion(self, choice: Any, request: dict[str, Any], usage: Usage, seconds: float) -> Completion:
        message = choice.message
        if getattr(message, "refusal", None) or choice.finish_reason == "content_filter":
            raise BadOutput(
                f"{self.endpoint.shown} (model {self.name!r}) will not answer: "
                f"{getattr(message, 'refusal', None) or 'its content filter stopped it'}. Put the question differently."
            )
        content = getattr(choice.logprobs, "content", None) or []
        return Completion(
            text=message.content or "",
            finish_reason=finish_reason(choice.finish_reason, stops="stop" in request),
            usage=usage,
            seconds=seconds,
            logprobs=tuple(float(token.logprob) for token in content),
            tool_calls=tuple(self._tool_call(entry) for entry in message.tool_calls or ()),
        )

    def _tool_call(self, entry: Any) -> ToolCall:
        try:
            arguments = json.loads(entry.function.arguments or "{}")
        except json.JSONDecodeError as error:
            raise BadOutput(
                f"{self.endpoint.shown} (model {self.name!r}) called {entry.function.name!r} with arguments that are "
                f"no JSON: {entry.function.arguments[:200]!r}. Ask again, or use a model trained for tools."
            ) from error
        return ToolCall(id=entry.id, name=entry.function.name, arguments=arguments)

    def _fitting(self, answer: Completion, request: dict[str, Any], schema: Schema, call: OpenCall) -> Completion:
        """The answer with its data, after at most two repairs that quote what is wrong."""
        rows, asked = request["messages"], 1
        while True:
            if answer.finish_reason == "length":
                raise BadOutput(
                    f"{self.endpoint.shown} (model {self.name!r}) was cut off at max_tokens={request['max_tokens']} "
                    "before its JSON was whole. Allow more tokens, or ask for less."
                )
            if answer.tool_calls:
                return answer
            try:
                return replace(answer, data=parse_answer(answer.text, schema))
            except BadOutput as error:
                if asked > REPAIRS:
                    raise BadOutput(
                        f"{self.endpoint.shown} (model {self.name!r}) gave no answer that fits the schema in {asked} "
                        f"attempts; of the last, {error} Use a simpler schema or a more able model."
                    ) from error
                wrong = f"That answer cannot be used: {error} Give the whole answer again, as JSON alone."
            rows = [*rows, {"role": "assistant", "content": answer.text}, {"role": "user", "content": wrong}]
            answer, asked = self._send({**request, "messages": rows}, call)[0], asked + 1

    def _letters(self, messages: Sequence[Message], options: Sequence[str], call: OpenCall) -> list[float] | None:
        letters = LETTERS[: len(options)]
        listed = "\n".join(f"{letter}) {option}" for letter, option in zip(letters, options, strict=True))
        asked = Message(role="user", content=f"{listed}\n\nAnswer with one letter, {letters[0]} to {letters[-1]}.")
        request = self._request([*messages, asked], max_tokens=1)
        answer = self._understood(request | {"logprobs": True, "top_logprobs": 20})
        if not getattr(answer, "choices", None):
            raise self.endpoint.malformed("there is no answer in it")
        counted(answer, call)
        content = getattr(answer.choices[0].logprobs, "content", None)
        if not content or not content[0].top_logprobs:
            return None
        mass = dict.fromkeys(letters, 0.0)
        for token in content[0].top_logprobs:
            letter = token.token.strip().rstrip(").")
            if letter in mass:
                mass[letter] += math.exp(token.logprob)
        total = sum(mass.values())
        return [value / total for value in mass.values()] if total > 0 else None

    def _pieces(self, request: dict[str, Any], purpose: str) -> Iterator[str]:
        with self.ledger.call(purpose, self.name) as call:
            chunks = self._understood(request)
            try:
                while True:
                    with self.endpoint.errors():
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    counted(chunk, call)
                    for choice in chunk.choices or ():
                        if choice.delta is not None and choice.delta.content:
                            yield choice.delta.content
            finally:
                chunks.close()


def counted(answer: Any, call: OpenCall) -> Usage:
    """The tokens that a reply or a chunk tells of, added to the call."""
    told = getattr(answer, "usage", None)
    used = Usage(
        tokens_in=getattr(told, "prompt_tokens", None) or 0, tokens_out=getattr(told, "completion_tokens", None) or 0
    )
    call.tokens_in += used.tokens_in
    call.tokens_out += used.tokens_out
    return used


def as_row(message: Message) -> dict[str, Any]:
    """A message as the protocol writes it."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        row["name"] = message.name
    if message.call_id is not None:
        row["tool_call_id"] = message.call_id
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    return row


def finish_reason(told: str | None, *, stops: bool) -> FinishReason:
    """The protocol says "stop" both for the model's own end and for a stop text; the second is only possible where one
    was given."""
    if told == "length":
        return "length"
    if told in ("tool_calls", "function_call"):
        return "tool_calls"
    return "stop" if stops else "eos"
