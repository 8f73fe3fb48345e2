"""Forgetting for good: words, everything derived from them, and their traces in other notes.

What has to go with a note: its row, versions, links, vectors, postings, mentions, times and queue entries; the
versions of other notes that were made because of it, with what was built upon them; the note that it superseded comes
back; pointers to it are emptied. Terms that no other note's content holds afterwards are looked for in every other
description and in the topic state, and taken out there. The journal holds no words and keeps only that it happened.
`Store.shrink` then overwrites the freed pages and empties the write-ahead log.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import regex
from sqlalchemy import delete, func, select, update

from loci.text import schema
from loci.text.construct import without_reply
from loci.text.search import document_frequencies
from loci.text.transaction import NoteState, Transaction, count_terms
from loci.text.words import fold, normal, terms

RULES = "rules"  # `made_by` of versions that the rule evolution made: they can be made again, clause by clause
_AT_ONCE = 500


def erase(transaction: Transaction, numbers: Collection[int]) -> dict[str, int]:
    """Remove notes within a transaction; returns how many rows of each kind went and how many notes were restored.

    Notes whose description changed are left in `transaction.pending_vectors()` for the caller to embed again.
    """
    doomed = sorted(set(numbers))
    states = transaction.load(doomed)
    doomed = [state.note for state in states]
    counts: Counter[str] = Counter()
    held: Counter[str] = Counter()
    said: Counter[str] = Counter()
    for state in states:
        counts["words"] += _erase_postings(transaction, state)
        held.update(set(terms(state.text)))
        said.update(set(terms(state.spoken)))
    counts["restored"] = _undo_effects(transaction, doomed)
    for start in range(0, len(doomed), _AT_ONCE):
        part = doomed[start : start + _AT_ONCE]
        counts["links"] += _count(transaction, schema.links.c.src, part)
        counts["versions"] += _count(transaction, schema.versions.c.note, part)
        _empty_pointers(transaction, part)
        table = schema.notes
        transaction.connection.execute(delete(table).where(table.c.space == transaction.space, table.c.note.in_(part)))
    for state in states:
        transaction.drop(state)
        transaction.log("forget", state.note)
    minus = [Counter({term: -notes for term, notes in counted.items()}) for counted in (held, said)]
    count_terms(transaction.connection, transaction.space, *minus)
    counts["notes"] = len(states)
    counts["cleaned"] = _clean_descriptions(transaction, set(said))
    return dict(counts)


def _erase_postings(transaction: Transaction, state: NoteState) -> int:
    table = schema.words
    found = sorted(set(terms(state.text)))
    mine = (table.c.space == transaction.space) & (table.c.note == state.note)
    removed = 0
    for start in range(0, len(found), _AT_ONCE):
        part = found[start : start + _AT_ONCE]
        removed += transaction.connection.execute(delete(table).where(mine, table.c.term.in_(part))).rowcount
    expected = transaction.connection.scalar(
        select(schema.notes.c.distinct_terms).where(
            schema.notes.c.space == transaction.space, schema.notes.c.note == state.note
        )
    )
    if removed != expected:
        # The words were cut by another version of the analysis: look at every posting of the space, slow but sure.
        removed += transaction.connection.execute(delete(table).where(mine)).rowcount
    return removed


def _undo_effects(transaction: Transaction, doomed: Sequence[int]) -> int:
    """Take back what the doomed notes did to others: versions they caused, and their words in replies to them."""
    version, note = schema.versions, schema.notes
    touched: set[int] = set()
    replies: set[int] = set()
    for start in range(0, len(doomed), _AT_ONCE):
        part = doomed[start : start + _AT_ONCE]
        for found, column in ((touched, version.c.cause), (replies, note.c.reply_to)):
            found.update(
                transaction.connection.scalars(
                    select(column.table.c.note).where(
                        column.table.c.space == transaction.space, column.in_(part), column.table.c.note.not_in(part)
                    )
                )
            )
    gone = set(doomed)
    for state in transaction.load(sorted((touched | replies) - gone)):
        chain = without(_chain(transaction, state), gone)
        if state.note in replies:
            chain = [{**row, "context": without_reply(row["context"])} for row in chain]
        transaction.rewrite_versions(state, chain)
        transaction.log("restore", state.note)
    return len(touched - gone)


def _chain(transaction: Transaction, state: NoteState) -> list[dict[str, Any]]:
    table = schema.versions
    rows = transaction.connection.execute(
        select(table).where(table.c.space == transaction.space, table.c.note == state.note).order_by(table.c.version)
    )
    return [dict(row._mapping) for row in rows]


def without(chain: Sequence[Mapping[str, Any]], causes: Collection[int]) -> list[dict[str, Any]]:
    """A chain of versions as it would be had the causes never been.

    Versions with such a cause are left out. A later version made by rules is made again: what it added and removed
    is applied to the chain so far. A later version written by a model saw the words that must go, so it goes too.
    """
    kept = [dict(chain[0])]
    tainted = False
    for before, version in itertools.pairwise(chain):
        if version["cause"] in causes:
            tainted = True
        elif not tainted:
            kept.append(dict(version))
        elif version["made_by"] == RULES:
            last = kept[-1]
            again = {
                **version,
                "keywords": _patched(last["keywords"], before["keywords"], version["keywords"]),
                "tags": _patched(last["tags"], before["tags"], version["tags"]),
                "context": "; ".join(
                    _patched(*(text.split("; ") for text in (last["context"], before["context"], version["context"])))
                ),
            }
            kept.append(again)
    return kept


def _patched(base: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """`base` with what came and what went between `before` and `after`."""
    kept = [item for item in base if item in after or item not in before]
    return kept + [item for item in after if item not in before and item not in kept]


def _empty_pointers(transaction: Transaction, doomed: Sequence[int]) -> None:
    table = schema.notes
    here = table.c.space == transaction.space
    revived = transaction.connection.scalars(
        select(table.c.note).where(here, table.c.superseded_by.in_(doomed), table.c.note.not_in(doomed))
    ).all()
    for note in revived:
        transaction.set_status(note, "live")
    for column in (table.c.reply_to, table.c.parent):
        transaction.connection.execute(update(table).where(here, column.in_(doomed)).values({column: None}))


def _clean_descriptions(transaction: Transaction, lost: set[str]) -> int:
    """Take terms that stand in no content any more out of every description and of the topics."""
    still: set[str] = set()
    ordered = sorted(lost)
    for start in range(0, len(ordered), _AT_ONCE):
        found = document_frequencies(transaction.connection, transaction.space, ordered[start : start + _AT_ONCE])
        still |= {term for term, (said, _) in found.items() if said > 0}
    orphans = lost - still
    if not orphans:
        return 0
    if transaction.dimension is not None:
        topics = transaction.topics(transaction.dimension)
        transaction.save_topics(topics, topics.drop_terms(orphans))
    cleaned = 0
    for state in transaction.load(sorted(_holders(transaction, orphans))):
        before = _chain(transaction, state)
        after = [_stripped(version, orphans) for version in before]
        if after != before:
            transaction.rewrite_versions(state, after)
            transaction.log("restore", state.note)
            cleaned += 1
    return cleaned


def _holders(transaction: Transaction, orphans: set[str]) -> set[int]:
    """Notes whose versions, current or older, hold one of the terms. Reads all versions: older ones are in no index."""
    # A stem shares all but its last letter with the words it stands for; this sorts out nearly every row at once.
    hint = regex.compile("|".join(regex.escape(term[:-1] if len(term) > 2 else term) for term in sorted(orphans)))
    versions = schema.versions
    rows = transaction.connection.execute(
        select(versions.c.note, versions.c.keywords, versions.c.tags, versions.c.context).where(
            versions.c.space == transaction.space
        )
    )
    holders: set[int] = set()
    for row in rows:
        if row.note not in holders:
            text = " ; ".join((*row.keywords, *row.tags, row.context))
            if hint.search(fold(normal(text))) and not orphans.isdisjoint(terms(text)):
                holders.add(row.note)
    return holders


def _stripped(version: dict[str, Any], orphans: set[str]) -> dict[str, Any]:
    def clean(item: str) -> bool:
        return orphans.isdisjoint(terms(item))

    clauses = []
    for clause in version["context"].split("; "):
        kept = clause if clean(clause) else ", ".join(part for part in clause.split(", ") if clean(part))
        if kept:
            clauses.append(kept)
    return {
        **version,
        "keywords": [word for word in version["keywords"] if clean(word)],
        "tags": [tag for tag in version["tags"] if clean(tag)],
        "context": "; ".join(clauses),
    }


def _count(transaction: Transaction, column: Any, numbers: Sequence[int]) -> int:
    table = column.table
    query = select(func.count()).where(table.c.space == transaction.space, column.in_(numbers))
    return int(transaction.connection.scalar(query) or 0)
