"""Proof that a note store is whole. Each function looks for one kind of fault; a sound store yields none."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, and_, case, exists, func, select

from loci.text import schema

_NAMED = 20  # faults of one kind that are listed; more are counted


def faults(connection: Connection) -> list[str]:
    """Every fault in one sentence each, at most 20 of a kind."""
    found = []
    for look in (_file, _words, _terms, _vectors, _versions, _links, _numbers):
        lines = list(look(connection))
        found += lines[:_NAMED]
        if len(lines) > _NAMED:
            found.append(f"… and {len(lines) - _NAMED} more of this kind")
    return found


def _file(connection: Connection) -> Iterator[str]:
    if connection.dialect.name != "sqlite":
        return
    for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if line != "ok":
            yield f"file: {line}"
    for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"file: a row of {row[0]} points to a row of {row[2]} that is not there"


def _words(connection: Connection) -> Iterator[str]:
    note, word = schema.notes, schema.words
    held = (
        select(word.c.space, word.c.note, func.count().label("terms"), func.sum(word.c.described).label("length"))
        .group_by(word.c.space, word.c.note)
        .subquery()
    )
    joined = note.outerjoin(held, and_(held.c.space == note.c.space, held.c.note == note.c.note))
    wrong = (func.coalesce(held.c.terms, 0) != note.c.distinct_terms) | (
        func.coalesce(held.c.length, 0) != note.c.described_length
    )
    for row in connection.execute(
        select(note.c.id, held.c.terms, note.c.distinct_terms).select_from(joined).where(wrong)
    ):
        yield f"words: note {row.id} has {row.terms or 0} of its {row.distinct_terms} terms in the word index"
    strays = select(word.c.note).where(~exists().where(note.c.space == word.c.space, note.c.note == word.c.note))
    for number in connection.scalars(strays.distinct()):
        yield f"words: the word index holds terms of note number {number}, which does not exist"


def _terms(connection: Connection) -> Iterator[str]:
    word, term = schema.words, schema.terms
    held = (
        select(
            word.c.space,
            word.c.term,
            func.count().label("described"),
            func.sum(case((word.c.content > 0, 1), else_=0)).label("said"),
        )
        .group_by(word.c.space, word.c.term)
        .subquery()
    )
    joined = held.outerjoin(term, and_(term.c.space == held.c.space, term.c.term == held.c.term))
    right = and_(term.c.said == held.c.said, term.c.described == held.c.described)
    for (found,) in connection.execute(select(held.c.term).select_from(joined).where(~func.coalesce(right, False))):
        yield f"words: the term {found!r} is counted wrongly"
    counted = connection.scalar(select(func.count()).select_from(term))
    if counted != connection.scalar(select(func.count()).select_from(held)):
        yield "words: terms are counted that no note holds"


def _vectors(connection: Connection) -> Iterator[str]:
    note, vector, space = schema.notes, schema.vectors, schema.spaces
    rows = connection.execute(
        select(note.c.id, vector.c.content, vector.c.described, space.c.dimension)
        .join(space, space.c.space == note.c.space)
        .outerjoin(vector, and_(vector.c.space == note.c.space, vector.c.note == note.c.note))
        .where(space.c.embedder.is_not(None))
    )
    for row in rows:
        if row.content is None:
            yield f"vectors: note {row.id} has none"
        elif len(row.content) != 2 * row.dimension or len(row.described) != 2 * row.dimension:
            yield f"vectors: note {row.id} has vectors of another width than {row.dimension}"


def _versions(connection: Connection) -> Iterator[str]:
    note, version = schema.notes, schema.versions
    held = (
        select(
            version.c.space,
            version.c.note,
            func.count().label("versions"),
            func.min(version.c.version).label("first"),
            func.max(version.c.version).label("last"),
        )
        .group_by(version.c.space, version.c.note)
        .subquery()
    )
    joined = note.outerjoin(held, and_(held.c.space == note.c.space, held.c.note == note.c.note))
    whole = and_(held.c.first == 1, held.c.last == held.c.versions, held.c.last == note.c.version)
    for row in connection.execute(
        select(note.c.id, note.c.version, held.c.versions).select_from(joined).where(~func.coalesce(whole, False))
    ):
        yield f"versions: note {row.id} stands at version {row.version} but {row.versions or 0} are kept"
    lost = select(version.c.note, version.c.version).where(
        version.c.cause.is_not(None),
        ~exists().where(note.c.space == version.c.space, note.c.note == version.c.cause),
    )
    for number, made in connection.execute(lost):
        yield f"versions: version {made} of note number {number} was caused by a note that does not exist"


def _links(connection: Connection) -> Iterator[str]:
    link = schema.links
    back = link.alias("back")
    one_way = select(link.c.src, link.c.dst, link.c.kind).where(
        ~exists().where(
            back.c.space == link.c.space,
            back.c.src == link.c.dst,
            back.c.dst == link.c.src,
            back.c.kind == link.c.kind,
        )
    )
    for row in connection.execute(one_way):
        yield f"links: {row.kind} from note number {row.src} to {row.dst} has no way back"


def _numbers(connection: Connection) -> Iterator[str]:
    note, space = schema.notes, schema.spaces
    rows = connection.execute(
        select(space.c.name, space.c.next_note, func.max(note.c.note).label("last"))
        .join(note, note.c.space == space.c.space)
        .group_by(space.c.space, space.c.name, space.c.next_note)
    )
    for row in rows:
        if row.last >= row.next_note:
            yield f"spaces: {row.name!r} would use the number {row.next_note} again"
    for column in (note.c.reply_to, note.c.superseded_by, note.c.parent):
        other = schema.notes.alias("other")
        lost = select(note.c.id).where(
            column.is_not(None), ~exists().where(other.c.space == note.c.space, other.c.note == column)
        )
        for (id,) in connection.execute(lost):
            yield f"notes: {column.name} of note {id} names a note that does not exist"
