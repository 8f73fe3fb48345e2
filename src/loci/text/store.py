"""The note store: one file (SQLite) or one database (PostgreSQL) that holds words and everything derived from them.

One write is one transaction: the note, its description, vectors, words, links, the notes it changed and the journal
appear together or not at all. SQLite runs in WAL mode with full synchronisation, a busy timeout, foreign keys and
secure deletion (freed bytes are overwritten), so a committed note survives a power cut and a forgotten one is gone.

`Store` opens, locks, counts and checks; `transaction.py` writes; `erase.py` forgets; `index.py` is what a search reads.
The word index is a table of postings and not FTS5: see docs/decisions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Row,
    bindparam,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import StaticPool

from loci import errors
from loci.text import schema
from loci.text.index import SpaceIndex
from loci.text.moments import now_micros, to_moment
from loci.text.organizer import Link, Note, TimeSpan, Version
from loci.text.transaction import Transaction

_BUSY_SECONDS = 30.0  # how long a writer waits for another process before it gives up; ours


@dataclass(frozen=True, kw_only=True)
class SpaceInfo:
    space: int
    name: str
    notes: int
    embedder: str | None
    dimension: int | None
    created_at: datetime


class Store:
    """Open with `Store.open`. One object serves many threads, one at a time; many processes may share one file."""

    def __init__(self, engine: Engine, where: str) -> None:
        self.where = where
        self.lock = threading.RLock()
        self._engine = engine
        self._connection = engine.connect()
        self._indexes: dict[int, SpaceIndex] = {}
        self._uses: dict[int, dict[int, int]] = {}
        self._last_used = 0

    # Opening and closing

    @classmethod
    def open(cls, url: str | Path, *, busy_seconds: float = _BUSY_SECONDS) -> Store:
        """Open or create a store.

        Args:
            url: a file's path, ":memory:", or a SQLAlchemy URL (`sqlite:///...`, `postgresql+psycopg://...`).
            busy_seconds: how long a writer waits while another process writes.

        Raises:
            NotAStore, NewerStore, StoreReadOnly, StoreFull, StoreBusy: each says what to do.
        """
        text = str(url)
        if "://" not in text:
            path = Path(text).expanduser()
            if text != ":memory:":
                _check_file(path)
            text = "sqlite://" if text == ":memory:" else f"sqlite:///{path}"
        try:
            address = make_url(text)
        except ArgumentError:
            raise errors.BadInput(
                f"{text!r} is no database: give a file's path, sqlite:///FILE or postgresql+psycopg://..."
            ) from None
        where = address.database or "memory" if address.get_backend_name() == "sqlite" else text
        with told(where):
            if address.get_backend_name() == "sqlite":
                engine = create_engine(
                    address,
                    poolclass=StaticPool,
                    connect_args={"check_same_thread": False, "timeout": busy_seconds, "isolation_level": None},
                )
                event.listen(engine, "connect", _prepare_sqlite)
                event.listen(engine, "begin", _begin_sqlite)
            else:
                engine = create_engine(address, pool_pre_ping=True)
            store = cls(engine, where)
            try:
                store._migrate()
            except BaseException:
                store.close()
                raise
            return store

    def close(self) -> None:
        """Write the counted uses and let go of the file. Safe to call twice."""
        with self.lock:
            if not self._connection.closed:
                try:
                    self.flush_uses()
                finally:
                    self._connection.close()
                    self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _migrate(self) -> None:
        """Bring the schema to its newest revision; refuse files that are no store or that a newer Loci wrote."""
        found = None
        with self.reading() as connection:
            tables = set(inspect(connection).get_table_names())
            if "alembic_version" in tables:
                found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found == schema.HEAD:
            return
        if found is None and tables:
            raise errors.NotAStore(
                f"{self.where} is a database of something else (it holds {', '.join(sorted(tables)[:3])}); "
                "give the path of a Loci store or of a file that does not exist yet."
            )
        if found is not None and found > schema.HEAD:
            raise errors.NewerStore(
                f"{self.where} has schema {found}, this Loci knows up to {schema.HEAD}: "
                "update it with  pip install -U loci-lm"
            )
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.lock, self._connection.begin():
            tables = set(inspect(self._connection).get_table_names())
            # Another process may have migrated while this one waited for the lock.
            if "alembic_version" in tables:
                found = self._connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            if found != schema.HEAD:
                config.attributes["connection"] = self._connection
                command.upgrade(config, "head")

    # Transactions

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A consistent view of the database for reading. Nested use shares the outer view."""
        with self.lock, told(self.where):
            if self._connection.in_transaction():
                yield self._connection
                return
            self._connection.info["begin"] = "BEGIN"
            try:
                with self._connection.begin():
                    yield self._connection
            finally:
                self._connection.info["begin"] = "BEGIN IMMEDIATE"

    @contextmanager
    def transaction(self, space: int, *, actor: str = "loci") -> Iterator[Transaction]:
        """Everything written inside appears together when the block ends, or not at all when it raises."""
        with self.lock, told(self.where):
            if self._connection.in_transaction():
                raise RuntimeError("a store transaction cannot be nested")
            with self._connection.begin():
                transaction = Transaction(self._connection, space, now_micros(), actor)
                yield transaction
                transaction.finish()

    # Spaces

    def space(self, name: str, *, create: bool = False) -> int:
        """The number of a space. Raises `UnknownSpace`, naming those that exist, unless `create`."""
        with self.reading() as connection:
            found = connection.scalar(select(schema.spaces.c.space).where(schema.spaces.c.name == name))
        if found is not None:
            return int(found)
        if not create:
            known = ", ".join(repr(info.name) for info in self.spaces()[:8]) or "none yet"
            raise errors.UnknownSpace(f"{self.where} has no space {name!r}. It holds: {known}.")
        if not name.strip() or len(name) > 200:
            raise errors.BadInput(f"a space needs a name of 1 to 200 characters, found {len(name)} of them.")
        with self.lock, told(self.where), self._connection.begin():
            again = self._connection.scalar(select(schema.spaces.c.space).where(schema.spaces.c.name == name))
            if again is not None:
                return int(again)
            row = self._connection.execute(
                insert(schema.spaces).values(name=name, created_at=now_micros(), next_note=1, seq=0)
            )
            return int(row.inserted_primary_key[0])  # type: ignore[index]

    def spaces(self) -> list[SpaceInfo]:
        table, note = schema.spaces, schema.notes
        count = select(func.count()).where(note.c.space == table.c.space, note.c.status == "live").scalar_subquery()
        with self.reading() as connection:
            rows = connection.execute(select(table, count.label("notes")).order_by(table.c.name)).all()
        return [
            SpaceInfo(
                space=row.space,
                name=row.name,
                notes=row.notes,
                embedder=row.embedder,
                dimension=row.dimension,
                created_at=to_moment(row.created_at),
            )
            for row in rows
        ]

    def index(self, space: int) -> SpaceIndex:
        """The space's search columns, caught up with the database. Use under `lock`."""
        with self.reading() as connection:
            index = self._indexes.get(space)
            if index is None:
                index = self._indexes[space] = SpaceIndex(space, None)
            index.catch_up(connection)
            return index

    # Reading

    def number(self, space: int, id: str) -> int:
        """The number of the note with this id, or with an id that begins so. Raises `UnknownNote`."""
        table = schema.notes
        with self.reading() as connection:
            numbers = connection.scalars(_NUMBER, {"space": space, "id": id}).all()
            if not numbers:
                begins = select(table.c.note).where(table.c.space == space, table.c.id.startswith(id, autoescape=True))
                numbers = connection.scalars(begins.limit(2)).all()
        if len(numbers) == 1 and id:
            return int(numbers[0])
        what = "more than one note" if numbers else "no note"
        raise errors.UnknownNote(f"{what} of this space has the id {id!r}; `loci notes show` lists ids.")

    def notes(self, space: int, numbers: Sequence[int] | None = None, *, status: str | None = "live") -> list[Note]:
        """Whole notes, in the order of `numbers`; all of the space in the order of writing when none are named."""
        table, version = schema.notes, schema.versions
        query = (
            select(table, version.c.keywords, version.c.tags, version.c.context)
            .join(
                version,
                (version.c.space == table.c.space)
                & (version.c.note == table.c.note)
                & (version.c.version == table.c.version),
            )
            .where(table.c.space == space)
            .order_by(table.c.note)
        )
        if status is not None:
            query = query.where(table.c.status == status)
        if numbers is not None:
            query = query.where(table.c.note.in_(numbers))
        with self.reading() as connection:
            rows = connection.execute(query).all()
            held = None if numbers is None else [row.note for row in rows]
            spans = self._spans(connection, space, held)
            named = self._named(connection, space, held)
            others = {row.reply_to for row in rows} | {row.superseded_by for row in rows}
            ids = {row.note: row.id for row in rows} | self.ids(space, [n for n in others if n is not None])
        found = {row.note: _note(row, ids, spans.get(row.note, ()), named.get(row.note, ())) for row in rows}
        return [found[number] for number in (numbers if numbers is not None else found) if number in found]

    def ids(self, space: int, numbers: Sequence[int]) -> dict[int, str]:
        with self.reading() as connection:
            rows = connection.execute(_IDS, {"space": space, "numbers": numbers})
            return {row.note: row.id for row in rows}

    def _spans(
        self, connection: Connection, space: int, numbers: Sequence[int] | None
    ) -> dict[int, tuple[TimeSpan, ...]]:
        table = schema.times
        query = (
            select(table, schema.notes.c.offset)
            .join(schema.notes, (schema.notes.c.space == table.c.space) & (schema.notes.c.note == table.c.note))
            .where(table.c.space == space)
            .order_by(table.c.note, table.c.position)
        )
        if numbers is not None:
            query = query.where(table.c.note.in_(numbers))
        spans: dict[int, list[TimeSpan]] = {}
        for row in connection.execute(query):
            spans.setdefault(row.note, []).append(
                TimeSpan(
                    text=row.text,
                    start=to_moment(row.start, row.offset),
                    end=to_moment(row.end, row.offset),
                    phrase=row.phrase,
                    begin=row.begin,
                    finish=row.finish,
                )
            )
        return {note: tuple(found) for note, found in spans.items()}

    def _named(self, connection: Connection, space: int, numbers: Sequence[int] | None) -> dict[int, tuple[str, ...]]:
        table = schema.mentions
        query = select(table.c.note, table.c.name).where(table.c.space == space).order_by(table.c.note, table.c.name)
        if numbers is not None:
            query = query.where(table.c.note.in_(numbers))
        named: dict[int, list[str]] = {}
        for row in connection.execute(query):
            named.setdefault(row.note, []).append(row.name)
        return {note: tuple(found) for note, found in named.items()}

    def history(self, space: int, note: int) -> list[Version]:
        """Every description the note has had, oldest first."""
        table = schema.versions
        with self.reading() as connection:
            rows = connection.execute(
                select(table).where(table.c.space == space, table.c.note == note).order_by(table.c.version)
            ).all()
            ids = self.ids(space, [row.cause for row in rows if row.cause is not None])
        return [
            Version(
                version=row.version,
                keywords=tuple(row.keywords),
                tags=tuple(row.tags),
                context=row.context,
                made_by=row.made_by,
                cause=ids.get(row.cause),
                reason=row.reason,
                written_at=to_moment(row.written_at),
            )
            for row in rows
        ]

    def links(self, space: int, note: int) -> list[Link]:
        """The note's links, strongest first."""
        table = schema.links
        with self.reading() as connection:
            rows = connection.execute(
                select(table).where(table.c.space == space, table.c.src == note).order_by(table.c.weight.desc())
            ).all()
            ids = self.ids(space, [note, *(row.dst for row in rows)])
        return [
            Link(
                src=ids[row.src],
                dst=ids[row.dst],
                kind=row.kind,
                weight=row.weight,
                reason=row.reason,
                made_by=row.made_by,
            )
            for row in rows
        ]

    def journal(self, space: int, *, limit: int = 50) -> list[Mapping[str, Any]]:
        """What was done, newest first: seq, op, note, before, after, actor, at. Never words."""
        table = schema.journal
        with self.reading() as connection:
            rows = connection.execute(
                select(table).where(table.c.space == space).order_by(table.c.seq.desc()).limit(limit)
            ).all()
            ids = self.ids(space, [row.note for row in rows if row.note is not None])
        return [
            {
                "seq": row.seq,
                "op": row.op,
                "note": ids.get(row.note),
                "before": row.before,
                "after": row.after,
                "actor": row.actor,
                "at": to_moment(row.at).isoformat(),
            }
            for row in rows
        ]

    # Use, size, health

    def count_uses(self, space: int, numbers: Sequence[int]) -> None:
        """Remember that these notes were read; written in batches, and always before the store closes."""
        with self.lock:
            counted = self._uses.setdefault(space, {})
            for number in numbers:
                counted[number] = counted.get(number, 0) + 1
            self._last_used = now_micros()
            if sum(len(notes) for notes in self._uses.values()) >= 256:
                self.flush_uses()

    def flush_uses(self) -> None:
        """Write the counted uses. Where the store cannot be written they are lost: reading must not fail."""
        table = schema.notes
        with self.lock:
            rows = [(space, note, n) for space, counted in self._uses.items() for note, n in counted.items()]
            self._uses.clear()
            if not rows:
                return
            statement = (
                update(table)
                .where(table.c.space == bindparam("s"), table.c.note == bindparam("n"))
                .values(uses=table.c.uses + bindparam("more"), last_used_at=self._last_used)
            )
            try:
                with told(self.where), self._connection.begin():
                    self._connection.execute(statement, [{"s": s, "n": n, "more": more} for s, n, more in rows])
            except (errors.StoreReadOnly, errors.StoreFull, errors.StoreBusy):
                return

    @property
    def nbytes(self) -> int:
        """Bytes held: the file's pages in use, and the search columns in memory."""
        return self.file_bytes + sum(index.nbytes for index in self._indexes.values())

    @property
    def file_bytes(self) -> int:
        """Pages of the file in use, in bytes (SQLite), or the size of the tables and indexes (PostgreSQL)."""
        with self.reading() as connection:
            if connection.dialect.name == "sqlite":
                return int(connection.exec_driver_sql(_BYTES_IN_USE).scalar_one())
            return int(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one())

    def shrink(self) -> None:
        """Give freed pages back and empty the write-ahead log, so that erased words lie nowhere in the files."""
        with self.lock, told(self.where):
            if self._connection.dialect.name != "sqlite":
                return
            raw: Any = self._connection.connection.dbapi_connection
            raw.execute("PRAGMA incremental_vacuum").fetchall()
            busy = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            self._connection.rollback()
            if busy:
                raise errors.StoreBusy(
                    f"{self.where} is being read by another process, so its log still holds erased words; "
                    "run  loci notes check  once that process has ended."
                )

    def drop_index(self, space: int) -> None:
        """Forget the search columns in memory; the next use reads them again without the dead rows."""
        with self.lock:
            self._indexes.pop(space, None)

    def delete_space(self, name: str) -> int:
        """Remove a space and everything in it; returns how many notes it held."""
        space = self.space(name)
        with self.lock, told(self.where), self._connection.begin():
            held = self._connection.scalar(select(func.count()).where(schema.notes.c.space == space)) or 0
            for table in (schema.words, schema.terms):
                self._connection.execute(delete(table).where(table.c.space == space))
            self._connection.execute(delete(schema.notes).where(schema.notes.c.space == space))
            self._connection.execute(delete(schema.spaces).where(schema.spaces.c.space == space))
        self.drop_index(space)
        self._uses.pop(space, None)
        self.shrink()
        return int(held)

    def check(self) -> list[str]:
        """Prove the store whole; every line returned is one fault, none means it is sound.

        Every live note has its words, its vectors (where the space has an embedder) and an unbroken chain of versions
        up to its newest; every link has its way back; the file itself passes the database's own test.
        """
        from loci.text.check import faults

        with self.reading() as connection:
            return faults(connection)


@contextmanager
def told(where: str) -> Iterator[None]:
    """Turn the database's own errors into Loci's: what happened to which file, and what to do."""
    try:
        yield
    except DBAPIError as error:
        text = str(error.orig).lower()
        if "disk is full" in text or "no space" in text:
            raise errors.StoreFull(
                f"the disk of {where} is full: nothing of this write was kept, all before it is safe. Free some space."
            ) from error
        if "readonly" in text or "read-only" in text:
            raise errors.StoreReadOnly(
                f"{where} cannot be written: give the file and its folder write permission, or name another with --db."
            ) from error
        if "locked" in text or "busy" in text:
            raise errors.StoreBusy(
                f"another process has held {where} for too long: try again, or end that process (`fuser {where}`)."
            ) from error
        if "not a database" in text or "malformed" in text:
            raise errors.NotAStore(
                f"{where} is no Loci store, or is damaged ({error.orig}): restore a copy, or name another file."
            ) from error
        if "unable to open" in text:
            raise errors.StoreReadOnly(
                f"{where} cannot be opened: its folder must exist and be writable by you."
            ) from error
        if isinstance(error, OperationalError):
            raise errors.StoreError(f"{where}: the database said {error.orig}.") from error
        raise


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise errors.NotAStore(f"{path} is a folder; give the path of a file in it, such as {path / 'memory.db'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.StoreReadOnly(
            f"the folder {path.parent} cannot be made ({error.strerror}): choose another path with --db."
        ) from error


# Made once: building a statement costs more than running it.
_NUMBER = select(schema.notes.c.note).where(
    schema.notes.c.space == bindparam("space"), schema.notes.c.id == bindparam("id")
)
_IDS = select(schema.notes.c.note, schema.notes.c.id).where(
    schema.notes.c.space == bindparam("space"), schema.notes.c.note.in_(bindparam("numbers", expanding=True))
)

_BYTES_IN_USE = (
    "SELECT (page_count - freelist_count) * page_size"
    " FROM pragma_page_count(), pragma_freelist_count(), pragma_page_size()"
)


def _prepare_sqlite(connection: Any, _: object) -> None:
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # holds only for a file that has no table yet
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA secure_delete=ON")
    connection.execute("PRAGMA cache_size=-65536")  # 64 MiB of pages; ours
    connection.execute("PRAGMA temp_store=MEMORY")


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes the lock at once: one that upgrades later fails when another has written in between.
    connection.exec_driver_sql(connection.info.get("begin", "BEGIN IMMEDIATE"))


def _note(row: Row[Any], ids: Mapping[int, str], spans: tuple[TimeSpan, ...], named: tuple[str, ...]) -> Note:
    return Note(
        id=row.id,
        kind=row.kind,
        content=row.content,
        source=row.source,
        said_at=to_moment(row.said_at, row.offset),
        written_at=to_moment(row.written_at),
        status=row.status,
        reply_to=ids.get(row.reply_to),
        superseded_by=ids.get(row.superseded_by),
        keywords=tuple(row.keywords),
        tags=tuple(row.tags),
        context=row.context,
        version=row.version,
        uses=row.uses,
        tokens=row.tokens,
        entities=named,
        times=spans,
        meta=row.meta or {},
    )
