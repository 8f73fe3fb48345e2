"""The tables of a note store, the same on SQLite and PostgreSQL.

Every table is keyed by `space` first, so that one tenant's rows lie together and the whole schema shards by tenant.
Inside a space a note is a number (`note`, counted upwards, never used again); people and programs see its `id`, a
time-ordered uuid. Moments are whole microseconds since 1970 in UTC; the offset they were given in stands beside them.

Nothing here holds words except `notes.content`, `versions`, `words`, `mentions`, `times` and `topics`: these are
the places that forgetting has to clean, and `Store.erase` cleans them.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)

HEAD = "0001"  # the newest migration; a store of another revision is migrated or refused

metadata = MetaData()


def _of_a_note() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["space", "note"], ["notes.space", "notes.note"], ondelete="CASCADE")


spaces = Table(
    "spaces",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("embedder", String(200)),  # null until the first vector is written
    Column("dimension", Integer),
    Column("next_note", BigInteger, nullable=False, default=1),
    Column("seq", BigInteger, nullable=False, default=0),  # of the newest journal row; caches catch up by it
)

notes = Table(
    "notes",
    metadata,
    Column("space", Integer, ForeignKey("spaces.space", ondelete="CASCADE"), primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(36), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("content", Text, nullable=False),
    Column("sha256", LargeBinary(32), nullable=False),
    Column("source", String(200)),
    Column("reply_to", BigInteger),
    Column("parent", BigInteger),  # the first part of a text that was too long for one note
    Column("said_at", BigInteger, nullable=False),
    Column("offset", SmallInteger, nullable=False),  # minutes east of Greenwich
    Column("offset_assumed", SmallInteger, nullable=False, default=0),  # 1: no zone was given, local time was taken
    Column("written_at", BigInteger, nullable=False),
    Column("status", String(10), nullable=False, default="live"),
    Column("superseded_by", BigInteger),
    Column("version", Integer, nullable=False, default=1),
    Column("heard", Integer, nullable=False, default=1),  # how often exactly this was written
    Column("uses", Integer, nullable=False, default=0),
    Column("last_used_at", BigInteger),
    Column("pinned", SmallInteger, nullable=False, default=0),
    Column("tokens", Integer, nullable=False),
    Column("content_length", Integer, nullable=False),  # in terms, for BM25
    Column("described_length", Integer, nullable=False),
    Column("distinct_terms", Integer, nullable=False),  # rows of this note in `words`; proves that an erasure was whole
    Column("dated", SmallInteger, nullable=False, default=0),  # 1: it speaks of a time that was resolved
    Column("import_key", String(64)),
    Column("meta", JSON),
    UniqueConstraint("space", "id"),
    CheckConstraint("status IN ('live', 'superseded', 'merged')", name="known_status"),
    Index("notes_by_hash", "space", "sha256"),
    Index("notes_by_time", "space", "said_at"),
    Index("notes_by_import_key", "space", "import_key"),
)

versions = Table(
    "versions",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("keywords", JSON, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("context", Text, nullable=False),
    Column("made_by", String(100), nullable=False),
    Column("cause", BigInteger),  # the note because of which this version was made
    Column("reason", Text, nullable=False),
    Column("written_at", BigInteger, nullable=False),
    _of_a_note(),
    Index("versions_by_cause", "space", "cause"),
)

links = Table(
    "links",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("src", BigInteger, primary_key=True, autoincrement=False),
    Column("dst", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(12), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("reason", Text, nullable=False),
    Column("made_by", String(100), nullable=False),
    Column("written_at", BigInteger, nullable=False),
    ForeignKeyConstraint(["space", "src"], ["notes.space", "notes.note"], ondelete="CASCADE"),
    ForeignKeyConstraint(["space", "dst"], ["notes.space", "notes.note"], ondelete="CASCADE"),
    Index("links_by_target", "space", "dst"),
    sqlite_with_rowid=False,
)

vectors = Table(
    "vectors",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("content", LargeBinary, nullable=False),  # float16, little endian, of the content
    Column("described", LargeBinary, nullable=False),  # the same of content, keywords, tags and context together
    _of_a_note(),
)

words = Table(
    "words",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("term", String(40), primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("content", SmallInteger, nullable=False),  # how often the term stands in the content
    Column("described", SmallInteger, nullable=False),  # and in content and description together
    sqlite_with_rowid=False,
)

# What `words` says of each term as a whole: so that a question or a keyword asks for one row and not for all postings.
terms = Table(
    "terms",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("term", String(40), primary_key=True),
    Column("said", Integer, nullable=False),  # notes that hold it in their content
    Column("described", Integer, nullable=False),  # notes that hold it in content or description
    sqlite_with_rowid=False,
)

mentions = Table(
    "mentions",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("entity", String(200), primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String(200), nullable=False),  # as it was written; `entity` is its folded form
    _of_a_note(),
    Index("mentions_by_note", "space", "note"),
    sqlite_with_rowid=False,
)

times = Table(
    "times",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("position", SmallInteger, primary_key=True, autoincrement=False),
    Column("text", Text, nullable=False),
    Column("phrase", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("end", BigInteger, nullable=False),
    Column("begin", Integer, nullable=False),
    Column("finish", Integer, nullable=False),
    _of_a_note(),
    Index("times_by_start", "space", "start"),
)

topics = Table(
    "topics",
    metadata,
    Column("space", Integer, ForeignKey("spaces.space", ondelete="CASCADE"), primary_key=True),
    Column("topic", Integer, primary_key=True, autoincrement=False),
    Column("size", Integer, nullable=False),
    Column("total", LargeBinary, nullable=False),  # float32, little endian: the sum of the members' content vectors
    Column("label", String(60), nullable=False),
    Column("words", JSON, nullable=False),  # term -> [count, as it was written]
)

calls = Table(
    "calls",
    metadata,
    Column("space", Integer, ForeignKey("spaces.space", ondelete="CASCADE"), primary_key=True),
    Column("call", BigInteger, primary_key=True, autoincrement=False),
    Column("purpose", String(40), nullable=False),
    Column("model", String(200), nullable=False),
    Column("tokens_in", Integer, nullable=False),
    Column("tokens_out", Integer, nullable=False),
    Column("ms", Float, nullable=False),
    Column("outcome", String(200), nullable=False),  # "ok", "repaired" or "failed: <kind of error>", never the output
    Column("at", BigInteger, nullable=False),
)

journal = Table(
    "journal",
    metadata,
    Column("space", Integer, ForeignKey("spaces.space", ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("op", String(20), nullable=False),
    Column("note", BigInteger),
    Column("before", JSON),  # version numbers and states, never words
    Column("after", JSON),
    Column("actor", String(100), nullable=False),
    Column("at", BigInteger, nullable=False),
)

pending = Table(
    "pending",
    metadata,
    Column("space", Integer, primary_key=True),
    Column("note", BigInteger, primary_key=True, autoincrement=False),
    Column("stage", String(20), primary_key=True),
    Column("attempts", Integer, nullable=False, default=0),
    Column("last_error", Text),
    _of_a_note(),
)
