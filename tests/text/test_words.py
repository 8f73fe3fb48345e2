"""The one analysis of words: what becomes of a text before any index sees it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loci.text import words
from loci.text.words import LONGEST_TERM, STOP_WORDS, count_tokens, fold, normal, scan, surface, terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("running dogs", ["run", "dog"]),
        ("Caroline's adoption", ["carolin", "adopt"]),
        ("Caroline’s adoption", ["carolin", "adopt"]),
        ("I’m sure they weren't", ["sure"]),
        ("dont wont shell", ["wont", "shell"]),
        ("O'Brien rock'n'roll", ["obrien", "rocknrol"]),
        ("l'été qu'il", ["ete", "il"]),
        ("naïve Café STRASSE Straße", ["naiv", "cafe", "strass", "strass"]),
        ("ﬁne ｆｕｌｌ ①", ["fine", "full", "1"]),
        ("10,000 and 3.14 at 1:56", ["10000", "3.14", "1", "56"]),
        ("v2.0 mp3 2nd", ["v2", "0", "mp3", "2nd"]),
        ("snake_case e-mail", ["snake", "case", "e", "mail"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("中 and 国", ["中", "国"]),
        ("한국어", ["한국", "국어"]),
        ("हिन्दी", ["हिन्दी"]),
        ("👍🏽 👍 ❤️ 🇩🇪", ["👍", "👍", "❤", "🇩🇪"]),
        ("👨‍👩‍👧", ["👨\u200d👩\u200d👧"]),
        ("party🎉party", ["parti", "🎉", "parti"]),
        ("", []),
        (" \t\n.,;!?", []),
        ("to be or not to be", []),
    ],
)
def test_text_becomes_these_terms(text, expected):
    assert terms(text) == expected


def test_month_of_may_is_no_function_word():
    assert terms("In May") == ["may"]


def test_terms_are_capped_so_that_a_hash_cannot_fill_an_index():
    assert [len(term) for term in terms("a" * 1000 + " " + "é" * 1000)] == [LONGEST_TERM, LONGEST_TERM]


def test_surface_keeps_the_written_form_beside_the_term():
    assert surface("The Painters' Cafés") == [("painter", "Painters"), ("cafe", "Cafés")]


def test_scan_tells_function_words_from_others_and_where_they_stand():
    found = scan("The dog, and Äpfel")
    assert [word.term for word in found] == ["", "dog", "", "apfel"]
    assert [word.surface for word in found] == ["The", "dog", "and", "Äpfel"]


@pytest.mark.parametrize("word", sorted(STOP_WORDS))
def test_every_function_word_vanishes_in_every_case(word):
    assert terms(word) == terms(word.upper()) == terms(word.replace("'", "’")) == []


@given(st.text())
def test_analysis_never_fails_and_every_word_lies_where_scan_says(text):
    whole = normal(text)
    for word in scan(text):
        assert whole[word.begin : word.finish] == word.surface
        assert len(word.term) <= LONGEST_TERM
    assert terms(text) == [word.term for word in scan(text) if word.term]


@given(st.text(alphabet=st.characters(codec="ascii")), st.sampled_from(["é", "東", "🎉"]))
def test_ascii_text_is_cut_alike_beside_other_scripts(text, other):
    assert terms(f"{text} {other}")[:-1] == terms(text)


@given(st.text())
def test_folding_twice_changes_nothing_more(text):
    assert fold(text) == fold(fold(text))


def test_lone_surrogates_and_control_characters_pass():
    assert terms("a\ud800b\x00dog") == terms("a\ud800b\x00dog")


def test_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(words, "_REMEMBERED", 100)
    words._term_of.clear()
    for i in range(1000):
        terms(f"word{i}x")
    assert len(words._term_of) <= 100


@pytest.mark.parametrize(
    ("text", "tokens"),  # counted with the default model's own tokenizer
    [
        ("Hey Mel! Good to see you! How have you been?", 13),
        ("I went to a LGBTQ support group yesterday and it was so powerful.", 14),
        ("昨日は東京の美術館に行って、たくさんの絵を見ました。", 47),
        ("Вчера я ходила в музей с моими детьми", 28),
        ("เมื่อวานฉันไปพิพิธภัณฑ์กับลูก", 57),
    ],
)
def test_estimated_tokens_are_near_the_counted_ones(text, tokens):
    assert count_tokens(text) == pytest.approx(tokens, rel=0.34)


def test_no_text_is_no_token_and_any_text_at_least_one():
    assert count_tokens("") == 0
    assert count_tokens(" ") == 1


@given(st.text(), st.text())
def test_more_text_never_counts_much_less(first, second):
    assert count_tokens(first + " " + second) >= count_tokens(first) - 1


def test_ten_thousand_short_turns_a_second_even_on_a_busy_machine():
    turn = (
        "Since we last spoke I took my kids to a park yesterday, and they had fun exploring and playing outdoors there."
    )
    terms(turn)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(1000):
            terms(turn)
        seconds.append(time.perf_counter() - begin)
    assert 1000 / min(seconds) > 10_000
