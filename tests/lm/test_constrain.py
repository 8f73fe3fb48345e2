"""Masks: whatever is drawn under them keeps to the constraint, and nothing that keeps to it is forbidden."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import jsonschema
import numpy as np
import pytest

from loci.errors import BadInput, Unsupported
from loci.lm import load
from loci.lm.constrain import (
    AscendingNumbers,
    Choice,
    Constraint,
    JsonSchema,
    NumberRange,
    Substring,
    Union,
    Vocabulary,
    closed,
)

STRING = {"type": "string", "maxLength": 12}
SCHEMAS = {
    "enum": {"enum": ["N1", "N2", 'a "quoted" one', "naïve 🎈", None, 7, -0.5, True]},
    "nested": {
        "type": "object",
        "properties": {
            "who": {
                "type": "object",
                "properties": {"name": STRING, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
                "required": ["name", "age"],
            },
            "tags": {"type": "array", "items": STRING, "minItems": 1, "maxItems": 3},
        },
        "required": ["who", "tags"],
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "ключ": STRING},
        "required": ["ключ"],
    },
    "longer strings": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 5}, "maxItems": 4},
    "pattern": {"type": "string", "pattern": "^[A-ZÄÖÜ][a-zäöüß]{1,8}( [0-9]{1,4})?$"},
    "either": {"anyOf": [STRING, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
    "shared": {
        "type": "object",
        "$defs": {"day": {"type": "string", "enum": ["Mon", "Tue", "Wed"]}},
        "properties": {"from": {"$ref": "#/$defs/day"}, "to": {"$ref": "#/$defs/day"}},
        "required": ["from", "to"],
    },
    "number": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
    "amem": {
        "type": "object",
        "properties": {
            "keywords": {"type": "array", "items": STRING, "minItems": 3, "maxItems": 6},
            "links": {"type": "array", "items": {"enum": ["N1", "N2", "N3", "N4", "N5"]}, "maxItems": 5},
            "context": {"type": "string", "maxLength": 40},
        },
        "required": ["keywords", "links", "context"],
    },
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(load("default"))


def walk(constraint: Constraint, vocabulary: Vocabulary, seed: int, steps: int = 400) -> str:
    """A text drawn evenly from what is allowed: a worse writer than any model. Ends are taken half of the time."""
    chance = random.Random(seed)
    state, tokens = constraint.start(), []
    for _ in range(steps):
        mask = state.allowed()
        assert mask.any()
        ends = sorted(end for end in vocabulary.ends if mask[end])
        if state.finished:
            assert mask.sum() == len(ends)
        if ends and (state.finished or chance.random() < 0.5):
            state.accept(ends[0])
            assert state.finished
            return vocabulary.tokenizer.decode_bytes(tokens).decode("utf-8")
        mask[ends] = False
        tokens.append(int(chance.choice(mask.nonzero()[0])))
        state.accept(tokens[-1])
    pytest.fail(f"no end within {steps} tokens: {vocabulary.tokenizer.decode_str(tokens)!r}")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_walk_through_a_schema_ends_in_json_that_is_valid_against_it(schema, vocabulary):
    constraint = JsonSchema(vocabulary, schema)
    for seed in range(12):
        text = walk(constraint, vocabulary, seed)
        jsonschema.validate(json.loads(text), schema)


def test_a_schema_that_no_grammar_can_keep_is_refused_by_the_keyword_s_name(vocabulary):
    with pytest.raises(Unsupported, match="uniqueItems"):
        JsonSchema(vocabulary, {"type": "array", "items": {"type": "integer"}, "uniqueItems": True})
    with pytest.raises(Unsupported, match="JSON schema"):
        JsonSchema(vocabulary, {"type": "nonsense"})


def test_plain_objects_are_closed_and_objects_put_together_are_left_open():
    plain = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    assert closed(plain)["additionalProperties"] is False
    assert closed(plain)["properties"]["a"]["additionalProperties"] is False
    together = {"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}
    assert closed(together) == together
    assert "additionalProperties" not in plain
    assert closed({"properties": {}, "additionalProperties": True})["additionalProperties"] is True


def test_a_choice_gives_one_of_its_options_and_reaches_all_of_them(vocabulary):
    options = ["yes", "yes, but", "no", 'the "third"\nway', "ünïcode 🎈"]
    seen = {walk(Choice(vocabulary, options), vocabulary, seed) for seed in range(60)}
    assert seen == set(options)


def test_a_substring_stands_word_for_word_in_one_of_the_texts(vocabulary):
    texts = ["We met in Paris, in May 2023. It's 5°C there!", "  ", 'Tanz\' mal – die "Ode"\n\tan 日本 🎈']
    constraint = Substring(vocabulary, texts)
    for seed in range(40):
        found = walk(constraint, vocabulary, seed)
        assert any(found in text for text in texts)
        assert found == found.strip() != ""
        where = next(text for text in texts if found in text)
        assert any(
            not (where[max(0, at - 1) : at].isalnum() and found[0].isalnum())
            for at in (match.start() for match in re.finditer(re.escape(found), where))
        )


def test_every_run_of_words_may_be_quoted(vocabulary):
    words = ["We", "met", "in", "Paris,", "in", "May", "2023."]
    constraint = Substring(vocabulary, [" ".join(words)])
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            state = constraint.start()
            for token in vocabulary.tokenizer.tokenize_str(" ".join(words[start:end])):
                state.accept(token)
            assert state.allowed()[sorted(vocabulary.ends)].all()


def spelled(constraint: Constraint, vocabulary: Vocabulary, text: str) -> bool:
    """Whether a constraint lets this text through to its end, letter by letter."""
    state = constraint.start()
    try:
        for letter in text:
            state.accept(vocabulary.tokenizer.tokenize_str(letter)[0])
        state.accept(min(vocabulary.ends))
    except BadInput:
        return False
    return True


@pytest.mark.parametrize(("low", "high"), [(0, 7), (-12, 3), (95, 1203), (-5, -2), (7, 7), (0, 0)])
def test_exactly_the_whole_numbers_of_a_range_can_be_written(vocabulary, low, high):
    constraint = NumberRange(vocabulary, low, high)
    for number in range(min(low - 30, -30), high + 130, 1 if high < 100 else 7):
        assert spelled(constraint, vocabulary, str(number)) == (low <= number <= high)
    for text in ("", "-", "-0", "00", "07", "1.0", "+1", " 1", "1-"):
        assert not spelled(constraint, vocabulary, text)


@pytest.mark.parametrize(
    ("low", "high", "decimals"), [(0.25, 1.5, 2), (-0.5, 0.5, 1), (3, 20, 3), ("-1.05", "-1.01", 2)]
)
def test_decimals_stay_within_their_range_and_both_bounds_are_reached(vocabulary, low, high, decimals):
    constraint = NumberRange(vocabulary, float(low), float(high), decimals=decimals)
    for seed in range(30):
        text = walk(constraint, vocabulary, seed)
        assert float(low) <= float(text) <= float(high)
        assert len(text.partition(".")[2]) <= decimals
    assert spelled(constraint, vocabulary, str(low))
    assert spelled(constraint, vocabulary, str(high))


def test_ascending_numbers_ascend_stay_below_and_all_such_lists_can_be_written(vocabulary):
    constraint = AscendingNumbers(vocabulary, 13)
    for seed in range(30):
        numbers = [int(number) for number in walk(constraint, vocabulary, seed).split(", ")]
        assert numbers == sorted(set(numbers))
        assert max(numbers) < 13
    assert spelled(constraint, vocabulary, "0, 3, 9, 10, 12")
    for text in ("", "3,4", "3, 3", "4, 3", "13", "3, ", "12, 13", "03"):
        assert not spelled(constraint, vocabulary, text)
    assert not spelled(AscendingNumbers(vocabulary, 13, at_most=2), vocabulary, "1, 2, 3")


def test_a_union_allows_what_any_of_its_parts_allows_and_drops_the_parts_that_cannot_go_on(vocabulary):
    constraint = Union([Choice(vocabulary, ["none", "7 or so"]), NumberRange(vocabulary, 1, 90)])
    for text in ("none", "7 or so", "7", "71"):
        assert spelled(constraint, vocabulary, text)
    for text in ("7 1", "nope", "91", ""):
        assert not spelled(constraint, vocabulary, text)
    assert {walk(constraint, vocabulary, seed) for seed in range(20)} & {"none", "7 or so"}


def constraints(vocabulary: Vocabulary) -> Iterator[Constraint]:
    yield JsonSchema(vocabulary, SCHEMAS["nested"])
    yield Choice(vocabulary, ["left", "right"])
    yield Substring(vocabulary, ["left or right"])
    yield NumberRange(vocabulary, 10, 20)
    yield AscendingNumbers(vocabulary, 20)
    yield Union([NumberRange(vocabulary, 10, 20), Choice(vocabulary, ["left"])])


def test_a_forbidden_token_is_refused_and_changes_nothing(vocabulary):
    for constraint in constraints(vocabulary):
        state = constraint.start()
        before = state.allowed()
        wrong = int((~before).nonzero()[0][-1])
        for token in (wrong, min(vocabulary.ends)):
            with pytest.raises(BadInput, match="forbidden"):
                state.accept(token)
        assert np.array_equal(state.allowed(), before)


def test_a_fork_moves_on_by_itself(vocabulary):
    for constraint in constraints(vocabulary):
        state = constraint.start()
        before = state.allowed()
        fork = state.fork()
        fork.accept(int(before.nonzero()[0][0]))
        assert np.array_equal(state.allowed(), before)
        assert np.array_equal(constraint.start().allowed(), before)
        assert not np.array_equal(fork.allowed(), before)


def test_constraints_of_nothing_are_refused(vocabulary):
    for build in (
        lambda: Choice(vocabulary, []),
        lambda: Choice(vocabulary, ["a", ""]),
        lambda: Substring(vocabulary, ["", " \n"]),
        lambda: NumberRange(vocabulary, 3, 2),
        lambda: NumberRange(vocabulary, 0.2, 0.8),
        lambda: AscendingNumbers(vocabulary, 0),
        lambda: Union([]),
    ):
        with pytest.raises(BadInput):
            build()
