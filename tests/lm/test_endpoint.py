"""Endpoints, against a real HTTP server on this machine that answers by a script: well, badly, late, or never."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loci.errors import (
    BadInput,
    BadOutput,
    ContextTooLong,
    EndpointBusy,
    EndpointDown,
    EndpointError,
    EndpointRefused,
)
from loci.lm.chat import Message, ToolCall
from loci.lm.endpoint import EndpointChat, EndpointLimits, Pace

KEY = "sk-secret-0123456789"
QUICK = EndpointLimits(connect_seconds=1.0, answer_seconds=0.4, attempts=2)
HELLO = [Message(role="user", content="Hello?")]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


class Server:
    """Answers each request with the next of `replies`; the last one again and again. A reply is a status, a body
    (bytes, or something to write as JSON) and headers, or a function that is given the handler."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any, dict[str, str]] | Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.requests.append(json.loads(body))
                outer.keys.append(self.headers["authorization"])
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if callable(reply):
                    with suppress(BrokenPipeError):  # the client has hung up
                        reply(self)
                    return
                status, content, headers = reply
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def model(server: Server) -> Iterator[EndpointChat]:
    chat = EndpointChat(server.url, "tiny", api_key=KEY, limits=QUICK)
    yield chat
    chat.endpoint.client.close()


def says(*texts: str | None, finish: str = "stop", **message: Any) -> tuple[int, Any, dict[str, str]]:
    choices = [
        {"index": place, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        for place, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 4 * len(texts), "total_tokens": 7 + 4 * len(texts)}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": choices, "usage": usage}
    return 200, body, {}


def refuses(status: int, message: str, *, code: str | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"error": {"message": message, "code": code}}, named


def test_an_answer_comes_with_its_reason_and_cost_and_the_ledger_knows_it(server, model):
    server.replies = [says("Hi there."), says("Hi th", finish="length")]
    (answer,) = model.complete(HELLO, temperature=0.5, top_p=0.9, stop=["\n"], max_tokens=9, purpose="greet")
    assert (answer.text, answer.finish_reason, answer.usage.tokens_in) == ("Hi there.", "stop", 7)
    assert model.complete(HELLO)[0].finish_reason == "length"
    sent = server.requests[0]
    assert (sent["temperature"], sent["top_p"], sent["stop"], sent["max_tokens"]) == (0.5, 0.9, ["\n"], 9)
    assert sent["messages"] == [{"role": "user", "content": "Hello?"}]
    assert server.keys[0] == f"Bearer {KEY}"
    totals = model.ledger.by_purpose()["greet"]
    assert (totals.calls, totals.tokens_in, totals.tokens_out, totals.failed) == (1, 7, 4, 0)


def test_a_server_that_knows_no_n_is_asked_until_there_are_n_answers(server, model):
    server.replies = [says("one"), says("two", "three", "too many")]
    assert [answer.text for answer in model.complete(HELLO, n=3)] == ["one", "two", "three"]
    assert [request.get("n") for request in server.requests] == [3, 2]


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, model):
    server.replies = [refuses(429, "slow down", retry_after="0.3"), says("Now.")]
    begun = time.perf_counter()
    assert model.complete(HELLO)[0].text == "Now."
    assert 0.3 <= time.perf_counter() - begun < 5.0
    assert len(server.requests) == 2


def test_a_server_that_stays_busy_is_named_with_the_wait_it_asks_for(server, model):
    server.replies = [refuses(429, "slow down", retry_after="3600")]
    with pytest.raises(EndpointBusy, match=rf"{server.url} \(model 'tiny'\).*wait 3600 s.*requests_a_minute"):
        model.complete(HELLO)
    assert len(server.requests) <= QUICK.attempts
    assert model.ledger.total.failed == 1


def test_a_failing_server_is_asked_again_and_then_reported(server, model):
    server.replies = [refuses(500, "disk on fire"), says("Fine.")]
    assert model.complete(HELLO)[0].text == "Fine."
    server.replies = [refuses(500, "disk on fire")]
    with pytest.raises(EndpointError, match="500: disk on fire"):
        model.complete(HELLO)


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (refuses(401, f"Incorrect key {KEY}"), EndpointRefused, r"key \(401: Incorrect key \[key\]\).*LOCI_API_KEY"),
        (refuses(403, "no rights"), EndpointRefused, "403"),
        (refuses(404, "no model tiny"), EndpointError, "curl http://127.0.0.1:.*/v1/models"),
        (refuses(400, "this model's maximum context length is 99 tokens"), ContextTooLong, "99 tokens"),
        (refuses(422, "messages are malformed"), EndpointError, "does not accept"),
        ((200, b'{"choices": [', {}), EndpointError, "no JSON"),
        ((200, b"<html>hello</html>", {"content-type": "text/html"}), EndpointError, "usually ends in /v1"),
        ((200, {"choices": []}, {}), EndpointError, "no answer in it"),
        (says(None, refusal="I would rather not."), BadOutput, "rather not"),
        (says("", finish="content_filter"), BadOutput, "content filter"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_bad_reply_is_one_error_that_names_address_and_model_and_never_the_key(
    server, model, reply, error, words
):
    server.replies = [reply]
    with pytest.raises(error, match=words) as caught:
        model.complete(HELLO)
    message = str(caught.value)
    assert server.url in message
    assert "tiny" in message
    assert KEY not in message + repr(model) + repr(model.endpoint)
    assert len(server.requests) == 1


def test_no_credit_is_a_refusal_and_not_a_rate_limit(server, model):
    server.replies = [refuses(429, "you exceeded your quota", code="insufficient_quota", retry_after="0.05")]
    with pytest.raises(EndpointRefused, match="credit"):
        model.complete(HELLO)


def test_a_silent_server_is_given_up_after_its_time(server, model):
    server.replies = [lambda handler: time.sleep(1.5)]
    begun = time.perf_counter()
    with pytest.raises(EndpointDown, match=r"no answer within 0.4 s in 2 attempts.*answer_seconds"):
        model.complete(HELLO)
    assert time.perf_counter() - begun < 10.0


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    model = EndpointChat(url, "tiny", api_key=KEY, limits=QUICK)
    with pytest.raises(EndpointDown, match=r"cannot be reached.*LOCI_BASE_URL") as caught:
        model.complete(HELLO)
    assert url in str(caught.value)
    assert model.ledger.by_purpose()["chat"].failed == 1
    model.endpoint.client.close()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:11434/v1"):
        EndpointChat(url, "tiny")


def test_a_password_in_the_address_is_not_shown():
    shown = repr(EndpointChat("http://user:hush@127.0.0.1:9/v1", "tiny"))
    assert "hush" not in shown
    assert "127.0.0.1:9/v1" in shown


def test_without_a_key_none_from_the_environment_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [says("Hi.")]
    model = EndpointChat(server.url, "tiny", limits=QUICK)
    model.complete(HELLO)
    assert KEY not in str(server.keys)
    model.endpoint.client.close()


def test_an_answer_to_a_schema_is_parsed_and_the_schema_was_sent(server, model):
    server.replies = [says('```json\n{"age": 7}\n```')]
    assert model.complete(HELLO, schema=SCHEMA)[0].data == {"age": 7}
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_an_answer_that_does_not_fit_goes_back_with_what_is_wrong(server, model):
    server.replies = [says("seven"), says('{"age": "seven"}'), says('{"age": 7}')]
    assert model.complete(HELLO, schema=SCHEMA)[0].data == {"age": 7}
    first, second = server.requests[1]["messages"], server.requests[2]["messages"]
    assert first[1] == {"role": "assistant", "content": "seven"}
    assert "no JSON" in first[2]["content"]
    assert "$.age" in second[4]["content"]
    assert model.ledger.total.calls == 1
    assert model.ledger.total.tokens_in == 21


def test_after_two_repairs_the_output_is_bad(server, model):
    server.replies = [says("no")]
    with pytest.raises(BadOutput, match="3 attempts"):
        model.complete(HELLO, schema=SCHEMA)
    assert len(server.requests) == 3


def test_json_that_was_cut_off_is_not_repaired(server, model):
    server.replies = [says('{"age": ', finish="length")]
    with pytest.raises(BadOutput, match="max_tokens=256"):
        model.complete(HELLO, schema=SCHEMA)
    assert len(server.requests) == 1


def test_a_server_that_takes_no_schema_is_told_it_in_words_from_then_on(server, model):
    server.replies = [refuses(400, "'response_format' is not supported"), says('{"age": 7}')]
    assert model.complete(HELLO, schema=SCHEMA)[0].data == {"age": 7}
    assert "response_format" not in server.requests[1]
    assert '"age"' in server.requests[1]["messages"][0]["content"]
    model.complete(HELLO, schema=SCHEMA)
    assert len(server.requests) == 3
    model.complete(HELLO)
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "Hello?"}]


def test_a_server_that_calls_max_tokens_otherwise_is_understood(server, model):
    server.replies = [refuses(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'."), says("Hi.")]
    assert model.complete(HELLO, max_tokens=5)[0].text == "Hi."
    assert server.requests[-1]["max_completion_tokens"] == 5
    assert "max_tokens" not in server.requests[-1]


def test_tools_are_offered_and_calls_come_back_with_their_arguments(server, model):
    tool = {"name": "weather", "description": "of a town", "parameters": {"type": "object"}}
    called = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bern"}'}}]
    server.replies = [says(None, finish="tool_calls", tool_calls=called), says("Sunny.")]
    (answer,) = model.complete(HELLO, tools=[tool])
    assert answer.finish_reason == "tool_calls"
    assert answer.tool_calls == (ToolCall(id="c1", name="weather", arguments={"town": "Bern"}),)
    assert server.requests[0]["tools"] == [{"type": "function", "function": tool}]
    told = [Message(role="assistant", content="", tool_calls=answer.tool_calls)]
    model.complete([*HELLO, *told, Message(role="tool", content="sun", call_id="c1")])
    rows = server.requests[1]["messages"]
    assert json.loads(rows[1]["tool_calls"][0]["function"]["arguments"]) == {"town": "Bern"}
    assert rows[2]["tool_call_id"] == "c1"
    called[0]["function"]["arguments"] = "{town"
    server.replies = [says(None, finish="tool_calls", tool_calls=called)]
    with pytest.raises(BadOutput, match="no JSON"):
        model.complete(HELLO, tools=[tool])


def with_logprobs(*tops: tuple[str, float]) -> tuple[int, Any, dict[str, str]]:
    status, body, headers = says("B")
    listed = [{"token": token, "logprob": value, "bytes": None} for token, value in tops]
    body["choices"][0]["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}], "refusal": None}
    return status, body, headers


def test_log_probabilities_are_told_where_the_server_tells_them(server, model):
    server.replies = [with_logprobs(("B", -0.25)), says("B")]
    assert model.complete(HELLO, logprobs=True)[0].logprobs == (-0.25,)
    assert model.complete(HELLO, logprobs=True)[0].logprobs == ()


def test_options_are_weighed_by_the_log_probabilities_of_their_letters(server, model):
    server.replies = [with_logprobs(("B", -0.5), (" A", -1.5), ("b", -2.0), ("The", -3.0))]
    first, second, third = model.choose(HELLO, ["red", "green", "blue"])
    assert second / first == pytest.approx(2.718281828)
    assert third == 0.0
    assert first + second + third == pytest.approx(1.0)
    assert "B) green" in server.requests[0]["messages"][-1]["content"]


def test_a_server_without_log_probabilities_names_one_option(server, model):
    server.replies = [refuses(400, "top_logprobs not allowed"), says("B"), says('"green"')]
    assert model.choose(HELLO, ["red", "green"]) == [0.0, 1.0]
    server.replies = [says('"red"')]
    assert model.choose(HELLO, ["red", "green"]) == [1.0, 0.0]
    for options in (["red"], ["red", "red"], ["red", ""]):
        with pytest.raises(BadInput, match="options"):
            model.choose(HELLO, options)


def streams(*pieces: str, whole: bool = True, pause: float = 0.0) -> Callable[[BaseHTTPRequestHandler], None]:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        if not whole:
            handler.send_header("content-length", "100000")
        handler.end_headers()
        for piece in pieces:
            delta = {"id": "1", "choices": [{"index": 0, "delta": {"content": piece}}]}
            handler.wfile.write(f"data: {json.dumps(delta)}\n\n".encode())
            handler.wfile.flush()
            time.sleep(pause)
        if whole:
            usage = {"id": "1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
            handler.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())

    return reply


def test_a_stream_gives_the_pieces_as_they_come_and_counts_them(server, model):
    server.replies = [streams("Hel", "lo ", "wörld 🎈")]
    assert list(model.stream(HELLO)) == ["Hel", "lo ", "wörld 🎈"]
    assert server.requests[0]["stream"] is True
    assert (model.ledger.total.tokens_in, model.ledger.total.tokens_out) == (7, 3)


def test_a_stream_that_breaks_off_or_stops_gives_what_came_and_then_the_error(server, model):
    for reply, error in (
        (streams("Hel", "lo", whole=False), EndpointError),
        (streams("Hel", "lo", pause=1.0), EndpointDown),
    ):
        server.replies = [reply]
        pieces = model.stream(HELLO)
        assert next(pieces) == "Hel"
        with pytest.raises(error, match=server.url):
            list(pieces)
    assert model.ledger.total.failed == 2


def test_an_error_inside_a_stream_is_reported(server, model):
    def reply(handler: BaseHTTPRequestHandler) -> None:
        streams("Hel", whole=False)(handler)
        handler.wfile.write(b'data: {"error": {"message": "out of memory"}}\n\n')

    server.replies = [reply]
    with pytest.raises(EndpointError, match="out of memory"):
        list(model.stream(HELLO))


def test_closing_a_stream_ends_it_and_the_ledger_says_so(server, model):
    outcomes = []
    model.ledger._on_call = lambda call: outcomes.append(call.outcome)
    server.replies = [streams("a", "b", "c", pause=0.05)]
    pieces = model.stream(HELLO)
    assert next(pieces) == "a"
    pieces.close()
    assert outcomes == ["cancelled"]
    assert model.ledger.total.failed == 0


def test_many_threads_share_one_model(server, model):
    server.replies = [says("Hi.")]
    threads = [threading.Thread(target=lambda: [model.complete(HELLO) for _ in range(3)]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.ledger.total.calls == 18
    assert model.ledger.total.tokens_in == 18 * 7


def test_calls_of_all_threads_keep_the_pace():
    pace = Pace(1200.0)  # one every 50 ms
    begun = time.perf_counter()
    threads = [threading.Thread(target=pace.wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - begun >= 4 * 0.05
    for wrong in (0.0, -1.0):
        with pytest.raises(BadInput, match="requests_a_minute"):
            Pace(wrong)


def test_an_endpoint_can_do_every_task_and_knows_no_others(model, server):
    assert model.can("chat")
    assert model.can("describe")
    with pytest.raises(BadInput, match="describe"):
        model.can("descrieb")
