"""The seam of the text room: what happens when a note is written, and how notes are found again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from loci.memory import Receipt

NoteKind = Literal["turn", "thought", "fact", "structure", "document", "user"]
LinkKind = Literal["similar", "entity", "reply", "time", "cause", "contradicts", "user"]
Status = Literal["live", "superseded", "merged", "forgotten"]


@dataclass(frozen=True, kw_only=True)
class TimeSpan:
    """A time that a text speaks of: the words, the days they mean, and the phrase that says so without context.

    `start` is inclusive and `end` exclusive, both in the note's own time zone. `phrase` reads like
    "7 May 2023", "the week before 9 June 2023", "June 2023" or "2022".
    """

    text: str
    start: datetime
    end: datetime
    phrase: str
    begin: int = 0  # character position of `text` in the note
    finish: int = 0  # and the position after it


@dataclass(frozen=True, kw_only=True)
class Version:
    """One state of a note's description, with who changed it because of what."""

    version: int
    keywords: tuple[str, ...]
    tags: tuple[str, ...]
    context: str
    made_by: str
    cause: str | None
    reason: str
    written_at: datetime


@dataclass(frozen=True, kw_only=True)
class Link:
    src: str
    dst: str
    kind: LinkKind
    weight: float
    reason: str
    made_by: str


@dataclass(frozen=True, kw_only=True)
class Note:
    id: str
    kind: NoteKind
    content: str
    source: str | None
    said_at: datetime
    written_at: datetime
    status: Status
    reply_to: str | None
    superseded_by: str | None
    keywords: tuple[str, ...]
    tags: tuple[str, ...]
    context: str
    version: int
    uses: int
    tokens: int
    entities: tuple[str, ...]
    times: tuple[TimeSpan, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Written(Receipt):
    links: tuple[Link, ...] = ()
    evolved: tuple[str, ...] = ()  # notes whose descriptions changed because of this one
    duplicate_of: str | None = None
    calls: int = 0  # calls of a language model


@dataclass(frozen=True, kw_only=True)
class Found:
    id: str
    content: str
    context: str
    source: str | None
    said_at: datetime
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)  # filled when `why=True`
    via: str | None = None  # the note whose link led here
    times: tuple[TimeSpan, ...] = ()
    tokens: int = 0


class Organizer(ABC):
    """A way to organise words. One system, one module, one final subclass.

    `calls_per_note` and `tokens_per_note` declare what a write costs in calls and tokens of a language model.
    """

    name: str
    calls_per_note: float
    tokens_per_note: float

    @abstractmethod
    def write(
        self,
        text: str,
        *,
        source: str | None = None,
        at: datetime | str | None = None,
        reply_to: str | None = None,
        kind: NoteKind = "turn",
        meta: Mapping[str, Any] | None = None,
    ) -> Written: ...

    @abstractmethod
    def read(
        self,
        query: str,
        *,
        k: int = 10,
        budget_tokens: int | None = None,
        at: datetime | str | None = None,
        between: tuple[datetime | str, datetime | str] | None = None,
        source: str | None = None,
        kinds: Sequence[NoteKind] | None = None,
        why: bool = False,
    ) -> list[Found]: ...

    @abstractmethod
    def forget(
        self,
        id: str | None = None,
        *,
        source: str | None = None,
        between: tuple[datetime | str, datetime | str] | None = None,
        query: str | None = None,
        why: str,
    ) -> Mapping[str, int]: ...

    @property
    @abstractmethod
    def nbytes(self) -> int: ...
