"""What a note's description is made of when no language model writes it.

A bare turn ("Yes, last Friday!") cannot be found by its own words. A-MEM (arXiv 2502.12110) has a language model write
keywords, tags and a sentence of context for it, and embeds the words together with them (its equation 3). These
functions build the same three from what is at hand, in well under a millisecond, so that a note is complete the moment
it is written and a small model need not pretend:

- keywords: the note's own words and word pairs that are rare in the space, in the form in which they were written;
- entities: names, from capital letters that are not there because a sentence begins;
- tags: the labels of the nearest topic clusters, so that the same topic has the same name in every note;
- context: who spoke to whom, when, in which session, in reply to what, with dates resolved.

Pure functions that know no store; the clusters stand in `topics`. Ours throughout: the paper leaves extraction to the
model. The weights of words come from the caller, because only a store knows which words are rare.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import regex

from loci.text.organizer import TimeSpan
from loci.text.times import say_day
from loci.text.words import Word, count_tokens, fold, normal, scan, terms

MOST_KEYWORDS = 12  # this and the two below: limits of Loci, so that no description outgrows its note
MOST_TAGS = 8
LONGEST_CONTEXT = 300  # characters
LONGEST_LABEL = 60  # characters of one keyword or tag
_CONTENT_FIRST = 180  # tokens; ours: with more, an encoder of 256 tokens would never see a description behind the words

Weight = Callable[[str], float]  # how much a term tells, such as its inverse document frequency; 0 leaves it out

_FILLER_WORDS = """
    able absolutely actually add adding agree ahead alone along already always amazing anything anyway appreciate
    around ask asked asking away awesome awful awhile aww bad based basically became become becoming began begin
    believe best better big bit bring bringing brings brought btw bunch bye call called care caring carry catch caught
    cause change changed chat check choose chose chosen come comes coming congrats congratulations continue cool
    couple day days dear decide decided definitely different done doubt easy eight end enjoy enjoyed especially even
    everything exactly excite excited exciting fantastic far favorite favourite feel feeling feelings feels felt find
    fine first five followed following forget forward found four full fun gave give given gives giving glad gone good
    gosh gotten grab great guess guys haha handle hang happen happened happening happens happy hard hear heard heart
    held hello help helped helps here hey hi high hmm hold hope hopefully hoping hung idea imagine important
    incredible inspiring interesting join joined keep kind kinda knew know known last lately laugh learn learned leave
    left letting little live loads lol long look looked looking looks lose love loved lovely loves low luck lucky made
    make makes making man maybe mean means mention mentioned met mind moment moments move nearly need needed needs
    never new next nice nine nope nothing old ones others part pass past people perfect person pic pick picked pics
    place plan planning please pretty proud put question quick ran reach ready real realize realized recently remember
    remind reminded reminds right said sat say says second see seeing seem seems seen sense set seven share sharing
    show shows similar since sit six something soon sorry sort sorts sound sounds special spend spent spoke stand
    stands start started stay still stop stopped stuff super sure take taken takes taking talk talked talking tell ten
    thank thankful thanks think thinkin thinking thought thoughts three thrilled throughout time times today together
    told took totally tough tried true truly try trying turn turned turns two understand use used usually various
    visited wait wanna want wanted wants way ways went whenever whoa whole wish wonder wonderful wondering wonders woo
    woohoo word words work working works world worry worth wow yay yep yourself yup zero
"""
_FILLER = frozenset(term for word in _FILLER_WORDS.split() for term in terms(word))
_DATE_WORDS = """
    january february march april may june july august september october november december jan feb mar apr jun jul aug
    sep sept oct nov dec monday tuesday wednesday thursday friday saturday sunday mon tue tues wed thu thurs fri
    today tomorrow tonight yesterday morning afternoon evening night week weeks weekend weekends month months year years
    hour hours minute minutes ago
"""
_DATES = frozenset(term for word in _DATE_WORDS.split() for term in terms(word))
_CALENDAR_NAMES = frozenset(word for word in _DATE_WORDS.split() if len(word) > 2)
# words that open sentences and titles, and so carry a capital without being a name
_OPENING_WORDS = f"""
    {_FILLER_WORDS} and but so or yes no ok okay oh ah well dear mr mrs ms dr sir the a an speaking being such even
    still another every last next
"""
_OPENERS = frozenset(fold(word) for word in _OPENING_WORDS.split())


# --- keywords ---------------------------------------------------------------------------------------------------------


def keywords(
    text: str, *, weight: Weight, exclude: Collection[str] = (), limit: int = MOST_KEYWORDS
) -> tuple[str, ...]:
    """The words and word pairs that tell most about a text, best first, as they were written.

    Args:
        weight: the rarity of a term, given in the form of `words.terms`; at or below 0 it is no keyword.
        exclude: words that are none here, such as the names of the speakers.
        limit: at most so many.

    A word counts by weight times saturated frequency (BM25 with k1 = 1.2 and no length norm); a name counts more, an
    adverb less. Two neighbours that both weigh at least the text's median become one entry and replace each other's
    single entries. Date words, numbers, small talk and words of one letter never count.
    """
    barred = {term for word in exclude for term in terms(word)}
    found = scan(text)
    whole = normal(text)
    starts = _sentence_starts(whole)
    weights: dict[str, float] = {}
    counts: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for word in found:
        if not _tells(word, barred) or (exclude and _speaker(word.surface, exclude)):
            continue
        counts[word.term] += 1
        if word.term not in weights:
            weights[word.term] = weight(word.term) * _shape(word, starts)
        if word.term not in shown or word.begin not in starts:
            shown[word.term] = _nice(word, starts)
    scores = {term: weights[term] * 2.2 * count / (count + 1.2) for term, count in counts.items() if weights[term] > 0}
    if not scores:
        return ()
    median = sorted(scores.values())[len(scores) // 2]
    entries: list[tuple[float, tuple[str, ...], str]] = [
        (score, (term,), shown[term]) for term, score in scores.items()
    ]
    seen: set[tuple[str, str]] = set()
    for first, second in itertools.pairwise(found):
        pair = (first.term, second.term)
        if pair in seen or first.term == second.term or first.term not in scores or second.term not in scores:
            continue
        if whole[first.finish : second.begin] not in (" ", "-"):
            continue
        if min(scores[first.term], scores[second.term]) >= median:
            seen.add(pair)
            # a pair says more than its better half, but less than both apart
            score = max(scores[first.term], scores[second.term]) + 0.5 * min(scores[first.term], scores[second.term])
            entries.append((score, pair, f"{_nice(first, starts)} {_nice(second, starts)}"))
    entries.sort(key=lambda entry: -entry[0])
    used: set[str] = set()
    chosen: list[str] = []
    for _, parts, words in entries:
        if len(chosen) == limit:
            break
        if not used.intersection(parts):
            used.update(parts)
            chosen.append(words[:LONGEST_LABEL])
    return tuple(chosen)


def _tells(word: Word, barred: Collection[str]) -> bool:
    term = word.term
    if not term or term in barred or term in _FILLER or term in _DATES or not any(map(str.isalpha, term)):
        return False
    return len(term) > 2 or not term.isascii() or word.surface.isupper()


def telling_words(text: str) -> list[tuple[str, str]]:
    """The words that may name what a text is about, names left out: pairs of term and word as written, in order."""
    whole = normal(text)
    starts = _sentence_starts(whole)
    return [
        (word.term, _nice(word, starts))
        for word in scan(whole)
        if _tells(word, ()) and not _is_name(word, whole, starts)
    ]


def _shape(word: Word, starts: Collection[int]) -> float:
    """Names above, adverbs and verbs below plain words."""
    if word.surface[:1].isupper() and word.begin not in starts:
        return 1.3
    if word.surface.endswith("ly"):
        return 0.5
    return 0.7 if word.surface.endswith(("ed", "ing")) else 1.0


def _is_name(word: Word, whole: str, starts: Collection[int]) -> bool:
    """Whether a word is written like a name, or like someone spoken to ("Caroline, ..."). Acronyms are none."""
    if not word.surface[:1].isupper() or word.surface[1:2].isupper():
        return False
    return word.begin not in starts or whole[word.finish : word.finish + 1] in (",", "!")


def _nice(word: Word, starts: Collection[int]) -> str:
    surface = _POSSESSIVE.sub("", word.surface)
    return surface.lower() if word.begin in starts and not surface[1:].isupper() else surface


# --- entities ---------------------------------------------------------------------------------------------------------

_POSSESSIVE = regex.compile(r"['’]s?$")
_START = regex.compile(r"(?:^|[.!?…:;\n]|\p{Extended_Pictographic}|(?<=\s)[-–—*•])[\s\"'“”‘’(\[*_#>-]*(?=\p{L})")
_CAPITAL = r"\p{Lu}[\p{L}\p{M}\p{N}]*(?:[-'’.&][\p{L}\p{N}]+)*"
_RUN = regex.compile(rf"\b{_CAPITAL}(?:\s(?:(?:of|de|la|van|von|da|di|del|and|the)\s){{0,2}}{_CAPITAL}|\s\d+\b)*")
_QUOTED = regex.compile(r"[\"“]([\p{Lu}\p{N}][^\"”\n]{1,58}[^\"”\n\s])[\"”]")
_FIRST_PERSON = frozenset({"i", "i'm", "i've", "i'd", "i'll", "im", "ive"})


def _sentence_starts(whole: str) -> frozenset[int]:
    return frozenset(match.end() for match in _START.finditer(whole))


def entities(text: str, speakers: Collection[str] = (), *, limit: int = 16) -> tuple[str, ...]:
    """The names in a text, in order, each once: people, places, works, organisations.

    Args:
        speakers: who takes part. One who is named, in full, by first name or by a nickname that begins it ("Mel" for
            Melanie), appears under the full name given here.

    A name is a run of capitalised words ("Bank of America"), a title in quotation marks, or an acronym. A capital that
    opens a sentence proves nothing: such a word counts only in front of another name, as an acronym, or when the text
    also has it inside a sentence. Lower-case names and names in scripts without capitals are not found.
    """
    whole = normal(text)
    shouting = sum(map(str.isupper, whole)) > 0.5 * max(1, sum(map(str.isalpha, whole)))
    starts = _sentence_starts(whole)
    runs: list[tuple[int, list[str]]] = []
    inside: set[str] = set()
    for match in _RUN.finditer(whole):
        parts = _POSSESSIVE.sub("", match[0]).split()
        runs.append((match.start(), parts))
        inside.update(fold(part) for part in parts[1 if match.start() in starts else 0 :])
    found: dict[str, str] = {}
    spans: list[tuple[int, str]] = [(match.start(), match[1].strip(" .,!?")) for match in _QUOTED.finditer(whole)]
    titles = [(match.start(), match.end()) for match in _QUOTED.finditer(whole)]
    for begin, parts in [] if shouting else runs:
        if any(first <= begin < last for first, last in titles):
            continue
        for offset, name in _names(parts, opens=begin in starts, inside=inside):
            spans.append((begin + offset, name))
    for begin, name in sorted(spans):
        canonical = _speaker(name, speakers) or name
        if len(canonical) > 1 and begin >= 0:
            found.setdefault(fold(canonical), canonical)
    whole_names = {fold(speaker): speaker for speaker in speakers}
    for word in scan(whole) if speakers else ():  # a speaker is known wherever the sentence begins, and in lower case
        folded = _POSSESSIVE.sub("", fold(word.surface))
        speaker = whole_names.get(folded)
        if speaker is None and word.term and word.surface[:1].isupper() and folded not in _CALENDAR_NAMES:
            speaker = _speaker(_POSSESSIVE.sub("", word.surface), speakers)
        if speaker:
            found.setdefault(fold(speaker), speaker)
    return tuple(found.values())[:limit]


def _names(parts: list[str], *, opens: bool, inside: Collection[str]) -> list[tuple[int, str]]:
    """The names in one run of capitalised words, with an order key: calendar words, "I" and openers cut it."""
    pieces: list[tuple[int, list[str]]] = []
    current: list[str] = []
    for i, part in enumerate(parts):
        folded = fold(part).replace("’", "'")
        first = opens and i == 0
        proven = folded in inside or (len(part) > 1 and part.isupper() and folded not in _OPENERS)
        cuts = (
            folded in _FIRST_PERSON
            or folded in _CALENDAR_NAMES
            or (part[0].isupper() and not terms(part))
            or (folded in _OPENERS and (len(parts) == 1 or (first and folded != "new")))
            or (first and not proven and (len(parts) == 1 or folded.endswith(("ed", "ing", "ly"))))
        )
        if cuts:
            pieces.append((i, current))
            current = []
        else:
            current.append(part)
    pieces.append((len(parts), current))
    names = []
    for end, words in pieces:
        while words and (words[-1].islower() or (words[-1].isdigit() and len(words) == 1)):
            words = words[:-1]
        while words and words[0].islower():
            words = words[1:]
        if "and" in words:
            cut = words.index("and")
            names += [(end, " ".join(words[:cut])), (end, " ".join(words[cut + 1 :]))]
        elif words:
            names.append((end, " ".join(words)))
    return [(end, name) for end, name in names if name and not name.isdigit()]


def _speaker(name: str, speakers: Collection[str]) -> str | None:
    folded = fold(name)
    for speaker in speakers:
        whole = fold(speaker)
        first = whole.split()[0] if whole.split() else ""
        if folded in (whole, first) or (len(folded) >= 3 and name[:1].isupper() and first.startswith(folded)):
            return speaker
    return None


# --- questions --------------------------------------------------------------------------------------------------------

_ASKS = regex.compile(r"[?？؟][?!？！؟]*[\s\"'”’)\]]*(?:\s|$|\p{Extended_Pictographic})|[？؟]|¿")
_ASKING_WORD = regex.compile(
    r"\s*(?:(?:hey|so|and|but|ok|okay|well|oh)[, ]+)?(?:who|what|when|where|why|how|which|whose|do|does|did|is|are|was"
    r"|were|can|could|would|will|should|have|has|had)(?:n't|'s|'d|'re)?\s[^.!]*",
    regex.IGNORECASE,
)


def is_question(text: str) -> bool:
    """Whether something is asked: a question mark that ends a sentence, or a question's first word and no stop."""
    return bool(_ASKS.search(text)) or (len(text) < 300 and bool(_ASKING_WORD.fullmatch(text.strip())))


# --- descriptions -----------------------------------------------------------------------------------------------------


def _clean(entries: Iterable[str], most: int) -> tuple[str, ...]:
    kept: dict[str, str] = {}
    for entry in entries:
        words = " ".join(entry.split())[:LONGEST_LABEL].strip()
        if words and len(kept) < most:
            kept.setdefault(fold(words), words)
    return tuple(kept.values())


@dataclass(frozen=True, kw_only=True)
class Description:
    """Keywords, tags and context of a note. The limits hold by construction: repeats and what is too much are cut."""

    keywords: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    context: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keywords", _clean(self.keywords, MOST_KEYWORDS))
        object.__setattr__(self, "tags", _clean(self.tags, MOST_TAGS))
        object.__setattr__(self, "context", shorten(" ".join(self.context.split()), LONGEST_CONTEXT))


def shorten(text: str, characters: int) -> str:
    """At most so many characters, cut between words where that costs less than a third, with "…" at the cut."""
    if len(text) <= characters:
        return text
    cut = text[: max(0, characters - 1)]
    space = cut.rfind(" ")
    return (cut[:space] if space > 2 * characters / 3 else cut).rstrip(" ,;:") + "…"


def spoken_text(content: str, source: str | None) -> str:
    """What is indexed as a note's content: its words, and in front of them who said them.

    Questions ask who did what; without its speaker a turn in the first person is found by neither half of that.
    """
    return content if source is None else f'{source}: "{content}"'


def described_text(content: str, description: Description) -> str:
    """A-MEM's equation 3: words, keywords, tags and context as one text, for the second vector and the second index.

    Long words go behind their description, because an encoder reads only the beginning of what it is given.
    """
    about = "\n".join(
        part for part in (", ".join(description.keywords), ", ".join(description.tags), description.context) if part
    )
    if not about:
        return content
    return f"{about}\n{content}" if count_tokens(content) > _CONTENT_FIRST else f"{content}\n{about}"


def compose_context(
    *,
    speaker: str | None,
    listener: str | None,
    said_at: datetime,
    topics: Sequence[str] = (),
    previous_words: Sequence[str] = (),
    spans: Sequence[TimeSpan] = (),
) -> str:
    """One line that says where a note belongs, at most 300 characters.

    >>> compose_context(speaker="Caroline", listener="Melanie", said_at=datetime(2023, 5, 8), topics=["support group"])
    'Caroline to Melanie on 8 May 2023, about support group'
    """
    who = f"{speaker} to {listener}" if speaker and listener else speaker or (f"to {listener}" if listener else "")
    when = say_day(said_at)
    head = f"{who} on {when}" if who else f"On {when}"
    dates = list(dict.fromkeys(span.phrase for span in spans if span.phrase != when))
    tail = f"; {', '.join(dates)}" if dates else ""
    middle = f", about {', '.join(topics)}" if topics else ""
    reply = f"; {_REPLY}{', '.join(previous_words)}" if previous_words else ""
    # dates and people come first when there is not room for all
    head, tail = shorten(head, 120), shorten(tail, 120)
    return shorten(head + shorten(middle + reply, LONGEST_CONTEXT - len(head) - len(tail)) + tail, LONGEST_CONTEXT)


_REPLY = "in reply to: "


def without_reply(context: str) -> str:
    """The context without the words of the note that was replied to."""
    return "; ".join(clause for clause in context.split("; ") if not clause.startswith(_REPLY))
