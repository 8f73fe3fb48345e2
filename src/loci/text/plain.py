"""A plain vector store: one vector per text as it was said, found by cosine, and nothing else.

The baseline that every other organizer is measured beside, and what most assistants use for a memory today: no
descriptions, no links, no word index, no dates resolved. It lives in memory and is gone with the process.

How the speaker is told to the embedder decides a good part of what is found. On LoCoMo (383 questions, MiniLM, evidence
recall at 10): words alone 0.25, `Ann: words` 0.51, `Speaker Ann says: words` 0.53, `Ann: "words"`, in quotation marks,
0.61. The third is how the literature stores turns and the default here; `wording` sets another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from uuid_utils import uuid7

from loci.errors import BadInput, EmptyNote, UnknownNote
from loci.lm.embed import Embedder
from loci.text.organizer import Found, NoteKind, Organizer, Written
from loci.text.times import parse_at, parse_span
from loci.text.words import count_tokens

Moment = datetime | str


class PlainStore(Organizer):
    name = "plain"
    calls_per_note = 0.0
    tokens_per_note = 0.0

    def __init__(self, embedder: Embedder, *, wording: str = "Speaker {source} says: {content}") -> None:
        """`wording` is what is embedded of a text whose source is known; it names `{source}` and `{content}`."""
        self.embedder = embedder
        self.wording = wording
        self._rows: list[tuple[Found, NoteKind]] = []
        self._vectors = np.empty((64, embedder.dimension), dtype=np.float32)  # doubled when full
        self._bytes_of_text = 0

    def write(
        self,
        text: str,
        *,
        source: str | None = None,
        at: Moment | None = None,
        reply_to: str | None = None,
        kind: NoteKind = "turn",
        meta: Mapping[str, Any] | None = None,
    ) -> Written:
        """Store one text. `reply_to` and `meta` are taken, as the seam asks, and not kept."""
        if not text.strip():
            raise EmptyNote("a note needs at least one word, this one has none.")
        before, said_at = self.nbytes, parse_at(at)
        vector = self.embedder.embed([text if source is None else self.wording.format(source=source, content=text)])[0]
        if len(self._rows) == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.empty_like(self._vectors)])
        self._vectors[len(self._rows)] = vector
        tokens = count_tokens(text)
        row = Found(id=str(uuid7()), content=text, context="", source=source, said_at=said_at, score=0.0, tokens=tokens)
        self._rows.append((row, kind))
        self._bytes_of_text += len(text.encode())
        return Written(id=row.id, bytes_added=self.nbytes - before, derived="done")

    def read(
        self,
        query: str,
        *,
        k: int = 10,
        budget_tokens: int | None = None,
        at: Moment | None = None,
        between: tuple[Moment, Moment] | None = None,
        source: str | None = None,
        kinds: Sequence[NoteKind] | None = None,
        why: bool = False,
    ) -> list[Found]:
        """The nearest texts, best first. The budget ends before the first that does not fit; `at` changes no cosine."""
        if k < 1:
            raise BadInput(f"k is the number of notes to find and at least 1, not {k}.")
        span = _span(between)
        scores = self._vectors[: len(self._rows)] @ self.embedder.embed([query])[0]
        found: list[Found] = []
        left = np.inf if budget_tokens is None else budget_tokens
        for position in np.argsort(-scores, kind="stable"):
            row, kind = self._rows[position]
            if not _fits(row, source, span) or (kinds is not None and kind not in kinds):
                continue
            left -= row.tokens
            if left < 0 or len(found) == k:
                break
            score = float(scores[position])
            found.append(replace(row, score=score, parts={"cosine(content)": score} if why else {}))
        return found

    def forget(
        self,
        id: str | None = None,
        *,
        source: str | None = None,
        between: tuple[Moment, Moment] | None = None,
        query: str | None = None,
        why: str,
    ) -> Mapping[str, int]:
        """Remove the notes that every given condition names; `query` names the ten nearest. `why` is not kept."""
        if id is None and source is None and between is None and query is None:
            raise BadInput("forget needs an id, a source, a time or a query; without one it would forget everything.")
        if id is not None and all(row.id != id for row, _ in self._rows):
            raise UnknownNote(f"this store holds no note {id!r}.")
        span = _span(between)
        near = None if query is None else {found.id for found in self.read(query)}
        goes = [
            _fits(row, source, span) and (id is None or row.id == id) and (near is None or row.id in near)
            for row, _ in self._rows
        ]
        stays = [position for position, leaves in enumerate(goes) if not leaves]
        spare = np.empty((64, self.embedder.dimension), dtype=np.float32)
        self._vectors = np.concatenate([self._vectors[stays], spare])
        self._rows = [self._rows[position] for position in stays]
        self._bytes_of_text = sum(len(row.content.encode()) for row, _ in self._rows)
        return {"notes": sum(goes)}

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, the rows kept free for the next ones included, and of the texts in UTF-8."""
        return self._vectors.nbytes + self._bytes_of_text


def _fits(row: Found, source: str | None, span: tuple[datetime, datetime] | None) -> bool:
    return (source is None or row.source == source) and (span is None or span[0] <= row.said_at < span[1])


def _span(between: tuple[Moment, Moment] | None) -> tuple[datetime, datetime] | None:
    return None if between is None else (parse_span(between[0])[0], parse_span(between[1])[1])
