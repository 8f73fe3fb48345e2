"""The bundled model behind the chat seam: always valid under a schema, fair between options, counted in the ledger."""

from __future__ import annotations

import json
import threading

import jsonschema
import numpy as np
import pytest
import torch

from loci.errors import BadInput, BadOutput, ContextTooLong, Unsupported
from loci.lm import LanguageModel, load
from loci.lm.chat import ChatModel, Message
from loci.lm.draft import TokenTree
from loci.lm.local_chat import LocalChat, grouped, log_softmax, shared_tree

NOTE = {
    "type": "object",
    "properties": {
        "keywords": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 1, "maxItems": 3},
        "mood": {"enum": ["glad", "sad", "naïve 🎈"]},
    },
    "required": ["keywords", "mood"],
}


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return load("default")


@pytest.fixture
def model(language_model: LanguageModel) -> LocalChat:
    return LocalChat(language_model, seed=0)


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def test_the_bundled_model_answers_and_the_ledger_counts_it(model):
    (answer,) = model.complete(user("What is the capital of France?"), max_tokens=16, logprobs=True)
    assert "Paris" in answer.text
    assert answer.usage.tokens_out == len(answer.tokens) == len(answer.logprobs) <= 16
    assert all(value <= 0 for value in answer.logprobs)
    assert model.ledger.total.tokens_in == answer.usage.tokens_in > 5
    assert isinstance(model, ChatModel)


def test_a_stream_joins_to_the_same_answer(model):
    question = user("Name three colours.")
    (answer,) = model.complete(question, max_tokens=12)
    assert "".join(model.stream(question, max_tokens=12)) == answer.text
    assert model.ledger.total.calls == 2


def test_a_closed_stream_leaves_the_model_ready(model):
    question = user("Name three colours.")
    (before,) = model.complete(question, max_tokens=8)
    pieces = model.stream(question, max_tokens=200)
    next(pieces)
    pieces.close()
    assert model.complete(question, max_tokens=8)[0].text == before.text


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_to_a_schema_are_valid_at_every_temperature(model, temperature):
    for answer in model.complete(user("I met Ann."), schema=NOTE, temperature=temperature, n=2, max_tokens=80):
        jsonschema.validate(json.loads(answer.text), NOTE)
        assert answer.data == json.loads(answer.text)


def test_json_that_is_cut_off_is_never_given_out(model):
    with pytest.raises(BadOutput, match="max_tokens=3"):
        model.complete(user("I met Ann."), schema=NOTE, max_tokens=3)
    with pytest.raises(BadOutput, match="stop="):
        model.complete(user("I met Ann."), schema=NOTE, stop=["keywords"])
    assert model.ledger.total.failed == 2


def test_a_seed_makes_sampled_answers_repeatable(language_model):
    texts = [
        [
            answer.text
            for answer in LocalChat(language_model, seed=seed).complete(user("Hi."), n=2, temperature=1.0, max_tokens=8)
        ]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_options_are_weighed_as_the_model_itself_weighs_them(model, language_model):
    messages = user("What is the capital of France?")
    options = ["Paris", "Paris, of course", "London", "the quick brown fox"]
    shares = model.choose(messages, options)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] > shares[2]
    prompt, means = language_model.encode(messages), []
    for option in options:
        answer = language_model.tokenizer.encode(option, add_special_tokens=False)
        with torch.inference_mode():
            logits = language_model.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        means.append(float(logits.log_softmax(dim=-1)[range(len(answer)), answer].mean()))
    expected = np.exp(means) / np.exp(means).sum()
    assert shares == pytest.approx(list(expected), abs=0.03)  # bfloat16 sums in another order


def test_the_engine_and_the_drafter_stay_from_turn_to_turn_and_change_no_answer(language_model):
    drafting, plain = LocalChat(language_model), LocalChat(language_model, drafter="none")
    messages = user("Count from one to twenty in words.")
    first = drafting.complete(messages, max_tokens=24)[0]
    kept = drafting._kept
    assert kept is not None
    assert kept.drafter is not None
    assert kept.drafter.name.startswith("lookup+recycle")
    assert "".join(drafting.stream(messages, max_tokens=24)) == first.text
    assert drafting._kept is kept
    assert plain.complete(messages, max_tokens=24)[0].text == first.text
    assert plain._kept is not None
    assert plain._kept.drafter is None


def test_options_do_not_depend_on_how_they_are_grouped(model, monkeypatch):
    messages, options = user("What is the capital of France?"), ["Paris", "Paris, of course", "London is"]
    shares = model.choose(messages, options)
    for nodes in (4, 1):
        kept = model._new()
        monkeypatch.setattr(
            kept.engine,
            "capabilities",
            kept.engine.capabilities.__class__(max_nodes=nodes, batch=False, hidden=True, hooks=False),
        )
        monkeypatch.setattr(model, "_kept", kept)
        assert model.choose(messages, options) == pytest.approx(shares, abs=0.03)


def test_a_tree_of_options_holds_common_beginnings_once():
    tree, paths = shared_tree(9, [[1, 2, 3], [1, 2], [1, 4, 5], [6]])
    assert isinstance(tree, TokenTree)
    assert tree.tokens.tolist() == [9, 1, 2, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 1]
    assert paths == [[0, 1, 2], [0, 1], [0, 1, 3], [0]]
    assert [len(group) for group in grouped([[1, 2, 3]] * 5, nodes=5)] == [2, 2, 1]
    with pytest.raises(Unsupported, match="9 tokens"):
        list(grouped([[1] * 9], nodes=5))


def test_log_softmax_adds_up_to_one_also_with_forbidden_tokens():
    logits = np.array([1.0, 800.0, -np.inf, 799.0], dtype=np.float32)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1.0)


def test_what_does_not_fit_the_window_or_cannot_be_done_is_refused(model):
    with pytest.raises(ContextTooLong):
        model.complete(user("word " * 9000))
    with pytest.raises(ContextTooLong, match="longest option"):
        model.choose(user("word " * 9000), ["yes", "no"])
    with pytest.raises(Unsupported, match="tools"):
        model.complete(user("Hi."), tools=[{"name": "weather"}])
    with pytest.raises(BadInput, match="no messages"):
        model.complete([])
    with pytest.raises(Unsupported, match="uniqueItems"):
        model.complete(user("Hi."), schema={"type": "array", "uniqueItems": True})


def test_a_small_model_chats_but_does_not_describe(model):
    assert model.can("chat")
    assert not model.can("describe")


def test_threads_share_one_model_and_get_their_own_answers(model):
    questions = [f"What is {number} plus 1?" for number in range(3)]
    expected = [model.complete(user(question), max_tokens=6)[0].text for question in questions]
    found: dict[str, str] = {}

    def ask(question: str) -> None:
        found[question] = model.complete(user(question), max_tokens=6)[0].text

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[question] for question in questions] == expected
    assert model.ledger.total.calls == 6


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_a_hundred_answers_to_nasty_schemas_are_all_valid(language_model, temperature):
    nested = {
        "type": "object",
        "properties": {
            "who": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]},
            "scores": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 12}, "maxItems": 4},
        },
        "required": ["who", "scores"],
    }
    word = {"type": "string", "pattern": "^[A-ZÄÖÜ][a-zäöüß]{1,6}$"}
    for schema in (NOTE, nested, word, {"anyOf": [word, {"type": "null"}]}):
        model = LocalChat(language_model, seed=1)
        for answer in model.complete(
            user("Tell me of Müller's day."), schema=schema, n=8, temperature=temperature, max_tokens=160
        ):
            jsonschema.validate(json.loads(answer.text), schema)
