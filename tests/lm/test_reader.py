"""The reader: many questions are read as one by one, nothing is cut silently, the model it came from stays as it is."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")
import torch

from loci.errors import BadInput, BadModel, ContextTooLong, ModelNotFound
from loci.lm.reader import SHIPPED, Confidence, Passage, Prompts, Reader, attribute, render
from loci.lm.train import example_loss

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

MAY = datetime(2031, 5, 8)
PASSAGES = [
    Passage(
        id="1", said_by="Ruth", said_at=MAY, text="I adopted a parrot last Friday (2 May 2031). We call him Captain."
    ),
    Passage(id="2", said_by="Noel", said_at=MAY, text="Lovely! I spent the weekend baking rye bread with my aunt."),
    Passage(id="3", said_by="Ruth", said_at=MAY, text="My new job as a welder starts next month (June 2031)."),
    Passage(id="4", said_by="Noel", said_at=MAY, text="I play the cello in a small orchestra in Ghent."),
]
QUESTIONS = ["What is Ruth's parrot called?", "When does Ruth start as a welder?", "What did Noel bake?"]


@pytest.fixture(scope="module")
def bare(default_model: LanguageModel) -> Reader:
    return Reader(default_model)


@pytest.fixture(scope="module")
def reader(default_model: LanguageModel) -> Reader:
    return Reader.load(default_model)


def test_a_passage_is_a_line_with_its_date_and_speaker() -> None:
    assert render(Passage(text="I am\n here.", said_by="Ruth", said_at=MAY)) == "[8 May 2031] Ruth: I am here."
    assert render(Passage(text="Bare.")) == "Bare."


def test_many_questions_are_answered_as_one_by_one(bare: Reader) -> None:
    together = bare.answer_many(QUESTIONS, PASSAGES, max_tokens=6)
    for question, answer in zip(QUESTIONS, together, strict=True):
        alone = bare.answer(question, PASSAGES, max_tokens=6)
        assert alone.guess == answer.guess
        assert math.isclose(alone.confidence, answer.confidence, abs_tol=1e-3)
        assert alone.tokens_in == answer.tokens_in


def test_answering_is_laid_out_as_training_was(bare: Reader) -> None:
    reading = bare.read([QUESTIONS[0]], PASSAGES, max_tokens=64)[0][0]
    example = bare.prompts.example(PASSAGES, [(QUESTIONS[0], reading.text)])
    loss = float(example_loss(bare.model.model, example).detach())
    assert loss == pytest.approx(-reading.mean * (reading.tokens_out + 1), rel=1e-2)


def test_passages_that_do_not_fit_are_dropped_from_the_end_and_counted(
    bare: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bare.model.model.config, "max_position_embeddings", 120)
    answer = bare.answer(QUESTIONS[0], PASSAGES, max_tokens=4)
    assert 0 < answer.dropped < len(PASSAGES)
    assert answer.tokens_in <= 116
    kept = PASSAGES[: len(PASSAGES) - answer.dropped]
    assert bare.answer(QUESTIONS[0], kept, max_tokens=4).guess == answer.guess


def test_a_first_passage_that_does_not_fit_is_an_error(bare: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare.model.model.config, "max_position_embeddings", 120)
    with pytest.raises(ContextTooLong, match="the first passage has"):
        bare.answer(QUESTIONS[0], [Passage(text="word " * 200)], max_tokens=4)


@pytest.mark.parametrize(("question", "tokens"), [("  ", 8), ("Who?", 0)])
def test_an_empty_question_and_an_answer_of_no_tokens_are_refused(bare: Reader, question: str, tokens: int) -> None:
    with pytest.raises(BadInput):
        bare.answer(question, PASSAGES, max_tokens=tokens)


def test_no_question_has_no_answer_and_no_passage_is_a_refusal(bare: Reader) -> None:
    assert bare.answer_many([], PASSAGES) == []
    answer = bare.answer(QUESTIONS[0], [], max_tokens=4)
    assert (answer.found, answer.text, answer.sources, answer.confidence) == (False, "", (), 0.0)


def test_a_model_without_the_marks_is_refused(tiny_model: LanguageModel) -> None:
    with pytest.raises(BadModel, match="no single tokens"):
        Prompts(tiny_model)


def test_a_missing_adapter_is_named(default_model: LanguageModel) -> None:
    with pytest.raises(ModelNotFound, match="no trained part at"):
        Reader.load(default_model, artifact="nowhere.safetensors")


def test_confidence_grows_with_the_chance_of_an_answer() -> None:
    confidence = Confidence(bias=0.5, refusal=0.8, mean=1.0, least=0.2)
    chances = [confidence.of(refusal, -0.5, -1.0) for refusal in (-900.0, -3.0, 0.0, 3.0, 900.0)]
    assert chances == sorted(chances)
    assert 0 <= chances[0] < chances[-1] <= 1


def test_sources_are_the_passages_that_hold_the_words() -> None:
    assert attribute("Captain", QUESTIONS[0], PASSAGES) == ("1",)
    assert attribute("rye bread", QUESTIONS[2], PASSAGES) == ("2",)
    assert set(attribute("a parrot, the cello", "What do they have?", PASSAGES)) == {"1", "4"}
    assert attribute("yes", "Does Noel play in an orchestra?", PASSAGES) == ("4",)
    assert attribute("anything", "Who?", [Passage(text="anything")]) == ()


def test_the_shipped_reader_answers_dates_names_and_refuses(reader: Reader) -> None:
    asked = [*QUESTIONS, "When did Ruth adopt the parrot?", "Which instrument does Noel play?"]
    answers = reader.answer_many(asked, PASSAGES)
    texts = [answer.text for answer in answers]
    assert "Captain" in texts[0]
    assert "June 2031" in texts[1]
    assert "bread" in texts[2]
    assert "2 May 2031" in texts[3]
    assert "cello" in texts[4]
    assert [answer.sources[0] for answer in answers] == ["1", "3", "2", "1", "4"]
    assert all(answer.found for answer in answers)
    absent = reader.answer("How many children does Noel have?", PASSAGES)
    assert not absent.found
    assert absent.text == ""
    assert absent.confidence < min(answer.confidence for answer in answers)


def test_an_answer_from_documents_is_a_quotation_and_one_from_a_conversation_need_not_be(bare: Reader) -> None:
    texts = ["The lighthouse was built in 1851 by Ana Duarte.", "Its lamp burned whale oil; today it is electric."]
    questions = ["Who built it?", "What did the lamp burn?"]
    documents = [Passage(text=text) for text in texts]
    for answer in bare.answer_many(questions, documents, max_tokens=8):
        assert answer.guess
        assert any(answer.guess in text for text in texts)
    spoken = [Passage(text=text, said_by="Ruth") for text in texts]
    guesses = [answer.guess for answer in bare.answer_many(questions, spoken, max_tokens=8)]
    assert not all(any(guess in text for text in texts) for guess in guesses)  # the bare model goes its own ways


def test_loading_the_reader_leaves_the_model_as_it_was(default_model: LanguageModel, reader: Reader) -> None:
    ours = default_model.model.model.layers[0].self_attn.q_proj.weight
    theirs = reader.model.model.model.layers[0].self_attn.q_proj.weight
    assert ours.data_ptr() != theirs.data_ptr()
    assert not torch.equal(ours, theirs)
    assert not hasattr(default_model.model, "peft_config")


def test_the_shipped_adapter_is_small() -> None:
    assert SHIPPED.stat().st_size <= 10 * 2**20
