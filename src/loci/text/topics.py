"""Topics of a space: a name for what notes have in common, so that the same thing has the same tag everywhere.

Online spherical k-means (Dhillon and Modha 2001) over the notes' vectors; ours is how labels are chosen and when.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from loci.errors import StoreError
from loci.text.construct import LONGEST_LABEL, telling_words
from loci.text.words import terms


@dataclass(frozen=True, kw_only=True)
class TopicRow:
    """A cluster at rest: its members, the sum of their vectors (float32, little endian), term -> (count, shown)."""

    size: int
    total: bytes
    label: str
    words: Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class TopicConfig:
    """How topics form. All defaults are ours."""

    near: float = 0.3  # cosine under which a note opens a topic of its own
    most: int = 512  # topics in one space, whatever its size
    words: int = 24  # terms counted for a topic's label
    label_words: int = 2  # words in a label


class TopicClusters:
    """Online spherical k-means over the vectors of notes, each cluster labelled by its commonest telling words.

    The number of clusters grows with the square root of the number of notes, so that assigning the n-th note costs
    about sqrt(n) dot products. A centre is the direction of its members' sum. A label is chosen anew whenever its
    cluster has doubled, so that it settles; `renamed` tells which labels changed. The words of a label are those that
    are common in the cluster and rare in the others (their count times log(1 + all words / their count everywhere)).
    """

    def __init__(self, config: TopicConfig | None = None) -> None:
        self.config = config or TopicConfig()
        self._sums: Float32[np.ndarray, "room dimension"] = np.zeros((0, 0), dtype=np.float32)
        self._centres: Float32[np.ndarray, "room dimension"] = np.zeros((0, 0), dtype=np.float32)
        self._sizes: list[int] = []
        self._words: list[dict[str, tuple[int, str]]] = []  # term: how often, and how it was written first
        self._labels: list[str] = []
        self._everywhere: Counter[str] = Counter()
        self._renamed: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def notes(self) -> int:
        return sum(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the two matrices; the counted words, at most 48 a cluster, come on top."""
        return int(self._sums.nbytes + self._centres.nbytes)

    def nearest(self, vector: Float[np.ndarray, " dimension"], count: int = 2) -> list[int]:
        """The clusters nearest to a unit vector, best first; fewer where there are fewer."""
        return [] if not self._sizes else np.argsort(-self._likeness(vector), kind="stable")[:count].tolist()

    def _likeness(self, vector: Float[np.ndarray, " dimension"]) -> Float32[np.ndarray, " clusters"]:
        return self._centres[: len(self)] @ vector.astype(np.float32, copy=False)

    def assign(self, vector: Float[np.ndarray, " dimension"]) -> int:
        """The cluster that a note belongs to; equal to `len(self)` when it opens a new one, which `update` then makes.

        A note opens a cluster when no centre is near and there are fewer clusters than the square root of the notes.
        """
        if not self._sizes:
            return 0
        likeness = self._likeness(vector)
        best = int(np.argmax(likeness))
        room = len(self) < min(self.config.most, math.isqrt(self.notes) + 1)
        return len(self) if likeness[best] < self.config.near and room else best

    def update(self, cluster: int, vector: Float[np.ndarray, " dimension"], text: str) -> None:
        """Add a note, by its unit vector and its words, to a cluster that `assign` named."""
        if cluster == len(self):
            self._open(len(vector))
        self._sizes[cluster] += 1
        row = self._sums[cluster]
        row += vector.astype(np.float32, copy=False)
        self._centres[cluster] = row / max(float(np.linalg.norm(row)), 1e-9)
        self._count(cluster, text)
        size = self._sizes[cluster]
        if size & (size - 1) == 0:  # 1, 2, 4, 8, ...
            old, new = self._labels[cluster], self._choose_label(cluster)
            self._labels[cluster] = new
            if old and new and old != new and old not in self._labels:
                self._renamed[old] = new

    def add(self, vector: Float[np.ndarray, " dimension"], text: str) -> int:
        """Assign a note and update its cluster, whose number is returned."""
        cluster = self.assign(vector)
        self.update(cluster, vector, text)
        return cluster

    def _open(self, dimension: int) -> None:
        if len(self) == len(self._sums):
            grown = np.zeros((max(8, 2 * len(self)), dimension), dtype=np.float32)
            grown[: len(self)] = self._sums if len(self) else 0
            self._sums = grown
            grown = np.zeros_like(grown)
            grown[: len(self)] = self._centres if len(self) else 0
            self._centres = grown
        self._sizes.append(0)
        self._words.append({})
        self._labels.append("")

    def _count(self, cluster: int, text: str) -> None:
        counts = self._words[cluster]
        for term, written in telling_words(text):
            number, shown = counts.get(term, (0, written))
            counts[term] = (number + 1, shown)
            self._everywhere[term] += 1
        if len(counts) > 2 * self.config.words:
            ranked = sorted(counts, key=lambda term: -counts[term][0])
            # the newest words stand last and have had the least time to be repeated: half of the room is theirs
            newest = list(counts)[-self.config.words // 2 :]
            kept = {*ranked[: self.config.words - len(newest) // 2], *newest}
            for term in [term for term in counts if term not in kept]:
                self._uncount(cluster, term)

    def _uncount(self, cluster: int, term: str) -> None:
        number, _ = self._words[cluster].pop(term)
        self._everywhere[term] -= number
        if self._everywhere[term] <= 0:
            del self._everywhere[term]

    def _choose_label(self, cluster: int) -> str:
        counts, total = self._words[cluster], self._everywhere.total()
        ranked = sorted(
            counts.items(),
            key=lambda entry: (-entry[1][0] * math.log(1 + total / self._everywhere[entry[0]]), entry[0]),
        )
        return " & ".join(shown for _, (_, shown) in ranked[: self.config.label_words])[:LONGEST_LABEL]

    def label(self, cluster: int) -> str:
        """The words that name a topic, such as "adoption & agencies"; "" where it has none yet."""
        return self._labels[cluster]

    def renamed(self) -> dict[str, str]:
        """Labels that changed since the last call: old to new."""
        changed, self._renamed = self._renamed, {}
        for old, new in changed.items():
            while new in changed and changed[new] not in (old, new):
                new = changed[new]
                changed[old] = new
                if new == old:
                    break
        return changed

    def drop_terms(self, gone: Collection[str]) -> list[int]:
        """Forget words: they leave the counts, labels that hold one are chosen anew; returns the clusters changed."""
        lost = frozenset(gone)
        changed = []
        for cluster, counts in enumerate(self._words):
            held = lost.intersection(counts)
            for term in held:
                self._uncount(cluster, term)
            named = not lost.isdisjoint(terms(self._labels[cluster]))
            if named:
                self._labels[cluster] = self._choose_label(cluster)
            if held or named:
                changed.append(cluster)
        self._renamed = {old: new for old, new in self._renamed.items() if lost.isdisjoint(terms(f"{old} {new}"))}
        return changed

    def row(self, cluster: int) -> TopicRow:
        """One cluster as a store keeps it: a write changes one cluster, so it writes one row."""
        return TopicRow(
            size=self._sizes[cluster],
            total=self._sums[cluster].astype("<f4").tobytes(),
            label=self._labels[cluster],
            words={term: list(entry) for term, entry in self._words[cluster].items()},
        )

    @classmethod
    def from_rows(cls, dimension: int, rows: Sequence[TopicRow], config: TopicConfig | None = None) -> TopicClusters:
        """The clusters that were written with `row`, in their order.

        Raises:
            StoreError: a row is of another width. The clusters are built again from the notes by `loci notes reembed`.
        """
        made = cls(config)
        for place, row in enumerate(rows):
            if len(row.total) != 4 * dimension:
                raise StoreError(
                    f"topic {place} holds {len(row.total)} bytes where {4 * dimension} belong; "
                    "build the topics again with:  loci notes reembed"
                )
            made._open(dimension)
            made._sizes[place], made._labels[place] = row.size, row.label
            made._words[place] = {term: (int(count), str(shown)) for term, (count, shown) in row.words.items()}
            made._everywhere.update({term: count for term, (count, _) in made._words[place].items()})
            made._sums[place] = np.frombuffer(row.total, dtype="<f4")
            made._centres[place] = made._sums[place] / max(float(np.linalg.norm(made._sums[place])), 1e-9)
        return made
