"""What a search must touch for every note of a space, held in memory as columns and kept up with the store.

Two float16 matrices (content, described) and a few numbers a note. Row order is note order. The index catches up
before each use: the space's journal says which notes have changed since, also when another process wrote them.
Held bytes: 4 * dimension + 30 a note; opening reads them once (0.8 s of a processor at 10^5 notes of 384 numbers). A
file of columns beside the database would open in 0.2 s, 0.6 s with the check of its bytes, and be a second place that
forgetting has to clean.

The product of a query with all rows is exact and runs at memory speed (numkong; 77 MB in 6 ms at 10^5 notes). Many
queries share each reading of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numkong
import numpy as np
from jaxtyping import Bool, Float, Int
from sqlalchemy import Connection, bindparam, func, select

from loci.text.schema import journal, notes, spaces, vectors

_ALL_AGAIN = 2_000  # changed notes above which one scan beats asking for each
_QUERIES_AT_ONCE = 64  # a block of cosines takes 4 bytes for each query and note
_AT_ONCE = 500  # numbers in one IN (...): SQLite allows 32,766, plans are small


class SpaceIndex:
    """The columns of one space. Not thread-safe: the store's lock guards it."""

    def __init__(self, space: int, dimension: int | None) -> None:
        self.space = space
        self.dimension = dimension
        self.sources: dict[str, int] = {}
        self.seq = -1
        self._size = 0
        self._columns = Columns.empty(16, dimension or 0)

    @property
    def note(self) -> Int[np.ndarray, " note"]:
        return self._columns.note[: self._size]

    @property
    def live(self) -> Bool[np.ndarray, " note"]:
        return self._columns.live[: self._size]

    @property
    def said_at(self) -> Int[np.ndarray, " note"]:
        return self._columns.said_at[: self._size]

    @property
    def content_length(self) -> Int[np.ndarray, " note"]:
        return self._columns.content_length[: self._size]

    @property
    def described_length(self) -> Int[np.ndarray, " note"]:
        return self._columns.described_length[: self._size]

    @property
    def source(self) -> Int[np.ndarray, " note"]:
        """For each note a place in `sources`, -1 where nobody is named."""
        return self._columns.source[: self._size]

    @property
    def dated(self) -> Bool[np.ndarray, " note"]:
        """Whether the note speaks of a time that was resolved to a date."""
        return self._columns.dated[: self._size]

    @property
    def content(self) -> Float[np.ndarray, "note dimension"]:
        return self._columns.content[: self._size]

    @property
    def described(self) -> Float[np.ndarray, "note dimension"]:
        return self._columns.described[: self._size]

    @property
    def nbytes(self) -> int:
        return self._columns.nbytes

    def rows(self, numbers: Sequence[int] | Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """The row of each note; -1 for a note that is not here or not live."""
        wanted = np.asarray(numbers, dtype=np.int64)
        if self._size == 0:
            return np.full(len(wanted), -1, dtype=np.int64)
        rows: Int[np.ndarray, " some"] = np.minimum(np.searchsorted(self.note, wanted), self._size - 1)
        rows[(self.note[rows] != wanted) | ~self.live[rows]] = -1
        return rows

    def cosine(self, query: Float[np.ndarray, " dimension"], *, field: str) -> Float[np.ndarray, " note"]:
        """The product of a unit vector with every row of `field` ("content" or "described"), exact."""
        matrix = self.content if field == "content" else self.described
        if self._size == 0 or self.dimension is None:
            return np.zeros(self._size, dtype=np.float32)
        products = numkong.cdist(query.astype(np.float16)[None], matrix, metric="dot")
        cosines: Float[np.ndarray, " note"] = np.asarray(products, dtype=np.float32)[0]
        return cosines

    def nearest(
        self, queries: Float[np.ndarray, "query dimension"], count: int, *, besides: int | None = None
    ) -> list[list[tuple[int, float]]]:
        """For each unit vector the live notes of the nearest contents, nearest first, as (note, cosine).

        Many queries share each reading of the columns: about 5 times as fast as one after the other, and the same.
        """
        if self._size == 0 or not self.dimension:
            return [[] for _ in queries]
        left_out = ~self.live if besides is None else ~self.live | (self.note == besides)
        some = min(count, self._size)
        found: list[list[tuple[int, float]]] = []
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            packed = numkong.dots_pack(queries[start : start + _QUERIES_AT_ONCE].astype(np.float16), dtype="float16")
            far = -np.asarray(numkong.dots_packed(self.content, packed)).T
            far[:, left_out] = np.inf
            for line in far:
                rows = np.argpartition(line, some - 1)[:some]
                rows = rows[np.lexsort((rows, line[rows]))]
                found.append([(int(self.note[row]), -float(line[row])) for row in rows if line[row] < np.inf])
        return found

    def catch_up(self, connection: Connection) -> None:
        """Take in everything that was committed since the last call."""
        row = connection.execute(_NEWEST, {"space": self.space}).one_or_none()
        if row is None or row.seq == self.seq:
            return
        if row.dimension != self.dimension:
            self.dimension, self.seq, self._size = row.dimension, -1, 0
            self._columns = Columns.empty(16, row.dimension or 0)
        changed: list[int] = []
        if self.seq >= 0:
            since = {"space": self.space, "seen": self.seq}
            if row.seq - self.seq <= _ALL_AGAIN or (connection.scalar(_HOW_MANY, since) or 0) <= _ALL_AGAIN:
                changed = sorted(connection.scalars(_WHICH, since))
                for start in range(0, len(changed), _AT_ONCE):
                    self._load(connection, changed[start : start + _AT_ONCE])
                self.seq = row.seq
                return
        self._size = 0
        self._grow(connection.scalar(_SIZE, {"space": self.space}) or 0)
        self._load(connection, None)
        self.seq = row.seq

    def _load(self, connection: Connection, numbers: list[int] | None) -> None:
        bound: dict[str, object] = {"space": self.space}
        if numbers is not None:
            bound["numbers"] = numbers
            known = self.rows(numbers)
            self.live[known[known >= 0]] = False  # those that still exist come back to life just below
        result = connection.execute(_ALL if numbers is None else _SOME, bound)
        while batch := result.fetchmany(4_000):
            columns = list(zip(*batch, strict=True))
            number = np.array(columns[0], dtype=np.int64)
            fresh = number > (self.note[-1] if self._size else -1)
            self._grow(int(fresh.sum()))
            # An older note can be absent here only after a compaction, and then it was dead and stays dead.
            position = np.searchsorted(self.note, number)
            position[fresh] = np.arange(self._size, self._size + int(fresh.sum()))
            self._size += int(fresh.sum())
            held = self._columns
            held.note[position] = number
            held.live[position] = [status == "live" for status in columns[1]]
            held.said_at[position] = columns[2]
            held.content_length[position] = columns[3]
            held.described_length[position] = columns[4]
            held.source[position] = [
                -1 if name is None else self.sources.setdefault(name, len(self.sources)) for name in columns[5]
            ]
            held.dated[position] = columns[6]
            if self.dimension:
                nothing = bytes(2 * self.dimension)
                for field, blobs in ((held.content, columns[7]), (held.described, columns[8])):
                    joined = b"".join(blob or nothing for blob in blobs)
                    field[position] = np.frombuffer(joined, dtype="<f2").reshape(-1, self.dimension)

    def _grow(self, more: int) -> None:
        if self._size + more > len(self._columns.note):
            room = self._size + max(more, self._size // 4)
            larger = Columns.empty(max(room, 16), self.dimension or 0)
            larger.take(self._columns, self._size)
            self._columns = larger


# Made once: building a statement costs more than running it.
_NEWEST = select(spaces.c.seq, spaces.c.dimension).where(spaces.c.space == bindparam("space"))
_SIZE = select(func.count()).where(notes.c.space == bindparam("space"))
_since = (journal.c.space == bindparam("space")) & (journal.c.seq > bindparam("seen")) & journal.c.note.is_not(None)
_HOW_MANY = select(func.count()).where(_since)
_WHICH = select(journal.c.note).where(_since).distinct()
_ALL = (
    select(
        notes.c.note,
        notes.c.status,
        notes.c.said_at,
        notes.c.content_length,
        notes.c.described_length,
        notes.c.source,
        notes.c.dated,
        vectors.c.content,
        vectors.c.described,
    )
    .select_from(notes.outerjoin(vectors, (vectors.c.space == notes.c.space) & (vectors.c.note == notes.c.note)))
    .where(notes.c.space == bindparam("space"))
    .order_by(notes.c.note)
)
_SOME = _ALL.where(notes.c.note.in_(bindparam("numbers", expanding=True)))


@dataclass(kw_only=True)
class Columns:
    note: Int[np.ndarray, " capacity"]
    live: Bool[np.ndarray, " capacity"]
    said_at: Int[np.ndarray, " capacity"]
    content_length: Int[np.ndarray, " capacity"]
    described_length: Int[np.ndarray, " capacity"]
    source: Int[np.ndarray, " capacity"]
    dated: Bool[np.ndarray, " capacity"]
    content: Float[np.ndarray, "capacity dimension"]
    described: Float[np.ndarray, "capacity dimension"]

    @classmethod
    def empty(cls, capacity: int, dimension: int) -> Columns:
        return cls(
            note=np.zeros(capacity, dtype=np.int64),
            live=np.zeros(capacity, dtype=bool),
            said_at=np.zeros(capacity, dtype=np.int64),
            content_length=np.zeros(capacity, dtype=np.int32),
            described_length=np.zeros(capacity, dtype=np.int32),
            source=np.full(capacity, -1, dtype=np.int32),
            dated=np.zeros(capacity, dtype=bool),
            content=np.zeros((capacity, dimension), dtype=np.float16),
            described=np.zeros((capacity, dimension), dtype=np.float16),
        )

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    def take(self, other: Columns, size: int) -> None:
        for name, array in vars(self).items():
            array[:size] = getattr(other, name)[:size]
