"""Descriptions made without a language model: keywords, entities, questions, context."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.text.construct import (
    LONGEST_CONTEXT,
    LONGEST_LABEL,
    MOST_KEYWORDS,
    MOST_TAGS,
    Description,
    compose_context,
    described_text,
    entities,
    is_question,
    keywords,
    shorten,
    telling_words,
)
from loci.text.times import resolve
from loci.text.words import STOP_WORDS, terms

MAY = datetime(2023, 5, 8, 13, 56, tzinfo=UTC)


def even(term: str) -> float:
    return 1.0


def rare(*rarities: tuple[str, float]):
    known = {terms(word)[0]: value for word, value in rarities}
    return lambda term: known.get(term, 0.5)


def test_rarer_words_come_first():
    weight = rare(("violin", 5.0), ("garden", 2.0))
    assert keywords("The house, the garden, the violin.", weight=weight) == ("violin", "garden", "house")


def test_two_rare_neighbours_become_one_keyword_and_replace_each_other():
    weight = rare(("charity", 4.0), ("race", 4.0))
    found = keywords("She entered a charity race near our house in town", weight=weight)
    assert found[0] == "charity race"
    assert "charity" not in found
    assert "race" not in found


def test_words_across_a_comma_or_a_function_word_make_no_pair():
    weight = rare(("violin", 4.0), ("piano", 4.0))
    assert "violin piano" not in keywords("violin, piano and house", weight=weight)
    assert "violin piano" not in keywords("violin and piano, house", weight=weight)


def test_keywords_keep_their_written_form_without_a_sentence_s_capital_or_a_possessive():
    assert set(keywords("Violins, the café's, LGBTQ+, flag", weight=even)) == {"violins", "café", "LGBTQ", "flag"}


def test_small_talk_dates_numbers_and_speakers_are_no_keywords():
    text = "Wow, thanks Caroline! Hey Mel, yesterday in May 2023 was amazing, 100 times! Last Friday too."
    assert keywords(text, weight=even, exclude=["Caroline", "Melanie"]) == ()


def test_a_word_without_weight_is_no_keyword():
    assert keywords("violin garden", weight=lambda term: 0.0 if term == "violin" else 1.0) == ("garden",)


@given(st.text(), st.integers(0, 20))
def test_keywords_of_any_text_respect_every_limit(text, limit):
    found = keywords(text, weight=even, limit=limit)
    assert len(found) <= limit
    assert len(set(found)) == len(found)
    for keyword in found:
        assert 0 < len(keyword) <= LONGEST_LABEL
        assert keyword.casefold() not in STOP_WORDS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I went to Paris with John.", ("Paris", "John")),
        ("Yesterday I'm told Mary left.", ("Mary",)),
        ("Painting is fun. Running too.", ()),
        ("New York is big", ("New York",)),
        ("We saw the Bank of America near West County", ("Bank of America", "West County")),
        ("I saw Caroline's dog and Oscar's cat", ("Caroline", "Oscar")),
        ('I read "Becoming Nicole" by Amy Ellis Nutt', ("Becoming Nicole", "Amy Ellis Nutt")),
        ("the LGBTQ group met NASA", ("LGBTQ", "NASA")),
        ("Thanks, Gina! Congrats Jon", ("Gina", "Jon")),
        ("Bach and Mozart", ("Bach", "Mozart")),
        ("I like Bach and Mozart. Bach is best", ("Bach", "Mozart")),
        ("In May, on Monday and at Christmas", ("Christmas",)),
        ("THIS IS ALL SHOUTED", ()),
        ("I’m sure. I’ve seen it.", ()),
        ("We met Jean-Luc O'Brien.", ("Jean-Luc O'Brien",)),
        ("Мы встретили Анну в Москве", ("Анну", "Москве")),
        ("", ()),
    ],
)
def test_names_are_found(text, expected):
    assert entities(text) == expected


def test_speakers_are_known_by_full_first_and_short_names():
    speakers = ["Melanie Smith", "Caroline"]
    assert entities("Hey Mel!", speakers) == ("Melanie Smith",)
    assert entities("Melanie, hi", speakers) == ("Melanie Smith",)
    assert entities("i saw caroline's dog", speakers) == ("Caroline",)
    assert entities("me and you", speakers) == ()


@given(st.text(), st.lists(st.text(max_size=8), max_size=3))
def test_entities_of_any_text_are_few_and_distinct(text, speakers):
    found = entities(text, speakers, limit=5)
    assert len(found) <= 5
    assert len({name.casefold() for name in found}) == len(found)


@pytest.mark.parametrize(
    "text",
    ["How are you?", "Nice! What's new? I ran.", "what did you buy", "Really?!", "¿Qué tal?", "何時ですか？", "Ok? 😊"],
)
def test_questions_are_recognised(text):
    assert is_question(text)


@pytest.mark.parametrize("text", ["", "I ran.", "How exciting!", "What a day.", "See http://a.b/?q=1 here", "Whatever"])
def test_other_sentences_are_no_questions(text):
    assert not is_question(text)


def test_labels_leave_out_names():
    assert telling_words("Caroline, the adoption agency in Paris helps LGBTQ families") == [
        ("adopt", "adoption"),
        ("agenc", "agency"),
        ("lgbtq", "LGBTQ"),
        ("famili", "families"),
    ]


def test_context_says_who_when_about_what_in_reply_and_which_dates():
    text = "I went to a support group yesterday"
    assert compose_context(
        speaker="Caroline",
        listener="Melanie",
        said_at=MAY,
        topics=["support group"],
        previous_words=["kids", "work"],
        spans=resolve(text, MAY),
    ) == ("Caroline to Melanie on 8 May 2023, about support group; in reply to: kids, work; 7 May 2023")


def test_context_leaves_out_what_is_not_known():
    assert compose_context(speaker=None, listener=None, said_at=MAY) == "On 8 May 2023"
    assert compose_context(speaker="user", listener=None, said_at=MAY) == "user on 8 May 2023"


def test_context_keeps_people_and_dates_when_it_must_be_cut():
    made = compose_context(
        speaker="Caroline",
        listener="Melanie",
        said_at=MAY,
        topics=["topic" + "x" * 50] * 5,
        previous_words=["word"] * 50,
        spans=resolve("I ran yesterday", MAY),
    )
    assert len(made) <= LONGEST_CONTEXT
    assert made.startswith("Caroline to Melanie on 8 May 2023, about topic")
    assert made.endswith("; 7 May 2023")


@given(st.text(), st.lists(st.text(), max_size=30), st.lists(st.text(), max_size=30))
def test_limits_of_a_description_hold_by_construction(context, words, tags):
    made = Description(keywords=tuple(words), tags=tuple(tags), context=context)
    assert len(made.keywords) <= MOST_KEYWORDS
    assert len(made.tags) <= MOST_TAGS
    assert len(made.context) <= LONGEST_CONTEXT
    assert Description(keywords=made.keywords, tags=made.tags, context=made.context) == made
    composed = compose_context(speaker=context, listener=context, said_at=MAY, topics=words, previous_words=tags)
    assert len(composed) <= LONGEST_CONTEXT


def test_repeats_and_white_space_leave_a_description():
    made = Description(keywords=("Dog", "dog ", " ", "big  dog"), tags=("", "pets"), context=" a \n b ")
    assert made == Description(keywords=("Dog", "big dog"), tags=("pets",), context="a b")


def test_described_text_holds_words_keywords_tags_and_context():
    made = Description(keywords=("dog", "park"), tags=("pets",), context="Ann on 8 May 2023")
    assert described_text("It ran.", made) == "It ran.\ndog, park\npets\nAnn on 8 May 2023"
    assert described_text("It ran.", Description()) == "It ran."


def test_a_description_stands_before_words_that_an_encoder_would_cut():
    text = "It ran and ran. " * 100
    assert described_text(text, Description(keywords=("dog",))).startswith("dog\nIt ran")


def test_shortening_cuts_between_words():
    assert shorten("one two three four", 15) == "one two three…"
    assert shorten("x" * 20, 10) == "x" * 9 + "…"
    assert shorten("short", 10) == "short"


def test_describing_a_turn_is_quick():
    text = (
        "Since we last spoke I took my kids to the Grand Canyon, and they had fun exploring and playing outdoors there."
    )
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(50):
            keywords(text, weight=even)
            entities(text, ("Melanie", "Caroline"))
            is_question(text)
        seconds.append((time.perf_counter() - begin) / 50)
    assert min(seconds) < 0.02  # a fifth of a millisecond on an idle machine, without the type checks of the tests
