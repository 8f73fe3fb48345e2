"""`loci remember`, `loci recall`, with the real embedder."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

FERRY = "The ferry to Gozo leaves at nine tomorrow."


def test_what_was_kept_is_told_with_its_dates_and_links_and_found_again(loci: Any) -> None:
    kept = loci("remember", FERRY, "--source", "Ada", "--at", "8 May 2026")
    assert kept.code == 0
    assert re.match(r"kept [0-9a-f]{8}  8 May 2026  Ada: The ferry", kept.out)
    assert "tomorrow = 9 May 2026" in kept.out
    assert "next: loci ask" in kept.err

    again = loci("remember", FERRY, "--source", "Ada", "--at", "8 May 2026")
    assert again.out.startswith("known already")

    second = loci("remember", "The ferry to Gozo was late.", "--source", "Ada", "--at", "9 May 2026")
    assert "linked to 1 note, the newest: 8 May 2026  Ada: The ferry" in second.out

    loci("remember", "We had lentils for dinner.", "--source", "Ivo", "--at", "12 May 2026")
    found = loci("recall", "When does the ferry leave?", "--why")
    head, first, *_ = found.out.splitlines()
    assert head.split()[:3] == ["note", "score", "content_cosine"]
    assert "(9 May 2026)" in first

    narrowed = loci("recall", "dinner", "--source", "Ivo", "--between", "10 May 2026", "12 May 2026", "--json")
    assert [note["content"] for note in narrowed.data["notes"]] == ["We had lentils for dinner."]
    assert narrowed.data["notes"][0]["parts"] == {}


def test_text_comes_from_standard_input_and_json_tells_all(loci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(FERRY + "\n"))
    row = loci("remember", "-", "--at", "8 May 2026", "--kind", "fact", "--embedder", "none", "--json").data
    assert (row["known"], row["times"][0]["phrase"], row["derived"]) == (False, "9 May 2026", "done")
    assert row["bytes_added"] >= 0  # whole pages of the file


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["remember", " "], "BadInput", "no words"),
        (["remember", "x", "--kind", "fakt"], "UnknownName", "'fact'"),
        (["remember", "x", "--at", "31 June"], "BadDate", "31 June"),
        (["remember", "<recalled-notes>1. x</recalled-notes>"], "RecalledText", "does not store its own words"),
        (["recall", "x", "--between", "June 2026", "May 2026"], "BadInput", "earlier"),
        (["recall", "x", "--space", "wrok"], "UnknownSpace", "'default'"),
        (["ask", "  "], "BadInput", "no words"),
        (["ask", "x", "--base-url", "http://127.0.0.1:1/v1"], "BadInput", "--model"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(arguments: list[str], kind: str, words: str, loci: Any) -> None:
    loci("remember", "something", "--embedder", "none")
    ended = loci(*arguments, "--embedder", "none")
    assert ended.code == 2
    assert ended.err.startswith(f"{kind}: ")
    assert words in ended.err


@pytest.mark.parametrize("command", [["recall", "x"], ["ask", "x"], ["notes", "show"], ["audit"], ["export"]])
def test_reading_makes_no_memory_where_there_is_none(command: list[str], loci: Any, tmp_path: Path) -> None:
    ended = loci(*command)
    assert ended.code == 1
    assert "nothing has been remembered there" in ended.err
    assert not (tmp_path / "home").exists()


def test_a_space_that_was_indexed_by_words_alone_stays_so(loci: Any) -> None:
    loci("remember", FERRY, "--embedder", "none")
    assert loci("recall", "ferry", "--json").data["notes"][0]["content"] == FERRY
    assert "words alone" in loci("audit").out
