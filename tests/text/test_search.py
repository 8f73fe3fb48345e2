"""Search: the fast forms against plain ones, and what a part may and may not do."""

import math
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pytest

from loci.text.amem import AMem, NewNote
from loci.text.construct import spoken_text
from loci.text.search import SearchConfig, bm25, idf, normalised, spread
from loci.text.words import terms

LINES = [
    "The ferry to Gozo leaves at nine.",
    "Nine boats lie in the harbour of Gozo, one ferry among them.",
    "Bread needs flour, water and time.",
    "The ferry, the ferry, always the ferry!",
    "A poem about the sea.",
]


@pytest.fixture
def filled(store, embedder):
    memory = AMem(store, embedder)
    memory.write_many([NewNote(text=line, source="Ada", at=datetime(2024, 1, 5, tzinfo=UTC)) for line in LINES])
    return memory


def plain_bm25(documents: list[list[str]], asked: list[str], config: SearchConfig) -> list[float]:
    """BM25 as the textbook writes it, without an index."""
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, total = Counter(document), 0.0
        for term in dict.fromkeys(asked):
            holding = sum(term in other for other in documents)
            if counts[term]:
                norm = config.k1 * (1 - config.b + config.b * len(document) / average)
                total += idf(len(documents), holding) * counts[term] * (config.k1 + 1) / (counts[term] + norm)
        scores.append(total)
    return scores


def test_bm25_over_postings_equals_bm25_over_texts(filled):
    config = SearchConfig()
    asked = terms("When does the ferry leave for Gozo?")
    with filled.store.lock, filled.store.reading() as connection:
        content, described = bm25(connection, filled.store.index(filled.space), asked, config=config)
        notes = filled.store.notes(filled.space)
    said = [terms(spoken_text(note.content, note.source)) for note in notes]
    assert content == pytest.approx(plain_bm25(said, asked, config), rel=1e-5)
    assert (described > 0).sum() >= (content > 0).sum()


def test_another_space_changes_no_score(filled, store, embedder):
    question = "Which boats lie in the harbour?"
    before = [(hit.id, hit.score) for hit in filled.read(question, k=5)]
    other = AMem(store, embedder, space="other")
    other.write_many([NewNote(text=f"Harbour boats and ferry number {i}.") for i in range(50)])
    assert [(hit.id, hit.score) for hit in filled.read(question, k=5)] == before


def test_the_exact_product_is_the_cosine(filled, embedder):
    index = filled.store.index(filled.space)
    query = embedder.embed(["ferry to Gozo"])[0]
    texts = [spoken_text(line, "Ada") for line in LINES]
    assert index.cosine(query, field="content") == pytest.approx(embedder.embed(texts) @ query, abs=2e-3)


def test_normalised_parts_lie_between_zero_and_one_whatever_is_masked():
    scores = np.array([5.0, -3.0, 2.0, 100.0], dtype=np.float32)
    allowed = np.array([True, True, True, False])
    found = normalised(scores, allowed)
    assert found[:3] == pytest.approx([1.0, 0.0, 0.625])
    assert ((found >= 0) & (found <= 1)).all()
    assert (normalised(np.ones(4, dtype=np.float32), allowed) == 0).all()


def test_what_spreads_reaches_the_linked_note_and_no_other(store, embedder):
    memory = AMem(store, embedder)
    first = memory.write("Did the plumber come?", source="Ada").id
    memory.write("He did, all fine.", source="Bob", reply_to=first)
    memory.write("Jupiter has ninety-five moons.", source="Eve")
    index = store.index(memory.space)
    total = np.array([2.0, 0.1, 0.1], dtype=np.float32)
    with store.reading() as connection:
        gained = spread(connection, index, total, config=SearchConfig(seeds=1))
    assert gained[1] > gained[2]


def test_rare_terms_weigh_more_and_no_term_weighs_less_than_nothing():
    weights = [idf(1_000, holding) for holding in (1, 10, 500, 1_000)]
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] > 0
    assert math.isfinite(idf(1, 1))


def test_terms_beyond_the_bound_are_left_out_commonest_first(filled):
    asked = terms("ferry bread")
    index = filled.store.index(filled.space)
    with filled.store.reading() as connection:
        content, _ = bm25(connection, index, asked, config=SearchConfig(most_postings=1))
    assert content[2] > 0  # bread, in one note
    assert content[0] == 0  # ferry, in three


def test_a_name_in_the_question_lifts_what_that_person_said(store, embedder):
    memory = AMem(store, embedder)
    memory.write("I bought a red bicycle.", source="Ada Byron")
    memory.write("I bought a red bicycle!", source="Bob")
    assert memory.read("What did Ada buy?", k=1)[0].source == "Ada Byron"
    assert memory.read("What's Bob's new bicycle like?", k=1)[0].source == "Bob"


def test_the_index_grows_shrinks_and_stays_in_note_order(store, embedder):
    memory = AMem(store, embedder)
    ids = [written.id for written in memory.write_many([NewNote(text=f"Walk {i} by the lake.") for i in range(40)])]
    index = store.index(memory.space)
    assert list(index.note) == list(range(1, 41))
    memory.forget(ids[3], why="test")
    memory.write("One more walk.")
    index = store.index(memory.space)
    assert 4 not in index.note[index.live]
    assert (np.diff(index.note) > 0).all()
    assert index.nbytes > 0
