"""Scripted and replayed models keep the contract of a chat model, and say plainly when they have no answer."""

from __future__ import annotations

import json

import pytest

from loci.errors import BadInput, BadModel, BadOutput, EndpointBusy, ModelNotFound
from loci.lm.chat import Completion, Message, ToolCall, Usage
from loci.lm.ledger import Ledger
from loci.lm.scripted import ReplayModel, ScriptedModel

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def user(*texts: str) -> list[Message]:
    return [Message(role="user", content=text) for text in texts]


def test_answers_come_in_order_and_the_questions_are_kept():
    model = ScriptedModel(["one two", "three", '{"age": 7}'])
    assert [answer.text for answer in model.complete(user("first"), n=2)] == ["one two", "three"]
    assert model.complete(user("second"), schema=SCHEMA, purpose="describe")[0].data == {"age": 7}
    assert [asked.messages[0].content for asked in model.asked] == ["first", "second"]
    assert (model.asked[1].schema, model.asked[1].purpose) == (SCHEMA, "describe")
    assert model.ledger.by_purpose()["chat"].tokens_out == 3


def test_a_script_at_its_end_names_the_question():
    model = ScriptedModel(["one"])
    model.complete(user("first"))
    with pytest.raises(BadInput, match=r"has 1 answers.*'and then'"):
        model.complete(user("and then"))
    with pytest.raises(BadInput, match="has 0 choices"):
        model.choose(user("which"), ["a", "b"])


def test_errors_of_the_script_are_raised_and_counted_as_failures():
    model = ScriptedModel([EndpointBusy("later"), "seven"])
    with pytest.raises(EndpointBusy):
        model.complete(user("first"))
    with pytest.raises(BadOutput):
        model.complete(user("age?"), schema=SCHEMA)
    assert model.ledger.total.failed == 2


def test_a_function_answers_by_what_it_is_asked():
    model = ScriptedModel(
        lambda messages: messages[-1].content.upper(), choices=lambda messages, options: [1.0, 0.0], tasks=["chat"]
    )
    assert model.complete(user("hello"))[0].text == "HELLO"
    assert model.choose(user("which"), ["a", "b"]) == [1.0, 0.0]
    assert model.can("chat")
    assert not model.can("describe")


def test_a_stream_joins_to_the_answer():
    text = "  Two words,\nand\n\n more "
    model = ScriptedModel([text, ""])
    pieces = list(model.stream(user("go")))
    assert len(pieces) == 5
    assert "".join(pieces) == text
    assert list(model.stream(user("go"))) == []


def recorded(path) -> ScriptedModel:
    """Records one call of each kind and returns the model that was asked."""
    full = Completion(
        text="seven\u2028or so 🎈",
        finish_reason="tool_calls",
        usage=Usage(tokens_in=1, tokens_out=2),
        seconds=0.5,
        tokens=(4, 5),
        logprobs=(-0.1, -0.2),
        tool_calls=(ToolCall(id="1", name="count", arguments={"to": 7}),),
    )
    model = ScriptedModel([full, "again", "a stream of words", '{"age": 7}'], choices=[[0.25, 0.75]], tasks=["chat"])
    replay = ReplayModel(path, record=model)
    replay.complete(user("how many?"), temperature=0.5)
    replay.complete(user("how many?"), temperature=0.5)
    list(replay.stream(user("say more")))
    replay.complete(user("age?"), schema=SCHEMA)
    replay.choose(user("which?"), ["a", "b"])
    replay.can("describe")
    return model


def test_a_recording_gives_the_same_answers_without_the_model(tmp_path):
    model = recorded(tmp_path / "calls.jsonl")
    ledger = Ledger()
    replay = ReplayModel(tmp_path / "calls.jsonl", ledger=ledger)
    assert replay.name == model.name
    first = replay.complete(user("how many?"), temperature=0.5, purpose="another")[0]
    assert (first.text, first.tokens, first.logprobs) == ("seven\u2028or so 🎈", (4, 5), (-0.1, -0.2))
    assert first.tool_calls[0].arguments == {"to": 7}
    assert replay.complete(user("how many?"), temperature=0.5)[0].text == "again"
    assert list(replay.stream(user("say more"))) == ["a ", "stream ", "of ", "words"]
    assert replay.complete(user("age?"), schema=SCHEMA)[0].data == {"age": 7}
    assert replay.choose(user("which?"), ["a", "b"]) == [0.25, 0.75]
    assert [replay.can("describe"), replay.can("describe")] == [False, False]
    assert ledger.total.calls == 5
    with pytest.raises(BadInput, match="2 times"):
        replay.complete(user("how many?"), temperature=0.5)


def test_recording_asks_only_for_what_the_file_lacks(tmp_path):
    recorded(tmp_path / "calls.jsonl")
    model = ScriptedModel(["new"])
    replay = ReplayModel(tmp_path / "calls.jsonl", record=model)
    assert replay.complete(user("age?"), schema=SCHEMA)[0].data == {"age": 7}
    assert replay.complete(user("a new one"))[0].text == "new"
    assert len(model.asked) == 1
    assert len((tmp_path / "calls.jsonl").read_text(encoding="utf-8").split("\n")) == 8


def test_a_call_that_was_not_recorded_names_what_differs(tmp_path):
    path = tmp_path / "calls.jsonl"
    model = ScriptedModel(lambda messages: "yes")
    replay = ReplayModel(path, record=model)
    replay.complete(user("You are kind.", "Who was there?"))
    replay.complete(user("You are kind.", "Who was there?", "And when?"))
    replay = ReplayModel(path)
    with pytest.raises(BadInput, match=r"line 1, differs in message 2: recorded 'Who was there\?', asked 'Who came\?'"):
        replay.complete(user("You are kind.", "Who came?"))
    with pytest.raises(BadInput, match="message 4: recorded nothing, asked 'Why"):
        replay.complete(user("You are kind.", "Who was there?", "And when?", "Why?"))
    with pytest.raises(BadInput, match="line 1 differs in temperature, max_tokens"):
        replay.complete(user("You are kind.", "Who was there?"), temperature=0.5, max_tokens=9)
    with pytest.raises(BadInput, match="no call of 'choose'"):
        replay.choose(user("which"), ["a", "b"])


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ModelNotFound, match=r"record=model"):
        ReplayModel(tmp_path / "none.jsonl")
    path = tmp_path / "calls.jsonl"
    recorded(path)
    good = path.read_text(encoding="utf-8")
    for bad in ("{", "[]", "7", json.dumps({"version": 99, "model": "m", "request": {}, "answer": []})):
        path.write_text(good + bad + "\n", encoding="utf-8")
        with pytest.raises(BadModel, match="line 7 "):
            ReplayModel(path)
