"""`loci chat` with lines from a pipe: it keeps, answers, forgets, and stops where it is told to."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from loci.cli.chat import parted
from loci.lm.scripted import ScriptedModel
from loci.text.memory import Memory

NONE = ("--embedder", "none", "--name", "Ada")


@pytest.fixture
def talk(loci: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*lines: str, options: tuple[str, ...] = ()) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return loci("chat", *NONE, *options)

    return run


@pytest.mark.usefixtures("word_reader")
def test_what_was_said_in_one_chat_is_answered_in_the_next(talk: Any, loci: Any) -> None:
    first = talk("My heron nests on the lighthouse.", "It came back in April.")
    assert first.code == 0
    assert "kept" in first.err
    assert "2 notes kept in" in first.err
    notes = loci("notes", "show", "--json").data
    assert [note["source"] for note in notes] == ["Ada", "Ada"]
    assert notes[1]["reply_to"] == notes[0]["id"]

    second = talk("Where does my heron have its nest on the lighthouse?", "/why", "/quit", "never read")
    answer, source = second.out.splitlines()[:2]
    assert answer == "My heron nests on the lighthouse."
    assert source.startswith("  [1] ")
    assert "content_words" in second.out
    assert "never read" not in json.dumps(loci("notes", "show", "--json").data)


@pytest.mark.usefixtures("word_reader")
def test_dates_are_understood_and_repetition_is_noticed(talk: Any) -> None:
    ended = talk("The heron hatched on 3 April 2026 and flew the day after.", "The heron is called Pim.",
                 "The heron is called Pim.")  # fmt: skip
    assert "linked to: " in ended.err
    assert "known already" in ended.err


@pytest.mark.usefixtures("word_reader")
def test_the_bundled_model_says_plainly_that_it_was_not_told(talk: Any) -> None:
    ended = talk("The heron is called Pim.", "What is the capital of France?")
    assert ended.out == "I was not told that. Nothing that was said tells it.\n"


@pytest.mark.usefixtures("word_reader")
def test_forgetting_asks_first_and_takes_the_answers_number(talk: Any, loci: Any) -> None:
    question = "What is the heron called?"
    kept = talk("The heron is called Pim.", question, "/forget 1", "n", "/forget", "/nonsense", "/help")
    assert "Forget this note for good?" in kept.err
    assert "nothing was forgotten" in kept.err
    assert "/nonsense is unknown" in kept.err
    gone = talk(question, "/forget 1", "y", "/notes", "/notes heron", question)
    assert "forgotten" in gone.err
    assert loci("notes", "show", "--json").data == []


@pytest.mark.usefixtures("word_reader")
def test_json_is_one_line_for_each_message(talk: Any) -> None:
    ended = talk("The heron is called Pim. What is the heron called?", "/notes", options=("--json",))
    kept, asked, notes = map(json.loads, ended.out.splitlines())
    assert kept["known"] is False
    assert (asked["found"], asked["notes"][0]["id"]) == (True, kept["kept"])
    assert notes["notes"][0]["content"] == "The heron is called Pim."


def test_a_capable_model_talks_where_memory_holds_nothing(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    described = '{"keywords": ["heron"], "tags": [], "context": "about a heron", "links": [], "updates": []}'

    def answers(messages: Any) -> str:
        text = messages[-1].content
        if text.endswith("Question: What is the capital of France?"):
            return '{"found": false, "answer": "", "notes": []}'
        return "It is Paris." if text == "What is the capital of France?" else described

    model = ScriptedModel(answers)
    monkeypatch.setattr("loci.lm.chat.load_chat", lambda name, *, base_url, api_key: model)
    ended = talk("The heron is called Pim.", "What is the capital of France?", options=("--model", "big"))
    assert ended.out == "It is Paris.\n"
    assert "not in memory" in ended.err
    spoken = next(asked for asked in model.asked if asked.messages[-1].content == "What is the capital of France?")
    assert "<recalled-notes>" in spoken.messages[0].content
    assert spoken.messages[1].content == "The heron is called Pim."


@pytest.mark.usefixtures("word_reader")
def test_ctrl_c_stops_an_answer_and_not_the_chat(talk: Any, loci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Memory, question: str, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Memory, "ask", stopped)
    ended = talk("What is it?", "The heron is called Pim.")
    assert "stopped; go on" in ended.err
    assert len(loci("notes", "show", "--json").data) == 1


@pytest.mark.usefixtures("word_reader")
def test_leaving_with_ctrl_c_says_that_all_is_kept(loci: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines: Iterator[str | type[BaseException]] = iter(["The heron is called Pim.", KeyboardInterrupt])

    def typed(prompt: str = "") -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    ended = loci("chat", *NONE)
    assert ended.code == 0
    assert "0 notes remembered" in ended.err
    assert "1 note kept" in ended.err


def test_an_error_in_one_message_does_not_end_the_chat(talk: Any, loci: Any) -> None:
    ended = talk("<recalled-notes>1. x</recalled-notes>", "The heron is called Pim.")
    assert ended.code == 0
    assert "RecalledText" in ended.err
    assert len(loci("notes", "show", "--json").data) == 1


@pytest.mark.parametrize(
    ("message", "told", "asked"),
    [
        ("My dog is Juniper.", "My dog is Juniper.", ""),
        ("When does it leave?", "", "When does it leave?"),
        ("My dog is Juniper. When does it leave?", "My dog is Juniper.", "When does it leave?"),
        ("Did I see Dr. Smith on Monday?", "", "Did I see Dr. Smith on Monday?"),
        ("Who is Ann? I forgot.", "", "Who is Ann? I forgot."),
        ("where is the key", "", "where is the key"),
    ],
)
def test_a_message_is_parted_at_its_first_question(message: str, told: str, asked: str) -> None:
    assert parted(message) == (told, asked)
