"""`loci demo`: real import, links and search; the flow with a stand-in reader, the answers where one is shipped."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from loci.cli.demo import agrees


def shipped() -> bool:
    return (files("loci.lm") / "artifacts" / "reader.safetensors").is_file()


@pytest.mark.usefixtures("word_reader")
def test_a_conversation_is_remembered_linked_and_asked_about(loci: Any, tmp_path: Path) -> None:
    keep = tmp_path / "demo.db"
    row = loci("demo", "--keep", str(keep), "--json").data
    lines = (files("loci.cli") / "demo_conversation.jsonl").read_text(encoding="utf-8").splitlines()
    assert row["imported"]["written"] == len(lines)
    assert {link["kind"] for _, link, _ in row["links"]} == {"reply", "similar", "entity"}
    assert all(link["src"] == note["id"] and link["dst"] == other["id"] for note, link, other in row["links"])
    assert len({note["id"] for note, _, _ in row["links"]}) == 3
    assert row["evolved"]["before"]["version"] + 1 == row["evolved"]["after"]["version"]
    assert row["evolved"]["after"]["cause"] is not None
    assert len(row["questions"]) == 10
    for each in row["questions"]:
        answer = each["answer"]["text"] if each["answer"]["found"] else None
        assert each["right"] == agrees(answer, each["reference"])
    assert row["right"] == sum(each["right"] for each in row["questions"])

    again = loci("demo", "--keep", str(keep))
    assert (again.code, "there already" in again.err) == (2, True)
    asked = loci("ask", "Who is allergic to hazelnuts?", "--db", str(keep), "--json").data
    assert any("allergic to hazelnuts" in note["content"] for note in asked["considered"])


@pytest.mark.usefixtures("word_reader")
def test_the_screen_tells_right_from_wrong_and_what_to_do_next(loci: Any) -> None:
    ended = loci("demo")
    assert ended.code == 0
    for number in range(1, 11):
        assert f"\n{number:2}. " in ended.out
    wrong = ended.out.count("wrong, expected: ")
    assert ended.out.endswith(f"\n{10 - wrong} of 10 questions answered rightly\n")
    assert "before   " in ended.out
    assert "because  " in ended.out
    assert "next: loci chat" in ended.err


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (None, None, True),
        ("Priya", None, False),
        (None, "Priya", False),
        ("Priya", "Priya", True),
        ("on 14 March 2026", "14 March 2026", True),
        ("14 March", "14 March 2026", False),
        ("18 March 2026", "18 April 2026", False),
        ("11 May 2026", "11 May", True),
        ("a sofa", "a green sofa, an oak bookcase, a captain's lamp", False),
        ("Jonas", "Priya", False),
    ],
)
def test_an_answer_agrees_by_its_words_or_by_refusing_rightly(
    answer: str | None, reference: str | None, right: bool
) -> None:
    assert agrees(answer, reference) == right


@pytest.mark.slow
@pytest.mark.skipif(not shipped(), reason="needs the trained reader: loci train reader")
def test_most_of_the_ten_questions_are_answered_rightly(loci: Any) -> None:
    row = loci("demo", "--json").data
    assert row["right"] >= 6, json.dumps(row["questions"], indent=1, ensure_ascii=False)
    assert row["seconds"] < 90
