"""The seam between Loci and anything that answers messages: local models, endpoints, scripts, replays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["eos", "stop", "length", "tool_calls"]
Schema = Mapping[str, Any]  # a JSON schema


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    content: str
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer. `tokens` and `logprobs` are empty where the model does not tell them."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    seconds: float
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class ChatModel(Protocol):
    name: str

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
    ) -> list[Completion]: ...

    def choose(self, messages: Sequence[Message], options: Sequence[str]) -> list[float]: ...

    def can(self, task: str) -> bool: ...
