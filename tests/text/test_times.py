"""Times that a text speaks of, resolved against the moment at which it was said."""

from __future__ import annotations

import gzip
import json
import os
import re
import string
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import Stemmer
from hypothesis import given
from hypothesis import strategies as st

from loci.errors import BadDate
from loci.text.times import annotate, parse_at, parse_span, resolve, say_day, says_zone, spans_of_question

NEW_YORK = ZoneInfo("America/New_York")
WEDNESDAY = datetime(2023, 5, 24, 14, 0, tzinfo=NEW_YORK)


def days(text: str, at: datetime = WEDNESDAY) -> list[tuple[str, str, str, str]]:
    """Words, phrase, first day and the day after the last."""
    return [(span.text, span.phrase, f"{span.start:%Y-%m-%d}", f"{span.end:%Y-%m-%d}") for span in resolve(text, at)]


TABLE = """
I went [yesterday]. | 23 May 2023 | 2023-05-23 | 2023-05-24
I saw it [last night] | 23 May 2023 | 2023-05-23 | 2023-05-24
[today] I ran | 24 May 2023 | 2023-05-24 | 2023-05-25
[This morning] I ran | 24 May 2023 | 2023-05-24 | 2023-05-25
[Tomorrow night] we dance | 25 May 2023 | 2023-05-25 | 2023-05-26
[the day before yesterday] | 22 May 2023 | 2023-05-22 | 2023-05-23
[two days ago] | 22 May 2023 | 2023-05-22 | 2023-05-23
[an hour ago] | 24 May 2023 | 2023-05-24 | 2023-05-25
[two weeks ago] | two weeks before 24 May 2023 | 2023-05-07 | 2023-05-14
[a week ago] | a week before 24 May 2023 | 2023-05-14 | 2023-05-21
[a couple of months ago] | March 2023 | 2023-03-01 | 2023-04-01
[about a year ago] | around May 2022 | 2022-05-01 | 2022-06-01
[ten years ago] | 2013 | 2013-01-01 | 2014-01-01
[a few weeks ago] | a few weeks before 24 May 2023 | 2023-04-12 | 2023-05-11
[two weekends ago] | two weekends before 24 May 2023 | 2023-05-13 | 2023-05-15
[half a year ago] | November 2022 | 2022-11-01 | 2022-12-01
[in two weeks] we fly | two weeks after 24 May 2023 | 2023-06-04 | 2023-06-11
[three days from now] | 27 May 2023 | 2023-05-27 | 2023-05-28
[last week] | the week before 24 May 2023 | 2023-05-15 | 2023-05-22
[this week] | the week of 24 May 2023 | 2023-05-22 | 2023-05-29
[next week] | the week after 24 May 2023 | 2023-05-29 | 2023-06-05
[last weekend] | the weekend before 24 May 2023 | 2023-05-20 | 2023-05-22
[this past weekend] | the weekend before 24 May 2023 | 2023-05-20 | 2023-05-22
[this weekend] | the weekend of 27 May 2023 | 2023-05-27 | 2023-05-29
we swam [over the weekend] | the weekend before 24 May 2023 | 2023-05-20 | 2023-05-22
[next month] | June 2023 | 2023-06-01 | 2023-07-01
[later this month] | May 2023 | 2023-05-01 | 2023-06-01
[last year] | 2022 | 2022-01-01 | 2023-01-01
[the week before last] | two weeks before 24 May 2023 | 2023-05-08 | 2023-05-15
[last Friday] | the Friday before 24 May 2023 | 2023-05-19 | 2023-05-20
[last Fri] | the Friday before 24 May 2023 | 2023-05-19 | 2023-05-20
[last Wednesday] | the Wednesday before 24 May 2023 | 2023-05-17 | 2023-05-18
[next Friday] | the Friday after 24 May 2023 | 2023-05-26 | 2023-05-27
[this Friday] | 26 May 2023 | 2023-05-26 | 2023-05-27
[this Monday] we met | 22 May 2023 | 2023-05-22 | 2023-05-23
We met [on Friday] | 19 May 2023 | 2023-05-19 | 2023-05-20
Let's meet [on Friday] | 26 May 2023 | 2023-05-26 | 2023-05-27
I saw her [Friday night] | 19 May 2023 | 2023-05-19 | 2023-05-20
[last summer] | the summer of 2022 | 2022-06-01 | 2022-09-01
[this summer] | the summer of 2023 | 2023-06-01 | 2023-09-01
[winter 2020] | the winter of 2020 | 2020-12-01 | 2021-03-01
We married [in June] | June 2022 | 2022-06-01 | 2022-07-01
We will marry [in April] | April 2024 | 2024-04-01 | 2024-05-01
[last May] | May 2022 | 2022-05-01 | 2022-06-01
[in 2019] | 2019 | 2019-01-01 | 2020-01-01
[in the 1990s] | the 1990s | 1990-01-01 | 2000-01-01
[since 2016] | since 2016 | 2016-01-01 | 2023-05-25
[Seven years now] | since 2016 | 2016-01-01 | 2023-05-25
known them [for 4 years] | since 2019 | 2019-01-01 | 2023-05-25
[for the past two weeks] | the two weeks before 24 May 2023 | 2023-05-10 | 2023-05-25
[in the next two days] | the two days after 24 May 2023 | 2023-05-24 | 2023-05-27
We leave by [June 5] | 5 June 2023 | 2023-06-05 | 2023-06-06
[early March 2020] | early March 2020 | 2020-03-01 | 2020-03-11
on [May 5th] we met | 5 May 2023 | 2023-05-05 | 2023-05-06
[the 5th of May, 2021] | 5 May 2021 | 2021-05-05 | 2021-05-06
[May 2-5, 2023] | 2 to 5 May 2023 | 2023-05-02 | 2023-05-06
[05/08/2023] | 8 May 2023 | 2023-05-08 | 2023-05-09
[25/12/22] | 25 December 2022 | 2022-12-25 | 2022-12-26
[5.8.2023] | 5 August 2023 | 2023-08-05 | 2023-08-06
[2023-05-07] | 7 May 2023 | 2023-05-07 | 2023-05-08
[on the 5th] I left | 5 May 2023 | 2023-05-05 | 2023-05-06
[last Christmas] | 25 December 2022 | 2022-12-25 | 2022-12-26
[first weekend of August 2023] | the first weekend of August 2023 | 2023-08-05 | 2023-08-07
[the week before 9 June 2023] | the week before 9 June 2023 | 2023-05-29 | 2023-06-05
[the Friday before 15 July 2023] | the Friday before 15 July 2023 | 2023-07-14 | 2023-07-15
[two days before May 5, 2023] | 3 May 2023 | 2023-05-03 | 2023-05-04
"""  # the words in brackets | their phrase | first day | the day after the last


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_words_mean_these_days(row):
    marked, *expected = row.split(" | ")
    words = marked[marked.index("[") + 1 : marked.index("]")]
    assert days(marked.replace("[", "").replace("]", "")) == [(words, *expected)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "recently",
        "the other day",
        "He was 8 years old",
        "every Friday we ran",
        "on Fridays",
        "it may 5 times fail",
        "I may march",
        "The sun is out and we sat down.",
        "finished it in two days",
        "summer break",
        "12,2023 people",
        "9999 years ago",
        "2023-02-30",
        "the last week of it",
        "昨日 gestern hier",
    ],
)
def test_words_that_name_no_time_are_left_alone(text):
    assert days(text) == []


def test_phrases_of_a_text_resolve_to_the_days_that_they_came_from():
    for text in ("last week", "last Friday", "last weekend", "last year", "next month", "yesterday", "last summer"):
        (span,) = resolve(text, WEDNESDAY)
        (again,) = resolve(
            f"in {span.phrase}" if span.phrase.isdigit() else span.phrase, datetime(2026, 1, 1, tzinfo=NEW_YORK)
        )
        assert (again.start, again.end) == (span.start, span.end)


def test_month_ends_and_leap_days_stay_in_the_calendar():
    assert days("a month ago", datetime(2023, 3, 31))[0][1] == "February 2023"
    assert days("a year ago", datetime(2024, 2, 29))[0][1] == "February 2023"
    assert days("in a month", datetime(2024, 1, 31))[0][1] == "February 2024"
    assert days("yesterday", datetime(2024, 3, 1))[0][1] == "29 February 2024"
    assert days("We met on February 29", datetime(2023, 3, 1))[0][1] == "29 February 2020"
    assert days("last month", datetime(2023, 1, 31))[0][1] == "December 2022"


def test_days_are_midnights_of_the_speakers_zone_across_summer_time():
    (span,) = resolve("yesterday", datetime(2023, 3, 13, 9, 0, tzinfo=NEW_YORK))
    assert span.start.isoformat() == "2023-03-12T00:00:00-05:00"
    assert span.end.isoformat() == "2023-03-13T00:00:00-04:00"


TIME_WORDS = """
last next this past on in since for the a two few couple of years year ago week weekend days Friday fri May may 5th 31
2023 29 February before after summer now early between and 05/08/2023 99/99/99 0 Christmas
"""
anything = st.one_of(
    st.text(),
    st.lists(st.sampled_from(TIME_WORDS.split()), max_size=12).map(" ".join),
)
moments = st.datetimes(timezones=st.sampled_from([None, UTC, NEW_YORK, timezone(timedelta(hours=14))]))


@given(anything, moments)
def test_any_text_at_any_moment_gives_spans_that_lie_in_it_in_order(text, at):
    spans = resolve(text, at)
    assert spans == resolve(text, at)
    assert resolve("", at) == []
    finished = 0
    for span in spans:
        assert finished <= span.begin < span.finish <= len(text)
        assert text[span.begin : span.finish] == span.text
        assert span.start < span.end
        assert span.start.tzinfo is span.end.tzinfo is at.tzinfo
        finished = span.finish
    annotated = annotate(text, spans)
    assert annotated.startswith(text[: spans[0].finish] if spans else text)
    assert len(annotated) <= len(text) + sum(len(span.phrase) + 3 for span in spans)


@given(anything, moments)
def test_any_question_gives_spans_that_lie_in_it(text, at):
    for span in spans_of_question(text, at):
        assert 0 <= span.begin < span.finish <= len(text)
        assert span.start < span.end
        span.start.replace(tzinfo=UTC).astimezone(timezone(timedelta(hours=-20)))  # far enough from the calendar's ends


@given(st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2099, 12, 31)))
def test_every_day_is_read_back_from_its_own_phrase(at):
    day = at.replace(hour=0, minute=0, second=0, microsecond=0)
    assert [span.start for span in resolve(f"It was on {say_day(day)}.", datetime(2023, 5, 24))] == [day]


def test_annotation_says_only_what_the_words_do_not():
    text = "Yesterday I met her, in 2019 him; on 5 May 2023 them, and on May 6th you."
    assert annotate(text, resolve(text, WEDNESDAY)) == (
        "Yesterday (23 May 2023) I met her, in 2019 him; on 5 May 2023 them, and on May 6th (6 May 2023) you."
    )


def test_annotating_twice_adds_nothing():
    once = annotate("We ran yesterday.", resolve("We ran yesterday.", WEDNESDAY))
    assert annotate(once, resolve(once, WEDNESDAY)) == once


@pytest.mark.parametrize(
    ("question", "start", "end"),
    [
        ("What happened in May 2023?", "2023-05-01", "2023-06-01"),
        ("What did she do in June?", "2022-06-01", "2022-07-01"),
        ("When will he go in June?", "2023-06-01", "2023-07-01"),
        ("What did John do on Friday?", "2023-05-19", "2023-05-20"),
        ("What did she paint last summer?", "2022-06-01", "2022-09-01"),
        ("Which 2022 trips were there?", "2022-01-01", "2023-01-01"),
        ("What was said before 2020?", "1000-01-01", "2020-01-01"),
        ("What changed after May 2022?", "2022-06-01", "2024-01-01"),
        ("What changed since March?", "2023-03-01", "2023-05-25"),
        ("What happened between 3 May 2023 and 7 June 2023?", "2023-05-03", "2023-06-08"),
        ("And between May and July 2022?", "2022-05-01", "2022-08-01"),
        ("What did she do during the week of 9 June 2023?", "2023-06-05", "2023-06-12"),
        ("Who called two weeks before August 11, 2023?", "2023-07-25", "2023-08-01"),
    ],
)
def test_questions_ask_about_these_days(question, start, end):
    spans = spans_of_question(question, WEDNESDAY)
    assert [(f"{span.start:%Y-%m-%d}", f"{span.end:%Y-%m-%d}") for span in spans] == [(start, end)]


@pytest.mark.parametrize(
    ("words", "moment"),
    [
        ("2023-05-08", "2023-05-08T00:00:00-04:00"),
        ("2023-05-08 14:00", "2023-05-08T14:00:00-04:00"),
        ("2023-05-08T14:00:00Z", "2023-05-08T14:00:00+00:00"),
        ("1:56 pm on 8 May, 2023", "2023-05-08T13:56:00-04:00"),
        ("12:09 am on 13 September, 2023", "2023-09-13T00:09:00-04:00"),
        ("8 May 2023", "2023-05-08T00:00:00-04:00"),
        ("May 8, 2023, 1:56\u202fPM", "2023-05-08T13:56:00-04:00"),
        ("Mon, 8 May 2023 13:56:01 +0200", "2023-05-08T13:56:01+02:00"),
        ("05/08/2023 2pm", "2023-05-08T14:00:00-04:00"),
        ("08.05.23, 14:12", "2023-05-08T14:12:00-04:00"),
        ("May 2023", "2023-05-01T00:00:00-04:00"),
        ("2023", "2023-01-01T00:00:00-05:00"),
        ("yesterday", "2023-05-23T00:00:00-04:00"),
        ("two weeks ago", "2023-05-10T00:00:00-04:00"),
        ("last Friday", "2023-05-19T00:00:00-04:00"),
        ("today at 5 pm", "2023-05-24T17:00:00-04:00"),
        ("8 mai 2023", "2023-05-08T00:00:00-04:00"),
        ("2023年5月8日", "2023-05-08T00:00:00-04:00"),
        ("now", "2023-05-24T14:00:00-04:00"),
    ],
)
def test_dates_are_read_in_many_spellings(words, moment):
    assert parse_at(words, now=WEDNESDAY).isoformat() == moment


NO_DATES = (
    "",
    "  ",
    "hello",
    "31 June 2023",
    "2023-13-01",
    "2023-05-08 25:00",
    "32/01/2023",
    "recently",
    "x" * 999,
    "\0",
)


@pytest.mark.parametrize("words", NO_DATES)
def test_words_without_a_date_are_refused_with_a_spelling_that_works(words):
    with pytest.raises(BadDate, match="Spellings that work: 2023-05-08"):
        parse_at(words, now=WEDNESDAY)


@given(st.text(max_size=40))
def test_reading_a_date_gives_an_aware_moment_or_a_bad_date(words):
    try:
        start, end = parse_span(words, now=WEDNESDAY, other_languages=False)
    except BadDate:
        return
    assert start.tzinfo is not None
    assert start <= end


def test_a_date_without_a_zone_is_local_and_that_can_be_known():
    naive = datetime(2023, 5, 8, 14, 0)
    assert parse_at(naive) == naive.astimezone()
    assert parse_at(WEDNESDAY) is WEDNESDAY
    assert abs(parse_at(None) - datetime.now(UTC)) < timedelta(seconds=5)
    assert not says_zone(naive)
    assert not says_zone("8 May 2023, 14:00")
    assert says_zone(WEDNESDAY)
    assert says_zone("2023-05-08T14:00+02:00")
    assert says_zone("8 May 2023 14:00 UTC")
    assert says_zone(None)


def test_a_span_covers_what_its_words_cover():
    assert [moment.isoformat() for moment in parse_span("May 2023", now=WEDNESDAY)] == [
        "2023-05-01T00:00:00-04:00",
        "2023-06-01T00:00:00-04:00",
    ]
    start, end = parse_span("2023-05-08 14:00", now=WEDNESDAY)
    assert start == end


def test_date_parser_is_not_loaded_by_dates_that_are_read_here():
    code = "import sys, loci.text.times as t; t.parse_at('8 May 2023 14:00'); print('dateparser' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


LOCOMO = Path(os.environ.get("LOCI_DATA", Path(__file__).parents[3] / "shared" / "data")) / "locomo" / "locomo3.json.gz"


@pytest.mark.skipif(not LOCOMO.exists(), reason=f"needs the LoCoMo conversations at {LOCOMO}")
def test_four_of_five_temporal_answers_stand_among_the_resolved_phrases():
    stemmer = Stemmer.Stemmer("porter")

    def stems(text):
        bare = "".join(sign for sign in str(text).lower().replace(",", " ") if sign not in string.punctuation)
        return [stemmer.stemWord(word) for word in bare.split() if word not in ("a", "an", "the", "and")]

    def overlap(first, second):
        a, b = Counter(stems(first)), Counter(stems(second))
        return 2 * (a & b).total() / (a.total() + b.total())

    hits = count = 0
    for sample in json.loads(gzip.decompress(LOCOMO.read_bytes())):
        talk = sample["conversation"]
        turns = {
            turn["dia_id"]: (turn["text"], parse_at(talk[f"{name}_date_time"], now=WEDNESDAY))
            for name in talk
            if re.fullmatch(r"session_\d+", name)
            for turn in talk[name]
        }
        for question in sample["qa"]:
            if question["category"] != 2:
                continue
            known = [turns[id] for id in re.findall(r"D\d+:\d+", " ".join(question["evidence"])) if id in turns]
            phrases = [span.phrase for text, at in known for span in resolve(text, at)]
            phrases += [say_day(at) for _, at in known]
            count += 1
            hits += any(overlap(phrase, question["answer"]) >= 0.8 for phrase in phrases)
    assert count == 90
    assert hits / count >= 0.8


def test_a_day_that_something_was_moved_to_lies_ahead():
    wednesday = datetime(2026, 11, 25, 10, tzinfo=UTC)
    (span,) = resolve("I moved the appointment to Thursday.", wednesday)
    assert span.start.date().isoformat() == "2026-11-26"
    (span,) = resolve("I met her on Thursday.", wednesday)
    assert span.start.date().isoformat() == "2026-11-19"
