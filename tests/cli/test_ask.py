"""`loci ask`: what an answer looks like, and what it looks like when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from loci.lm.scripted import ScriptedModel

NONE = ("--embedder", "none")


@pytest.fixture
def told(loci: Any) -> None:
    loci("remember", "The ferry to Gozo leaves at nine tomorrow.", "--source", "Ada", "--at", "8 May 2026", *NONE)
    loci("remember", "Ivo cooked lentils.", "--at", "9 May 2026", *NONE)


@pytest.mark.usefixtures("told", "word_reader")
def test_an_answer_stands_above_its_sources(loci: Any) -> None:
    ended = loci("ask", "When does the ferry leaves Gozo?", *NONE)
    assert ended.code == 0
    answer, source = ended.out.splitlines()
    assert "(9 May 2026)" in answer
    assert source.startswith("  [1] 8 May 2026  Ada: ")

    why = loci("ask", "When does the ferry leaves Gozo?", "--why", *NONE)
    assert "content_words" in why.out
    assert "confidence 0." in why.err


@pytest.mark.usefixtures("told", "word_reader")
def test_what_was_never_said_is_no_error(loci: Any) -> None:
    ended = loci("ask", "Who won the ferry race?", *NONE)
    assert (ended.code, ended.out) == (0, "Nothing that was said tells it.\n")
    row = loci("ask", "Who won the race?", "--json", *NONE).data
    assert (row["found"], row["text"], row["notes"]) == (False, "", [])


@pytest.mark.usefixtures("told")
def test_a_capable_chat_model_answers_and_names_its_notes(loci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScriptedModel(['{"found": true, "answer": "at nine", "notes": [1]}'])
    monkeypatch.setattr("loci.lm.chat.load_chat", lambda name, *, base_url, api_key: model)
    row = loci("ask", "When does the ferry leave?", "--model", "big", "--json", *NONE).data
    assert row["text"] == "at nine"
    assert row["notes"][0]["content"].startswith("The ferry")
    assert "<recalled-notes>" in model.asked[0].messages[-1].content


@pytest.mark.usefixtures("told")
def test_an_address_in_the_environment_alone_sends_nothing_anywhere(
    loci: Any, monkeypatch: pytest.MonkeyPatch, word_reader: None
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert loci("ask", "Who cooked lentils?", *NONE).code == 0
