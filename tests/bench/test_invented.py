"""Invented conversations: the same seed gives the same one, and answers can be found in what was said."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from loci.bench.invented import Conversation, invent
from loci.bench.scoring import stemmed_f1
from loci.text.times import resolve

SEEDS = range(40)


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return [invent(seed) for seed in SEEDS]


def test_the_same_seed_gives_the_same_conversation(conversations: list[Conversation]) -> None:
    assert invent(7) == conversations[7]
    assert len({conversation.turns for conversation in conversations}) == len(conversations)


def test_no_slot_is_left_open(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        texts = [turn.text for turn in conversation.turns]
        texts += [text for question in conversation.questions for text in (question.text, question.answer or "")]
        assert not [text for text in texts if re.search(r"[{}|]", text)]


def test_turns_go_forward_in_time_and_have_ids_of_their_own(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        assert all(earlier.at < later.at for earlier, later in pairwise(conversation.turns))
        assert len({turn.id for turn in conversation.turns}) == len(conversation.turns)
        assert {turn.speaker for turn in conversation.turns} <= set(conversation.speakers)


def test_evidence_names_turns_and_every_answer_has_some(conversations: list[Conversation]) -> None:
    for conversation in conversations:
        ids = {turn.id for turn in conversation.turns}
        for question in conversation.questions:
            assert set(question.evidence) <= ids
            assert question.answer is None or question.evidence
            assert (question.answer is None) == (question.kind == "absent")


def test_the_words_of_single_answers_stand_in_their_evidence(conversations: list[Conversation]) -> None:
    shares = []
    for conversation in conversations:
        turns = {turn.id: turn.text for turn in conversation.turns}
        for question in conversation.questions:
            if question.answer is not None and question.kind in ("single", "list", "now", "before"):
                said = " ".join(turns[id] for id in question.evidence)
                shares.append(
                    all(stemmed_f1(word, word) and word in said for word in re.findall(r"[A-Z]\w+", question.answer))
                )
    assert sum(shares) / len(shares) > 0.97  # the rest speaks of the teller by name


def test_answers_to_when_are_the_phrases_of_the_times_in_the_text(conversations: list[Conversation]) -> None:
    checked = 0
    for conversation in conversations:
        turns = {turn.id: turn for turn in conversation.turns}
        for question in conversation.questions:
            if question.kind == "time":
                spans = [span.phrase for id in question.evidence for span in resolve(turns[id].text, turns[id].at)]
                assert question.answer in spans
                checked += 1
    assert checked > 100


def test_lists_have_as_many_parts_as_turns(conversations: list[Conversation]) -> None:
    lists = [q for c in conversations for q in c.questions if q.kind == "list" and len(q.evidence) > 1]
    assert lists
    assert max(len(question.answer.split(", ")) for question in lists if question.answer) >= 3


def test_every_kind_of_question_occurs_and_enough_have_no_answer(conversations: list[Conversation]) -> None:
    kinds = [question.kind for conversation in conversations for question in conversation.questions]
    assert set(kinds) == {"single", "time", "list", "count", "now", "before", "absent"}
    assert 0.15 < kinds.count("absent") / len(kinds) < 0.5


def test_sessions_can_be_chosen() -> None:
    assert {turn.id.split(":")[0] for turn in invent(3, sessions=2).turns} <= {"1", "2"}
