"""The words that every memory shares, wherever it lies: write, read, forget, and the bytes it really holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The proof that an item is stored.

    `derived` says what became of everything that is computed from the item (descriptions, links, indexes):
    "done", "pending" (a background queue holds it) or "failed: <reason>". The item itself is safe in all three.
    """

    id: str
    bytes_added: int
    derived: str


@runtime_checkable
class Memory(Protocol):
    """What a memory in any of the five places can do. Arguments beyond the first are each memory's own."""

    def write(self, item: Any, /) -> Receipt:
        """Store one item and return the proof."""

    def read(self, query: Any, /) -> Any:
        """Return what the memory recalls for the query, best first."""

    def forget(self, what: Any, /) -> Mapping[str, int]:
        """Remove items for good; returns how many of each kind of thing were removed."""

    @property
    def nbytes(self) -> int:
        """Bytes held now, counted from the storage itself, never estimated."""
