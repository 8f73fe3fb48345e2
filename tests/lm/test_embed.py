"""The seam of embedders: specs, and endpoints that answer well or not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from loci.errors import BadInput, BadOutput, EndpointError
from loci.lm.embed import Embedder, EndpointEmbedder, load_embedder


class Server:
    """Embeds a text as the sizes of its parts, at random places of the reply; `spoil` may change the reply."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.spoil = lambda data: data
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.batches.append(asked["input"])
                data: list[Any] = [
                    {"object": "embedding", "index": place, "embedding": [len(text), text.count("a"), 1.0]}
                    for place, text in enumerate(asked["input"])
                ]
                reply = {"object": "list", "model": "m", "data": outer.spoil(data[::-1]), "usage": {"prompt_tokens": 2}}
                payload = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def embedder(server: Server) -> Iterator[EndpointEmbedder]:
    made = EndpointEmbedder(server.url, "m", batch=4)
    yield made
    made.endpoint.client.close()


def test_rows_come_in_order_with_unit_norm_in_batches(server, embedder):
    texts = ["a" * size for size in range(1, 11)]
    rows = embedder.embed(texts)
    assert [len(batch) for batch in server.batches] == [4, 4, 2]
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0)
    assert rows[:, 0] / rows[:, 2] == pytest.approx(np.arange(1, 11))
    assert embedder.dimension == 3
    assert (embedder.ledger.total.calls, embedder.ledger.total.tokens_in) == (3, 6)


def test_the_dimension_is_asked_for_once_where_nothing_was_embedded_yet(server, embedder):
    assert embedder.dimension == 3
    assert embedder.dimension == 3
    assert len(server.batches) == 1
    assert embedder.embed([]).shape == (0, 3)


def test_the_empty_text_and_broken_unicode_reach_the_server_as_text(server, embedder):
    embedder.embed(["", "lone \ud800 surrogate"])
    assert server.batches == [[" ", "lone ? surrogate"]]


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda data: data[1:], EndpointError, "1 rows for 2 texts"),
        (lambda data: [{**entry, "embedding": [0.0, 0.0, 0.0]} for entry in data], BadOutput, "without a direction"),
        (lambda data: [{**entry, "embedding": [1.0, 2.0]} for entry in data], BadOutput, r"\[2\] numbers, expected 3"),
        (lambda data: [], EndpointError, "0 rows"),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused(server, embedder, spoil, error, words):
    embedder.embed(["first"])
    server.spoil = spoil
    with pytest.raises(error, match=words) as caught:
        embedder.embed(["second", "third"])
    assert server.url in str(caught.value)


def test_a_spec_names_the_bundled_embedder_none_or_an_endpoint(server):
    assert load_embedder("none") is None
    remote = load_embedder(f"{server.url}#m")
    assert isinstance(remote, EndpointEmbedder)
    assert isinstance(remote, Embedder)
    assert remote.name == "m"
    bundled = load_embedder("default")
    assert isinstance(bundled, Embedder)
    assert (bundled.name, bundled.dimension) == ("all-MiniLM-L6-v2", 384)
    for spec in ("", "bge-m3", "http://host/v1", "#m"):
        with pytest.raises(BadInput, match="no embedder is called"):
            load_embedder(spec)


def test_one_string_is_no_list_of_texts(embedder):
    with pytest.raises(BadInput, match=r"embed\(\['hello'\]\)"):
        embedder.embed("hello")
