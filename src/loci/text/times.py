"""Times that a text speaks of: "yesterday" said on 8 May 2023 is 7 May 2023.

A note that says "last Friday" is worth little a month later, so the words are resolved once, when they are said, and
the answer travels with the note. `resolve` finds the spans, `annotate` writes them into the text, `parse_at` reads
the time of a note from what a caller gives, and `spans_of_question` reads the time that a question asks about.

The rules are ours: one table of patterns, each with a function that computes the days and a phrase. A phrase is what
a careful note-taker writes down, no more precise than what was said:

    yesterday               7 May 2023                     last week        the week before 9 June 2023
    last Friday             the Friday before 15 July 2023 last weekend     the weekend before 17 July 2023
    two weeks ago           two weeks before 11 August 2023  next month     June 2023
    ten years ago           2013                           last summer      the summer of 2022
    for seven years now     since 2016                     this week        the week of 23 August 2023

What a reader must know:

- Weeks run from Monday to Sunday. "Last week" is the week before the present one, "last Friday" the latest Friday
  before today, "next Friday" the first one after today, "last weekend" the Saturday and Sunday of the week before.
- "In May", "on Friday", "May 5th" name no year or week: the tense of the nearest verb decides between past and
  future; without a verb, the nearest such month or day, and the coming weekday.
- 05/08/2023 is 8 May nowhere and everywhere: with slashes the month comes first (5/8 is 8 May), with dots or hyphens
  the day (5.8. is 5 August), unless a number over 12 decides.
- Seasons are those of the north: summer is June to August, the winter of 2022 ends in February 2023.
- Left out because they name no time: "recently", "the other day", "soon", "once", ages ("8 years old"), durations in
  the future ("for two days"), and habits ("on Fridays", "every May").

English only; other languages pass untouched. Absolute dates given to `parse_at` may be in any language that
`dateparser` reads.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from loci.errors import BadDate
from loci.text.organizer import TimeSpan

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "last": -1}
_SEASONS = {"spring": 3, "summer": 6, "fall": 9, "autumn": 9, "winter": 12}  # the month each begins in
_HOLIDAYS = {
    "christmas eve": (12, 24),
    "christmas day": (12, 25),
    "christmas": (12, 25),
    "new year's eve": (12, 31),
    "new years eve": (12, 31),
    "new year's day": (1, 1),
    "halloween": (10, 31),
    "valentine's day": (2, 14),
    "valentines day": (2, 14),
}
_ONE_DAY = timedelta(days=1)

# Pieces of patterns. All matching is ASCII and ignores case.
_MONTH = (
    r"(?P<month>january|february|march|april|may|june|july|august|september|october|november|december"
    r"|(?:jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b\.?)"
)
_WEEKDAY = r"(?P<weekday>monday|tuesday|wednesday|thursday|friday|saturday|sunday)"
_ANY_WEEKDAY = (
    r"(?P<weekday>mon(?:day)?|tue(?:s|sday)?|wed(?:nesday)?|thu(?:r|rs|rsday)?|fri(?:day)?|sat(?:urday)?|sun(?:day)?)"
)
_COUNT = (
    r"(?P<count>\d{1,4}|an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen"
    r"|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty"
    r"|(?:a\s+)?couple(?:\s+of)?|(?:a\s+)?few|several)"
)
_UNIT = r"(?P<unit>hour|day|night|weekend|week|fortnight|month|year|decade)s?"
_SEASON = r"(?P<season>spring|summer|fall|autumn|winter)"
_YEAR = r"(?P<year>(?:1[6-9]|20)\d\d)(?![\w%])(?![.,:/-]\d)"
_PART = r"(?:(?P<part>early|mid|late|(?:the\s+)?(?:beginning|start|middle|end)\s+of)[\s-]+)?"
_ABOUT = r"(?P<about>(?:about|around|roughly|almost|nearly|over|more\s+than|maybe|like)\s+)?"
_DAYTIME = r"(?:\s+(?:early\s+)?(?:morning|afternoon|evening|night))?"
_DAY = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?(?![\d:%])(?!\s*[ap]m\b)"


@dataclass(frozen=True, kw_only=True)
class _Said:
    """The moment of speaking, and what the rule needs to know about the place of the match in the text."""

    at: datetime  # the moment itself
    today: datetime  # its midnight
    text: str
    question: bool = False


_Made = tuple[datetime, datetime, str]
_Handler = Callable[[re.Match[str], _Said], _Made | None]


@dataclass(frozen=True, kw_only=True)
class _Rule:
    pattern: re.Pattern[str]
    make: _Handler
    needs: tuple[str, ...]  # one of these must stand in the text, in lower case, before the pattern is tried


# --- calendar ---------------------------------------------------------------------------------------------------------


def say_day(day: datetime) -> str:
    """A day as notes write it: 7 May 2023."""
    return f"{day.day} {_MONTHS[day.month - 1]} {day.year}"


def _one_day(day: datetime) -> _Made:
    return day, day + _ONE_DAY, say_day(day)


def _first_of(today: datetime, year: int, month: int) -> datetime:
    """The first day of a month; `month` may lie outside 1..12 and is carried into the year."""
    carried, month0 = divmod(month - 1, 12)
    return today.replace(year=year + carried, month=month0 + 1, day=1)


def _month(today: datetime, year: int, month: int) -> _Made:
    start = _first_of(today, year, month)
    return start, _first_of(today, year, month + 1), f"{_MONTHS[start.month - 1]} {start.year}"


def _year(today: datetime, year: int) -> _Made:
    return _first_of(today, year, 1), _first_of(today, year + 1, 1), str(year)


def _season(today: datetime, year: int, name: str) -> _Made:
    begins = _SEASONS[name]
    name = "autumn" if name == "fall" else name
    return _first_of(today, year, begins), _first_of(today, year, begins + 3), f"the {name} of {year}"


def _monday(day: datetime) -> datetime:
    return day - timedelta(days=day.weekday())


def _weekday_number(word: str) -> int:
    return next(i for i, name in enumerate(_WEEKDAYS) if name.lower().startswith(word.lower()[:3]))


def _month_number(word: str) -> int:
    return next(i for i, name in enumerate(_MONTHS, start=1) if name.lower().startswith(word.lower()[:3]))


def _on_day(today: datetime, year: int, month: int, day: int) -> datetime | None:
    """A day of a year, or None where the calendar has no such day."""
    try:
        return today.replace(year=year, month=month, day=day)
    except ValueError:
        return None


# --- counts, tense ----------------------------------------------------------------------------------------------------


def _count(words: str) -> tuple[int, str]:
    """The number meant, and how to write it: "couple" is 2, "a couple of"; "4" is 4, "four"; "30" is 30, "30"."""
    word = " ".join(words.lower().split())
    if "couple" in word:
        return 2, "a couple of"
    if "few" in word or word == "several":
        return 3, "a few" if "few" in word else "several"
    if word in ("a", "an"):
        return 1, "a"
    if word in ("thirty", "forty", "fifty"):
        return {"thirty": 30, "forty": 40, "fifty": 50}[word], word
    number = int(word) if word.isdigit() else _NUMBERS.index(word)
    return number, _NUMBERS[number] if number <= 12 else str(number)


def _is_vague(words: str) -> bool:
    return "few" in words.lower() or "several" in words.lower()


_TENSE = re.compile(
    r"(?P<future>\b(?:will|won't|going\s+to|gonna|plan(?:s|ning)?|about\s+to|upcoming|coming|can't\s+wait|forward"
    r"|hop(?:e|ing)|wants?|tomorrow|soon|should|let's|needs?|gotta|scheduled|see\s+you|opens?|starts?|begins?"
    r"|is|are|am|can|could|would|free|busy|until|by|next|invited?|remind)\b|\b(?:i|you|we|they|he|she|it)'(?:ll|m|re)\b)"
    r"|(?P<past>\b(?:was|were|did|didn't|wasn't|had|went|got|made|took|saw|came|met|found|gave|told|said|bought|ate"
    r"|ran|won|lost|left|felt|heard|held|began|wrote|drove|flew|spent|thought|taught|caught|built|sent|sold|became"
    r"|brought|chose|fell|grew|knew|read|slept|spoke|stood|swam|threw|wore|broke|hurt|visited|since|[a-z]{2,}ed)\b)",
    re.IGNORECASE | re.ASCII,
)
_NOT_PAST = frozenset(("need", "indeed", "speed", "feed", "seed", "bed", "red", "excited", "interested", "scheduled"))
_SENTENCE_END = re.compile(r"[.!?\n]+(?:\s|$)")


def _tense(match: re.Match[str], said: _Said) -> str:
    """ "past", "future" or "": what the verb nearest to the match, in the same sentence, says."""
    begin = 0
    finish = len(said.text)
    window = max(0, match.start() - 300)
    for end in _SENTENCE_END.finditer(said.text, window, match.start()):
        begin = end.end()
    begin = max(begin, window)
    if after := _SENTENCE_END.search(said.text, match.end(), match.end() + 300):
        finish = after.start()
    finish = min(finish, match.end() + 300)
    best, distance = "", 10_000
    for verb in _TENSE.finditer(said.text, begin, finish):
        if verb.start() < match.end() and verb.end() > match.start():
            continue
        if verb["past"] and verb["past"].lower() in _NOT_PAST:
            continue
        # a verb before the time word governs it more often than one behind it
        gap = match.start() - verb.end() if verb.end() <= match.start() else 2 * (verb.start() - match.end()) + 10
        if gap < distance:
            best, distance = ("past" if verb["past"] else "future"), gap
    return best


def _nearest_year(match: re.Match[str], said: _Said, month: int, day: int | None) -> datetime | None:
    """The occurrence of a month (or of a day of the year) that is meant where no year is named."""
    tense = _tense(match, said)
    found = []
    for year in range(said.today.year - 8, said.today.year + 9):
        if 1 <= year <= 9998 and (start := _on_day(said.today, year, month, day or 1)):
            found.append(start)
    this_month = said.today.replace(day=1)
    present = said.today if day else this_month
    if tense == "past" or (said.question and tense != "future"):
        return max((start for start in found if start <= present), default=None)
    if tense == "future":
        return min((start for start in found if start >= present), default=None)
    return min(found, key=lambda start: abs(start - present), default=None)


# --- the rules --------------------------------------------------------------------------------------------------------


def _relative_day(match: re.Match[str], said: _Said) -> _Made:
    words = " ".join(match[0].lower().split())
    if "before yesterday" in words:
        shift = -2
    elif "after tomorrow" in words:
        shift = 2
    else:
        shift = -1 if words.startswith(("yesterday", "last night")) else 1 if words.startswith("tomorrow") else 0
    return _one_day(said.today + timedelta(days=shift))


def _shifted(said: _Said, unit: str, count: int, sign: int, *, about: bool, vague: bool, words: str) -> _Made | None:
    """`count` units before (sign -1) or after (+1) the moment of speaking."""
    today, around, side = said.today, "around " if about else "", "before" if sign < 0 else "after"
    plural = "" if words == "a" or count == 1 else "s"
    unit = {"night": "day"}.get(unit, unit)
    if unit == "fortnight":
        unit, count, words, plural = "week", 2 * count, _NUMBERS[2] if count == 1 else str(2 * count), "s"
    if unit == "decade":
        unit, count = "year", 10 * count
    if unit == "hour":
        return _one_day((said.at + sign * timedelta(hours=count)).replace(hour=0, minute=0, second=0, microsecond=0))
    if vague:  # "a few" is two to six of them
        far, near = (6, 2) if sign < 0 else (2, 7)
        first, last = _unit_away(today, unit, sign * far), _unit_away(today, unit, sign * near)
        anchor = str(today.year) if unit == "year" else say_day(today)
        return first, last + _ONE_DAY, f"{words} {unit}s {side} {anchor}"
    middle = _unit_away(today, unit, sign * count)
    if unit == "day":
        start, end, phrase = _one_day(middle)
        return start, end, around + phrase
    if unit == "week":
        slack = timedelta(days=3)
        return middle - slack, middle + slack + _ONE_DAY, f"{around}{words} week{plural} {side} {say_day(today)}"
    if unit == "weekend":
        saturday = _monday(today) + timedelta(days=5 + 7 * sign * count)
        return saturday, saturday + 2 * _ONE_DAY, f"{around}{words} weekend{plural} {side} {say_day(today)}"
    if unit == "month" or count == 1:
        start, end, phrase = _month(today, middle.year, middle.month)
        return start, end, around + phrase
    start, end, phrase = _year(today, middle.year)
    return start, end, around + phrase


def _unit_away(today: datetime, unit: str, count: int) -> datetime:
    """A day `count` units away; in a shorter month, its last day."""
    if unit in ("day", "week", "weekend"):
        return today + timedelta(days=count * (1 if unit == "day" else 7))
    first = _first_of(today, today.year, today.month + count * (12 if unit == "year" else 1))
    last = _first_of(today, first.year, first.month + 1) - _ONE_DAY
    return first.replace(day=min(today.day, last.day))


def _ago(match: re.Match[str], said: _Said) -> _Made | None:
    count, words = _count(match["count"])
    return _shifted(
        said,
        match["unit"].lower(),
        count,
        -1,
        about=bool(match["about"]),
        vague=_is_vague(match["count"]),
        words=words,
    )


def _from_now(match: re.Match[str], said: _Said) -> _Made | None:
    count, words = _count(match["count"])
    if said.question and _tense(match, said) == "past":
        return None  # "how far did she run in two weeks?"
    if _tense(match, said) == "past" and "from" not in match[0].lower():
        return None  # "finished it in two days" is a duration
    return _shifted(
        said,
        match["unit"].lower(),
        count,
        +1,
        about=bool(match["about"]),
        vague=_is_vague(match["count"]),
        words=words,
    )


def _half_year_ago(match: re.Match[str], said: _Said) -> _Made | None:
    return _shifted(said, "month", 6, -1, about=False, vague=False, words="six")


def _lasting(match: re.Match[str], said: _Said) -> _Made | None:
    """ "for seven years now" is since 2016, up to the moment of speaking."""
    count, words = _count(match["count"])
    unit = match["unit"].lower()
    tomorrow = said.today + _ONE_DAY
    if unit in ("hour", "night", "weekend", "fortnight", "decade") or count == 0:
        return None
    if _is_vague(match["count"]):
        start = _unit_away(said.today, unit, -2 * count)
        return start, tomorrow, f"the {words.removeprefix('a ')} {unit}s before {say_day(said.today)}"
    start = _unit_away(said.today, unit, -count)
    if unit == "year":
        return _first_of(said.today, start.year, 1), tomorrow, f"since {start.year}"
    if unit == "month":
        return start.replace(day=1), tomorrow, f"since {_month(said.today, start.year, start.month)[2]}"
    plural = "" if count == 1 else "s"
    amount = "" if count == 1 else f"{words} "
    return start, tomorrow, f"the {amount}{unit}{plural} before {say_day(said.today)}"


def _coming(match: re.Match[str], said: _Said) -> _Made | None:
    """In the next two weeks: from the moment of speaking on."""
    count, words = _count(match["count"])
    unit = match["unit"].lower()
    if unit in ("hour", "night", "weekend", "fortnight", "decade"):
        return None
    end = _unit_away(said.today, unit, 2 * count if _is_vague(match["count"]) else count)
    plural = "" if count == 1 else "s"
    return said.today, end + _ONE_DAY, f"the {words.removeprefix('a ')} {unit}{plural} after {say_day(said.today)}"


def _for_years(match: re.Match[str], said: _Said) -> _Made | None:
    if _tense(match, said) == "future":
        return None
    return _lasting(match, said)


def _side(word: str) -> int:
    """-1 for last and past, 1 for next and coming, 0 for this."""
    word = word.lower().split()[-1]
    return -1 if word in ("last", "past") else 1 if word in ("next", "coming") else 0


def _named_unit(match: re.Match[str], said: _Said) -> _Made | None:
    """Last, this or next week, weekend, month, year."""
    side, unit, today = _side(match["side"]), match["unit"].lower(), said.today
    name = ("before", "of", "after")[side + 1]
    if unit == "week":
        start = _monday(today) + timedelta(days=7 * side)
        return start, start + 7 * _ONE_DAY, f"the week {name} {say_day(today)}"
    if unit == "weekend":
        saturday = _monday(today) + timedelta(days=5 + 7 * side)
        if side == 0:
            return saturday, saturday + 2 * _ONE_DAY, f"the weekend of {say_day(saturday)}"
        if side == 1 and today.weekday() < 5 and "coming" in match["side"].lower():
            saturday -= 7 * _ONE_DAY
        return saturday, saturday + 2 * _ONE_DAY, f"the weekend {name} {say_day(today)}"
    if unit == "month":
        return _month(today, today.year, today.month + side)
    return _year(today, today.year + side)


def _before_last(match: re.Match[str], said: _Said) -> _Made | None:
    """The week, weekend, month, year or weekday before last."""
    unit, today = match["unit"].lower(), said.today
    if unit == "week":
        start = _monday(today) - 14 * _ONE_DAY
        return start, start + 7 * _ONE_DAY, f"two weeks before {say_day(today)}"
    if unit == "weekend":
        saturday = _monday(today) - 9 * _ONE_DAY
        return saturday, saturday + 2 * _ONE_DAY, f"two weekends before {say_day(today)}"
    return _month(today, today.year, today.month - 2) if unit == "month" else _year(today, today.year - 2)


def _over_the_weekend(match: re.Match[str], said: _Said) -> _Made | None:
    today = said.today
    if _tense(match, said) == "future" and not said.question:
        saturday = _monday(today) + 5 * _ONE_DAY
        return saturday, saturday + 2 * _ONE_DAY, f"the weekend of {say_day(saturday)}"
    saturday = _monday(today) - 2 * _ONE_DAY
    return saturday, saturday + 2 * _ONE_DAY, f"the weekend before {say_day(today)}"


def _side_weekday(match: re.Match[str], said: _Said) -> _Made | None:
    """Last, this or next Friday."""
    side, number, today = _side(match["side"]), _weekday_number(match["weekday"]), said.today
    back = (today.weekday() - number - 1) % 7 + 1
    ahead = (number - today.weekday() - 1) % 7 + 1
    if side == 0:
        monday = _monday(today)
        day = monday + timedelta(days=number)
        if day < today and _tense(match, said) != "past":
            day += 7 * _ONE_DAY
        return _one_day(day)
    day = today - timedelta(days=back) if side < 0 else today + timedelta(days=ahead)
    return day, day + _ONE_DAY, f"the {_WEEKDAYS[number]} {'before' if side < 0 else 'after'} {say_day(today)}"


_HABIT = re.compile(
    r"\b(?:every|each|any|most|some|black|good|ash|cyber|first|second|third|last|next|other)\s+$", re.IGNORECASE
)


# "I moved it to Thursday": the verb is past, the day is not.
_MOVED_TO = re.compile(
    r"\b(?:moved|postponed|rescheduled|pushed|shifted|delayed|put\s+off|brought\s+forward|changed)\b[^.!?]*\b(?:to|until|till)\s+$",
    re.IGNORECASE,
)


def _bare_weekday(match: re.Match[str], said: _Said) -> _Made | None:
    """Friday, on Friday: past or coming by the tense."""
    word, today = match["weekday"], said.today
    if _HABIT.search(said.text, max(0, match.start() - 12), match.start()):
        return None
    on = match[0].lower().startswith(("on ", "this "))
    if not on and word[0].islower() and len(word) < 6:
        return None
    if len(word) <= 4 and not (on and word[0].isupper()):
        return None  # "sun" and "sat" are words of their own
    tense = _tense(match, said) or ("past" if said.question else "future" if on else "")
    if _MOVED_TO.search(said.text, max(0, match.start() - 80), match.start()):
        tense = "future"
    if not tense:
        return None
    number = _weekday_number(word)
    if tense == "past":
        return _one_day(today - timedelta(days=(today.weekday() - number - 1) % 7 + 1))
    return _one_day(today + timedelta(days=(number - today.weekday() - 1) % 7 + 1))


def _side_month(match: re.Match[str], said: _Said) -> _Made | None:
    """Last, this or next May."""
    side, month, today = _side(match["side"]), _month_number(match["month"]), said.today
    if side < 0:
        return _month(today, today.year - (month >= today.month), month)
    if side > 0:
        return _month(today, today.year + (month <= today.month), month)
    return _month(today, today.year, month)


def _side_season(match: re.Match[str], said: _Said) -> _Made | None:
    """Last, this or next summer; "in the summer" by tense."""
    name, today = match["season"].lower(), said.today
    found = [_season(today, year, name) for year in range(max(1, today.year - 2), min(9997, today.year + 2) + 1)]
    side = match["side"]
    past = [made for made in found if made[1] <= today]
    ahead = [made for made in found if made[0] > today]
    now = [made for made in found if made[0] <= today < made[1]]
    if side and _side(side) < 0:
        return past[-1] if past else None
    if side and _side(side) > 0:
        return ahead[0] if ahead else None
    if now:
        return now[0]
    tense = _tense(match, said) or ("past" if said.question else "future")
    if side:  # "this summer" lies in this year, whatever the tense
        return _season(today, today.year, name)
    return (past[-1] if past else None) if tense == "past" else (ahead[0] if ahead else None)


def _season_of_year(match: re.Match[str], said: _Said) -> _Made | None:
    return _season(said.today, int(match["year"]), match["season"].lower())


def _part_of(made: _Made, part: str | None) -> _Made:
    """Early, middle or late third of a month or year."""
    if not part:
        return made
    start, end, phrase = made
    third = (end - start) // 3
    word = part.lower().split()
    if "early" in word or "beginning" in word or "start" in word:
        return start, _midnight(start + third), f"early {phrase}"
    if "late" in word or "end" in word:
        return _midnight(end - third), end, f"late {phrase}"
    return _midnight(start + third), _midnight(end - third), f"the middle of {phrase}"


def _midnight(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _month_of_year(match: re.Match[str], said: _Said) -> _Made | None:
    return _part_of(_month(said.today, int(match["year"]), _month_number(match["month"])), match["part"])


def _in_month(match: re.Match[str], said: _Said) -> _Made | None:
    """In May, since March, by June: the year is the nearest that the tense allows."""
    month = _month_number(match["month"])
    start = _nearest_year(match, said, month, None)
    return _part_of(_month(said.today, start.year, month), match["part"]) if start else None


def _since(match: re.Match[str], said: _Said) -> _Made | None:
    """Since 2016, since May 2016, since May: up to the moment of speaking."""
    today, year = said.today, match["year"]
    if not match["month"] and not year:
        return None
    if match["month"]:
        month = _month_number(match["month"])
        made = _month(today, int(year) if year else today.year - (month > today.month), month)
    else:
        made = _year(today, int(year))
    return (made[0], today + _ONE_DAY, f"since {made[2]}") if made[0] <= today else None


def _in_year(match: re.Match[str], said: _Said) -> _Made | None:
    return _part_of(_year(said.today, int(match["year"])), match["part"])


def _in_year_alone(match: re.Match[str], said: _Said) -> _Made | None:
    return _year(said.today, int(match["year"]))


def _decade(match: re.Match[str], said: _Said) -> _Made | None:
    year = int(match["decade"])
    return _first_of(said.today, year, 1), _first_of(said.today, year + 10, 1), f"the {year}s"


def _day_of_month(match: re.Match[str], said: _Said) -> _Made | None:
    """5 May, May 5th, with or without a year."""
    month, day, year = _month_number(match["month"]), int(match["day"]), match["year"]
    if not year and match["month"] == "may" and match[0].startswith("may") and not match[0][-1].isalpha():
        return None  # "it may 5 times out of 10 ..."
    start = (
        _on_day(said.today, int(year), month, day) if year else _nearest_year(match, said, month, day) if day else None
    )
    return _one_day(start) if start else None


def _days_of_month(match: re.Match[str], said: _Said) -> _Made | None:
    """5-8 May 2023, May 5 to 8."""
    month, first, last, year = _month_number(match["month"]), int(match["day"]), int(match["until"]), match["year"]
    if not 0 < first < last:
        return None
    start = _on_day(said.today, int(year), month, first) if year else _nearest_year(match, said, month, first)
    end = _on_day(said.today, start.year, month, last) if start else None
    return (start, end + _ONE_DAY, f"{first} to {say_day(end)}") if start and end else None


def _on_the_day(match: re.Match[str], said: _Said) -> _Made | None:
    """On the 5th."""
    day, today = int(match["day"]), said.today
    past = _tense(match, said) == "past" or said.question
    for shift in range(4):
        first = _first_of(today, today.year, today.month + (-shift if past else shift))
        start = _on_day(today, first.year, first.month, day) if day else None
        if start and (start <= today if past else start >= today):
            return _one_day(start)
    return None


def _numbers(match: re.Match[str], said: _Said) -> _Made | None:
    """05/08/2023 and its relatives."""
    first, second, year = int(match["first"]), int(match["second"]), int(match["year"])
    if year < 100:
        year += 2000 if year < 70 else 1900
    month_first = match["sign"] == "/"
    if first > 12 or second > 12:
        month_first = second > 12
    month, day = (first, second) if month_first else (second, first)
    start = _on_day(said.today, year, month, day) if 1 <= month <= 12 else None
    return _one_day(start) if start else None


def _iso(match: re.Match[str], said: _Said) -> _Made | None:
    month = int(match["month"])
    start = _on_day(said.today, int(match["year"]), month, int(match["day"])) if 1 <= month <= 12 else None
    return _one_day(start) if start else None


def _holiday(match: re.Match[str], said: _Said) -> _Made | None:
    month, day = _HOLIDAYS[" ".join(match["holiday"].lower().replace("’", "'").split())]
    today = said.today
    side = match["side"]
    if match["year"]:
        return _one_day(today.replace(year=int(match["year"]), month=month, day=day))
    if side and _side(side):
        this_year = today.replace(month=month, day=day)
        before = today.year - (this_year >= today)
        year = before if _side(side) < 0 else before + 1 + (this_year == today)
        return _one_day(today.replace(year=year, month=month, day=day))
    start = _nearest_year(match, said, month, day)
    return _one_day(start) if start else None


def _nth_of_month(match: re.Match[str], said: _Said) -> _Made | None:
    """The first weekend of August 2023, the last week of May."""
    month, year, nth = _month_number(match["month"]), match["year"], _ORDINALS[match["nth"].lower()]
    start = _first_of(said.today, int(year), month) if year else _nearest_year(match, said, month, None)
    if start is None:
        return None
    end, unit = _first_of(said.today, start.year, month + 1), match["unit"].lower()
    phrase = f"the {match['nth'].lower()} {unit} of {_MONTHS[month - 1]} {start.year}"
    if unit == "week":
        first = start + timedelta(days=7 * (nth - 1)) if nth > 0 else end - 7 * _ONE_DAY
        return first, min(first + 7 * _ONE_DAY, end), phrase
    if unit == "day":
        first = start + timedelta(days=nth - 1) if nth > 0 else end - _ONE_DAY
        return first, first + _ONE_DAY, say_day(first)
    number = 5 if unit == "weekend" else _weekday_number(unit)
    days = [day for day in (start + timedelta(days=i) for i in range((end - start).days)) if day.weekday() == number]
    if nth > len(days):
        return None
    first = days[nth - 1 if nth > 0 else -1]
    if unit == "weekend":
        return first, first + 2 * _ONE_DAY, phrase
    return first, first + _ONE_DAY, say_day(first)


def _beside_date(match: re.Match[str], said: _Said) -> _Made | None:
    """The week before 9 June 2023, the weekend of 5 May, the Friday after May 5th, two days before 5 May 2023."""
    inner = _whole_date(match["date"], said, match)
    if inner is None:
        return None
    day, unit, side = inner[0], match["unit"].lower(), match["side"].lower()
    there = _Said(at=day, today=day, text=match["date"], question=said.question)
    sign = {"before": -1, "prior to": -1, "of": 0, "after": 1, "following": 1}[" ".join(side.split())]
    unit = unit.removesuffix("s") if unit not in ("tues", "thurs") else unit
    if match["count"]:
        if sign == 0 or unit in ("hour",):
            return None
        count, words = _count(match["count"])
        if unit in ("day", "week", "fortnight", "weekend", "month", "year", "decade", "night"):
            return _shifted(there, unit, count, sign, about=False, vague=_is_vague(match["count"]), words=words)
        return None
    if unit in ("day", "night"):
        return _one_day(day + sign * _ONE_DAY)
    if unit in ("month", "year"):
        return _month(day, day.year, day.month + sign) if unit == "month" else _year(day, day.year + sign)
    if unit == "week":
        start = _monday(day) + timedelta(days=7 * sign)
        return start, start + 7 * _ONE_DAY, f"the week {('before', 'of', 'after')[sign + 1]} {inner[2]}"
    if unit == "weekend":
        saturday = _monday(day) + timedelta(days=5 + 7 * sign)
        return saturday, saturday + 2 * _ONE_DAY, f"the weekend {('before', 'of', 'after')[sign + 1]} {inner[2]}"
    number = _weekday_number(unit)
    if sign == 0:
        return None
    away = (day.weekday() - number - 1) % 7 + 1 if sign < 0 else (number - day.weekday() - 1) % 7 + 1
    chosen = day + sign * timedelta(days=away)
    return chosen, chosen + _ONE_DAY, f"the {_WEEKDAYS[number]} {'before' if sign < 0 else 'after'} {inner[2]}"


def _whole_date(words: str, said: _Said, match: re.Match[str]) -> _Made | None:
    """A date inside another pattern; its tense is that of the whole sentence."""
    inside = _Said(at=said.at, today=said.today, text=words, question=said.question or _tense(match, said) == "past")
    for rule in _DATES:
        if (found := rule.pattern.fullmatch(words)) and (made := rule.make(found, inside)):
            return made
    return None


def _between_months(match: re.Match[str], said: _Said) -> _Made | None:
    """Between May and July 2023; in which year, the tense says where none is named."""
    first, last = _month_number(match["month"]), _month_number(match["until"])
    if match["year"]:
        year = int(match["year"]) - (first > last)
    elif start := _nearest_year(match, said, first, None):
        year = start.year
    else:
        return None
    start, _, since = _month(said.today, year, first)
    _, end, until = _month(said.today, year + (first > last), last)
    return start, end, f"{since} to {until}"


# --- the table --------------------------------------------------------------------------------------------------------


def _rule(pattern: str, make: _Handler, *needs: str) -> _Rule:
    whole = re.compile(rf"(?<![\w/.-])(?:{pattern})(?!\w)", re.IGNORECASE | re.ASCII)
    return _Rule(pattern=whole, make=make, needs=needs)


_MONTH_NEEDS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAY_NEEDS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SEASON_NEEDS = ("spring", "summer", "fall", "autumn", "winter")
_SIDE_NEEDS = ("last", "next", "this", "past", "coming")
_SIDE = r"(?P<side>last|next|this\s+past|this\s+last|this\s+coming|this|past|coming)"
_TO = r"\s*(?:-|–|to|until|through)\s*(?P<until>[0-3]?\d)(?:st|nd|rd|th)?(?!\d)"
_HOLIDAY = (
    rf"(?P<holiday>{'|'.join(name.replace(' ', '[ ]').replace(chr(39), '[’' + chr(39) + ']') for name in _HOLIDAYS)})"
)
# a month that a day or a year follows belongs to another rule
_NOT_DATED = r"(?!,?\s*(?:of\s+|the\s+)?\d)"
_OTHER_MONTH = _MONTH.replace("?P<month>", "?P<until>")
_PLAIN_MONTH = _MONTH.replace("?P<month>", "?:")
_DATE_WORDS = (
    r"(?P<date>\d{4}-\d\d-\d\d|\d{1,2}/\d{1,2}/\d{2,4}"
    rf"|(?:the\s+)?[0-3]?\d(?:st|nd|rd|th)?\s+(?:of\s+)?{_PLAIN_MONTH}(?:,?\s*(?:19|20)\d\d)?"
    rf"|{_PLAIN_MONTH}\s+[0-3]?\d(?:st|nd|rd|th)?(?!\d)(?:,?\s*(?:19|20)\d\d)?)"
)

_DATES = (
    _rule(r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)", _iso, "-"),
    _rule(
        r"(?P<first>\d{1,2})(?P<sign>[/.-])(?P<second>\d{1,2})(?P=sign)(?P<year>\d{4}|\d\d)", _numbers, "/", ".", "-"
    ),
    _rule(rf"(?:the\s+)?{_DAY}\s*(?:of\s+)?{_MONTH}(?:,?\s*{_YEAR})?", _day_of_month, *_MONTH_NEEDS),
    _rule(rf"{_MONTH}\s*(?:the\s+)?{_DAY}(?:,?\s*{_YEAR})?", _day_of_month, *_MONTH_NEEDS),
    _rule(rf"{_MONTH}\s+{_DAY}{_TO}(?:,?\s*{_YEAR})?", _days_of_month, *_MONTH_NEEDS),
    _rule(rf"{_DAY}{_TO}\s+(?:of\s+)?{_MONTH}(?:,?\s*{_YEAR})?", _days_of_month, *_MONTH_NEEDS),
    _rule(rf"{_PART}{_MONTH},?\s*(?:of\s+)?{_YEAR}", _month_of_year, *_MONTH_NEEDS),
)
_RULES = (
    *_DATES,
    _rule(
        rf"(?:the\s+)?day\s+(?:before\s+yesterday|after\s+tomorrow)|yesterday{_DAYTIME}|tomorrow{_DAYTIME}|tonight"
        r"|(?:earlier\s+|later\s+)?today|this\s+(?:morning|afternoon|evening)|last\s+night",
        _relative_day,
        *("yesterday", "tomorrow", "today", "tonight", "this", "last"),
    ),
    _rule(rf"{_ABOUT}{_COUNT}\s+{_UNIT}\s+(?:ago|back|earlier)", _ago, "ago", "back", "earlier"),
    _rule(r"half\s+a\s+year\s+ago", _half_year_ago, "half"),
    _rule(rf"in\s+{_ABOUT}{_COUNT}\s+{_UNIT}(?:'s?\s+time)?(?!\s+(?:ago|or|of))", _from_now, "in "),
    _rule(rf"{_ABOUT}{_COUNT}\s+{_UNIT}\s+from\s+(?:now|today)", _from_now, "from"),
    _rule(
        rf"(?:(?:for|over|in|during|within|the|these)\s+)*(?:past|last)\s+{_COUNT}\s+{_UNIT}", _lasting, "past", "last"
    ),
    _rule(rf"(?:for\s+)?{_ABOUT}{_COUNT}\s+{_UNIT}\s+(?:now|already)", _lasting, "now", "already"),
    _rule(
        rf"(?:(?:in|over|within|during|for)\s+)?the\s+(?:next|coming)\s+{_COUNT}\s+{_UNIT}", _coming, "next", "coming"
    ),
    _rule(rf"for\s+{_ABOUT}{_COUNT}\s+(?P<unit>year)s?(?!\s+(?:old|ago|now))", _for_years, "year"),
    _rule(
        rf"(?:(?:earlier|later)\s+)?{_SIDE}\s+(?P<unit>week|weekend|month|year)(?!\s+(?:of|in|before|after)\b)",
        _named_unit,
        *_SIDE_NEEDS,
    ),
    _rule(r"the\s+(?P<unit>week|weekend|month|year)\s+before\s+last", _before_last, "before last"),
    _rule(r"(?:over|during|on|at)\s+the\s+weekend(?!\s+(?:of|before|after)\b)", _over_the_weekend, "weekend"),
    _rule(rf"(?:on\s+)?{_SIDE}\s+{_ANY_WEEKDAY}{_DAYTIME}", _side_weekday, *_SIDE_NEEDS),
    _rule(rf"(?:on\s+)?{_ANY_WEEKDAY}{_DAYTIME}", _bare_weekday, *_DAY_NEEDS),
    _rule(rf"{_SIDE}\s+{_MONTH}{_NOT_DATED}", _side_month, *_SIDE_NEEDS),
    _rule(rf"(?:(?:in|during|over|since)\s+)?(?:the\s+)?{_SIDE}\s+{_SEASON}(?!\s+break)", _side_season, *_SIDE_NEEDS),
    _rule(
        rf"(?:in|during|over)\s+(?:the\s+)?(?P<side>this\s+)?{_SEASON}(?!\s+(?:break|of)\b)",
        _side_season,
        *_SEASON_NEEDS,
    ),
    _rule(rf"(?:the\s+)?{_SEASON}\s+(?:of\s+|in\s+)?{_YEAR}", _season_of_year, *_SEASON_NEEDS),
    _rule(
        rf"(?:in|during|until|till|by|from|of|around|before|after|through)\s+{_PART}{_MONTH}{_NOT_DATED}",
        _in_month,
        *_MONTH_NEEDS,
    ),
    _rule(rf"(?=early|mid|late|the|begin|start|end){_PART}{_MONTH}{_NOT_DATED}", _in_month, *_MONTH_NEEDS),
    _rule(
        rf"(?:between|from)\s+{_MONTH}\s+(?:and|to|until|through)\s+{_OTHER_MONTH}(?:,?\s*{_YEAR})?",
        _between_months,
        *_MONTH_NEEDS,
    ),
    _rule(rf"since\s+(?:{_MONTH}(?!\s+[0-3]?\d(?!\d))\s*,?\s*)?(?:{_YEAR})?", _since, "since"),
    _rule(rf"(?:in|during|until|till|by|back\s+in|the\s+year)\s+(?:the\s+year\s+)?{_PART}{_YEAR}", _in_year, *"12"),
    _rule(rf"(?=early|mid|late|the|begin|start|end){_PART}{_YEAR}", _in_year, "early", "mid", "late", "of"),
    _rule(
        r"(?:in|during|since|from)\s+the\s+(?:early\s+|mid\s+|late\s+)?(?P<decade>(?:1[6-9]|20)\d0)'?s",
        _decade,
        "0s",
        "0's",
    ),
    _rule(rf"on\s+the\s+{_DAY}(?<=[a-z])", _on_the_day, "on the"),
    _rule(rf"(?:{_SIDE}\s+)?{_HOLIDAY}(?:,?\s*{_YEAR})?", _holiday, "christmas", "new year", "halloween", "valentine"),
    _rule(
        rf"(?:the\s+)?(?P<nth>first|second|third|fourth|last)\s+(?P<unit>day|week|weekend|{'|'.join(_WEEKDAYS)})\s+(?:of|in)\s+{_MONTH}"
        rf"(?:,?\s*{_YEAR})?",
        _nth_of_month,
        *_MONTH_NEEDS,
    ),
    _rule(
        rf"(?:the\s+)?(?:{_COUNT}\s+)?(?P<unit>(?:day|night|week|weekend|fortnight|month|year|{'|'.join(_WEEKDAYS)})s?)\s+"
        rf"(?P<side>before|prior\s+to|of|after|following)\s+{_DATE_WORDS}",
        _beside_date,
        *("before", "prior", "of", "after", "following"),
    ),
)
_ONLY_IN_QUESTIONS = (_rule(rf"{_YEAR}", _in_year_alone, *"12"),)

_OPENINGS = re.compile(r"\b(?P<word>before|until|till|after|since|between|from)\s+(?:the\s+)?$", re.IGNORECASE)
_JOINED = re.compile(r"\s*(?:and|to|until|till|through|-|–)\s+(?:the\s+)?", re.IGNORECASE)


def _spans(text: str, at: datetime, rules: Sequence[_Rule], *, question: bool) -> list[TimeSpan]:
    """Every rule over the whole text; where two matches overlap, the longer one stands."""
    said = _Said(at=at, today=_midnight(at), text=text, question=question)
    lowered = text.lower()
    found: list[tuple[int, int, TimeSpan]] = []
    for order, rule in enumerate(rules):
        if not any(word in lowered for word in rule.needs):
            continue
        for match in rule.pattern.finditer(text):
            try:
                made = rule.make(match, said)
            except (OverflowError, ValueError):
                continue  # a day outside of the calendar's years has no span
            if made and made[0] < made[1] and made[0].year > 1 and made[1].year < 9999:
                start, end, phrase = made
                words = match[0].rstrip()
                span = TimeSpan(
                    text=words,
                    start=start,
                    end=end,
                    phrase=phrase,
                    begin=match.start(),
                    finish=match.start() + len(words),
                )
                found.append((-len(words), order, span))
    kept: list[TimeSpan] = []
    for _, _, span in sorted(found, key=lambda entry: (entry[0], entry[1], entry[2].begin)):
        if all(span.finish <= other.begin or span.begin >= other.finish for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span.begin)


def resolve(text: str, at: datetime) -> list[TimeSpan]:
    """The times that a text speaks of, in the order of its words, given the moment at which it was said.

    Args:
        text: what was said; any length, any script.
        at: when; `start` and `end` of each span are midnights in its time zone.

    >>> [span.phrase for span in resolve("I ran a race last Saturday.", datetime(2023, 5, 25))]
    ['the Saturday before 25 May 2023']
    """
    return _spans(text, at, _RULES, question=False)


def annotate(text: str, spans: Sequence[TimeSpan]) -> str:
    """The text with each span's phrase in parentheses behind its words, where the phrase adds something.

    >>> text = "I went there yesterday, for the first time in 2023."
    >>> annotate(text, resolve(text, datetime(2023, 5, 8)))
    'I went there yesterday (7 May 2023), for the first time in 2023.'
    """
    pieces, done = [], 0
    for span in spans:
        note = f" ({span.phrase})"
        pieces.append(text[done : span.finish])
        done = span.finish
        if not _adds_nothing(span) and not text.startswith(note, span.finish):
            pieces.append(note)
    return "".join([*pieces, text[done:]])


_PIECES = re.compile(r"\d+|[a-z]+", re.IGNORECASE | re.ASCII)


def _adds_nothing(span: TimeSpan) -> bool:
    said = {piece.lstrip("0").lower() for piece in _PIECES.findall(span.text)}
    return all(piece.lower() in said for piece in _PIECES.findall(span.phrase))


def spans_of_question(question: str, at: datetime) -> list[TimeSpan]:
    """The times that a question asks about, for filtering and boosting.

    Differs from `resolve`: what names no year lies in the past unless the question speaks of the future; a year alone
    counts; "before", "after" and "since" open the span, "between X and Y" and "from X to Y" join two.
    An open span begins in the year 1000 or, to the other side, ends a year after `at` or after its own beginning.
    """
    spans = _spans(question, at, (*_RULES, *_ONLY_IN_QUESTIONS), question=True)
    found: list[TimeSpan] = []
    for span in spans:
        before = found[-1] if found else None
        if before and span.end > before.start and _JOINED.fullmatch(question, before.finish, span.begin):
            opening = _OPENINGS.search(question, 0, before.begin)
            if opening and opening["word"].lower() in ("between", "from"):
                found[-1] = TimeSpan(
                    text=question[before.begin : span.finish],
                    start=before.start,
                    end=span.end,
                    phrase=f"{before.phrase} to {span.phrase}",
                    begin=before.begin,
                    finish=span.finish,
                )
                continue
        found.append(span)
    return [_opened(span, question, at) for span in found]


def _opened(span: TimeSpan, question: str, at: datetime) -> TimeSpan:
    opening = _OPENINGS.search(question, 0, span.begin)
    first = opening["word"].lower() if opening else span.text.split()[0].lower()
    begin = opening.start() if opening else span.begin
    far = at.replace(
        month=1, day=1, year=min(9998, max(at, span.end).year + 1), hour=0, minute=0, second=0, microsecond=0
    )
    if first in ("before", "until", "till"):
        start, end, word = _midnight(span.start).replace(year=1000, month=1, day=1), span.start, first
    elif first == "after":
        start, end, word = span.end, far, "after"
    elif first == "since" and not span.phrase.startswith("since"):
        start, end, word = span.start, far, "since"
    else:
        return span
    if start >= end:
        return span
    phrase = f"{word} {span.phrase}"
    return TimeSpan(
        text=question[begin : span.finish], start=start, end=end, phrase=phrase, begin=begin, finish=span.finish
    )


# --- reading the time of a note ---------------------------------------------------------------------------------------

_CLOCK = (
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,6})\d*)?)?)?"
    r"\s*(?P<half>[ap]\.?\s?m\.?)?"
)
_ZONE = r"(?:\s*(?P<zone>z|utc|gmt|(?:utc|gmt)?[+-]\d\d?:?(?:\d\d)?))?"
_CLOCK_FIRST = re.compile(rf"{_CLOCK}{_ZONE}\s*(?:\bon\b|,|-)?\s*(?P<date>.+)", re.IGNORECASE | re.ASCII)
_DATE_FIRST = re.compile(rf"(?P<date>.+?)(?:\s*,?\s+(?:at\s+)?|\s*,\s*|t){_CLOCK}{_ZONE}", re.IGNORECASE | re.ASCII)
_DAY_NAME = re.compile(
    rf"(?:on\s+)?(?:{_ANY_WEEKDAY.replace('?P<weekday>', '?:')})\b[.,]?\s+", re.IGNORECASE | re.ASCII
)
_EXACTLY_AGO = re.compile(rf"{_COUNT}\s+(?P<unit>hour|day|week|month|year)s?\s+ago", re.IGNORECASE | re.ASCII)
_BARE = (
    (re.compile(r"(?P<year>\d{4})[-/](?P<month>\d\d?)[-/](?P<day>\d\d?)"), ("year", "month", "day")),
    (re.compile(r"(?P<year>\d{4})-(?P<month>\d\d)"), ("year", "month")),
    (re.compile(r"(?P<year>\d{4})"), ("year",)),
)


def says_zone(value: datetime | str | None) -> bool:
    """Whether `value` names its time zone. Where it does not, `parse_at` takes the local one; callers record that."""
    if value is None:
        return True
    if isinstance(value, datetime):
        return value.tzinfo is not None
    words = _plain(value)
    try:
        return datetime.fromisoformat(words).tzinfo is not None
    except ValueError:
        parts = _moment(words)
        return bool(parts and parts[2])


def parse_at(value: datetime | str | None, *, now: datetime | None = None) -> datetime:
    """When a note was said, as an aware datetime.

    Args:
        value: a datetime (a naive one is taken as local), None for now, or words: ISO 8601, "1:56 pm on 8 May, 2023",
            "8 May 2023", "2023-05-08 14:00", "May 2023" (its first day), "yesterday", "last Friday". A date without a
            clock is midnight, one without a zone is in the zone of `now`, which is the local one unless given.
        now: the present, for "yesterday" and for None; a naive one is taken as local.

    Raises:
        BadDate: the words hold no date, or one that the calendar does not have.
    """
    return parse_span(value, now=now)[0]


def parse_span(
    value: datetime | str | None, *, now: datetime | None = None, other_languages: bool = True
) -> tuple[datetime, datetime]:
    """Like `parse_at`, with the end of what the words cover: a day, a month, a year, or nothing after a clock time.

    For `between=("May 2023", "June 2023")`: from the start of the first to the end of the second. Without
    `other_languages`, spellings that only `dateparser` knows are refused, which is faster where most lines are none.
    """
    now = datetime.now().astimezone() if now is None else now.astimezone() if now.tzinfo is None else now
    if value is None:
        return now, now
    if isinstance(value, datetime):
        moment = value.astimezone() if value.tzinfo is None else value
        return moment, moment
    words = _plain(value)
    try:
        if found := _read(words, now, other_languages=other_languages):
            return found
    except (ValueError, OverflowError):
        pass  # such as 31 June; the error below says so
    raise BadDate(
        f"no date can be read from {value[:80]!r}. Spellings that work: 2023-05-08, 2023-05-08 14:00, 8 May 2023, "
        "1:56 pm on 8 May 2023, yesterday."
    )


def _plain(value: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", value).split())


def _zoned(moment: datetime, now: datetime) -> datetime:
    """A wall-clock time in the zone of `now`; where that is the system's own, its summer time is followed."""
    local = datetime.now().astimezone()
    if isinstance(now.tzinfo, timezone) and now.utcoffset() == local.utcoffset() and now.tzname() == local.tzname():
        return moment.astimezone()
    return moment.replace(tzinfo=now.tzinfo)


def _moment(words: str) -> tuple[str, tuple[int, int, int, int] | None, str] | None:
    """A date's words, the clock beside them, and the zone's words; None where a clock cannot be one."""
    for pattern in (_DATE_FIRST, _CLOCK_FIRST):
        match = pattern.fullmatch(words)
        if match and (match["minute"] or match["half"]):
            hour, half = int(match["hour"]), (match["half"] or "").lower()[:1]
            if half and not 1 <= hour <= 12:
                continue
            hour = hour % 12 + (12 if half == "p" else 0) if half else hour
            micro = int((match["fraction"] or "0").ljust(6, "0"))
            return (
                match["date"],
                (hour, int(match["minute"] or 0), int(match["second"] or 0), micro),
                match["zone"] or "",
            )
    return None


def _read(words: str, now: datetime, *, other_languages: bool) -> tuple[datetime, datetime] | None:
    if not words:
        return None
    try:
        moment = datetime.fromisoformat(words)
    except ValueError:
        pass
    else:
        start = moment if moment.tzinfo else _zoned(moment, now)
        return start, start + _ONE_DAY if len(words) <= 10 and moment.tzinfo is None else start
    parts = _moment(words)
    if parts:
        date, clock, zone = parts
        span = _read_date(date.strip(" ,"), now)
        if span is None or clock is None:
            return _read_elsewhere(words, now) if other_languages else None
        hour, minute, second, micro = clock
        start = span[0].replace(hour=hour, minute=minute, second=second, microsecond=micro, tzinfo=None)
        moment = start.replace(tzinfo=_offset(zone)) if zone else _zoned(start, now)
        return moment, moment
    return _read_date(words, now) or (_read_elsewhere(words, now) if other_languages else None)


def _offset(zone: str) -> timezone:
    digits = re.sub(r"[^\d+-]", "", zone)
    if not digits:
        return UTC
    sign, number = (-1 if digits[0] == "-" else 1), digits[1:]
    hours, minutes = (int(number[:-2]), int(number[-2:])) if len(number) > 2 else (int(number), 0)
    return timezone(sign * timedelta(hours=hours, minutes=minutes))


def _read_date(words: str, now: datetime) -> tuple[datetime, datetime] | None:
    """A day, month or year in words, as midnights in the zone of `now`."""
    for pattern, names in _BARE:
        if match := pattern.fullmatch(words):
            numbers = {name: int(match[name]) for name in names}
            start = datetime(numbers["year"], numbers.get("month", 1), numbers.get("day", 1))
            if "day" in numbers:
                end = start + _ONE_DAY
            else:
                end = (
                    _first_of(start, start.year, start.month + 1)
                    if "month" in numbers
                    else start.replace(year=start.year + 1)
                )
            return _zoned(start, now), _zoned(end, now)
    if words.lower() in ("now", "right now"):
        return now, now
    if (ago := _EXACTLY_AGO.fullmatch(words)) and not _is_vague(ago["count"]):
        count, unit = _count(ago["count"])[0], ago["unit"].lower()
        moment = now - timedelta(hours=count) if unit == "hour" else _unit_away(_midnight(now), unit, -count)
        return moment, moment if unit == "hour" else moment + _ONE_DAY
    unnamed = words if words.lower().split()[0] in ("last", "next", "this") else _DAY_NAME.sub("", words, count=1)
    for reading in (unnamed, f"on {words}", f"in {words}"):
        for span in resolve(reading, now):
            if len(span.text) == len(reading.rstrip(".")) or span.text == words:
                start, end = span.start.replace(tzinfo=None), span.end.replace(tzinfo=None)
                return _zoned(start, now), _zoned(end, now)
    return None


# a letter outside of English month, weekday and clock words; without one, `dateparser` searches in vain, for seconds
_FOREIGN = re.compile(
    r"(?!(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun)[a-z]*\b|(?:am|pm|st|nd|rd|th|at|on|of"
    r"|the|z|t|utc|gmt)\b)(?<![^\W\d_])[^\W\d_]",
    re.IGNORECASE,
)


def _read_elsewhere(words: str, now: datetime) -> tuple[datetime, datetime] | None:
    """Other spellings and other languages, by `dateparser`; day, month and year must all be there."""
    if not any(character.isdigit() for character in words) or len(words) > 60 or not _FOREIGN.search(words):
        return None
    import dateparser  # takes half a second

    moment = dateparser.parse(
        words,
        settings={"STRICT_PARSING": True, "PARSERS": ["absolute-time"], "RELATIVE_BASE": now.replace(tzinfo=None)},
    )
    if moment is None:
        return None
    start = moment if moment.tzinfo else _zoned(moment, now)
    whole_day = (moment.hour, moment.minute, moment.second) == (0, 0, 0) and ":" not in words
    return start, start + _ONE_DAY if whole_day else start
