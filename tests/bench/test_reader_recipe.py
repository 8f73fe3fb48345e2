"""The reader's recipe: articles are held back whole, views answer only what they show, numbers name sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.bench.invented import invent
from loci.bench.reader_recipe import (
    BARS,
    Mixture,
    Paragraph,
    ReaderRecipe,
    calibration_views,
    conversation_view,
    evaluate,
    fit_confidence,
    read_squad,
    split,
    squad_view,
    train,
)
from loci.errors import DataNotFound
from loci.lm.reader import Passage, Prompts, Reader, Reading
from loci.lm.train import LoraRecipe, load_artifact

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

PARAGRAPHS = [
    Paragraph(
        title=f"Article {number // 4}",
        text=f"The river {number} has {number} bridges. The oldest is of stone.",
        asked=((f"How many bridges has river {number}?", (str(number), f"{number} bridges")), ("Who built it?", ())),
    )
    for number in range(24)
]


def test_whole_articles_are_held_back_and_nothing_is_lost() -> None:
    ours, held = split(PARAGRAPHS, held_back=0.1)
    assert not {one.title for one in ours} & {one.title for one in held}
    assert len(ours) + len(held) == len(PARAGRAPHS)
    assert 0.1 <= len(held) / len(PARAGRAPHS) < 0.3
    assert split(PARAGRAPHS[::-1], held_back=0.1)[1] == held[::-1]


def test_the_real_split_is_by_article(data: Path) -> None:
    paragraphs = read_squad(data / "squad")
    assert sum(len(one.asked) for one in paragraphs) == 6_078
    ours, held = split(paragraphs, held_back=0.1)
    assert {one.title for one in held} == {"Steam engine", "European Union law"}
    assert not {one.text for one in ours} & {one.text for one in held}


def test_absent_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match="passages"):
        read_squad(tmp_path)


def test_a_paragraph_keeps_its_words_and_its_answers() -> None:
    for seed in range(20):
        view = squad_view(PARAGRAPHS[5], PARAGRAPHS, random.Random(seed))
        assert " ".join(passage.text for passage in view.passages) == PARAGRAPHS[5].text
        assert ("How many bridges has river 5?", "5") in view.asked
        assert ("Who built it?", None) in view.asked


def test_a_view_of_a_conversation_answers_only_what_it_shows() -> None:
    for seed in range(30):
        conversation = invent(seed)
        view = conversation_view(conversation, random.Random(seed), dated=1.0)
        shown = {passage.id for passage in view.passages}
        answers = dict(view.asked)
        for question in conversation.questions:
            if question.answer is not None and answers.get(question.text) == question.answer:
                assert set(question.evidence) <= shown or any(
                    other.text == question.text and set(other.evidence) <= shown for other in conversation.questions
                )
        assert any(answer is not None for _, answer in view.asked)
        assert any(answer is None for _, answer in view.asked)


def test_the_same_number_is_the_same_sequence(default_model: LanguageModel) -> None:
    recipe = ReaderRecipe(squad_passes=2, views=6)
    one, other = (Mixture(Prompts(default_model), PARAGRAPHS, recipe) for _ in range(2))
    assert len(one) == 2 * len(PARAGRAPHS) + 6
    for number in (0, 30, len(one) - 1):
        assert one[number].tokens.tolist() == other[number].tokens.tolist()
    assert one.view(0) != one.view(len(PARAGRAPHS))  # the second pass asks in another order


def test_conversations_for_calibration_are_none_of_training() -> None:
    recipe = ReaderRecipe()
    ours = {turn for seed in range(3) for turn in invent(seed).turns}
    for view in calibration_views(PARAGRAPHS[:2], recipe)[2:]:
        assert not ours & set(view.passages)


def test_confidence_is_fitted_to_what_the_model_did() -> None:
    class Told(Reader):
        """Reads 2 where the question has an answer, -2 where not, and errs with every seventh passage."""

        def __init__(self) -> None:
            pass

        def read(self, questions: Sequence[str], passages: Sequence[Passage], **_: object) -> tuple[list[Reading], int]:
            wrong = int(passages[0].text.split()[2]) % 7 == 6
            return [
                Reading(
                    text="4",
                    refusal=2.0 if ("bridges" in question) != wrong else -2.0,
                    mean=-0.1,
                    least=-0.1,
                    tokens_in=1,
                    tokens_out=1,
                )
                for question in questions
            ], 0

    views = [squad_view(one, [], random.Random(0)) for one in PARAGRAPHS]
    fitted = fit_confidence(Told(), views)
    assert fitted.of(2.0, -0.1, -0.1) > 0.8 > 0.2 > fitted.of(-2.0, -0.1, -0.1)
    assert 0 < fitted.threshold < 1


@pytest.mark.slow
def test_a_short_training_makes_an_artifact_that_reads(
    default_model: LanguageModel, data: Path, tmp_path: Path
) -> None:
    recipe = ReaderRecipe(squad_passes=1, views=2, kept_out=540, lora=LoraRecipe(rank=2))
    artifact = train(tmp_path, squad=data / "squad", model=default_model, recipe=recipe, progress=False)
    reader = Reader.load(default_model, artifact=load_artifact(artifact.path))
    assert reader.answer("What color is it?", [Passage(text="The door is green.")]).guess


@pytest.mark.slow
def test_the_shipped_reader_clears_its_bars(default_model: LanguageModel, data: Path) -> None:
    figures = evaluate(model=default_model, squad=data / "squad", locomo_data=data / "locomo", bare=False)
    assert figures["reader"]["squad_f1"] >= BARS["squad_f1"]
    assert figures["reader"]["locomo_f1"] >= BARS["locomo_f1"]
    assert figures["reader"]["refusal_auroc"] >= BARS["refusal_auroc"]
