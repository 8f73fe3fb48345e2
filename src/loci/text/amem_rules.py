"""What rules make of a note while it is written: description, links, evolution. A-MEM without a language model.

The paper has a model describe, link and evolve (Xu et al. 2025, section 3); here rules do it at once, so that a note is
whole within its own transaction. `RuleWriter` is the write path of `loci.text.amem`, which explains the system.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from sqlalchemy import bindparam, select

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

    item: NewNote
    text: str
    said_at: datetime
    assumed: bool
    spans: list[TimeSpan]
    part_of: int | None  # place of the first part, for texts that were split
    place: int  # of the item in the caller's list
    vector: Float32[np.ndarray, " dimension"] | None = None


@dataclass(kw_only=True)
class Batch:
    """What earlier notes of the same transaction add to what the database tells."""

    topics: TopicClusters | None  # None without an embedder
    recent: list[tuple[int, tuple[str, ...]]]  # said_at and keywords of the latest turns, oldest first
    frequency: Counter[str] = field(default_factory=Counter)
    holders: dict[str, list[int]] = field(default_factory=dict)
    states: list[NoteState] = field(default_factory=list)
    vectors: list[Float32[np.ndarray, " dimension"]] = field(default_factory=list)
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
                placed: dict[int, tuple[NoteState | None, int]] = {}
                firsts: dict[int, int] = {}
                for ready in prepared:
                    follows = ready.item.follows
                    reply_to = placed[follows][1] if follows is not None else None
                    if ready.item.reply_to is not None:
                        reply_to = self.store.number(self.space, ready.item.reply_to)
                    parent = firsts.get(ready.part_of) if ready.part_of is not None else None
                    same = None if parent is not None else self._same(transaction, batch, ready)
                    if same is not None:
                        transaction.heard_again(same)
                        placed.setdefault(ready.place, (None, same))
                        continue
                    state = self._place(transaction, index, batch, ready, reply_to, parent)
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

    def _same(self, transaction: Transaction, batch: Batch, ready: _Prepared) -> int | None:
        """The note that holds exactly these words of this speaker already.

        Words that speak of a day relative to their own ("I ran today") say something new on another day.
        """
        key, source, said_at = digest(ready.text), ready.item.source, to_micros(ready.said_at)
        for state in batch.states:
            draft = state.draft
            if draft is not None and digest(state.content) == key and draft.source == source:
                return state.note if not ready.spans or draft.said_at.date() == ready.said_at.date() else None
        rows = transaction.connection.execute(_SAME, {"space": self.space, "key": key, "source": source})
        for row in rows:
            if not ready.spans or abs(row.said_at - said_at) < DAY:
                return int(row.note)
        return None

    def _place(
        self,
        transaction: Transaction,
        index: SpaceIndex,
        batch: Batch,
        ready: _Prepared,
        reply_to: int | None,
        parent: int | None,
    ) -> NoteState:
        """Describe, add, link and let evolve: one note, by rules."""
        near = self.nearest(index, batch, ready.vector)
        earlier = transaction.state(reply_to) if reply_to is not None else None
        said = terms(ready.text)
        found = document_frequencies(transaction.connection, self.space, said)
        frequency = {term: found.get(term, (0, 0))[0] + batch.frequency[term] for term in said}
        live = max(int(index.live.sum()) + len(batch.states), 1)
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

    def nearest(
        self,
        index: SpaceIndex,
        batch: Batch,
        vector: Float32[np.ndarray, " dimension"] | None,
        *,
        besides: int | None = None,
    ) -> list[tuple[int, float]]:
        """The nearest notes by content, nearest first, as (note, cosine); `besides` is left out."""
        if vector is None:
            return []
        near: list[tuple[int, float]] = []
        if len(index.note):
            cosines = np.where(index.live & (index.note != besides), index.cosine(vector, field="content"), -1.0)
            some = min(self.config.neighbours, len(cosines))
            rows = np.argpartition(-cosines, some - 1)[:some]
            near = [(int(index.note[row]), float(cosines[row])) for row in rows if cosines[row] > -1.0]
        if batch.vectors:
            cosines = np.stack(batch.vectors) @ vector
            near += [(state.note, float(c)) for state, c in zip(batch.states, cosines, strict=True)]
        return sorted(near, key=lambda pair: (-pair[1], pair[0]))[: self.config.neighbours]

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
        shared = self._holders(transaction, batch, words, frequency)
        for word, holders in shared.items():
            for note in holders:
                found.append((note, "entity", 1.0 / len(holders), f"both speak of {word}"))
        for note, kind, weight, reason in found:
            transaction.link(state.note, note, kind, weight, reason, made_by=RULES)
            batch.links.setdefault(state.note, []).append((note, kind, weight, reason))

    def _holders(
        self, transaction: Transaction, batch: Batch, words: Sequence[str], frequency: Mapping[str, int]
    ) -> dict[str, list[int]]:
        """For each keyword that few notes share, the other notes that hold it."""
        low, high = self.config.rare
        # The note itself counts as one of the holders.
        rare = {term: word for word in words for term in terms(word) if low <= frequency.get(term, 0) + 1 <= high}
        held: dict[str, list[int]] = {}
        if rare:
            rows = transaction.connection.execute(_HOLDERS, {"space": self.space, "terms": list(rare)})
            for term, note in rows:
                held.setdefault(rare[term], []).append(note)
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
        batch.states.append(state)
        if ready.vector is None or batch.topics is None:
            return {}
        batch.vectors.append(ready.vector)
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
        ids = self.store.ids(self.space, [*others, *changed, *(note for _, note in placed.values())])
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
_SAME = select(_notes.c.note, _notes.c.said_at).where(
    _notes.c.space == bindparam("space"),
    _notes.c.sha256 == bindparam("key"),
    _notes.c.source.is_not_distinct_from(bindparam("source")),
    _notes.c.status == "live",
)
_HOLDERS = select(_words.c.term, _words.c.note).where(
    _words.c.space == bindparam("space"), _words.c.term.in_(bindparam("terms", expanding=True)), _words.c.content > 0
)


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
