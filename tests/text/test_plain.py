from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from jaxtyping import Float32

from loci.errors import BadDate, BadInput, EmptyNote, UnknownNote
from loci.text.plain import PlainStore

START = datetime(2023, 5, 8, tzinfo=UTC)


class CountedLetters:
    """As many letters of each kind as a text has, scaled to unit norm: cosines that can be checked by hand."""

    name = "letters"
    dimension = 26

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        rows = [[text.lower().count(chr(97 + letter)) + 1e-6 for letter in range(26)] for text in texts]
        vectors = np.array(rows, dtype=np.float32).reshape(len(texts), self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def store() -> PlainStore:
    return PlainStore(CountedLetters())


def test_the_nearest_texts_come_first_with_their_cosine(store: PlainStore) -> None:
    ids = [store.write(text, at=START).id for text in ("aabb", "aaab", "zz")]
    found = store.read("aaaa", k=2, why=True)
    assert [note.id for note in found] == [ids[1], ids[0]]
    assert found[0].score == pytest.approx(3 / np.sqrt(10), abs=1e-4)
    assert found[0].parts == {"cosine(content)": found[0].score}
    assert store.read("aaaa", k=1)[0].parts == {}


def test_the_speaker_is_part_of_what_is_embedded_and_not_of_the_content() -> None:
    store = PlainStore(CountedLetters(), wording="{source}{content}")
    store.write("bb", source="zz", at=START)
    (found,) = store.read("bbzz")
    assert found.score == pytest.approx(1, abs=1e-4)
    assert (found.content, found.source) == ("bb", "zz")


def test_filters_leave_only_what_they_name(store: PlainStore) -> None:
    for day, speaker in enumerate(("Ann", "Bo", "Ann", "Bo")):
        store.write(f"text {day}", source=speaker, at=START + timedelta(days=day), kind="turn" if day < 3 else "fact")
    assert {note.content for note in store.read("text", source="Ann")} == {"text 0", "text 2"}
    assert {note.content for note in store.read("text", kinds=["fact"])} == {"text 3"}
    between = (START + timedelta(days=1), START + timedelta(days=3))
    assert {note.content for note in store.read("text", between=between)} == {"text 1", "text 2"}


def test_a_budget_of_tokens_ends_the_list(store: PlainStore) -> None:
    for text in ("a short one", "a longer one than the one before it", "a third"):
        store.write(text, at=START)
    everything = store.read("a short one")
    budget = everything[0].tokens + everything[1].tokens
    assert store.read("a short one", budget_tokens=budget) == everything[:2]
    assert store.read("a short one", budget_tokens=0) == []


def test_it_grows_past_its_first_room_and_counts_its_bytes(store: PlainStore) -> None:
    before = store.nbytes
    added = sum(store.write(f"note {number}", at=START).bytes_added for number in range(200))
    assert store.nbytes == before + added
    assert len(store.read("note", k=500)) == 200
    assert store.nbytes >= 200 * 26 * 4


def test_forgotten_texts_are_found_no_more_and_the_bytes_fall(store: PlainStore) -> None:
    ids = [store.write(f"note {number}", source="Ann" if number < 90 else "Bo", at=START).id for number in range(100)]
    held = store.nbytes
    assert store.forget(ids[0], why="asked") == {"notes": 1}
    assert store.forget(source="Ann", why="asked") == {"notes": 89}
    assert store.nbytes < held
    assert {note.id for note in store.read("note", k=100)} == set(ids[90:])
    with pytest.raises(UnknownNote):
        store.forget(ids[0], why="asked twice")
    assert store.write("after all", at=START).id in {note.id for note in store.read("after all")}


def test_forgetting_by_time_and_query(store: PlainStore) -> None:
    for day in range(30):
        store.write("aa" if day % 2 else "zz", at=START + timedelta(days=day))
    assert store.forget(between=(START, START + timedelta(days=10)), why="asked") == {"notes": 10}
    assert store.forget(query="zz", why="asked") == {"notes": 10}
    assert {note.content for note in store.read("zz", k=30)} == {"aa"}


def test_what_cannot_be_used_is_an_error(store: PlainStore) -> None:
    with pytest.raises(EmptyNote):
        store.write("  \n")
    with pytest.raises(BadDate):
        store.write("text", at="the day of the flying pigs")
    with pytest.raises(BadInput, match="at least 1"):
        store.read("text", k=0)
    with pytest.raises(BadInput, match="everything"):
        store.forget(why="no reason")


def test_an_empty_store_finds_nothing(store: PlainStore) -> None:
    assert store.read("anything") == []
