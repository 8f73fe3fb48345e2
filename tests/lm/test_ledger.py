"""The ledger: every call is counted once, with what it cost and how it ended."""

from __future__ import annotations

import threading

import pytest

from loci.errors import EndpointDown
from loci.lm.ledger import Ledger, Totals


def test_calls_add_up_by_purpose_and_by_model():
    ledger = Ledger()
    for purpose, model, tokens in (("chat", "a", 3), ("chat", "b", 4), ("describe", "a", 5)):
        with ledger.call(purpose, model) as call:
            call.tokens_in, call.tokens_out = tokens, 1
    assert {name: totals.tokens_in for name, totals in ledger.by_purpose().items()} == {"chat": 7, "describe": 5}
    assert {name: totals.calls for name, totals in ledger.by_model().items()} == {"a": 2, "b": 1}
    assert (ledger.total.calls, ledger.total.tokens_out, ledger.total.failed) == (3, 3, 0)
    assert ledger.total.milliseconds > 0


def test_an_error_is_the_outcome_and_goes_on():
    calls = []
    ledger = Ledger(on_call=calls.append)

    def failing() -> None:
        with ledger.call("chat", "a") as call:
            call.tokens_in = 2
            raise EndpointDown("gone")

    with pytest.raises(EndpointDown):
        failing()
    assert (calls[0].outcome, calls[0].tokens_in) == ("EndpointDown", 2)
    assert ledger.total.failed == 1


def test_an_interruption_is_no_failure():
    calls = []
    ledger = Ledger(on_call=calls.append)
    with pytest.raises(KeyboardInterrupt), ledger.call("chat", "a"):
        raise KeyboardInterrupt
    assert calls[0].outcome == "cancelled"
    assert ledger.total.failed == 0


def test_a_span_is_the_difference_of_two_readings():
    ledger = Ledger()
    with ledger.call("chat", "a") as call:
        call.tokens_in = 5
    before = ledger.total
    with ledger.call("chat", "a") as call:
        call.tokens_in = 7
    assert (ledger.total - before).tokens_in == 7
    assert ledger.total - ledger.total == Totals()


def test_threads_lose_no_call():
    ledger = Ledger()

    def work() -> None:
        for _ in range(300):
            with ledger.call("chat", "a") as call:
                call.tokens_in = 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ledger.total.calls, ledger.total.tokens_in) == (2400, 2400)
