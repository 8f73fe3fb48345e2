"""Finding notes: several weak signals added up, then spread along the links.

Each *part* gives every live note of the space a number; min-max normalised over the space, weighted and added:

    content_cosine, described_cosine   the question's vector against the note's two vectors
    content_words, described_words     BM25 over the postings of the content and of content with description
    speaker, entity                    the question names who said the note, or somebody or something it mentions
    time                               the question speaks of a time in which the note was said, or of which it speaks
    dated                              the question asks when, and the note speaks of a time

The ten best notes then send their score through the link graph (personalised PageRank, two hops), so that a note which
says the missing half in other words is pulled in by the note it belongs to.

Source  A-MEM's retrieval (Xu et al. 2025, section 3.4) is cosine plus linked notes; the sum of parts and the spread are
        ours, measured in `loci bench locomo`.
Cost    linear in the notes of the space for the two products and the normalisation; postings of the
        question's terms, at most `most_postings`; links of two hops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex
from jaxtyping import Bool, Float
from sqlalchemy import Connection, bindparam, select

from loci.text import schema
from loci.text.index import SpaceIndex
from loci.text.moments import DAY, to_micros
from loci.text.organizer import TimeSpan
from loci.text.words import fold, scan, terms

Scores = Float[np.ndarray, " note"]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Weights of the parts. All ours, tuned on LoCoMo's development part except where a source is named."""

    content_cosine: float = 1.0
    described_cosine: float = 1.5
    content_words: float = 0.5
    described_words: float = 0.5
    speaker: float = 0.7
    entity: float = 0.3
    time: float = 1.0
    dated: float = 0.3
    spread: float = 1.2
    reply: float = 1.0  # how much of a link's weight counts, by its kind
    similar: float = 0.3
    shared: float = 1.0  # links of kind "entity"
    seeds: int = 10  # notes from which the score spreads
    restart: float = 0.4
    sharpness: float = 4.0  # of the seeds: the best of them send nearly all of the score
    iterations: int = 10
    k1: float = 1.2  # BM25's usual saturation
    b: float = 0.4  # BM25's length normalisation; turns are short, so less than the usual 0.75
    most_postings: int = 20_000  # read for one question; the commonest terms are left out first


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked. `vector` is None where the space has no embedder."""

    text: str
    vector: Float[np.ndarray, " dimension"] | None
    spans: Sequence[TimeSpan] = ()
    allowed: Bool[np.ndarray, " note"] | None = None  # rows that may be found; None for all live ones


@dataclass(frozen=True, kw_only=True)
class Hit:
    note: int
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)
    via: int | None = None  # the note whose link brought this one in


def search(connection: Connection, index: SpaceIndex, query: Query, *, k: int, config: SearchConfig) -> list[Hit]:
    """The `k` best notes, best first, each with its parts."""
    allowed = index.live.copy() if query.allowed is None else index.live & query.allowed
    if not allowed.any():
        return []
    parts: dict[str, Scores] = {}
    if query.vector is not None:
        for name, field_, weight in (
            ("content_cosine", "content", config.content_cosine),
            ("described_cosine", "described", config.described_cosine),
        ):
            if weight:
                parts[name] = weight * normalised(index.cosine(query.vector, field=field_), allowed)
    words_in_content, words_described = bm25(connection, index, terms(query.text), config=config)
    parts["content_words"] = config.content_words * normalised(words_in_content, allowed)
    parts["described_words"] = config.described_words * normalised(words_described, allowed)
    parts["speaker"] = config.speaker * _speakers(index, query.text)
    parts["entity"] = config.entity * _entities(connection, index, query.text)
    if query.spans:
        parts["time"] = config.time * _times(connection, index, query.spans)
    if config.dated and _ASKS_WHEN.search(query.text):
        parts["dated"] = config.dated * index.dated.astype(np.float32)
    total = np.where(allowed, sum(parts.values()), -np.inf)
    before = total
    if config.spread:
        parts["spread"] = config.spread * spread(connection, index, total, config=config)
        total = np.where(allowed, total + parts["spread"], -np.inf)
    best = _top(total, k)
    unaided = set(_top(before, k).tolist())
    via = _neighbours(connection, index, [int(row) for row in best if row not in unaided], before, config)
    return [
        Hit(
            note=int(index.note[row]),
            score=float(total[row]),
            parts={name: round(float(scores[row]), 4) for name, scores in parts.items()},
            via=via.get(int(row)),
        )
        for row in best
    ]


_ASKS_WHEN = regex.compile(
    r"\b(?:when|(?:what|which) (?:date|day|month|year|time|week|season)|how long ago)\b", regex.IGNORECASE
)


def normalised(scores: Scores, allowed: Bool[np.ndarray, " note"]) -> Scores:
    """Min-max over the allowed notes; all zero where they do not differ."""
    low, high = float(scores[allowed].min()), float(scores[allowed].max())
    if high - low <= 1e-12:
        return np.zeros_like(scores)
    return np.clip((scores - low) / (high - low), 0.0, 1.0)


def document_frequencies(connection: Connection, space: int, wanted: Sequence[str]) -> dict[str, tuple[int, int]]:
    """In how many notes each known term stands: in contents, and in contents and descriptions together."""
    if not wanted:
        return {}
    rows = connection.execute(_FREQUENCY, {"space": space, "terms": list(dict.fromkeys(wanted))})
    return {term: (said, described) for term, said, described in rows}


_FREQUENCY = select(schema.terms.c.term, schema.terms.c.said, schema.terms.c.described).where(
    schema.terms.c.space == bindparam("space"), schema.terms.c.term.in_(bindparam("terms", expanding=True))
)


def idf(notes: int, holding: int) -> float:
    """Robertson's inverse document frequency, kept above zero (Lucene's form)."""
    return float(np.log(1 + (notes - holding + 0.5) / (holding + 0.5)))


def bm25(
    connection: Connection, index: SpaceIndex, asked: Sequence[str], *, config: SearchConfig
) -> tuple[Scores, Scores]:
    """BM25 of every note for the asked terms: over contents, and over contents with descriptions."""
    content = np.zeros(len(index.note), dtype=np.float32)
    described = np.zeros(len(index.note), dtype=np.float32)
    wanted = list(dict.fromkeys(asked))
    frequency = document_frequencies(connection, index.space, wanted)
    room = config.most_postings
    live = max(int(index.live.sum()), 1)
    norms = [
        config.k1 * (1 - config.b + config.b * length / max(float(length[index.live].mean()), 1.0))
        for length in (index.content_length.astype(np.float32), index.described_length.astype(np.float32))
    ]
    table = schema.words
    for term, (said, holding) in sorted(frequency.items(), key=lambda entry: entry[1]):
        # The rarest term is always read; a term that would break the bound says least, as nearly all notes hold it.
        if holding > room and room < config.most_postings:
            break
        room -= holding
        rows = connection.execute(
            select(table.c.note, table.c.content, table.c.described)
            .where(table.c.space == index.space, table.c.term == term)
            .limit(config.most_postings)
        ).all()
        postings = np.array([tuple(row) for row in rows], dtype=np.int64)
        at = index.rows(postings[:, 0])
        postings, at = postings[at >= 0], at[at >= 0]
        for scores, column, norm, notes in ((content, 1, norms[0], said), (described, 2, norms[1], holding)):
            times = postings[:, column].astype(np.float32)
            scores[at] += idf(live, min(notes, live)) * times * (config.k1 + 1) / (times + norm[at])
    return content, described


def _speakers(index: SpaceIndex, question: str) -> Scores:
    """1 for notes whose speaker the question names, by the full name or one part of it."""
    said = {fold(word.surface).removesuffix("'s").removesuffix("’s") for word in scan(question)}
    named = [
        place
        for name, place in index.sources.items()
        if any(len(part) > 1 and part in said for part in fold(name).split())
    ]
    return np.isin(index.source, named).astype(np.float32)


def _entities(connection: Connection, index: SpaceIndex, question: str) -> Scores:
    """Between 0 and 1: the share of the question's entities that the note mentions, rare ones counting more."""
    words = [fold(word.surface).removesuffix("'s").removesuffix("’s") for word in scan(question)]
    runs = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    runs -= {part for name in index.sources for part in (fold(name), *fold(name).split())}
    scores = np.zeros(len(index.note), dtype=np.float32)
    table = schema.mentions
    rows = connection.execute(
        select(table.c.entity, table.c.note).where(table.c.space == index.space, table.c.entity.in_(sorted(runs)))
    ).all()
    by_entity: dict[str, list[int]] = {}
    for row in rows:
        by_entity.setdefault(row.entity, []).append(row.note)
    live = max(int(index.live.sum()), 1)
    for held in by_entity.values():
        at = index.rows(held)
        scores[at[at >= 0]] += idf(live, min(len(held), live))
    highest = float(scores.max()) if len(scores) else 0.0
    return scores / highest if highest > 0 else scores


def _times(connection: Connection, index: SpaceIndex, spans: Sequence[TimeSpan]) -> Scores:
    """1 for notes that were said in one of the spans, or that speak of a time in it."""
    scores = np.zeros(len(index.note), dtype=np.float32)
    table = schema.times
    for span in spans:
        start, end = to_micros(span.start), to_micros(span.end)
        scores[(index.said_at >= start) & (index.said_at < end)] = 1.0
        speaking = connection.scalars(
            select(table.c.note)
            .where(table.c.space == index.space, table.c.start < end, table.c.end > start)
            # A note that speaks of a whole year says little about one of its days.
            .where(table.c.end - table.c.start <= 4 * max(end - start, DAY))
        ).all()
        at = index.rows(speaking)
        scores[at[at >= 0]] = 1.0
    return scores


def spread(connection: Connection, index: SpaceIndex, total: Scores, *, config: SearchConfig) -> Scores:
    """What flows to each note from the best ones over two hops of links, normalised so that the highest is 1.

    Personalised PageRank whose restart prefers the very best (scores relative to the best, to the power `sharpness`).
    What a note gets from restarts alone is taken off again: it has that score already, only the flow is news.
    """
    seeds = _top(total, config.seeds)
    seeds = seeds[np.isfinite(total[seeds]) & (total[seeds] > 0)]
    scores = np.zeros(len(index.note), dtype=np.float32)
    if len(seeds) == 0:
        return scores
    edges = _edges(connection, index, seeds, config)
    second = np.setdiff1d(edges[:, 1].astype(np.int64), seeds)
    if len(second):
        edges = np.concatenate([edges, _edges(connection, index, second, config)])
    if len(edges) == 0:
        return scores
    nodes, ends = np.unique(np.concatenate([edges[:, 0], edges[:, 1], seeds]).astype(np.int64), return_inverse=True)
    source, target = ends[: len(edges)], ends[len(edges) : 2 * len(edges)]
    out = np.bincount(source, weights=edges[:, 2], minlength=len(nodes))
    share = edges[:, 2] / out[source]
    start = np.zeros(len(nodes))
    start[ends[2 * len(edges) :]] = (total[seeds] / total[seeds].max()) ** config.sharpness
    start /= start.sum()
    rank = start.copy()
    for _ in range(config.iterations):
        flow = np.bincount(target, weights=rank[source] * share, minlength=len(nodes))
        rank = config.restart * start + (1 - config.restart) * flow
    gained = rank - config.restart * start
    scores[nodes] = gained / max(float(gained.max()), 1e-12)
    return scores


def _edges(
    connection: Connection, index: SpaceIndex, rows: Any, config: SearchConfig
) -> Float[np.ndarray, "edge three"]:
    """The links from these rows to live notes, as (source row, target row, weight)."""
    table = schema.links
    held = connection.execute(
        select(table.c.src, table.c.dst, table.c.weight, table.c.kind).where(
            table.c.space == index.space, table.c.src.in_([int(note) for note in index.note[rows]])
        )
    ).all()
    if not held:
        return np.zeros((0, 3))
    worth = {"reply": config.reply, "similar": config.similar, "entity": config.shared}
    found = np.array([(src, dst, weight * worth.get(kind, 1.0)) for src, dst, weight, kind in held], dtype=np.float64)
    source, target = index.rows(found[:, 0].astype(np.int64)), index.rows(found[:, 1].astype(np.int64))
    keep = (source >= 0) & (target >= 0) & (found[:, 2] > 0)
    return np.stack([source[keep], target[keep], found[keep, 2]], axis=1)


def _neighbours(
    connection: Connection, index: SpaceIndex, rows: Sequence[int], before: Scores, config: SearchConfig
) -> dict[int, int]:
    """For each row the linked note with the best score of its own: through it the row was found."""
    if not len(rows):
        return {}
    edges = _edges(connection, index, np.array(rows, dtype=np.int64), config)
    via: dict[int, tuple[float, int]] = {}
    for source, target, _ in edges:
        candidate = (float(before[int(target)]), int(index.note[int(target)]))
        via[int(source)] = max(via.get(int(source), (-np.inf, -1)), candidate)
    return {row: note for row, (_, note) in via.items()}


def _top(scores: Scores, k: int) -> Any:
    """Rows of the k highest finite scores, highest first; of equals the older note first."""
    k = min(k, len(scores))
    part = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
    part = part[np.isfinite(scores[part])]
    return part[np.lexsort((part, -scores[part]))]
