"""The conversation and the questions of the demo hold together."""

import importlib.resources
import json
import re
from datetime import datetime, timedelta
from typing import Any

import pytest

from loci.text.times import annotate, resolve

FOLDER = importlib.resources.files("loci.cli")
TURNS: list[dict[str, str]] = [
    json.loads(line) for line in (FOLDER / "demo_conversation.jsonl").read_text(encoding="utf-8").splitlines()
]
QUESTIONS: list[dict[str, Any]] = json.loads((FOLDER / "demo_questions.json").read_text(encoding="utf-8"))["questions"]


def test_at_least_110_turns_of_two_or_three_people_run_over_several_weeks() -> None:
    assert len(TURNS) >= 110
    assert len({turn["name"] for turn in TURNS}) in (2, 3)
    moments = [datetime.fromisoformat(turn["timestamp"]) for turn in TURNS]
    assert moments == sorted(moments)
    assert all(moment.tzinfo is not None for moment in moments)
    assert moments[-1] - moments[0] > timedelta(weeks=6)
    assert all(set(turn) == {"name", "content", "timestamp"} and turn["content"].strip() for turn in TURNS)


def test_ten_questions_of_every_kind() -> None:
    assert len(QUESTIONS) == 10
    assert {"who", "when", "what changed", "several turns", "never said"} <= {
        question["kind"] for question in QUESTIONS
    }
    assert sum(question["answer"] is None for question in QUESTIONS) >= 2


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["question"])
def test_the_words_of_an_answer_stand_in_its_evidence(question: dict[str, Any]) -> None:
    if question["answer"] is None:
        assert question["evidence"] == []
        return
    shown = ""
    for place in question["evidence"]:
        turn = TURNS[place]
        spans = resolve(turn["content"], datetime.fromisoformat(turn["timestamp"]))
        shown += f"{turn['name']}: {annotate(turn['content'], spans)}\n"
    words = set(re.findall(r"\w+", shown.lower()))
    apart = set(re.findall(r"\w+", question["answer"].lower())) - words
    assert apart <= {"an", "s", "mara", "were"}, apart  # in the chat it is "my mother", and the strike is going on
