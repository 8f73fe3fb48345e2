"""What rules make of a note while it is written: description, links, evolution. A-MEM without a language model.

The paper has a model describe, link and evolve (Xu et al. 2025, section 3); here rules do it at once, so that a note is
whole within its own transaction. `RuleWriter` is the write path of `loci.text.amem`, which explains the system.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from sqlalchemy import Row, Select, bindparam, select

from loci import errors
from loci.lm.embed import Embedder
from loci.text import schema
from loci.text.construct import (
    LONGEST_CONTEXT,
    Description,
    compose_context,
    entities,
    is_question,
    keywords,
    shorten,
    spoken_text,
)
from loci.text.erase import RULES
from loci.text.index import SpaceIndex
from loci.text.moments import DAY, to_micros
from loci.text.organizer import Link, LinkKind, NoteKind, TimeSpan, Written
from loci.text.recall import refuse_recalled
from loci.text.search import SearchConfig, document_frequencies, idf
from loci.text.split import split
from loci.text.store import Store
from loci.text.times import parse_at, resolve, says_zone
from loci.text.topics import TopicClusters
from loci.text.transaction import Draft, NoteState, Transaction, digest
from loci.text.words import scan, terms


@dataclass(frozen=True, kw_only=True)
class AMemConfig:
    """Each part can be switched off alone, which is how the claim measures what it is worth."""

    search: SearchConfig = field(default_factory=SearchConfig)
    neighbours: int = 5  # both official repositories
    keywords: int = 5  # that rules give a note; of 4 to 12 all find as much, and fewer are embedded faster; ours
    similar_from: float = 0.35  # cosine from which notes are linked; ours
    same_from: float = 0.97  # cosine from which notes with equal numbers, names and negation say the same; ours
    model_from: float = 0.3  # below this best cosine a model only describes; ours
    rare: tuple[int, int] = (2, 8)  # a keyword in so many notes links them; ours
    drift_floor: float = 0.3  # an evolved context further than this from its own content is refused; ours
    drift_step: float = 0.2  # and one that moves away by more than this
    longest: int = 2_000  # tokens in one note; longer texts are split
    recent: int = 8  # earlier turns whose words tell what a session is about; ours
    session_hours: float = 6.0  # a longer pause begins a new session; ours
    described: bool = True
    links: bool = True
    evolution: bool = True
    times: bool = True
    construct: Literal["auto", "rules", "model"] = "auto"
    wait: bool = False  # True: a write returns after the model's part, False: `enrich` does it later

    def searching(self) -> SearchConfig:
        """The search weights that these switches leave."""
        config = self.search
        if not self.described:
            config = replace(config, described_cosine=0.0, described_words=0.0)
        if not self.links:
            config = replace(config, spread=0.0)
        return config if self.times else replace(config, time=0.0, dated=0.0)


@dataclass(frozen=True, kw_only=True)
class NewNote:
    """One thing to write. `follows` is the place, in the same call, of the item that this one answers."""

    text: str
    source: str | None = None
    at: datetime | str | None = None
    reply_to: str | None = None
    follows: int | None = None
    kind: NoteKind = "turn"
    meta: Mapping[str, Any] | None = None
    import_key: str | None = None


@dataclass(kw_only=True)
class _Prepared:
    """An item after everything that needs no lock: checked, dated, cut and embedded."""

    key: bytes  # digest of the text
    terms: list[str]  # of the text, in order

    item: NewNote
    text: str
    said_at: datetime
    assumed: bool
    spans: list[TimeSpan]
    part_of: int | None  # place of the first part, for texts that were split
    place: int  # of the item in the caller's list
    vector: Float32[np.ndarray, " dimension"] | None = None
    near: list[tuple[int, float]] = field(default_factory=list)  # stored notes, nearest first, with their cosine


@dataclass(kw_only=True)
class Batch:
    """What earlier notes of the same transaction add to what the database tells."""

    topics: TopicClusters | None  # None without an embedder
    recent: list[tuple[int, tuple[str, ...]]]  # said_at and keywords of the latest turns, oldest first
    live: int = 0  # stored notes
    stored_same: dict[bytes, list[tuple[str | None, int, int]]] = field(default_factory=dict)  # source, said_at, note
    stored_frequency: dict[str, int] = field(default_factory=dict)
    stored_holders: dict[str, list[int]] = field(default_factory=dict)  # of rare terms only
    same: dict[tuple[bytes, str | None], NoteState] = field(default_factory=dict)
    frequency: Counter[str] = field(default_factory=Counter)
    holders: dict[str, list[int]] = field(default_factory=dict)
    states: list[NoteState] = field(default_factory=list)
    vectors: Float32[np.ndarray, "room dimension"] | None = None  # of `states`, with room for all of the batch
    before: dict[int, tuple[Description, Float32[np.ndarray, " dimension"] | None]] = field(default_factory=dict)
    links: dict[int, list[tuple[int, LinkKind, float, str]]] = field(default_factory=dict)
    evolved: dict[int, list[int]] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)  # topics


class RuleWriter:
    """Writes notes into one space and describes, links and evolves them by rules."""

    def __init__(self, store: Store, embedder: Embedder | None, config: AMemConfig, *, space: int, name: str) -> None:
        self.store = store
        self.embedder = embedder
        self.config = config
        self.space = space
        self.space_name = name
        self._topics: tuple[int, TopicClusters] | None = None  # as they stood at that journal row

    def write_many(self, items: Sequence[NewNote], *, describe: bool) -> list[Written]:
        """Write several notes in one transaction; with `describe` they are queued for a model. One receipt an item."""
        prepared = self._prepare(items)
        if self.embedder is not None and prepared:
            for ready, vector in zip(
                prepared,
                self.embedder.embed([spoken_text(ready.text, ready.item.source) for ready in prepared]),
                strict=True,
            ):
                ready.vector = vector
        with self.store.lock:
            before = self.store.file_bytes
            with self.store.transaction(self.space, actor=RULES) as transaction:
                self._claim(transaction)
                index = self.store.index(self.space)  # under the lock: another process may have written before it
                batch = self.batch(transaction)
                self._look_up(transaction, index, batch, prepared)
                placed: dict[int, tuple[NoteState | None, int]] = {}
                firsts: dict[int, int] = {}
                for ready in prepared:
                    follows = ready.item.follows
                    reply_to = placed[follows][1] if follows is not None else None
                    if ready.item.reply_to is not None:
                        reply_to = self.store.number(self.space, ready.item.reply_to)
                    parent = firsts.get(ready.part_of) if ready.part_of is not None else None
                    same = None if parent is not None else self._same(batch, ready)
                    if same is not None:
                        transaction.heard_again(same)
                        placed.setdefault(ready.place, (None, same))
                        continue
                    state = self._place(transaction, batch, ready, reply_to, parent)
                    firsts.setdefault(ready.place, state.note)
                    placed.setdefault(ready.place, (state, state.note))
                self.embed(transaction, batch)
                if describe:
                    for state in batch.states:
                        transaction.queue(state.note, "describe")
                if batch.topics is not None:
                    transaction.save_topics(batch.topics, batch.touched)
            self._topics = None if batch.topics is None else (transaction.seq, batch.topics)
            added = self.store.file_bytes - before
        return self._receipts(len(items), placed, batch, added, pending=describe)

    def _prepare(self, items: Sequence[NewNote]) -> list[_Prepared]:
        prepared = []
        for place, item in enumerate(items):
            if not item.text.strip():
                raise errors.EmptyNote("a note needs at least one word; the text given was empty.")
            refuse_recalled(item.text)
            if "\x00" in item.text:
                raise errors.BadInput("a note cannot hold the character U+0000; remove it and write the rest.")
            try:
                item.text.encode()
            except UnicodeEncodeError as error:
                raise errors.BadInput(
                    f"the text holds half a surrogate pair at character {error.start}, which is no Unicode text; "
                    "decode it with errors='replace' first."
                ) from None
            said_at = parse_at(item.at)
            assumed = not says_zone(item.at)
            if item.follows is not None and not 0 <= item.follows < place:
                raise errors.BadInput(f"item {place} follows item {item.follows}, which does not come before it.")
            for part, text in enumerate(split(item.text, longest=self.config.longest)):
                spans = resolve(text, said_at) if self.config.times else []
                prepared.append(
                    _Prepared(
                        key=digest(text),
                        terms=terms(text),
                        item=item,
                        text=text,
                        said_at=said_at,
                        assumed=assumed,
                        spans=spans,
                        part_of=place if part else None,
                        place=place,
                    )
                )
        return prepared

    def batch(self, transaction: Transaction) -> Batch:
        rows = transaction.connection.execute(_RECENT, {"space": self.space, "latest": self.config.recent}).all()
        topics = None
        if self.embedder is not None:
            seq, topics = self._topics or (-1, None)
            if seq != transaction.seq or topics is None:
                topics = transaction.topics(self.embedder.dimension)
        self._topics = None  # until the transaction has succeeded, what it changes here must not be used again
        return Batch(topics=topics, recent=[(row.said_at, tuple(row.keywords)) for row in reversed(rows)])

    def _look_up(
        self, transaction: Transaction, index: SpaceIndex, batch: Batch, prepared: Sequence[_Prepared]
    ) -> None:
        """Ask for all items together what the database tells of each: same words, frequencies, holders, neighbours."""
        batch.live = int(index.live.sum())
        keys = list(dict.fromkeys(ready.key for ready in prepared))
        for row in _in_parts(transaction, _SAME, "keys", keys):
            batch.stored_same.setdefault(row.sha256, []).append((row.source, row.said_at, row.note))
        wanted = list(dict.fromkeys(term for ready in prepared for term in ready.terms))
        for start in range(0, len(wanted), _AT_ONCE):
            found = document_frequencies(transaction.connection, self.space, wanted[start : start + _AT_ONCE])
            batch.stored_frequency |= {term: said for term, (said, _) in found.items()}
        rare = [term for term, notes in batch.stored_frequency.items() if 0 < notes < self.config.rare[1]]
        for row in _in_parts(transaction, _HOLDERS, "terms", sorted(rare)):
            batch.stored_holders.setdefault(row.term, []).append(row.note)
        vectors = [ready.vector for ready in prepared if ready.vector is not None]
        if vectors:
            batch.vectors = np.empty((len(vectors), len(vectors[0])), dtype=np.float32)
            nearest = index.nearest(np.stack(vectors), self.config.neighbours)
            for ready, near in zip(prepared, nearest, strict=True):
                ready.near = near

    def _same(self, batch: Batch, ready: _Prepared) -> int | None:
        """The note that holds exactly these words of this speaker already.

        Words that speak of a day relative to their own ("I ran today") say something new on another day.
        """
        source, said_at = ready.item.source, to_micros(ready.said_at)
        state = batch.same.get((ready.key, source))
        if state is not None and state.draft is not None:
            return state.note if not ready.spans or state.draft.said_at.date() == ready.said_at.date() else None
        for by, moment, note in batch.stored_same.get(ready.key, ()):
            if by == source and (not ready.spans or abs(moment - said_at) < DAY):
                return note
        return None

    def _place(
        self,
        transaction: Transaction,
        batch: Batch,
        ready: _Prepared,
        reply_to: int | None,
        parent: int | None,
    ) -> NoteState:
        """Describe, add, link and let evolve: one note, by rules."""
        near = self._nearest(batch, ready)
        earlier = transaction.state(reply_to) if reply_to is not None else None
        frequency = {term: batch.stored_frequency.get(term, 0) + batch.frequency[term] for term in ready.terms}
        live = max(batch.live + len(batch.states), 1)
        listener = earlier.source if earlier is not None else None
        speakers = {name for name in (ready.item.source, listener) if name}
        words = keywords(
            ready.text,
            weight=lambda term: idf(live, min(frequency.get(term, 0), live)),
            exclude=speakers,
            limit=self.config.keywords,
        )
        description = Description(
            keywords=words,
            tags=self._tags(batch, ready.vector),
            context=compose_context(
                speaker=ready.item.source,
                listener=listener if listener != ready.item.source else None,
                said_at=ready.said_at,
                topics=self._session_topics(batch, to_micros(ready.said_at)),
                previous_words=earlier.description.keywords if earlier is not None else (),
                spans=ready.spans,
            ),
        )
        state = transaction.add(
            Draft(
                content=ready.text,
                kind=ready.item.kind,
                source=ready.item.source,
                said_at=ready.said_at,
                offset_assumed=ready.assumed,
                reply_to=reply_to,
                parent=parent,
                description=description,
                made_by=RULES,
                reason="described when it was written",
                entities=entities(ready.text, speakers),
                spans=ready.spans,
                meta=ready.item.meta,
                import_key=ready.item.import_key if parent is None else None,
                vector=ready.vector,
            )
        )
        self._link(transaction, batch, state, near, words, frequency, reply_to, parent)
        renamed = self._remember_in_batch(batch, state, ready)
        if self.config.evolution:
            self._evolve(transaction, batch, state, earlier, near, renamed)
        return state

    def _nearest(self, batch: Batch, ready: _Prepared) -> list[tuple[int, float]]:
        """The nearest notes by content, stored or of this batch, nearest first, as (note, cosine)."""
        if ready.vector is None or batch.vectors is None or not batch.states:
            return ready.near
        cosines = batch.vectors[: len(batch.states)] @ ready.vector
        places = np.argsort(-cosines, kind="stable")[: self.config.neighbours]
        fresh = [(batch.states[place].note, float(cosines[place])) for place in places]
        return sorted([*ready.near, *fresh], key=lambda pair: (-pair[1], pair[0]))[: self.config.neighbours]

    def _session_topics(self, batch: Batch, said_at: int) -> tuple[str, ...]:
        """The keywords that the latest turns of the same talk share or begin with, at most two."""
        scores: dict[str, float] = {}
        for moment, words in batch.recent[-self.config.recent :]:
            if 0 <= said_at - moment <= self.config.session_hours * 3_600_000_000:
                for place, word in enumerate(words):
                    scores[word] = scores.get(word, 0.0) + 1 / (1 + place)
        return tuple(sorted(scores, key=lambda word: -scores[word])[:2])

    def _link(
        self,
        transaction: Transaction,
        batch: Batch,
        state: NoteState,
        near: Sequence[tuple[int, float]],
        words: Sequence[str],
        frequency: Mapping[str, int],
        reply_to: int | None,
        parent: int | None,
    ) -> None:
        found: list[tuple[int, LinkKind, float, str]] = []
        if reply_to is not None:
            found.append((reply_to, "reply", 1.0, "answers it"))
        if parent is not None:
            found.append((parent, "reply", 1.0, "goes on from it"))
        for note, cosine in near:
            if cosine >= self.config.similar_from:
                same = cosine >= self.config.same_from and _essence(state.content) == _essence(
                    transaction.state(note).content
                )
                found.append((note, "similar", cosine, "says the same" if same else "is near in meaning"))
        shared = self._holders(batch, words, frequency)
        for word, holders in shared.items():
            for note in holders:
                found.append((note, "entity", 1.0 / len(holders), f"both speak of {word}"))
        for note, kind, weight, reason in found:
            transaction.link(state.note, note, kind, weight, reason, made_by=RULES)
            batch.links.setdefault(state.note, []).append((note, kind, weight, reason))

    def _holders(self, batch: Batch, words: Sequence[str], frequency: Mapping[str, int]) -> dict[str, list[int]]:
        """For each keyword that few notes share, the other notes that hold it."""
        low, high = self.config.rare
        # The note itself counts as one of the holders.
        rare = {term: word for word in words for term in terms(word) if low <= frequency.get(term, 0) + 1 <= high}
        held: dict[str, list[int]] = {}
        for term in sorted(rare):
            if term in batch.stored_holders:
                held.setdefault(rare[term], []).extend(batch.stored_holders[term])
        for term, word in rare.items():
            held.setdefault(word, []).extend(batch.holders.get(term, ()))
        return {word: list(dict.fromkeys(notes)) for word, notes in held.items() if notes}

    def _evolve(
        self,
        transaction: Transaction,
        batch: Batch,
        state: NoteState,
        earlier: NoteState | None,
        near: Sequence[tuple[int, float]],
        renamed: Mapping[str, str],
    ) -> None:
        """A turn learns what its answer speaks of; near notes whose topic got a new name take it as their tag."""
        if earlier is not None and state.description.keywords:
            answered = is_question(earlier.content) and not is_question(state.content)
            clause = ("answered with: " if answered else "taken up with: ") + ", ".join(state.description.keywords)
            self._change(
                transaction,
                batch,
                state,
                earlier,
                with_clause(earlier.description, clause),
                "was answered" if answered else "was taken up",
            )
        for note, _ in near if renamed else ():
            other = transaction.state(note)
            tags = tuple(dict.fromkeys(renamed.get(tag, tag) for tag in other.description.tags))
            if tags != other.description.tags:
                description = Description(
                    keywords=other.description.keywords, tags=tags, context=other.description.context
                )
                self._change(transaction, batch, state, other, description, "its topic has a new name")

    def _change(
        self,
        transaction: Transaction,
        batch: Batch,
        cause: NoteState,
        state: NoteState,
        description: Description,
        reason: str,
    ) -> None:
        if state.draft is None:
            batch.before.setdefault(state.note, (state.description, state.described))
        transaction.describe(state, description, made_by=RULES, cause=cause.note, reason=reason)
        batch.evolved.setdefault(cause.note, []).append(state.note)

    def _tags(self, batch: Batch, vector: Float32[np.ndarray, " dimension"] | None) -> tuple[str, ...]:
        """The labels of the two nearest topics."""
        if batch.topics is None or vector is None:
            return ()
        return tuple(label for label in map(batch.topics.label, batch.topics.nearest(vector)) if label)

    def _remember_in_batch(self, batch: Batch, state: NoteState, ready: _Prepared) -> dict[str, str]:
        """Let the next notes of the batch see this one; returns the topics that have a new name since."""
        batch.recent.append((to_micros(ready.said_at), state.description.keywords))
        said = set(terms(state.spoken))
        batch.frequency.update(said)
        for term in said:
            batch.holders.setdefault(term, []).append(state.note)
        batch.same.setdefault((ready.key, ready.item.source), state)
        batch.states.append(state)
        if ready.vector is None or batch.topics is None or batch.vectors is None:
            return {}
        batch.vectors[len(batch.states) - 1] = ready.vector
        batch.touched.add(batch.topics.add(ready.vector, ready.text))
        return batch.topics.renamed()

    def _claim(self, transaction: Transaction) -> None:
        """The first writer of a space decides by which embedder it is indexed."""
        self.check_embedder(transaction.embedder, transaction.dimension, None)
        if transaction.embedder is None and self.embedder is not None and transaction.holds_notes:
            raise errors.EmbedderChanged(
                f"space {self.space_name!r} of {self.store.where} holds notes without vectors: it was written with "
                f"words alone.\n"
                f"  keep it so:      open it with embedder=None (--embedder none)\n"
                f"  index it:        loci notes reembed --space {self.space_name}"
            )
        if transaction.embedder is None and self.embedder is not None:
            transaction.embedder, transaction.dimension = self.embedder.name, self.embedder.dimension

    def check_embedder(self, name: str | None, dimension: int | None, notes: int | None) -> None:
        have = None if self.embedder is None else (self.embedder.name, self.embedder.dimension)
        if name is None or have == (name, dimension):
            return
        mine = "no embedder" if have is None else f"{have[0]} ({have[1]} numbers a note)"
        count = f"     {notes:,} notes" if notes else ""
        raise errors.EmbedderChanged(
            f"space {self.space_name!r} of {self.store.where} was indexed with {name} ({dimension} numbers a note), "
            f"opened with {mine}.\n"
            f"  keep it:         open it with the embedder {name}\n"
            f"  index it again:  loci notes reembed --space {self.space_name}{count}"
        )

    def embed(self, transaction: Transaction, batch: Batch) -> None:
        """Give every new or changed description its vector; refuse changes that drift from the note's own words."""
        states = transaction.pending_vectors()
        if self.embedder is None or not states:
            return
        for state, vector in zip(states, self.embedder.embed([state.text for state in states]), strict=True):
            before, described = batch.before.get(state.note, (None, None))
            if before is not None and described is not None and state.vector is not None:
                was, now = float(state.vector @ described), float(state.vector @ vector)
                if now < self.config.drift_floor or was - now > self.config.drift_step:
                    while state.fresh_versions:
                        transaction.take_back(state, before, described)
                    continue
            state.described = vector

    def _receipts(
        self, items: int, placed: Mapping[int, tuple[NoteState | None, int]], batch: Batch, added: int, *, pending: bool
    ) -> list[Written]:
        others = [other for links in batch.links.values() for other, *_ in links]
        changed = [note for notes in batch.evolved.values() for note in notes]
        ids = {state.note: state.id for state in batch.states}
        wanted = {*others, *changed, *(note for _, note in placed.values())} - ids.keys()
        if wanted:
            ids |= self.store.ids(self.space, sorted(wanted))
        fresh = max(sum(state is not None for state, _ in placed.values()), 1)
        receipts = []
        for place in range(items):
            state, note = placed[place]
            links = tuple(
                Link(src=ids[note], dst=ids[other], kind=kind, weight=weight, reason=reason, made_by=RULES)
                for other, kind, weight, reason in batch.links.get(note, ())
            )
            receipts.append(
                Written(
                    id=ids[note],
                    bytes_added=0 if state is None else added // fresh,
                    derived="pending" if state is not None and pending else "done",
                    links=() if state is None else links,
                    evolved=() if state is None else tuple(ids[n] for n in batch.evolved.get(note, [])),
                    duplicate_of=ids[note] if state is None else None,
                )
            )
        return receipts


# Statements of the write path, made once: building one costs more than running it.
_notes, _versions, _words = schema.notes, schema.versions, schema.words
_RECENT = (
    select(_notes.c.said_at, _versions.c.keywords)
    .join(
        _versions,
        (_versions.c.space == _notes.c.space)
        & (_versions.c.note == _notes.c.note)
        & (_versions.c.version == _notes.c.version),
    )
    .where(_notes.c.space == bindparam("space"), _notes.c.status == "live")
    .order_by(_notes.c.note.desc())
    .limit(bindparam("latest"))
)
_SAME = (
    select(_notes.c.sha256, _notes.c.source, _notes.c.said_at, _notes.c.note)
    .where(
        _notes.c.space == bindparam("space"),
        _notes.c.sha256.in_(bindparam("keys", expanding=True)),
        _notes.c.status == "live",
    )
    .order_by(_notes.c.note)
)
_HOLDERS = (
    select(_words.c.term, _words.c.note)
    .where(
        _words.c.space == bindparam("space"),
        _words.c.term.in_(bindparam("terms", expanding=True)),
        _words.c.content > 0,
    )
    .order_by(_words.c.term, _words.c.note)
)
_AT_ONCE = 500  # values in one IN (...)


def _in_parts(transaction: Transaction, statement: Select[Any], name: str, values: Sequence[Any]) -> Iterator[Row[Any]]:
    """The rows of a statement whose bound list `name` is given in parts."""
    for start in range(0, len(values), _AT_ONCE):
        bound = {"space": transaction.space, name: list(values[start : start + _AT_ONCE])}
        yield from transaction.connection.execute(statement, bound)


def with_clause(description: Description, clause: str) -> Description:
    """The description with one more clause of context, shortened where there is no room for all of it."""
    room = LONGEST_CONTEXT - len(description.context) - 2
    if clause in description.context or room < 30:
        return description
    longer = f"{description.context}; {shorten(clause, room)}" if description.context else clause
    return Description(keywords=description.keywords, tags=description.tags, context=longer)


_NEGATIONS = frozenset({"no", "not", "never", "none", "nobody", "nothing", "neither", "nor", "without", "cannot"})


def _essence(text: str) -> tuple[Counter[str], int]:
    """What two texts must share to say the same: numbers, names and how often they negate."""
    words = [word.surface for word in scan(text)]
    marked = Counter(word for word in words if any(c.isdigit() for c in word) or word[:1].isupper())
    negated = sum(word.lower() in _NEGATIONS or word.lower().endswith(("n't", "n’t")) for word in words)
    return marked, negated
