"""`loci notes ...`, `loci audit`: looking, taking back, forgetting. Words alone where no vector matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NONE = ("--embedder", "none")


@pytest.fixture
def ids(loci: Any) -> list[str]:
    """Three notes; the second answers nothing, the third is of another speaker."""
    said = [
        ("The roof leaks above the stairs.", "Ada", "1 May 2026"),
        ("The roof was mended yesterday.", "Ada", "5 May 2026"),
        ("My sister Quenby plays the bassoon.", "Ivo", "6 May 2026"),
    ]
    return [loci("remember", text, "--source", who, "--at", at, "--json", *NONE).data["id"] for text, who, at in said]


def test_notes_are_listed_and_shown_by_the_end_of_their_id(loci: Any, ids: list[str]) -> None:
    listed = loci("notes", "show", "--last", "2")
    assert "2 of 3 notes" in listed.err
    assert ids[2][-8:] in listed.out
    assert "leaks" not in listed.out
    whole = loci("notes", "show", ids[1][-8:])
    assert "yesterday = 4 May 2026" in whole.out
    assert loci("notes", "show", ids[1], "--json").data["content"] == "The roof was mended yesterday."
    unknown = loci("notes", "show", "ffffffff")
    assert (unknown.code, unknown.err.split(":")[0]) == (2, "UnknownNote")


def test_links_and_history_name_the_other_notes(loci: Any, ids: list[str]) -> None:
    rows = loci("notes", "links", ids[1]).out
    assert ids[0][-8:] in rows
    assert loci("notes", "links", ids[1], "--json").data["links"][0]["dst"] == ids[0]
    told = loci("notes", "history", ids[0])
    assert "version 1" in told.out
    assert loci("notes", "history", ids[0], "--json").data["versions"][0]["made_by"] == "rules"


def test_an_answered_question_evolves_and_that_can_be_taken_back(loci: Any, tmp_path: Path) -> None:
    chat = tmp_path / "chat.txt"
    chat.write_text("Ada: Where does the heron nest?\nIvo: On the old lighthouse.\n")
    loci("import", str(chat), "--embedder", "none")
    question = loci("notes", "show", "--json").data[0]
    assert question["version"] == 2
    shown = loci("notes", "history", question["id"])
    assert "because" in shown.out
    assert "lighthouse" in shown.out
    journal = loci("notes", "journal", "--json").data
    change = next(entry["seq"] for entry in journal if entry["op"] == "evolve")
    assert f"loci notes undo {change}" in loci("notes", "journal").err
    assert loci("notes", "undo", str(change), *NONE).code == 0
    assert "lighthouse" not in loci("notes", "show", question["id"], "--json").data["context"]
    refused = loci("notes", "undo", "1", *NONE)
    assert (refused.code, "forget" in refused.err) == (2, True)


def test_nothing_is_forgotten_unasked(loci: Any, ids: list[str]) -> None:
    for words in (["forget", ids[2]], ["keep", "--max-notes", "1"]):
        refused = loci("notes", *words, *NONE)
        assert refused.code == 2
        assert "--yes" in refused.err
    assert "of 3 notes" in loci("notes", "show").err


@pytest.mark.parametrize(
    "way",
    [
        lambda id: [id[-8:]],
        lambda id: ["--query", "Who plays the bassoon?"],
        lambda id: ["--source", "Ivo"],
        lambda id: ["--between", "6 May 2026", "6 May 2026"],
    ],
    ids=["id", "query", "source", "between"],
)
def test_forgotten_words_are_not_in_the_file_any_more(way: Any, loci: Any, ids: list[str], tmp_path: Path) -> None:
    assert b"Quenby" in b"".join(file.read_bytes() for file in (tmp_path / "home").iterdir())
    done = loci("notes", "forget", *way(ids[2]), "--why", "test", "--yes", *NONE)
    assert done.out.startswith("forgot 1 note")
    assert b"Quenby" not in b"".join(file.read_bytes() for file in (tmp_path / "home").iterdir())
    assert loci("notes", "check").code == 0
    assert "of 2 notes" in loci("notes", "show").err


def test_one_way_of_naming_is_asked_for(loci: Any, ids: list[str]) -> None:
    for words in ([], [ids[0], "--source", "Ada"], ["--query", "x", "--source", "Ada"]):
        assert "in one way" in loci("notes", "forget", *words, "--yes", *NONE).err


def test_a_pinned_note_outlives_the_others(loci: Any, ids: list[str]) -> None:
    assert loci("notes", "pin", ids[0]).out.startswith("pinned")
    kept = loci("notes", "keep", "--max-notes", "1", "--yes", "--json", *NONE).data
    assert (kept["forgotten"]["notes"], kept["notes"]) == (2, 1)
    assert loci("notes", "show", "--json").data[0]["id"] == ids[0]
    fits = loci("notes", "keep", "--max-bytes", "1GB", "--json", *NONE).data  # nothing to ask: all fits already
    assert fits["forgotten"] == {"notes": 0}
    assert "no size" in loci("notes", "keep", "--max-bytes", "many", *NONE).err


def test_reembedding_gives_a_space_of_words_its_vectors(loci: Any, ids: list[str]) -> None:
    done = loci("notes", "reembed", "--json")
    assert done.data == {"space": "default", "notes": 3, "embedder": "all-MiniLM-L6-v2"}
    assert loci("notes", "check").code == 0
    changed = loci("recall", "leak", *NONE)
    assert (changed.code, changed.err.split(":")[0]) == (1, "EmbedderChanged")
    assert loci("notes", "reembed", "--embedder", "none", "--json").data["embedder"] is None


def test_an_audit_tells_what_is_held_and_done(loci: Any, ids: list[str], tmp_path: Path) -> None:
    loci("remember", "elsewhere", "--space", "work", *NONE)
    row = loci("audit", "--json").data
    assert row["where"] == str(tmp_path / "home" / "memory.db")
    assert row["faults"] == []
    assert row["bytes"] > 0
    space = row["spaces"][0]
    assert (space["name"], space["notes"], space["calls"]) == ("default", {"live": 3}, [])
    assert space["journal"][0]["op"] == "write"
    shown = loci("audit").out
    assert "sound" in shown
    assert "no language model has seen" in shown
    assert [space["name"] for space in loci("notes", "spaces", "--json").data] == ["default", "work"]
