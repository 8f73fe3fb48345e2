"""The seam between Loci and anything that answers messages: local models, endpoints, scripts, replays.

    LocalChat      a model on this machine                  `loci.lm.local_chat`
    EndpointChat   any OpenAI-compatible server             `loci.lm.endpoint`
    ScriptedModel  answers given beforehand, for tests      `loci.lm.scripted`
    ReplayModel    recorded answers of another model        `loci.lm.scripted`

Importing this module loads none of them; `load_chat` finds the one that a short text names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from loci.errors import BadInput, BadOutput, UnknownName

if TYPE_CHECKING:
    from loci.lm.ledger import Ledger

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["eos", "stop", "length", "tool_calls"]
Schema = Mapping[str, Any]  # a JSON schema
TASKS = ("chat", "describe")


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that a model asks for: the tool's name, and arguments that fit the tool's schema."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `tool_calls` are the assistant's; a message of role "tool" names the call it answers by `call_id`."""

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one answer; 0 where an endpoint does not tell. An endpoint's one figure for several answers is shared
    out evenly."""

    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer.

    `tokens` and `logprobs` are empty where the model does not tell them. `data` is the parsed answer where a schema was
    asked for, else None. `finish_reason` is "length" when `max_tokens` cut the answer off.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    seconds: float
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    data: Any = None
    tool_calls: tuple[ToolCall, ...] = ()


@runtime_checkable
class ChatModel(Protocol):
    """Whatever answers messages. Safe to call from several threads. Every call is written into `ledger`."""

    name: str
    ledger: Ledger

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
        """Answer the messages `n` times.

        Args:
            schema: a JSON schema; each text is then JSON that is valid against it, or `BadOutput` is raised.
            tools: functions the model may ask for, each {"name", "description", "parameters": schema}.
            temperature: 0 takes the likeliest token each time.
            stop: texts at which the answer ends; they are not part of it. At most 4.
            max_tokens: of each answer.
            logprobs: also tell each token's log-probability, where the model can.
            purpose: under which name the ledger counts the call.

        Raises:
            BadInput: no messages, or a number out of its range.
            ContextTooLong: the messages fill the model's window.
            Unsupported: the model cannot do what was asked (a schema keyword, tools).
            BadOutput: no answer that fits `schema`, after all repairs, or `max_tokens` cut it off.
            EndpointDown, EndpointRefused, EndpointBusy, EndpointError: a remote model did not answer.
        """

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
        """The pieces of one answer as they come; joined they are what `complete` would give. Closing the iterator ends
        the generation, and the ledger says "cancelled". Raises as `complete` does, also between two pieces."""

    def choose(self, messages: Sequence[Message], options: Sequence[str], *, purpose: str = "choose") -> list[float]:
        """How probable each option is as the answer, in their order; the probabilities add up to 1.

        Raises:
            BadInput: fewer than two options, an empty one, or one that occurs twice.
        """

    def can(self, task: str) -> bool:
        """Whether the model is good enough for a task: "chat", or "describe" (notes' keywords, tags and context)."""


def load_chat(
    spec: str = "default", *, base_url: str | None = None, api_key: str | None = None, ledger: Ledger | None = None
) -> ChatModel:
    """The chat model that a short text names: an endpoint's model where `base_url` is given, else a local model's name
    as `loci.lm.load` takes it."""
    if base_url is not None:
        from loci.lm.endpoint import EndpointChat

        return EndpointChat(base_url, spec, api_key=api_key, ledger=ledger)
    from loci.lm.load import load
    from loci.lm.local_chat import LocalChat

    return LocalChat(load(spec), ledger=ledger)


def parse_answer(text: str, schema: Schema) -> Any:
    """The value that an answer holds, valid against the schema. A fence of backticks around the JSON is taken off.

    Raises:
        BadOutput: no JSON, or JSON that does not fit; the message says where, in words that a model can act upon.
    """
    import jsonschema

    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```") and "\n" in bare:
        bare = bare[bare.index("\n") : -3].strip()
    try:
        value = json.loads(bare)
    except json.JSONDecodeError as error:
        raise BadOutput(f"this is no JSON: {error.msg} at character {error.pos} of {bare[:200]!r}.") from error
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError as error:
        raise BadOutput(f"this JSON does not fit at {error.json_path}: {error.message[:300]}.") from error
    except jsonschema.SchemaError as error:
        raise BadInput(f"the schema itself is no JSON schema: at {error.json_path}: {error.message[:300]}.") from error
    return value


def check_request(
    messages: Sequence[Message],
    *,
    n: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    max_tokens: int = 1,
) -> None:
    """Refuse what no model can answer, with the range that each number must keep to."""
    if not messages:
        raise BadInput("there are no messages to answer; give at least one.")
    wrong = {
        f"n is {n}; it must be at least 1": n < 1,
        f"temperature is {temperature}; it must lie between 0 and 2": not 0.0 <= temperature <= 2.0,
        f"top_p is {top_p}; it must be above 0 and at most 1": not 0.0 < top_p <= 1.0,
        f"max_tokens is {max_tokens}; it must be at least 1": max_tokens < 1,
        f"stop is {list(stop)!r}; it takes at most 4 texts, none of them empty": len(stop) > 4 or "" in stop,
    }
    for problem, found in wrong.items():
        if found:
            raise BadInput(f"{problem}.")


def check_options(options: Sequence[str]) -> None:
    """Raise `BadInput` unless there are two or more different options, none of them empty."""
    if len(options) < 2 or "" in options or len(set(options)) != len(options):
        raise BadInput(f"a choice needs two or more different options and no empty one, found {list(options)!r}.")


def check_task(task: str) -> None:
    """Raise `UnknownName` for a task that no chat model is asked about."""
    if task not in TASKS:
        raise UnknownName.among("task of a chat model", task, TASKS)
