"""Spec-Bench: questions of six kinds whose answers are easy or hard to foresee.

Source   Xia et al. 2024, "Unlocking Efficiency in Large Language Model Inference: A Comprehensive Survey of Speculative
         Decoding", arXiv:2401.07851; its file `question.jsonl`, or a part of it, read as it is.
Tasks    multi_turn (MT-bench, two turns), translation (WMT14 German to English), summarization (CNN/DailyMail), qa
         (Natural Questions), math_reasoning (GSM8K), rag (Natural Questions with passages).
Use      speed and exactness only: nothing is scored, and no drafter may be trained on it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loci.errors import BadInput, DataNotFound

TASKS = ("multi_turn", "translation", "summarization", "qa", "math_reasoning", "rag")
# Raised when anything that moves a figure changes: how questions are drawn, laid out or timed.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Question:
    """`turns` are the user's messages, asked one after the other."""

    id: int
    task: str
    turns: tuple[str, ...]


def file_of(data: Path) -> Path:
    """The file of questions in a folder, or the file itself.

    Raises:
        DataNotFound: there is none.
    """
    if data.is_file():
        return data
    for name in ("question.jsonl", "question.jsonl.gz"):
        if (data / name).is_file():
            return data / name
    raise DataNotFound(
        f"{data} holds no question.jsonl or question.jsonl.gz; give a folder with Spec-Bench's questions"
        " (github.com/hemingkx/Spec-Bench, data/spec_bench)."
    )


def read(data: Path) -> list[Question]:
    """Every question, in the order of the file.

    Raises:
        DataNotFound: there is no such file.
        BadInput: the file is not of Spec-Bench's form.
    """
    path = file_of(data)
    try:
        text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = [json.loads(line) for line in text.decode("utf-8").splitlines() if line.strip()]
        # The published file tells only the category; the eight of MT-bench are the task multi_turn.
        questions = [
            Question(
                id=int(row["question_id"]),
                task=row.get("task") or (row["category"] if row["category"] in TASKS else "multi_turn"),
                turns=tuple(str(turn) for turn in row["turns"]),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(
            f"{path} is not of Spec-Bench's form ({type(error).__name__}: {error}); each line should be a JSON object"
            " with `question_id`, `category` and `turns`."
        ) from error
    if not questions or any(not question.turns for question in questions):
        raise BadInput(f"{path} holds no questions, or one without turns.")
    return questions


def pick(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most so many, as many of each task as can be, spread evenly over each task's questions.

    They come task by task in turn, so that an interrupted run has seen some of each.

    Raises:
        BadInput: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit is the number of questions and at least 1, not {limit}.")
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    wanted = len(questions) if limit is None else min(limit, len(questions))
    counts = dict.fromkeys(by_task, 0)
    while sum(counts.values()) < wanted:
        for task, held in by_task.items():
            if counts[task] < len(held) and sum(counts.values()) < wanted:
                counts[task] += 1
    chosen = {
        task: [held[place * len(held) // counts[task]] for place in range(counts[task])]
        for task, held in by_task.items()
    }
    longest = max(counts.values())
    return [held[place] for place in range(longest) for held in chosen.values() if place < len(held)]
