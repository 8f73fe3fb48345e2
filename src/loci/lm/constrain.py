"""Masks over the next token: only what a constraint allows can be generated.

Source  llguidance (Microsoft, MIT) keeps the state of grammars and expressions and computes their masks. Numbers are
        our own few lines over the letters of a token, because the next number may depend on the one before.
Ours    JSON is written compactly, with one blank after a comma or colon, so that a model cannot stay in white space;
        an object whose schema lists `properties` and says nothing of others is closed, so that it must end.
Cost    a mask of 49,152 tokens takes 0.02 to 0.5 ms; a vocabulary is prepared once per model, in about 2 s.

    JsonSchema(model, schema)        any text that is valid against the schema
    Choice(model, options)           one of the options, letter by letter
    Substring(model, texts)          words that stand in one of the texts, in that order
    NumberRange(model, low, high)    one number between two bounds
    AscendingNumbers(model, below)   "2, 5, 9": whole numbers, each greater than the one before
    Union(constraints)               whatever one of several constraints allows
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool

from loci.errors import BadInput, Unsupported
from loci.lm.imports import require

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from loci.lm.chat import Schema
    from loci.lm.model import LanguageModel

Progress = TypeVar("Progress")  # how far a text has been read; a value that is replaced, never changed


@runtime_checkable
class Constraint(Protocol):
    """What may be said. One constraint serves many generations, also at once; each begins with `start`."""

    def start(self) -> ConstraintState: ...


@runtime_checkable
class ConstraintState(Protocol):
    """How far one generation has come. Belongs to one thread."""

    def allowed(self) -> Bool[np.ndarray, " vocabulary"]:
        """True for every token that may come next, of which there is always one. The end tokens are among them only
        where the text may end."""

    def accept(self, token: int) -> None:
        """Move on by one token. Raises `BadInput` for a token that `allowed` forbids, and changes nothing then."""

    def fork(self) -> ConstraintState:
        """A copy that moves on by itself: the branches of a tree of drafted tokens."""

    @property
    def finished(self) -> bool:
        """True once nothing but the end may follow."""


class JsonSchema:
    """Text that parses as JSON and is valid against a schema, whatever the model prefers.

    Args:
        schema: a JSON schema. An object with `properties` and without `additionalProperties` is taken as closed.

    Raises:
        Unsupported: the schema uses a keyword that cannot be turned into a grammar; the message names it.
    """

    def __init__(self, model: LanguageModel | Vocabulary, schema: Schema) -> None:
        matcher = require("llguidance", purpose="constrained output").LLMatcher
        self.schema = schema
        grammar = matcher.grammar_from_json_schema(
            closed(schema), overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        self._grammar = Grammar(model, grammar, what="JSON schema")

    def start(self) -> ConstraintState:
        return self._grammar.start()


class Choice:
    """One of a few texts, and nothing else."""

    def __init__(self, model: LanguageModel | Vocabulary, options: Sequence[str]) -> None:
        if not options or "" in options:
            raise BadInput(f"a choice needs at least one option and no empty one, found {list(options)!r}.")
        self.options = tuple(options)
        lines = " | ".join(json.dumps(option) for option in dict.fromkeys(options))
        self._grammar = Grammar(model, f"start: {lines}", what="choice")

    def start(self) -> ConstraintState:
        return self._grammar.start()


class Substring:
    """A run of whole words that stands, letter by letter, in one of the texts: a quotation.

    At least one word, and white space only between words, so that the run can be found again with `in`. Texts without a
    word are passed over.
    """

    def __init__(self, model: LanguageModel | Vocabulary, texts: Sequence[str]) -> None:
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadInput("a substring needs at least one text with a word in it, found none.")
        runs = " | ".join(f"RUN{index}" for index in range(len(texts)))
        rules = [f"RUN{index}: %regex {json.dumps({'substring_words': text})}" for index, text in enumerate(texts)]
        ends = r"/\S(?s:.*)/ & /(?s:.*)\S/"
        self._grammar = Grammar(model, "\n".join([f"start: WORDS\nWORDS: ({runs}) & {ends}", *rules]), what="substring")

    def start(self) -> ConstraintState:
        return self._grammar.start()


class NumberRange:
    """One number from `low` to `high`, both included, in plain digits: -7, 0, 12, 3.25.

    Args:
        decimals: digits after the point at most; 0 for whole numbers.
    """

    def __init__(
        self,
        model: LanguageModel | Vocabulary,
        low: int | float | Decimal,
        high: int | float | Decimal,
        *,
        decimals: int = 0,
    ) -> None:
        numbers = Numbers(low=Decimal(str(low)), high=Decimal(str(high)), decimals=decimals)
        if numbers.empty:
            raise BadInput(f"no number with at most {decimals} decimals lies between {low} and {high}.")
        self._written = Written(model, numbers)

    def start(self) -> ConstraintState:
        return self._written.start()


class AscendingNumbers:
    """Whole numbers from 0, each greater than the one before and all smaller than `below`: "2, 5, 9".

    Args:
        at_most: how many numbers there may be; by default as many as there are.
    """

    def __init__(self, model: LanguageModel | Vocabulary, below: int, *, at_most: int | None = None) -> None:
        if below < 1 or (at_most is not None and at_most < 1):
            raise BadInput(f"ascending numbers need below >= 1 and at_most >= 1, found {below} and {at_most}.")
        self._written = Written(model, Ascending(below=below, at_most=at_most or below))

    def start(self) -> ConstraintState:
        return self._written.start()


class Union:
    """Whatever at least one of several constraints over the same vocabulary allows."""

    def __init__(self, constraints: Sequence[Constraint]) -> None:
        if not constraints:
            raise BadInput("a union needs at least one constraint, found none.")
        self.constraints = tuple(constraints)

    def start(self) -> ConstraintState:
        return UnionState([constraint.start() for constraint in self.constraints])


class UnionState:
    """The constraints that have allowed everything so far."""

    def __init__(self, live: list[ConstraintState]) -> None:
        self._live = live

    def allowed(self) -> Bool[np.ndarray, " vocabulary"]:
        mask = self._live[0].allowed().copy()
        for state in self._live[1:]:
            mask |= state.allowed()
        return mask

    def accept(self, token: int) -> None:
        live = []
        for state in self._live:
            with suppress(BadInput):  # that constraint drops out
                state.accept(token)
                live.append(state)
        if not live:
            raise forbidden(token, "each of the union's constraints")
        self._live = live

    def fork(self) -> ConstraintState:
        return UnionState([state.fork() for state in self._live])

    @property
    def finished(self) -> bool:
        return all(state.finished for state in self._live)


class Grammar:
    """A grammar of llguidance over one vocabulary.

    Args:
        grammar: in llguidance's Lark dialect, or what `LLMatcher.grammar_from_...` returned.
        what: names the grammar in errors.
    """

    def __init__(self, model: LanguageModel | Vocabulary, grammar: str, *, what: str = "grammar") -> None:
        matcher = require("llguidance", purpose="constrained output").LLMatcher
        self.vocabulary = Vocabulary.of(model)
        self._first = matcher(self.vocabulary.tokenizer, grammar, log_level=0)
        if self._first.is_error():
            reason = str(self._first.get_error()).split("\n<state>")[0].strip()
            raise Unsupported(f"this {what} cannot be kept to while generating: {reason}")

    def start(self) -> ConstraintState:
        return GrammarState(self.vocabulary, self._first.deep_copy())


class GrammarState:
    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, *, ended: bool = False) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._ended = ended

    def allowed(self) -> Bool[np.ndarray, " vocabulary"]:
        if self.finished:
            return self._vocabulary.only_ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise Unsupported(f"the grammar grew past its limits: {self._matcher.get_error()}")
        return np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        if token in self._vocabulary.ends:
            if not (self.finished or self._matcher.is_accepting()):
                raise forbidden(token, "the grammar", text="the end")
            self._ended = True
        elif self.finished or not self._matcher.try_consume_tokens([token]):
            raise forbidden(token, "the grammar")

    def fork(self) -> ConstraintState:
        return GrammarState(self._vocabulary, self._matcher.deep_copy(), ended=self._ended)

    @property
    def finished(self) -> bool:
        return self._ended or bool(self._matcher.is_stopped())


class Spelling(ABC, Generic[Progress]):
    """A language given letter by letter."""

    letters: str  # every letter that can occur

    @abstractmethod
    def begin(self) -> Progress: ...

    @abstractmethod
    def read(self, progress: Progress, letter: str) -> Progress | None:
        """The progress after one more letter; None where no text of the language begins so."""

    @abstractmethod
    def complete(self, progress: Progress) -> bool:
        """Whether the text may end here."""


@dataclass(frozen=True, kw_only=True)
class Numbers(Spelling[str]):
    """Numbers between two bounds. Progress is what has been written: "", "-", "1", "1.", "1.2"."""

    low: Decimal
    high: Decimal
    decimals: int
    letters = "-.0123456789"

    @property
    def scale(self) -> int:
        return int(10**self.decimals)

    def magnitudes(self, negative: bool) -> tuple[int, int]:
        """The smallest and greatest digits that stand behind this sign, in units of the last decimal."""
        least, most = math.ceil(self.low * self.scale), math.floor(self.high * self.scale)
        return (max(1, -most), -least) if negative else (max(0, least), most)

    @property
    def empty(self) -> bool:
        return all(least > most for least, most in map(self.magnitudes, (False, True)))

    def begin(self) -> str:
        return ""

    def read(self, progress: str, letter: str) -> str | None:
        text = progress + letter
        negative = text.startswith("-")
        whole, point, fraction = text.removeprefix("-").partition(".")
        least, most = self.magnitudes(negative)
        if "-" in text[1:] or "." in fraction or len(fraction) > self.decimals or (point and not self.decimals):
            return None
        if whole == "":
            return text if negative and not point and least <= most else None
        if len(whole) > 1 and whole[0] == "0":
            return None
        if point:
            room = 10 ** (self.decimals - len(fraction))
            start = int(whole + fraction) * room
            return text if start <= most and start + room - 1 >= least else None
        further = 1 if whole == "0" else 10 ** max(0, len(str(most)) - len(whole))
        while further >= 1:  # as many more digits as the greatest number has, down to none
            start = int(whole) * further * self.scale
            if start <= most and start + further * self.scale - 1 >= least:
                return text
            further //= 10
        return None

    def complete(self, progress: str) -> bool:
        if not progress or progress[-1] in "-.":
            return False
        return self.low <= Decimal(progress) <= self.high


@dataclass(frozen=True, kw_only=True)
class Ascending(Spelling[tuple[int, int, str]]):
    """Ascending numbers. Progress is the last number (-1 before the first), how many came, and the letters since."""

    below: int
    at_most: int
    letters = ", 0123456789"

    def begin(self) -> tuple[int, int, str]:
        return (-1, 0, "")

    def read(self, progress: tuple[int, int, str], letter: str) -> tuple[int, int, str] | None:
        last, count, text = progress
        if letter == ",":
            number = int(text) if text.isdigit() else -1
            more = last < number < self.below - 1 and count + 1 < self.at_most
            return (number, count + 1, ",") if more else None
        if letter == " ":
            return (last, count, "") if text == "," else None
        if text == ",":
            return None
        numbers = Numbers(low=Decimal(last + 1), high=Decimal(self.below - 1), decimals=0)
        longer = numbers.read(text, letter)
        return None if longer is None else (last, count, longer)

    def complete(self, progress: tuple[int, int, str]) -> bool:
        last, _, text = progress
        return text.isdigit() and last < int(text) < self.below


class Written(Generic[Progress]):
    """A spelling over one vocabulary: a token is allowed when all its letters are."""

    def __init__(self, model: LanguageModel | Vocabulary, spelling: Spelling[Progress]) -> None:
        self.vocabulary = Vocabulary.of(model)
        self.spelling = spelling
        self.tokens = self.vocabulary.spelled_with(spelling.letters)

    def start(self) -> ConstraintState:
        return WrittenState(self, self.spelling.begin())

    def read(self, progress: Progress, letters: str) -> Progress | None:
        reached: Progress | None = progress
        for letter in letters:
            if reached is None:
                return None
            reached = self.spelling.read(reached, letter)
        return reached


class WrittenState(Generic[Progress]):
    def __init__(self, written: Written[Progress], progress: Progress, *, ended: bool = False) -> None:
        self._written = written
        self._progress = progress
        self._ended = ended

    def allowed(self) -> Bool[np.ndarray, " vocabulary"]:
        may_end = self._ended or self._written.spelling.complete(self._progress)
        vocabulary = self._written.vocabulary
        mask = vocabulary.only_ends() if may_end else np.zeros(vocabulary.size, dtype=np.bool_)
        if not self._ended:
            for token, letters in self._written.tokens.items():
                mask[token] = self._written.read(self._progress, letters) is not None
        return mask

    def accept(self, token: int) -> None:
        if token in self._written.vocabulary.ends:
            if not (self._ended or self._written.spelling.complete(self._progress)):
                raise forbidden(token, "the spelling", text="the end")
            self._ended = True
            return
        letters = self._written.tokens.get(token)
        reached = None if letters is None or self._ended else self._written.read(self._progress, letters)
        if reached is None:
            raise forbidden(token, "the spelling", text=letters)
        self._progress = reached

    def fork(self) -> ConstraintState:
        return WrittenState(self._written, self._progress, ended=self._ended)

    @property
    def finished(self) -> bool:
        if self._ended:
            return True
        going = (self._written.read(self._progress, letters) for letters in self._written.tokens.values())
        return all(reached is None for reached in going)


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """The tokens of one model as constraints see them: their number, which of them end a text, and their letters."""

    size: int
    ends: frozenset[int]
    tokenizer: LLTokenizer

    @classmethod
    def of(cls, model: LanguageModel | Vocabulary) -> Vocabulary:
        """The vocabulary of a loaded model; prepared at the first call, in about 2 s, and kept as long as the model."""
        if isinstance(model, Vocabulary):
            return model
        found = PREPARED.get(model)
        if found is None:
            found = PREPARED[model] = cls._prepare(model)
        return found

    @classmethod
    def _prepare(cls, model: LanguageModel) -> Vocabulary:
        bridge = require("llguidance.hf", purpose="constrained output")
        ends = model.end_tokens
        if not ends:
            raise Unsupported(f"{model.name} names no end token, so nothing says where constrained text ends.")
        try:
            tokenizer = bridge.from_tokenizer(model.tokenizer, n_vocab=model.vocabulary, eos_token=sorted(ends))
        except ValueError as error:
            raise Unsupported(f"{model.name} has a tokenizer that constraints cannot read: {error}") from error
        return cls(size=model.vocabulary, ends=ends, tokenizer=tokenizer)

    def only_ends(self) -> Bool[np.ndarray, " vocabulary"]:
        mask = np.zeros(self.size, dtype=np.bool_)
        mask[sorted(self.ends)] = True
        return mask

    def spelled_with(self, letters: str) -> Mapping[int, str]:
        """The tokens that consist of these letters (ASCII) alone, special ones left out."""
        known = frozenset(letters.encode("ascii"))
        found = {}
        for token in range(self.size):
            text = self.tokenizer.decode_bytes([token])
            if text and known.issuperset(text) and not self.tokenizer.is_special_token(token):
                found[token] = text.decode("ascii")
        return found


PREPARED: WeakKeyDictionary[LanguageModel, Vocabulary] = WeakKeyDictionary()


def closed(schema: Any) -> Any:
    """The schema with every plain object closed: no property that it does not list.

    Objects that are put together (`allOf`, `$ref` and the like) are left as they are: closing one part would forbid the
    properties of the others.
    """
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    together = {"allOf", "anyOf", "oneOf", "$ref", "if", "not"} & schema.keys()
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(copy.get(keyword), Mapping):
            copy[keyword] = {name: closed(part) for name, part in copy[keyword].items()}
    if "items" in copy:
        copy["items"] = closed(copy["items"])
    for keyword in ("prefixItems", *(() if "properties" in schema else ("anyOf", "oneOf"))):
        if isinstance(copy.get(keyword), Sequence):
            copy[keyword] = [closed(part) for part in copy[keyword]]
    if "properties" in schema and not together and "patternProperties" not in schema:
        copy.setdefault("additionalProperties", False)
    return copy


def forbidden(token: int, by: str, *, text: str | None = None) -> BadInput:
    """The error for a token that a constraint does not allow."""
    named = "" if text is None else f" ({text!r})"
    return BadInput(f"token {token}{named} is forbidden here by {by}; take one that `allowed` shows as True.")
