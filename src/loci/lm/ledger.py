"""The ledger: what was asked of language models, for which purpose, and what it cost.

Every `ChatModel` writes each call into its ledger, failed ones too. Totals stay small however many calls there are; who
wants the calls themselves, such as a store, is told of each when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that has ended. `outcome` is "ok", "cancelled", or the name of the error."""

    purpose: str
    model: str
    tokens_in: int
    tokens_out: int
    milliseconds: float
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over calls. `failed` are the calls whose outcome is neither "ok" nor "cancelled"."""

    calls: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    milliseconds: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            calls=self.calls + other.calls,
            failed=self.failed + other.failed,
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
            milliseconds=self.milliseconds + other.milliseconds,
        )

    def __sub__(self, earlier: Totals) -> Totals:
        """What came since an earlier reading of the same ledger."""
        return Totals(
            calls=self.calls - earlier.calls,
            failed=self.failed - earlier.failed,
            tokens_in=self.tokens_in - earlier.tokens_in,
            tokens_out=self.tokens_out - earlier.tokens_out,
            milliseconds=self.milliseconds - earlier.milliseconds,
        )

    @classmethod
    def of(cls, call: Call) -> Totals:
        return cls(
            calls=1,
            failed=int(call.outcome not in ("ok", "cancelled")),
            tokens_in=call.tokens_in,
            tokens_out=call.tokens_out,
            milliseconds=call.milliseconds,
        )


@dataclass(kw_only=True)
class OpenCall:
    """A call that goes on; its maker adds the tokens as it learns of them."""

    tokens_in: int = 0
    tokens_out: int = 0


class Ledger:
    """Counts calls by purpose and model. Threads may share one.

    Args:
        on_call: told of each call when it ends, in the thread that made it.
    """

    def __init__(self, on_call: Callable[[Call], None] | None = None) -> None:
        self._on_call = on_call
        self._lock = threading.Lock()
        self._totals: dict[tuple[str, str], Totals] = {}

    @contextmanager
    def call(self, purpose: str, model: str) -> Iterator[OpenCall]:
        """Count what happens inside as one call; an error that leaves it is its outcome, and goes on."""
        opened, begun, outcome = OpenCall(), time.perf_counter(), "ok"
        try:
            yield opened
        except GeneratorExit:
            outcome = "cancelled"
            raise
        except BaseException as error:
            outcome = "cancelled" if isinstance(error, KeyboardInterrupt) else type(error).__name__
            raise
        finally:
            self.add(
                Call(
                    purpose=purpose,
                    model=model,
                    tokens_in=opened.tokens_in,
                    tokens_out=opened.tokens_out,
                    milliseconds=1000 * (time.perf_counter() - begun),
                    outcome=outcome,
                )
            )

    def add(self, call: Call) -> None:
        """Write down a call that was counted elsewhere."""
        with self._lock:
            key = (call.purpose, call.model)
            self._totals[key] = self._totals.get(key, Totals()) + Totals.of(call)
        if self._on_call is not None:
            self._on_call(call)

    @property
    def total(self) -> Totals:
        """Everything so far."""
        with self._lock:
            return sum(self._totals.values(), Totals())

    def by_purpose(self) -> Mapping[str, Totals]:
        return self._summed(0)

    def by_model(self) -> Mapping[str, Totals]:
        return self._summed(1)

    def _summed(self, part: int) -> Mapping[str, Totals]:
        sums: dict[str, Totals] = {}
        with self._lock:
            for key, totals in self._totals.items():
                sums[key[part]] = sums.get(key[part], Totals()) + totals
        return sums
