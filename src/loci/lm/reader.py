"""The reader: answers a question from given passages, in a few words, or says that they do not hold the answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, kw_only=True)
class Passage:
    """One thing that was said or written. `text` carries its resolved dates already: "yesterday (7 May 2023)"."""

    text: str
    said_by: str | None = None
    said_at: datetime | None = None
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReaderAnswer:
    """`text` is empty when `found` is false. `confidence` is the reader's probability that the passages hold the
    answer; `sources` are the ids of the passages that the answer's words come from, best first."""

    text: str
    found: bool
    confidence: float
    sources: tuple[str, ...]
    tokens_in: int
    tokens_out: int
    seconds: float
