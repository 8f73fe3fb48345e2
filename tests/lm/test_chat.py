"""The seam of chat models: what is refused before any model is asked, and answers that must fit a schema."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loci.errors import BadInput, BadOutput, UnknownName
from loci.lm.chat import ChatModel, Message, check_options, check_request, check_task, load_chat, parse_answer
from loci.lm.endpoint import EndpointChat
from loci.lm.scripted import ScriptedModel

HELLO = [Message(role="user", content="Hello?")]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize("text", ['{"age": 7}', ' {"age":7}\n', '```json\n{"age": 7}\n```', '```\n{"age": 7}```'])
def test_json_is_parsed_also_from_within_a_fence(text):
    assert parse_answer(text, SCHEMA) == {"age": 7}


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no JSON"), ('{"age": 7', "no JSON"), ('{"age": "7"}', r"\$\.age"), ("{}", "'age' is a required")],
)
def test_an_answer_that_does_not_fit_is_told_where(text, words):
    with pytest.raises(BadOutput, match=words):
        parse_answer(text, SCHEMA)


def test_a_schema_that_is_none_is_the_caller_s_mistake():
    with pytest.raises(BadInput, match="schema itself"):
        parse_answer("{}", {"type": "nonsense"})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": [""]}, "stop is"),
        ({"stop": list("abcde")}, "at most 4"),
    ],
)
def test_numbers_out_of_range_are_refused_with_their_range(wrong, words):
    with pytest.raises(BadInput, match=words):
        check_request(HELLO, **wrong)


def test_no_messages_no_options_and_unknown_tasks_are_refused():
    with pytest.raises(BadInput, match="no messages"):
        check_request([])
    for options in ([], ["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(BadInput, match="options"):
            check_options(options)
    with pytest.raises(UnknownName, match="'describe'"):
        check_task("describ")


def test_an_address_loads_an_endpoint_and_both_kinds_keep_the_protocol():
    model = load_chat("tiny", base_url="http://127.0.0.1:9/v1")
    assert isinstance(model, EndpointChat)
    assert isinstance(model, ChatModel)
    assert isinstance(ScriptedModel(), ChatModel)


def test_the_seams_import_without_any_heavy_package():
    heavy = ("torch", "transformers", "openai", "llguidance", "jsonschema", "tokenizers")
    modules = ", ".join(f"loci.lm.{name}" for name in ("chat", "embed", "endpoint", "ledger", "scripted", "constrain"))
    code = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
