"""A-MEM: notes that describe, link and rewrite each other.

Source  Xu, Liang, Mei, Gao, Tan, Zhang, "A-MEM: Agentic Memory for LLM Agents", NeurIPS 2025, arXiv:2502.12110,
        section 3: note construction, link generation, memory evolution, retrieval.
Ours    Every note is whole without a language model: rules describe, link and evolve it at once, so nothing waits for
        a call. A model, where one is able to, then describes, links and evolves it again in one call. Neighbours are
        shown to it under handles N1..N5 and nothing else can be named. Evolution is versioned: who changed what because
        of which note is kept, can be undone, and is undone when the cause is forgotten.
Near    `plain` keeps vectors of bare turns: what a vector store does.
Cost    one write: two or three embeddings and one product with all notes; no call, or one with a model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import delete, func, select, update

from loci import errors
from loci.lm.chat import ChatModel
from loci.lm.embed import Embedder
from loci.text import amem_model, schema
from loci.text.amem_rules import AMemConfig, NewNote, RuleWriter
from loci.text.construct import Description
from loci.text.erase import erase
from loci.text.index import SpaceIndex
from loci.text.moments import DAY, now_micros, to_micros
from loci.text.organizer import Found, Link, Note, NoteKind, Organizer, Version, Written
from loci.text.search import Hit, Query, search
from loci.text.store import Store
from loci.text.times import parse_at, parse_span, spans_of_question
from loci.text.transaction import NoteState, Transaction


class AMem(Organizer):
    """Notes of one space. Threads may share it; processes may share its file."""

    name = "amem"
    calls_per_note = 1.0  # with a model that can describe; else none
    tokens_per_note = 1_200.0  # the paper's figure per operation

    def __init__(
        self,
        store: Store,
        embedder: Embedder | None,
        model: ChatModel | None = None,
        config: AMemConfig | None = None,
        *,
        space: str = "default",
    ) -> None:
        """Raises `EmbedderChanged` when the space was indexed by another embedder."""
        self.store = store
        self.embedder = embedder
        self.model = model
        self.config = config or AMemConfig()
        self.space_name = space
        self.space = store.space(space, create=True)
        info = next(info for info in store.spaces() if info.space == self.space)
        self.writer = RuleWriter(store, embedder, self.config, space=self.space, name=space)
        self.writer.check_embedder(info.embedder, info.dimension, info.notes)

    @property
    def describes(self) -> bool:
        """Whether notes are described by the language model, not by rules alone."""
        if self.model is None or self.config.construct == "rules":
            return False
        return self.config.construct == "model" or self.model.can("describe")

    # Writing

    def write(
        self,
        text: str,
        *,
        source: str | None = None,
        at: datetime | str | None = None,
        reply_to: str | None = None,
        kind: NoteKind = "turn",
        meta: Mapping[str, Any] | None = None,
    ) -> Written:
        """Store one note and everything that rules derive from it.

        Args:
            text: what was said. Beyond 2,000 tokens it is split into notes that name the first as their parent.
            source: who said it.
            at: when it was said, a moment or words for one; a moment without a zone is taken as local; now if None.
            reply_to: the id of the note that this one answers.

        Returns:
            `Written`; for a text that was split, that of its first part. `duplicate_of` is set when the same words by
            the same speaker were there already: they are counted, not stored again. `bytes_added` counts pages of
            the file, so it is 0 for a note that fits into pages in use.

        Raises:
            EmptyNote, BadDate, UnknownNote, RecalledText, StoreError.
        """
        return self.write_many([NewNote(text=text, source=source, at=at, reply_to=reply_to, kind=kind, meta=meta)])[0]

    def write_many(self, items: Sequence[NewNote]) -> list[Written]:
        """Write several notes in one transaction, with the same result as one after the other; one receipt an item."""
        written = self.writer.write_many(items, describe=self.describes)
        if self.describes and self.config.wait:
            calls = {id: self._enrich_one(self.store.number(self.space, id)) for id in {w.id for w in written}}
            written = [replace(receipt, calls=calls.get(receipt.id, 0), derived="done") for receipt in written]
        return written

    # Reading

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
    ) -> list[Found]:
        """The notes that answer a question best, best first.

        Args:
            k: at most so many notes, at least 1.
            budget_tokens: stop before the notes hold more tokens than this.
            at: when the question is asked; "last week" is counted from here.
            between: only notes that were said, or that speak of a time, from the first moment up to the second.
            source: only notes of this speaker.
            kinds: only notes of these kinds.
            why: fill `Found.parts` with every part of the score.
        """
        if k < 1:
            raise errors.BadInput(f"k is how many notes to find, at least 1; found {k}.")
        if not query.strip():
            raise errors.EmptyNote("a question needs at least one word; the text given was empty.")
        vector = self.embedder.embed([query])[0] if self.embedder is not None else None
        spans = spans_of_question(query, parse_at(at)) if self.config.times else []
        with self.store.lock:
            index = self.store.index(self.space)
            with self.store.reading() as connection:
                asked = Query(
                    text=query, vector=vector, spans=spans, allowed=self._allowed(index, between, source, kinds)
                )
                hits = search(connection, index, asked, k=k, config=self.config.searching())
            found = self._found(hits, why=why)
            if budget_tokens is not None:
                found = _within(found, budget_tokens)
            self.store.count_uses(self.space, [hit.note for hit in hits[: len(found)]])
        return found

    def _allowed(
        self,
        index: SpaceIndex,
        between: tuple[datetime | str, datetime | str] | None,
        source: str | None,
        kinds: Sequence[NoteKind] | None,
    ) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        allowed = None
        if source is not None:
            allowed = index.source == index.sources.get(source, -2)
        table = schema.notes
        if between is not None:
            start, end = self._between(between)
            inside = (index.said_at >= start) & (index.said_at < end)
            with self.store.reading() as connection:
                speaking = connection.scalars(
                    select(schema.times.c.note).where(
                        schema.times.c.space == self.space, schema.times.c.start < end, schema.times.c.end > start
                    )
                ).all()
            rows = index.rows(speaking)
            inside[rows[rows >= 0]] = True
            allowed = inside if allowed is None else allowed & inside
        if kinds is not None:
            with self.store.reading() as connection:
                held = connection.scalars(
                    select(table.c.note).where(table.c.space == self.space, table.c.kind.in_(kinds))
                ).all()
            chosen = np.zeros(len(index.note), dtype=bool)
            rows = index.rows(held)
            chosen[rows[rows >= 0]] = True
            allowed = chosen if allowed is None else allowed & chosen
        return allowed

    def _between(self, between: tuple[datetime | str, datetime | str]) -> tuple[int, int]:
        # A day or a month named as the end is meant to its end.
        start, end = to_micros(parse_span(between[0])[0]), to_micros(parse_span(between[1])[1])
        if start >= end:
            raise errors.BadInput(f"between needs an earlier and a later moment; found {between[0]} and {between[1]}.")
        return start, end

    def _found(self, hits: Sequence[Hit], *, why: bool) -> list[Found]:
        notes = self.store.notes(self.space, [hit.note for hit in hits])
        ids = self.store.ids(self.space, [hit.via for hit in hits if hit.via is not None])
        return [
            Found(
                id=note.id,
                content=note.content,
                context=note.context,
                source=note.source,
                said_at=note.said_at,
                score=hit.score,
                parts=hit.parts if why else {},
                via=ids.get(hit.via) if hit.via is not None else None,
                times=note.times,
                tokens=note.tokens,
            )
            for hit, note in zip(hits, notes, strict=True)
        ]

    def note(self, id: str) -> Note:
        return self.store.notes(self.space, [self.store.number(self.space, id)], status=None)[0]

    def history(self, id: str) -> list[Version]:
        """Every description the note has had, with who made it because of which note."""
        return self.store.history(self.space, self.store.number(self.space, id))

    def links(self, id: str) -> list[Link]:
        return self.store.links(self.space, self.store.number(self.space, id))

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    # Changing

    def revise(self, id: str, text: str, reason: str) -> Written:
        """Say it anew: the text becomes a note that supersedes the old one, which is kept but never found."""
        number = self.store.number(self.space, id)
        old = self.store.notes(self.space, [number], status=None)[0]
        if old.status != "live":
            raise errors.BadInput(f"note {id} is {old.status} already; revise the note that took its place.")
        written = self.write(text, source=old.source, kind=old.kind, reply_to=None, meta={"revises": old.id})
        new = self.store.number(self.space, written.id)
        if new == number:
            return written
        with self.store.transaction(self.space, actor="user") as transaction:
            transaction.set_status(number, "superseded", superseded_by=new)
            transaction.link(new, number, "cause", 1.0, reason, made_by="user")
        return written

    def undo(self, seq: int) -> None:
        """Take back one change of a description or a state, named by its number in the journal.

        Raises `BadInput` where it cannot: a note's writing is undone by `forget`, and forgetting by nothing.
        """
        with self.store.transaction(self.space, actor="undo") as transaction:
            journal = schema.journal
            row = transaction.connection.execute(
                select(journal).where(journal.c.space == self.space, journal.c.seq == seq)
            ).one_or_none()
            if row is None:
                raise errors.BadInput(f"the journal has no entry {seq}; `loci notes journal` lists them.")
            if row.op == "status":
                transaction.set_status(row.note, row.before["status"])
            elif row.op == "evolve":
                version = schema.versions
                old = transaction.connection.execute(
                    select(version).where(
                        version.c.space == self.space,
                        version.c.note == row.note,
                        version.c.version == row.before["version"],
                    )
                ).one_or_none()
                found = transaction.load([row.note])
                if old is None or not found:
                    raise errors.BadInput(f"what entry {seq} changed has been forgotten since.")
                transaction.describe(
                    found[0],
                    Description(keywords=tuple(old.keywords), tags=tuple(old.tags), context=old.context),
                    made_by="undo",
                    cause=None,
                    reason=f"took back entry {seq}",
                )
                self.writer.embed(transaction, self.writer.batch(transaction))
            else:
                way = "use `forget` to undo a writing" if row.op == "write" else "it cannot be taken back"
                raise errors.BadInput(f"entry {seq} is of the kind {row.op!r}: {way}.")

    def pin(self, id: str, *, pinned: bool = True) -> None:
        """A pinned note is never chosen by `keep`."""
        number = self.store.number(self.space, id)
        with self.store.transaction(self.space, actor="user") as transaction:
            table = schema.notes
            transaction.connection.execute(
                update(table).where(table.c.space == self.space, table.c.note == number).values(pinned=int(pinned))
            )
            transaction.log("pin", number, after={"pinned": pinned})

    # Forgetting

    def forget(
        self,
        id: str | None = None,
        *,
        source: str | None = None,
        between: tuple[datetime | str, datetime | str] | None = None,
        query: str | None = None,
        why: str,
    ) -> Mapping[str, int]:
        """Remove notes for good, with their traces in other notes, and overwrite the bytes they took.

        Args:
            id: one note; or instead any of
            source, between: all notes of a speaker, all that were said in a time (both: those that meet both);
            query: the one note that answers this best.
            why: kept in the journal; it must not repeat the words that are forgotten.

        Returns:
            How many notes, links, versions and postings were removed, how many other notes were restored or cleaned.
        """
        if sum(value is not None for value in (id, query)) + (source is not None or between is not None) != 1:
            raise errors.BadInput("name what to forget in one way: an id, a query, or a source and/or a time.")
        if id is not None:
            numbers = [self.store.number(self.space, id)]
        elif query is not None:
            hits = self.read(query, k=1)
            numbers = [self.store.number(self.space, hit.id) for hit in hits]
        else:
            numbers = self._chosen(source, between)
        return self._erase(numbers, why)

    def _chosen(self, source: str | None, between: tuple[datetime | str, datetime | str] | None) -> list[int]:
        table = schema.notes
        query = select(table.c.note).where(table.c.space == self.space)
        if source is not None:
            query = query.where(table.c.source == source)
        if between is not None:
            start, end = self._between(between)
            query = query.where(table.c.said_at >= start, table.c.said_at < end)
        with self.store.reading() as connection:
            return [int(number) for number in connection.scalars(query)]

    def _erase(self, numbers: Sequence[int], why: str) -> dict[str, int]:
        if not numbers:
            return {"notes": 0}
        with self.store.lock:
            with self.store.transaction(self.space, actor="user") as transaction:
                counts = erase(transaction, numbers)
                transaction.log("why", None, after={"why": why[:200]})
                self.writer.embed(transaction, self.writer.batch(transaction))
                if self.embedder is None:
                    for state in transaction.pending_vectors():
                        state.described = state.vector  # better the content's vector than one of forgotten words
            self.store.drop_index(self.space)
            self.store.shrink()
        return counts

    def keep(self, *, max_bytes: int | None = None, max_notes: int | None = None) -> Mapping[str, int]:
        """Forget the least useful notes until what is held fits.

        Utility = exp(-age / (60 days * (1 + uses))) * (1 + links), infinite for pinned notes. The age counts from the
        last use, or from the writing. Deletion goes in rounds, as a page is freed only when all on it is gone.

        Raises:
            BadInput: the bound cannot be met: pinned notes alone, or an empty store, take more.
        """
        if (max_bytes is None) == (max_notes is None):
            raise errors.BadInput("keep needs one bound: max_bytes or max_notes.")
        total: Counter[str] = Counter()
        while True:
            order = self._by_utility()
            held = self.store.nbytes
            if max_notes is not None:
                excess = self._live() - max_notes
            else:
                # Bytes are not spread evenly over notes, so a round aims short of the bound and looks again.
                share = held / max(self._live(), 1)
                excess = 0 if held <= (max_bytes or 0) else max(1, int(0.9 * (held - (max_bytes or 0)) / share))
            if excess <= 0:
                return dict(total)
            if not order:
                raise errors.BadInput(
                    f"{held:,} bytes are held by what may not be forgotten (pinned notes, the empty store); "
                    f"the bound of {max_bytes or max_notes:,} cannot be met."
                )
            total.update(self._erase(order[:excess], "kept within a bound"))

    def _live(self) -> int:
        table = schema.notes
        with self.store.reading() as connection:
            return int(
                connection.scalar(select(func.count()).where(table.c.space == self.space, table.c.status == "live"))
                or 0
            )

    def _by_utility(self) -> list[int]:
        """Notes that may be forgotten, least useful first; superseded ones before all others."""
        note, link = schema.notes, schema.links
        degree = select(func.count()).where(link.c.space == note.c.space, link.c.src == note.c.note).scalar_subquery()
        self.store.flush_uses()
        with self.store.reading() as connection:
            rows = connection.execute(
                select(
                    note.c.note,
                    note.c.status,
                    note.c.written_at,
                    note.c.last_used_at,
                    note.c.uses,
                    degree.label("links"),
                ).where(note.c.space == self.space, note.c.pinned == 0)
            ).all()
        now = now_micros()

        def utility(row: Any) -> tuple[bool, float, int]:
            age = max(now - (row.last_used_at or row.written_at), 0) / DAY
            value = float(np.exp(-age / (60.0 * (1 + row.uses)))) * (1 + row.links)
            return (row.status == "live", value, row.note)

        return [row.note for row in sorted(rows, key=utility)]

    # The model's part

    def enrich(self, limit: int | None = None, *, progress: Callable[[int, int], None] | None = None) -> int:
        """Let the model describe, link and evolve the notes that wait for it, oldest first; returns how many it did.

        A call that fails leaves the note as the rules made it and is counted; the note is not tried again.
        """
        if not self.describes:
            return 0
        table = schema.pending
        with self.store.reading() as connection:
            waiting = connection.scalars(
                select(table.c.note)
                .where(table.c.space == self.space, table.c.stage == "describe")
                .order_by(table.c.note)
                .limit(limit)
            ).all()
        for done, number in enumerate(waiting, start=1):
            self._enrich_one(number)
            if progress is not None:
                progress(done, len(waiting))
        return len(waiting)

    def _enrich_one(self, number: int) -> int:
        """One call for one note; returns the number of calls made (repairs count)."""
        if self.model is None:
            return 0
        with self.store.lock:
            index = self.store.index(self.space)
            with self.store.reading():
                row = index.rows([number])[0]
                vector = index.content[row].astype(np.float32) if row >= 0 and index.dimension else None
                near: list[tuple[int, float]] = []
                if vector is not None:
                    near = index.nearest(vector[None], self.config.neighbours, besides=number)[0]
                if near and near[0][1] < self.config.model_from:
                    near = []
            notes = {
                self.store.number(self.space, note.id): note
                for note in self.store.notes(self.space, [number, *(note for note, _ in near)])
            }
        subject = notes.pop(number, None)
        began = time.perf_counter()
        outcome: amem_model.Outcome
        if subject is None:
            outcome = amem_model.Outcome(result=None, calls=0, tokens_in=0, tokens_out=0, outcome="forgotten meanwhile")
        else:
            outcome = amem_model.ask(self.model, subject, list(notes.values()))
        with self.store.transaction(self.space, actor=self.model.name) as transaction:
            table = schema.pending
            transaction.connection.execute(
                delete(table).where(table.c.space == self.space, table.c.note == number, table.c.stage == "describe")
            )
            transaction.record_call(
                purpose="describe",
                model=self.model.name,
                tokens_in=outcome.tokens_in,
                tokens_out=outcome.tokens_out,
                ms=1_000 * (time.perf_counter() - began),
                outcome=outcome.outcome,
            )
            if outcome.result is not None and transaction.load([number]):
                self._apply(transaction, number, list(notes), outcome.result)
        return outcome.calls

    def _apply(
        self, transaction: Transaction, number: int, neighbours: Sequence[int], result: amem_model.Result
    ) -> None:
        """Write what the model said, as new versions; refuse what drifts."""
        made_by = self.model.name if self.model is not None else "model"
        state = transaction.state(number)
        handles = dict(zip(amem_model.handles(len(neighbours)), neighbours, strict=True))
        wanted: list[tuple[NoteState, Description, int | None, str]] = [
            (state, result.description(), None, "described by a model")
        ]
        for change in result.updates:
            other = handles.get(change.neighbour)
            found = transaction.load([other]) if other is not None else []
            if found:
                description = change.description(found[0].description)
                wanted.append((found[0], description, number, change.reason or "evolved by a model"))
        for target, description, cause, reason in wanted:
            if self._drifts(target, description):
                transaction.log("refuse", target.note, after={"reason": "drift"})
                continue
            transaction.describe(target, description, made_by=made_by, cause=cause, reason=reason)
        for link in result.links:
            other = handles.get(link.neighbour)
            if other is not None and transaction.load([other]):
                transaction.link(number, other, "similar", 1.0, link.reason, made_by=made_by)
        if self.embedder is not None:
            changed = transaction.pending_vectors()
            if changed:
                for target, vector in zip(changed, self.embedder.embed([s.text for s in changed]), strict=True):
                    target.described = vector

    def _drifts(self, state: NoteState, description: Description) -> bool:
        """Whether a new context has too little to do with the note's own words."""
        if self.embedder is None or state.vector is None or not description.context:
            return False
        texts = [description.context] + ([state.description.context] if state.description.context else [])
        cosines = self.embedder.embed(texts) @ state.vector
        if float(cosines[0]) < self.config.drift_floor:
            return True
        return len(cosines) > 1 and float(cosines[1] - cosines[0]) > self.config.drift_step

    # Upkeep

    def rebuild(self, *, progress: Callable[[int, int], None] | None = None) -> int:
        """Embed every note again with this object's embedder and make the word index anew; returns how many notes.

        This is also the way to another embedder: open with `AMem.reembedding`.
        """
        with self.store.reading() as connection:
            numbers = connection.scalars(
                select(schema.notes.c.note).where(schema.notes.c.space == self.space).order_by(schema.notes.c.note)
            ).all()
        with self.store.lock:
            with self.store.transaction(self.space, actor="rebuild") as transaction:
                if self.embedder is not None:
                    transaction.embedder, transaction.dimension = self.embedder.name, self.embedder.dimension
                else:
                    transaction.embedder = transaction.dimension = None
                    transaction.connection.execute(delete(schema.vectors).where(schema.vectors.c.space == self.space))
                done = 0
                for start in range(0, len(numbers), 256):
                    states = transaction.load(numbers[start : start + 256])
                    texts = [state.spoken for state in states] + [state.text for state in states]
                    vectors = self.embedder.embed(texts) if self.embedder is not None else None
                    for place, state in enumerate(states):
                        state.changed = True
                        if vectors is not None:
                            state.vector, state.described = vectors[place], vectors[len(states) + place]
                    done += len(states)
                    if progress is not None:
                        progress(done, len(numbers))
                transaction.rewrite_postings()
                transaction.log("rebuild", None)
            self.store.drop_index(self.space)
        return len(numbers)

    @classmethod
    def reembedding(cls, store: Store, embedder: Embedder | None, *, space: str = "default") -> AMem:
        """Open a space whose index was made by another embedder, in order to `rebuild` it."""
        opened = cls.__new__(cls)
        opened.store, opened.embedder, opened.model = store, embedder, None
        opened.config, opened.space_name, opened.space = AMemConfig(), space, store.space(space)
        opened.writer = RuleWriter(store, embedder, opened.config, space=opened.space, name=space)
        return opened


def _within(found: list[Found], budget: int) -> list[Found]:
    """The best notes that fit into the budget together, at least one if it fits alone."""
    kept, room = [], budget
    for hit in found:
        if hit.tokens > room:
            break
        kept.append(hit)
        room -= hit.tokens
    return kept


__all__ = ["AMem", "AMemConfig", "NewNote"]
