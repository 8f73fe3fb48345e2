"""Writing to a note store: changes are gathered, then appear together.

A `Transaction` holds the store's write lock. Notes that it adds or whose descriptions it changes are `NoteState`s in
memory; `finish` writes every table at once, in bulk, which is what makes one write cheap and a thousand cheaper. Word
postings are derived here and nowhere else, so they cannot disagree with the note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from hashlib import sha256
from operator import itemgetter
from typing import Any

import numpy as np
import uuid_utils
from jaxtyping import Float32
from sqlalchemy import Connection, Dialect, Insert, Table, bindparam, delete, insert, select, update

from loci.text import schema
from loci.text.construct import Description, described_text, spoken_text
from loci.text.moments import to_micros
from loci.text.organizer import LinkKind, NoteKind, Status, TimeSpan
from loci.text.topics import TopicClusters, TopicRow
from loci.text.words import count_tokens, fold, terms

Vector = Float32[np.ndarray, " dimension"]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A note about to be stored."""

    content: str
    kind: NoteKind
    source: str | None
    said_at: datetime
    offset_assumed: bool = False
    reply_to: int | None = None
    parent: int | None = None
    description: Description
    made_by: str
    reason: str
    entities: Sequence[str] = ()
    spans: Sequence[TimeSpan] = ()
    meta: Mapping[str, Any] | None = None
    import_key: str | None = None
    vector: Vector | None = None  # of the content


@dataclass(kw_only=True)
class NoteState:
    """A note as this transaction sees it. `described` is None while it has to be embedded (again)."""

    note: int
    id: str
    content: str
    source: str | None
    description: Description
    version: int
    vector: Vector | None
    described: Vector | None
    draft: Draft | None = None  # set for notes that this transaction adds
    stored: Description | None = None  # what the database holds; None for a new note
    changed: bool = False
    rewritten: bool = False  # all its postings are made anew
    fresh_versions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spoken(self) -> str:
        """What the content's vector and postings are made of."""
        return spoken_text(self.content, self.source)

    @property
    def text(self) -> str:
        """What the second vector and postings are made of."""
        return described_text(self.spoken, self.description)


class Transaction:
    """Made by `Store.transaction`; `finish` is called there."""

    def __init__(self, connection: Connection, space: int, now: int, actor: str) -> None:
        self.connection = connection
        self.space = space
        self.now = now
        self.actor = actor
        query = _SPACE if connection.dialect.name == "sqlite" else _SPACE.with_for_update()
        row = connection.execute(query, {"s": space}).one()
        self.embedder: str | None = row.embedder
        self.dimension: int | None = row.dimension
        self._next_note: int = row.next_note
        self.seq: int = row.seq  # of the newest journal row when the transaction began; `finish` moves it on
        self._topics: dict[int, TopicRow] = {}
        self._states: dict[int, NoteState] = {}
        self._links: dict[tuple[int, int, str], dict[str, Any]] = {}
        self._pending: list[dict[str, Any]] = []
        self._journal: list[dict[str, Any]] = []

    @property
    def holds_notes(self) -> bool:
        """Whether the space held notes before this transaction added its own."""
        table = schema.notes
        return self.connection.scalar(select(table.c.note).where(table.c.space == self.space).limit(1)) is not None

    # Notes

    def add(self, draft: Draft) -> NoteState:
        """Take in a new note; its number and id are fixed from here on."""
        state = NoteState(
            note=self._next_note,
            id=str(uuid_utils.uuid7()),
            content=draft.content,
            source=draft.source,
            description=draft.description,
            version=1,
            vector=draft.vector,
            described=None,
            draft=draft,
            changed=True,
        )
        self._next_note += 1
        self._states[state.note] = state
        self._version(state, made_by=draft.made_by, cause=None, reason=draft.reason)
        self.log("write", state.note, after={"version": 1})
        return state

    def state(self, note: int) -> NoteState:
        """A note of this space, loaded once."""
        if note not in self._states:
            self.load([note])
        return self._states[note]

    def load(self, numbers: Iterable[int]) -> list[NoteState]:
        """Load many notes at once; numbers that are no notes are left out."""
        wanted = [number for number in numbers if number not in self._states]
        if wanted:
            rows = self.connection.execute(_NOTES, {"s": self.space, "numbers": wanted})
            for row in rows:
                description = Description(keywords=tuple(row.keywords), tags=tuple(row.tags), context=row.context)
                self._states[row.note] = NoteState(
                    note=row.note,
                    id=row.id,
                    content=row.content,
                    source=row.source,
                    description=description,
                    version=row.version,
                    vector=_vector(row.vector),
                    described=_vector(row.described),
                    stored=description,
                )
        return [self._states[number] for number in numbers if number in self._states]

    def describe(
        self, state: NoteState, description: Description, *, made_by: str, cause: int | None, reason: str
    ) -> None:
        """Give a note a new description, as a new version that says who made it because of which note."""
        if description == state.description:
            return
        state.description = description
        state.version += 1
        state.described = None
        state.changed = True
        self._version(state, made_by=made_by, cause=cause, reason=reason)
        self.log("evolve", state.note, before={"version": state.version - 1}, after={"version": state.version})

    def take_back(self, state: NoteState, description: Description, described: Vector | None) -> None:
        """Undo the last `describe` of this transaction, as if it had not been."""
        state.fresh_versions.pop()
        state.version -= 1
        state.description, state.described = description, described
        state.changed = state.draft is not None or bool(state.fresh_versions)
        for position in range(len(self._journal) - 1, -1, -1):
            if self._journal[position]["note"] == state.note and self._journal[position]["op"] == "evolve":
                del self._journal[position]
                break

    def rewrite_versions(self, state: NoteState, versions: Sequence[Mapping[str, Any]]) -> None:
        """Replace a stored note's whole chain of versions (forgetting does this); the last one becomes current."""
        table = schema.versions
        self.connection.execute(delete(table).where(table.c.space == self.space, table.c.note == state.note))
        rows = [
            {**version, "space": self.space, "note": state.note, "version": place}
            for place, version in enumerate(versions, start=1)
        ]
        self.connection.execute(insert(table), rows)
        last = rows[-1]
        description = Description(keywords=tuple(last["keywords"]), tags=tuple(last["tags"]), context=last["context"])
        if description != state.description:
            state.description, state.described = description, None
        state.version = len(rows)
        state.changed = True

    def drop(self, state: NoteState) -> None:
        """Let go of a note that was erased, so that `finish` does not write it again."""
        self._states.pop(state.note, None)

    def pending_vectors(self) -> list[NoteState]:
        """The notes whose description has to be embedded before `finish`, when the space has an embedder."""
        return [state for state in self._states.values() if state.changed and state.described is None]

    @property
    def added(self) -> list[NoteState]:
        return [state for state in self._states.values() if state.draft is not None]

    # Links, states, journal

    def link(self, src: int, dst: int, kind: LinkKind, weight: float, reason: str, *, made_by: str) -> None:
        """Link two notes, both ways. A link that is there already keeps the larger weight."""
        if src == dst:
            return
        for one, other in ((src, dst), (dst, src)):
            row = self._links.get((one, other, kind))
            if row is None or row["weight"] < weight:
                self._links[one, other, kind] = {
                    "space": self.space,
                    "src": one,
                    "dst": other,
                    "kind": kind,
                    "weight": float(weight),
                    "reason": reason,
                    "made_by": made_by,
                    "written_at": self.now,
                }

    def set_status(self, note: int, status: Status, *, superseded_by: int | None = None) -> None:
        table = schema.notes
        before = self.connection.scalar(select(table.c.status).where(table.c.space == self.space, table.c.note == note))
        self.connection.execute(
            update(table)
            .where(table.c.space == self.space, table.c.note == note)
            .values(status=status, superseded_by=superseded_by)
        )
        self.log("status", note, before={"status": before}, after={"status": status})

    def heard_again(self, note: int) -> None:
        table = schema.notes
        self.connection.execute(
            update(table).where(table.c.space == self.space, table.c.note == note).values(heard=table.c.heard + 1)
        )

    def queue(self, note: int, stage: str) -> None:
        """Leave a stage of a note's making to the background."""
        self._pending.append({"space": self.space, "note": note, "stage": stage, "attempts": 0})

    def record_call(
        self, *, purpose: str, model: str, tokens_in: int, tokens_out: int, ms: float, outcome: str
    ) -> None:
        table = schema.calls
        last = self.connection.scalar(
            select(table.c.call).where(table.c.space == self.space).order_by(table.c.call.desc()).limit(1)
        )
        self.connection.execute(
            insert(table).values(
                space=self.space,
                call=(last or 0) + 1,
                purpose=purpose,
                model=model,
                tokens_in=tokens_in,
                tokens_out=tokens_out,
                ms=ms,
                outcome=outcome,
                at=self.now,
            )
        )

    def topics(self, dimension: int) -> TopicClusters:
        """The space's topics as they were stored."""
        table = schema.topics
        rows = self.connection.execute(select(table).where(table.c.space == self.space).order_by(table.c.topic)).all()
        return TopicClusters.from_rows(
            dimension, [TopicRow(size=row.size, total=row.total, label=row.label, words=row.words) for row in rows]
        )

    def save_topics(self, topics: TopicClusters, changed: Iterable[int]) -> None:
        """Keep these clusters when the transaction ends."""
        self._topics |= {cluster: topics.row(cluster) for cluster in changed}

    def log(
        self,
        op: str,
        note: int | None,
        *,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
    ) -> None:
        self._journal.append({"op": op, "note": note, "before": before, "after": after})

    def rewrite_postings(self) -> None:
        """Make the word index of every loaded note anew, after the analysis of words has changed."""
        for table in (schema.words, schema.terms):
            self.connection.execute(delete(table).where(table.c.space == self.space))
        for state in self._states.values():
            state.changed = state.rewritten = True

    # The end

    def finish(self) -> None:
        """Write everything gathered. The caller commits."""
        added = self.added
        changed = [state for state in self._states.values() if state.changed and state.draft is None]
        words = {state.note: count_words(state.spoken, state.text) for state in added + changed}
        self._write_notes(added, changed, words)
        self._write_versions(added + changed)
        self._write_words(added, changed, words)
        self._write_vectors(added, changed)
        self._write_mentions_and_times(added)
        if self._links:
            upsert(self.connection, schema.links, list(self._links.values()), plain=True)
        if self._topics:
            rows = [{"space": self.space, "topic": topic, **vars(row)} for topic, row in self._topics.items()]
            upsert(self.connection, schema.topics, rows)
        if self._pending:
            upsert(self.connection, schema.pending, self._pending)
        self._write_journal()

    def _write_notes(
        self, added: list[NoteState], changed: list[NoteState], words: Mapping[int, tuple[Counter[str], Counter[str]]]
    ) -> None:
        rows = []
        for state in added:
            draft = state.draft
            if draft is None:
                continue
            offset = draft.said_at.utcoffset()
            inside, found = words[state.note]
            rows.append(
                {
                    "space": self.space,
                    "note": state.note,
                    "id": state.id,
                    "kind": draft.kind,
                    "content": state.content,
                    "sha256": digest(state.content),
                    "source": draft.source,
                    "reply_to": draft.reply_to,
                    "parent": draft.parent,
                    "said_at": to_micros(draft.said_at),
                    "offset": int(offset.total_seconds() // 60) if offset is not None else 0,
                    "offset_assumed": int(draft.offset_assumed),
                    "written_at": self.now,
                    "status": "live",
                    "version": state.version,
                    "tokens": count_tokens(state.content),
                    "content_length": inside.total(),
                    "described_length": found.total(),
                    "distinct_terms": len(found),
                    "dated": int(bool(draft.spans)),
                    "import_key": draft.import_key,
                    "meta": dict(draft.meta) if draft.meta else None,
                }
            )
        if rows:
            self.connection.execute(_insert(schema.notes), rows)
        if changed:
            updates = []
            for state in changed:
                _, found = words[state.note]
                updates.append(
                    {"s": self.space, "n": state.note, "v": state.version, "l": found.total(), "d": len(found)}
                )
            self.connection.execute(_CHANGED, updates)

    def _version(self, state: NoteState, *, made_by: str, cause: int | None, reason: str) -> None:
        state.fresh_versions.append(
            {
                "space": self.space,
                "note": state.note,
                "version": state.version,
                "keywords": list(state.description.keywords),
                "tags": list(state.description.tags),
                "context": state.description.context,
                "made_by": made_by,
                "cause": cause,
                "reason": reason,
                "written_at": self.now,
            }
        )

    def _write_versions(self, states: list[NoteState]) -> None:
        rows = [version for state in states for version in state.fresh_versions]
        if rows:
            self.connection.execute(_insert(schema.versions), rows)

    def _write_words(
        self, added: list[NoteState], changed: list[NoteState], words: Mapping[int, tuple[Counter[str], Counter[str]]]
    ) -> None:
        rows: list[dict[str, Any]] = []
        gone: list[dict[str, Any]] = []
        counted: Counter[str] = Counter()  # change in the number of notes that hold a term
        said: Counter[str] = Counter()  # and of those that hold it in their content
        for state in added + changed:
            new = postings(self.space, state.note, *words[state.note])
            if state.draft is not None or state.rewritten:
                rows += new
                counted.update(row["term"] for row in new)
                said.update(row["term"] for row in new if row["content"])
            elif state.stored is not None and state.stored != state.description:
                old = Counter(terms(described_text(state.spoken, state.stored)))
                rows += [row for row in new if old[row["term"]] != row["described"]]
                lost = old.keys() - {row["term"] for row in new}
                gone += [{"s": self.space, "t": term, "n": state.note} for term in lost]
                counted.update(row["term"] for row in new if row["term"] not in old)
                counted.subtract(lost)
        if gone:
            self.connection.execute(_GONE, gone)
        if rows:
            upsert(self.connection, schema.words, rows, plain=True)
        count_terms(self.connection, self.space, counted, said)

    def _write_vectors(self, added: list[NoteState], changed: list[NoteState]) -> None:
        if self.embedder is None:
            return
        rows = []
        for state in added + changed:
            if state.vector is None or state.described is None:
                raise RuntimeError(f"note {state.id} reached the end of its transaction without vectors")
            rows.append(
                {
                    "space": self.space,
                    "note": state.note,
                    "content": state.vector.astype("<f2").tobytes(),
                    "described": state.described.astype("<f2").tobytes(),
                }
            )
        if rows:
            upsert(self.connection, schema.vectors, rows)

    def _write_mentions_and_times(self, added: list[NoteState]) -> None:
        mentions, times = [], []
        for state in added:
            if state.draft is None:
                continue
            for entity, name in {fold(name)[:200]: name[:200] for name in state.draft.entities}.items():
                mentions.append({"space": self.space, "entity": entity, "note": state.note, "name": name})
            for position, span in enumerate(state.draft.spans):
                times.append(
                    {
                        "space": self.space,
                        "note": state.note,
                        "position": position,
                        "text": span.text,
                        "phrase": span.phrase,
                        "start": to_micros(span.start),
                        "end": to_micros(span.end),
                        "begin": span.begin,
                        "finish": span.finish,
                    }
                )
        if mentions:
            self.connection.execute(_insert(schema.mentions), mentions)
        if times:
            self.connection.execute(_insert(schema.times), times)

    def _write_journal(self) -> None:
        for place, row in enumerate(self._journal, start=1):
            row.update(space=self.space, seq=self.seq + place, actor=self.actor, at=self.now)
        if self._journal:
            self.connection.execute(_insert(schema.journal), self._journal)
        self.connection.execute(
            _ADVANCE,
            {
                "s": self.space,
                "next": self._next_note,
                "newest": self.seq + len(self._journal),
                "by": self.embedder,
                "numbers": self.dimension,
            },
        )
        self.seq += len(self._journal)


def count_words(content: str, described: str) -> tuple[Counter[str], Counter[str]]:
    """How often each term stands in a note's content, and in the whole of content and description."""
    return Counter(terms(content)), Counter(terms(described))


def postings(space: int, note: int, inside: Counter[str], whole: Counter[str]) -> list[dict[str, Any]]:
    """The rows of the word index for one note, of what `count_words` counted."""
    return [
        {"space": space, "term": term, "note": note, "content": min(inside[term], 32_767), "described": min(n, 32_767)}
        for term, n in whole.items()
    ]


def count_terms(connection: Connection, space: int, counted: Counter[str], said: Counter[str]) -> None:
    """Add to the numbers of notes that hold each term; terms that no note holds any more are removed."""
    table = schema.terms
    rows: list[dict[str, Any]] = [
        {"space": space, "term": term, "said": said[term], "described": counted[term]}
        for term in counted.keys() | said.keys()
        if counted[term] or said[term]
    ]
    if not rows:
        return
    upsert(connection, table, rows, add=True, plain=True)
    fallen = [row["term"] for row in rows if row["described"] < 0]
    for start in range(0, len(fallen), 500):
        part = fallen[start : start + 500]
        connection.execute(delete(table).where(table.c.space == space, table.c.term.in_(part), table.c.described <= 0))


def digest(content: str) -> bytes:
    """By what the same words are known again: SHA-256."""
    return sha256(content.encode()).digest()


def upsert(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, add: bool = False, plain: bool = False
) -> None:
    """Insert rows; one whose key is there already takes the new values, or with `add` adds them to its own.

    `plain` rows hold nothing but numbers and text, which the database takes as they are: twice as fast for many rows.
    """
    columns = tuple(rows[0])
    statement = _upsert(table, columns, connection.dialect.name, add)
    if not plain or connection.dialect.name != "sqlite":
        connection.execute(statement, rows)
        return
    sql, names = _compiled(statement, columns, connection.dialect)
    picked = itemgetter(*names)
    connection.exec_driver_sql(sql, [picked(row) for row in rows])


@cache
def _compiled(statement: Insert, columns: tuple[str, ...], dialect: Dialect) -> tuple[str, tuple[str, ...]]:
    """A statement in the database's own words, and the columns whose values it takes in order."""
    made: Any = statement.compile(dialect=dialect, column_keys=list(columns))
    return str(made), tuple(made.positiontup)


@cache
def _insert(table: Table) -> Insert:
    return insert(table)


@cache
def _upsert(table: Table, columns: tuple[str, ...], dialect: str, add: bool) -> Insert:
    """The statement, made once: building it costs more than running it."""
    if dialect == "sqlite":
        from sqlalchemy.dialects.sqlite import insert as insert_or_update
    else:
        from sqlalchemy.dialects.postgresql import insert as insert_or_update  # type: ignore[assignment]
    statement = insert_or_update(table)
    keys = [column.name for column in table.primary_key]
    values = {
        name: table.c[name] + statement.excluded[name] if add else statement.excluded[name]
        for name in columns
        if name not in keys
    }
    return statement.on_conflict_do_update(index_elements=keys, set_=values)


def _vector(data: bytes | None) -> Vector | None:
    return None if data is None else np.frombuffer(data, dtype="<f2").astype(np.float32)


# Statements of every write, made once: building one costs more than running it.
_notes, _versions, _vectors, _words, _spaces = (
    schema.notes,
    schema.versions,
    schema.vectors,
    schema.words,
    schema.spaces,
)
_SPACE = select(_spaces).where(_spaces.c.space == bindparam("s"))
_ADVANCE = (
    update(_spaces)
    .where(_spaces.c.space == bindparam("s"))
    .values(
        next_note=bindparam("next"), seq=bindparam("newest"), embedder=bindparam("by"), dimension=bindparam("numbers")
    )
)
_CHANGED = (
    update(_notes)
    .where(_notes.c.space == bindparam("s"), _notes.c.note == bindparam("n"))
    .values(version=bindparam("v"), described_length=bindparam("l"), distinct_terms=bindparam("d"))
)
_GONE = delete(_words).where(
    _words.c.space == bindparam("s"), _words.c.term == bindparam("t"), _words.c.note == bindparam("n")
)
_NOTES = (
    select(
        _notes.c.note,
        _notes.c.id,
        _notes.c.content,
        _notes.c.source,
        _notes.c.version,
        _versions.c.keywords,
        _versions.c.tags,
        _versions.c.context,
        _vectors.c.content.label("vector"),
        _vectors.c.described,
    )
    .join(
        _versions,
        (_versions.c.space == _notes.c.space)
        & (_versions.c.note == _notes.c.note)
        & (_versions.c.version == _notes.c.version),
    )
    .outerjoin(_vectors, (_vectors.c.space == _notes.c.space) & (_vectors.c.note == _notes.c.note))
    .where(_notes.c.space == bindparam("s"), _notes.c.note.in_(bindparam("numbers", expanding=True)))
)
