from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from loci.bench.spec_bench import TASKS, Question, file_of, pick, read
from loci.errors import BadInput, DataNotFound


def write(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "question.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_questions_are_read_with_their_task_or_told_by_their_category(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 200, "category": "qa", "turns": ["c"]},
        {"question_id": 300, "category": "stem", "task": "multi_turn", "turns": ["d"]},
    )
    assert [(question.id, question.task, question.turns) for question in read(tmp_path)] == [
        (81, "multi_turn", ("a", "b")),
        (200, "qa", ("c",)),
        (300, "multi_turn", ("d",)),
    ]


def test_a_packed_file_is_read_too(tmp_path: Path) -> None:
    row = {"question_id": 1, "category": "rag", "turns": ["a"]}
    (tmp_path / "question.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    assert read(tmp_path)[0].task == "rag"
    assert file_of(tmp_path / "question.jsonl.gz").name == "question.jsonl.gz"


@pytest.mark.parametrize("text", ["{", '{"question_id": 1}', '{"question_id": 1, "category": "qa", "turns": []}', ""])
def test_what_is_not_of_its_form_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(BadInput, match=r"question\.jsonl"):
        read(tmp_path)


def test_a_folder_without_questions_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="no-such"):
        read(tmp_path / "no-such")


def questions(**counts: int) -> list[Question]:
    return [Question(id=number, task=task, turns=("x",)) for task, count in counts.items() for number in range(count)]


def test_a_part_is_spread_over_tasks_and_over_each_tasks_questions() -> None:
    chosen = pick(questions(qa=10, rag=10, multi_turn=2), 9)
    assert Counter(question.task for question in chosen) == {"qa": 4, "rag": 3, "multi_turn": 2}
    assert [question.id for question in chosen if question.task == "qa"] == [0, 2, 5, 7]
    assert [question.task for question in chosen[:3]] == ["qa", "rag", "multi_turn"]


def test_without_a_limit_all_are_asked() -> None:
    every = questions(qa=3, rag=5)
    assert Counter(question.task for question in pick(every, None)) == {"qa": 3, "rag": 5}
    assert len(pick(every, 100)) == 8
    with pytest.raises(BadInput, match="0"):
        pick(every, 0)


def test_the_real_file_has_forty_questions_of_each_task(data: Path) -> None:
    if not (data / "spec_bench").is_dir():
        pytest.skip(f"needs spec_bench in {data}")
    assert Counter(question.task for question in read(data / "spec_bench")) == dict.fromkeys(TASKS, 40)
