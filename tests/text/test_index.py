"""The columns of a space: the nearest notes are those that a plain product finds, and no room is wasted on opening."""

import numpy as np
import pytest

from loci.text.amem import AMem, NewNote
from loci.text.store import Store

NUMBERS = "one two three four five six seven eight nine ten".split()
TOWNS = "Gozo Paris Lima Oslo Turin Graz Kyiv Riga".split()
LINES = [f"In {town} we saw {number} boats." for town in TOWNS for number in NUMBERS]


@pytest.fixture
def filled(store, embedder):
    memory = AMem(store, embedder)
    memory.write_many([NewNote(text=line) for line in LINES])
    return memory


def plain(index, query: np.ndarray, count: int, gone: set[int]) -> list[tuple[int, float]]:
    """One product a note, all sorted."""
    cosines = index.content.astype(np.float32) @ query.astype(np.float16).astype(np.float32)
    pairs = [(int(note), float(cosine)) for note, cosine in zip(index.note, cosines, strict=True)]
    return sorted((pair for pair in pairs if pair[0] not in gone), key=lambda pair: (-pair[1], pair[0]))[:count]


@pytest.mark.parametrize("queries", [1, 63, 64, 65])  # one, under, at and past a block
def test_the_nearest_of_many_queries_are_those_of_each_alone(filled, embedder, queries):
    index = filled.store.index(filled.space)
    vectors = embedder.embed(LINES[:queries])
    for vector, found in zip(vectors, index.nearest(vectors, 5), strict=True):
        expected = plain(index, vector, 5, set())
        assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)
        assert found == index.nearest(vector[None], 5)[0]
        assert [note for note, _ in found] == [note for note, _ in sorted(found, key=lambda pair: (-pair[1], pair[0]))]


def test_dead_notes_and_the_one_left_out_are_never_near(filled, embedder):
    near = filled.read(LINES[3], k=1)[0]
    filled.forget(near.id, why="no longer wanted")
    index = filled.store.index(filled.space)
    vector = embedder.embed([LINES[4]])[0]
    itself = index.nearest(vector[None], 1)[0][0][0]
    others = [note for note, _ in index.nearest(vector[None], 200, besides=itself)[0]]
    assert len(others) == len(LINES) - 2
    assert itself not in others
    assert filled.store.ids(filled.space, [itself])


def test_an_empty_space_has_nothing_near(store, embedder):
    memory = AMem(store, embedder)
    assert store.index(memory.space).nearest(embedder.embed(["a", "b"]), 5) == [[], []]


def test_opening_reserves_what_is_there_and_no_more(filled, tmp_path):
    filled.store.close()
    with Store.open(tmp_path / "memory.db") as again:
        index = again.index(filled.space)
        assert len(index.note) == len(LINES)
        held = 4 * 384 + 8 + 1 + 8 + 4 + 4 + 4 + 1
        assert index.nbytes == held * len(LINES)


def test_the_columns_grow_with_what_is_written_and_keep_what_they_held(filled, embedder):
    before = filled.store.index(filled.space).content.copy()
    for start in range(3):
        filled.write_many([NewNote(text=f"Then {number} ships in {start}.") for number in NUMBERS])
    index = filled.store.index(filled.space)
    assert len(index.note) == len(LINES) + 3 * len(NUMBERS)
    assert np.array_equal(index.content[: len(LINES)], before)
