"""What a claim is: a paper's own words, what is measured here, and whether it holds.

A claim is one module `loci.claims.<system>` with three public names:

    CLAIM     a `Claim`: the paper's words, our scale, what differs, the minutes it takes
    measure   runs the measurement and returns figures by name; it takes keyword-only arguments alone, all with defaults
    holds     judges those figures, and nothing else; a claim that does not hold stays, with its numbers

`run_claim` runs one and returns its `Outcome`. `measure` may say how far it is through `progress`, and must not print.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from loci import catalog
from loci.errors import BadInput

Figure = float | int | str | bool | None
Measured = Mapping[str, Any]  # figures by name; a group of figures is a mapping itself
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The data of a claim. Every word that a reader needs in order to doubt the figures."""

    system: str  # its name in the catalog
    paper: str  # where it is claimed: reference and table or figure
    says: str  # the paper's claim in a sentence
    here: str  # what is measured instead: model, data, sizes, seed
    differs: str  # how that differs from the paper
    minutes: float  # on two cores


@runtime_checkable
class ClaimModule(Protocol):
    """The shape of a module under `loci.claims`."""

    CLAIM: Claim

    def measure(self, *, progress: Progress | None = None) -> Measured:
        """Do the measurement. Raises `DataNotFound` where its data is absent."""
        ...

    def holds(self, measured: Measured) -> bool:
        """Judge the figures."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One claim, measured."""

    claim: Claim
    measured: Measured
    holds: bool
    seconds: float
    measured_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def verdict(self) -> catalog.State:
        """What the catalog would say."""
        return "holds" if self.holds else "does not hold"

    def as_row(self) -> dict[str, Any]:
        """For JSON: the claim, the figures, the verdict and what they were measured with."""
        from loci.bench.recipe import machine

        return {
            **asdict(self.claim),
            "measured": self.measured,
            "holds": self.holds,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "measured_at": self.measured_at.isoformat(timespec="seconds"),
            "machine": machine(),
        }


def written() -> list[str]:
    """The systems whose claim is written, in the catalog's order."""
    folder = Path(__file__).parent
    return [system.name for system in catalog.systems() if (folder / f"{system.name}.py").is_file()]


def load_claim(name: str) -> ClaimModule:
    """The claim of the system called `name`.

    Raises:
        UnknownName: no such system.
        BadInput: the system is known and its claim is not written yet.
    """
    system = catalog.find(name)
    if system.name not in written():
        raise BadInput(
            f"{system.name} has no claim yet: it is {system.state}. Written so far: {', '.join(written()) or 'none'}."
        )
    return cast(ClaimModule, importlib.import_module(system.claim))


def run_claim(name: str, *, progress: Progress | None = None) -> Outcome:
    """Measure the claim of one system and judge it.

    Raises:
        UnknownName: no such system.
        BadInput: its claim is not written yet.
        DataNotFound: the claim needs data that is not here.
    """
    module = load_claim(name)
    started = time.perf_counter()
    measured = module.measure(progress=progress)
    seconds = time.perf_counter() - started
    return Outcome(claim=module.CLAIM, measured=measured, holds=module.holds(measured), seconds=seconds)
