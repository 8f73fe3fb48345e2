"""Conversations that were never held, with questions about them: data to train on and to measure with.

`invent(seed)` writes a chat of two or three people over several weeks. They tell of jobs, pets, trips, health, plans;
they say "last Friday" and mean a date; facts change, and some answers are spread over months. With the chat come
questions: who, what, why and how, lists, counts, dates, what holds now and what held before, opinions that follow from
what was said, and questions without an answer, about the wrong person or about what nobody mentioned.

Everything is drawn from `invented.json`: words by kind, and *threads*, short exchanges with slots ("I bought {bought}
{past}!") and the questions that they answer. The same seed gives the same conversation. Gold answers to "when" are the
phrases of `loci.text.times`, worked out from the words that were said; the text itself is left as it was said.

Slots: `{hobby}`, `{hobby2}` are two words of a kind; `{past}`, `{future}`, `{longago}`, `{month}` are times, and
`{when:past}` in an answer is the date meant; `{A}` tells and `{B}` listens; `{I}`, `{my}`, `{v:know}` stand in the
first person where A speaks, in the second where B does, and in the third in questions and answers; `{0:words}` holds
if the first variant was said. Variants are divided by " | "; an answer takes the first one whose slots were said, and
a question of which no answer was said is one without an answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

from loci.text.times import resolve

QuestionKind = Literal["single", "time", "list", "count", "now", "before", "absent"]
_SLOT = re.compile(r"\{([^{}]+)\}")
_TIMES = ("past", "future", "longago", "month")
# Kinds that may be told of twice by one speaker, because no question asks for them alone.
_REPEATABLE = frozenset(
    "feeling adj friendname company number bignumber money frequency years duration place kin photo color memento "
    "season titleA titleB relative trait past future longago month".split()
)
_COUNTS = ("none", "one", "two", "three", "four", "five", "six")
_FORMS = {  # first person, second, third of a woman, third of a man
    "I": ("I", "you", "she", "he"),
    "me": ("me", "you", "her", "him"),
    "my": ("my", "your", "her", "his"),
    "myself": ("myself", "yourself", "herself", "himself"),
}
_FORMS |= {"he": _FORMS["I"], "him": _FORMS["me"], "his": _FORMS["my"], "himself": _FORMS["myself"]}


@dataclass(frozen=True, kw_only=True)
class Turn:
    id: str
    speaker: str
    at: datetime
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """`answer` is None where the conversation does not hold it; `evidence` are the ids of the turns that do. For a
    question about the wrong person, `evidence` are the turns that make it tempting."""

    text: str
    answer: str | None
    evidence: tuple[str, ...]
    kind: QuestionKind


@dataclass(frozen=True, kw_only=True)
class Conversation:
    seed: int
    speakers: tuple[str, ...]
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


def invent(seed: int, *, sessions: int | None = None) -> Conversation:
    """One conversation. `sessions` is drawn from 3 to 7 where it is not given."""
    return _Writer(random.Random(f"loci conversation {seed}"), seed).write(sessions)


@cache
def _data() -> Mapping[str, Any]:
    data = json.loads((Path(__file__).parent / "invented.json").read_text(encoding="utf-8"))
    return dict(data)


def _kinds(text: str) -> set[str]:
    """Kinds of words that a template has slots for."""
    names = {slot.removeprefix("when:").rstrip("0123456789") for slot in _SLOT.findall(text)}
    return {name for name in names if name in _data()["words"] or name in _TIMES}


@dataclass
class _Speaker:
    name: str
    woman: bool
    told: set[str] = field(default_factory=set)  # kinds of words that are used up

    def form(self, word: str, person: int) -> str:
        return _FORMS[word][person if person < 2 else 2 + (not self.woman)]


@dataclass
class _Said:
    """A thread as it was said: its slots filled, its turns, and which variant of the first turn was taken."""

    slots: dict[str, str]
    turns: list[tuple[str, Turn]]  # template and turn
    variant: int


class _Writer:
    def __init__(self, draw: random.Random, seed: int) -> None:
        self.draw, self.seed, self.data = draw, seed, _data()
        names = {
            name: woman for key, woman in (("she", True), ("he", False)) for name in self.data["names"][key].split()
        }
        chosen = draw.sample(sorted(names), 2 if draw.random() < 0.8 else 3)
        self.people = [_Speaker(name, names[name]) for name in chosen]
        self.turns: list[Turn] = []
        self.questions: list[Question] = []
        self.at = datetime(draw.randint(2019, 2025), draw.randint(1, 12), draw.randint(1, 28), draw.randint(8, 22))
        self.session = 0
        self.place = 0
        self.unused = list(range(len(self.data["threads"])))
        draw.shuffle(self.unused)
        # What is to be said in a session to come, and the list that takes the turn once it was said.
        self.later: dict[int, list[tuple[_Speaker, str, list[Turn]]]] = {}
        self.finishers: list[Callable[[], None]] = []  # ask about facts of several sessions, when all is said

    def write(self, sessions: int | None) -> Conversation:
        count = sessions or self.draw.randint(3, 7)
        if count > 1:
            for plan in (self._collection, self._collection, self._change, self._repeat, self._collection):
                if self.draw.random() < 0.75:
                    plan(count)
        tellings = []
        for self.session in range(1, count + 1):
            self.place = 0
            tellings += self._session()
            self.at += timedelta(days=self.draw.randint(2, 24), hours=self.draw.randint(-6, 6))
        for finish in self.finishers:
            finish()
        for thread, teller, listener, said in tellings:
            for ask in thread["asks"]:
                self._ask(ask, thread, teller, listener, said)
        self._never_said()
        self.draw.shuffle(self.questions)
        return Conversation(
            seed=self.seed,
            speakers=tuple(person.name for person in self.people),
            turns=tuple(self.turns),
            questions=tuple(self.questions),
        )

    # --- what is said -------------------------------------------------------------------------------------------------

    def _session(self) -> list[tuple[Mapping[str, Any], _Speaker, _Speaker, _Said]]:
        tellings = []
        first, second = self.draw.sample(self.people, 2)
        opening = self._pick(self.data["greetings"])
        due = list(self.later.get(self.session, []))
        self.draw.shuffle(due)
        for _ in range(self.draw.randint(1, 3)):
            teller, listener = self.draw.sample([first, second], 2)
            thread = self._thread_for(teller)
            if thread is not None:
                tellings.append((thread, teller, listener, self._tell(thread, teller, listener, opening)))
                opening = ""
            self._chat(first, second)
        for teller, text, heard in due:
            listener = self.draw.choice([person for person in self.people if person is not teller])
            heard.append(self._say(teller, listener, self._dressed(text, opening), {}))
            opening = ""
            self._chat(first, second)
        return tellings

    def _thread_for(self, teller: _Speaker) -> Mapping[str, Any] | None:
        for place, number in enumerate(self.unused):
            thread: Mapping[str, Any] = self.data["threads"][number]
            kinds = _kinds(json.dumps(thread)) - _REPEATABLE
            if not kinds & teller.told:
                teller.told |= kinds
                del self.unused[place]
                return thread
        return None

    def _slots(self, thread: Mapping[str, Any]) -> dict[str, str]:
        filled: dict[str, str] = {}
        for slot in sorted(set(_SLOT.findall(json.dumps(thread)))):
            kind = slot.rstrip("0123456789")
            words = self.data["words"].get(kind) or self.data["times"].get(kind)
            if words and ":" not in slot:
                rest = [word for word in words if word not in filled.values()]
                filled[slot] = self._pick(rest or words)
        return filled

    def _tell(self, thread: Mapping[str, Any], teller: _Speaker, listener: _Speaker, opening: str) -> _Said:
        slots = self._slots(thread)
        said = _Said(slots, [], 0)
        for number, line in enumerate(thread["turns"]):
            who, _, variants = line.partition(": ")
            options = variants.split(" | ")
            choice = self.draw.randrange(len(options))
            said.variant = said.variant if number else choice
            speaker, other = (teller, listener) if who == "A" else (listener, teller)
            text = self._fill(options[choice], slots, teller, listener, person=0 if who == "A" else 1)
            turn = self._say(speaker, other, self._dressed(text, opening), {})
            opening = ""
            said.turns.append((options[choice], turn))
        return said

    def _dressed(self, text: str, opening: str) -> str:
        """The same words as people say them: after a greeting, before an afterthought."""
        text = text[0].upper() + text[1:]
        if not opening and self.draw.random() < 0.25:
            opener = self._pick(self.data["openers"])
            keep = re.match(r"(?:I|My)\b", text) or text.split()[0] in self._proper()
            text = f"{opener} {text if keep else text[0].lower() + text[1:]}"
        if self.draw.random() < 0.3:
            text = f"{text} {self._pick(self.data['closers'])}"
        return f"{opening} {text}".strip()

    def _proper(self) -> set[str]:
        return {
            word.split()[0]
            for kind in ("petname", "friendname", "city", "country", "band")
            for word in self.data["words"][kind]
        }

    def _chat(self, first: _Speaker, second: _Speaker) -> None:
        for _ in range(self.draw.randint(0, 2)):
            speaker, other = self.draw.sample([first, second], 2)
            text = self._pick(self._pick(self.data["chatter"]))
            self._say(speaker, other, text, {"photo": self._pick(self.data["words"]["photo"])})

    def _say(self, speaker: _Speaker, other: _Speaker, text: str, slots: Mapping[str, str]) -> Turn:
        self.place += 1
        text = self._fill(text, slots, speaker, other, person=0)
        text = re.sub(r"(^|[.!?] |\] )([a-z])", lambda match: match[1] + match[2].upper(), text)
        at = self.at + timedelta(minutes=self.place)
        turn = Turn(id=f"{self.session}:{self.place}", speaker=speaker.name, at=at, text=text)
        self.turns.append(turn)
        return turn

    # --- facts of more than one session -------------------------------------------------------------------------------

    def _places(self, sessions: int, count: int) -> list[int]:
        return sorted(self.draw.choices(range(1, sessions + 1), k=count))

    def _collection(self, sessions: int) -> None:
        plan, teller = self._pick(self.data["collections"]), self._pick(self.people)
        kind = plan["kind"]
        if kind in teller.told:
            return
        teller.told.add(kind)
        words = self.draw.sample(self.data["words"][kind], self.draw.randint(2, 4))
        heard: list[list[Turn]] = []
        for word, session in zip(words, self._places(sessions, len(words)), strict=True):
            heard.append([])
            text = self._pick(plan["says"]).replace("{x}", word).replace("{mine}", word)
            text = text.replace("{pet}", self._pick(self.data["words"]["pet"]))
            self.later.setdefault(session, []).append((teller, text, heard[-1]))

        def finish() -> None:
            turns = [turn for one in heard for turn in one]
            order = sorted(range(len(words)), key=lambda number: self.turns.index(heard[number][0]))
            third = [self._fill(words[number], {}, teller, teller, person=2) for number in order]
            third = [re.sub(r"^(a|an|the) (?!\w+ \w+ \w+)", r"\1 ", word) for word in third]
            evidence = tuple(turn.id for turn in sorted(turns, key=self.turns.index))
            for text in self.draw.sample(plan["asks"], 1):
                self._add(self._fill(text, {}, teller, teller, person=2), ", ".join(third), evidence, "list")
            for text in plan.get("count", [])[:1]:
                self._add(self._fill(text, {}, teller, teller, person=2), _COUNTS[len(words)], evidence, "count")
            absent = self._pick([person for person in self.people if person is not teller])
            if kind not in absent.told:
                self._add(self._fill(self._pick(plan["asks"]), {}, absent, absent, person=2), None, evidence, "absent")

        self.finishers.append(finish)

    def _repeat(self, sessions: int) -> None:
        plan, teller = self._pick(self.data["repeats"]), self._pick(self.people)
        count = self.draw.randint(1, min(4, sessions))
        heard: list[Turn] = []
        for session in self.draw.sample(range(1, sessions + 1), count):
            self.later.setdefault(session, []).append((teller, self._pick(plan["says"]), heard))

        def finish() -> None:
            ask = self._fill(self._pick(plan["asks"]), {}, teller, teller, person=2)
            self._add(ask, "once" if count == 1 else _COUNTS[count], tuple(turn.id for turn in heard), "count")

        self.finishers.append(finish)

    def _change(self, sessions: int) -> None:
        plan, teller = self._pick(self.data["changes"]), self._pick(self.people)
        kind = plan["kind"]
        if kind in teller.told:
            return
        teller.told |= {kind, "home"} if kind == "city" else {kind}
        old, new = self.draw.sample(self.data["words"][kind], 2)
        first, then = sorted(self.draw.sample(range(1, sessions + 1), 2))
        early: list[Turn] = []
        late: list[Turn] = []
        self.later.setdefault(first, []).append((teller, self._pick(plan["first"]).replace("{x}", old), early))
        text = self._pick(plan["later"]).replace("{x}", new).replace("{old}", old)
        self.later.setdefault(then, []).append((teller, text, late))

        def finish() -> None:
            evidence = (early[0].id, late[0].id)
            kinds: tuple[tuple[QuestionKind, str], ...] = (("now", new), ("before", old))
            for name, answer in kinds:
                ask = self._fill(self._pick(plan[name]), {}, teller, teller, person=2)
                self._add(ask, self._fill(answer, {}, teller, teller, person=2), evidence, name)

        self.finishers.append(finish)

    # --- questions ----------------------------------------------------------------------------------------------------

    def _ask(
        self, ask: Sequence[str], thread: Mapping[str, Any], teller: _Speaker, listener: _Speaker, said: _Said
    ) -> None:
        question = self._pick(ask[0].split(" | "))
        answer, evidence = self._answer(ask[1], teller, listener, said)
        kind: QuestionKind = "absent" if answer is None else "single"
        if answer and "{when:" in ask[1]:
            kind = "time"
        elif answer and re.search(r"\}, .*\{", ask[1].split(" | ")[0]):
            kind = "list"
        self._add(self._fill(question, said.slots, teller, listener, person=2), answer, evidence, kind)
        if "{A}" not in question or "{B}" in question or answer is None or self.draw.random() < 0.45:
            return
        asked = _kinds(ask[1]) - set(_TIMES) or _kinds(question) or _kinds(json.dumps(thread["turns"]))
        strangers = [person for person in self.people if person is not teller and not asked & person.told]
        strangers = [person for person in strangers if person.name not in answer]
        if strangers:
            wrong = self._pick(strangers)
            self._add(self._fill(question, said.slots, wrong, teller, person=2), None, evidence, "absent")

    def _answer(
        self, answers: str, teller: _Speaker, listener: _Speaker, said: _Said
    ) -> tuple[str | None, tuple[str, ...]]:
        for answer in answers.split(" | "):
            literal = re.fullmatch(r"\{(\d):(.*)\}", answer)
            if literal:
                if int(literal[1]) == said.variant:
                    return literal[2], (said.turns[0][1].id,)
                continue
            slots = dict(said.slots)
            needed = [slot.removeprefix("when:") for slot in _SLOT.findall(answer)]
            needed = [slot for slot in needed if slot in slots]
            holders = [turn for template, turn in said.turns if any(f"{{{slot}}}" in template for slot in needed)]
            templates = " ".join(template for template, _ in said.turns)
            if any(f"{{{slot}}}" not in templates for slot in needed):
                continue
            for slot in needed:
                if f"{{when:{slot}}}" in answer:
                    meant = next((m for turn in holders if (m := _meant(turn, slots[slot]))), None)
                    if meant is None:
                        return None, ()
                    slots[f"when:{slot}"] = meant
            evidence = holders or [turn for _, turn in said.turns if turn.speaker == teller.name]
            text = self._fill(answer, slots, teller, listener, person=2)
            return text, tuple(turn.id for turn in evidence)
        return None, tuple(turn.id for _, turn in said.turns)

    def _never_said(self) -> None:
        for number in self.unused[: self.draw.randint(2, 5)]:
            thread = self.data["threads"][number]
            ask = self._pick(thread["asks"])
            question = self._pick(ask[0].split(" | "))
            person, other = self.draw.sample(self.people, 2)
            kinds = (_kinds(ask[1]) - set(_TIMES)) | _kinds(question)
            if "{A}" in question and kinds and not kinds & (person.told | _REPEATABLE):
                self._add(self._fill(question, self._slots(thread), person, other, person=2), None, (), "absent")

    def _add(self, text: str, answer: str | None, evidence: tuple[str, ...], kind: QuestionKind) -> None:
        if kind == "absent" or answer:
            self.questions.append(
                Question(text=text[0].upper() + text[1:], answer=answer, evidence=evidence, kind=kind)
            )

    # --- words --------------------------------------------------------------------------------------------------------

    def _fill(self, text: str, slots: Mapping[str, str], teller: _Speaker, listener: _Speaker, *, person: int) -> str:
        def word(match: re.Match[str]) -> str:
            slot = match[1]
            if slot == "A":
                return teller.name
            if slot == "B":
                return listener.name
            if slot in _FORMS:
                return teller.form(slot, person)
            if slot.startswith("v:"):
                return slot[2:] + ("s" if person == 2 else "")
            return slots.get(slot, match[0])

        for _ in range(2):  # words may hold slots themselves
            text = _SLOT.sub(word, text)
        return text

    def _pick(self, options: Sequence[Any]) -> Any:
        return options[self.draw.randrange(len(options))]


def _meant(turn: Turn, words: str) -> str | None:
    """The phrase for a time that a turn speaks of in these words; None where it cannot be resolved."""
    place = turn.text.lower().find(words.lower())
    if place < 0:
        return None
    for span in resolve(turn.text, turn.at):
        if span.begin < place + len(words) and place < span.finish:
            return span.phrase
    return None
