"""The 61 systems as data: which paper, which place, which module, and how far each has come.

The rows are in `catalog.toml` beside this file. Everything that lists systems reads them here: `loci systems`,
`loci cite`, the tables of the guide, and the contract tests, which demand of every system past "planned" that its
module, its test and its claim exist.

    planned          not built yet
    built            built and tested; its paper's claim not yet judged at full size
    holds            the claim was measured here and holds at our scale
    does not hold    the claim was measured here and does not hold; the numbers stay
"""

from __future__ import annotations

import tomllib
import unicodedata
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from loci.errors import UnknownName

State = Literal["planned", "built", "holds", "does not hold"]
Place = Literal[
    "text", "context", "state", "weights", "hardware",  # where a memory lies
    "decoding", "reasoning", "structure", "agents", "scenes", "nas", "bench",  # the rooms that use them
]  # fmt: skip
STATES: tuple[State, ...] = get_args(State)
ROOMS: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True, kw_only=True)
class System:
    """One system. A fact that is not known for certain is None, and nothing is guessed in its place."""

    name: str
    label: str  # what people call it
    idea: str  # one line
    title: str
    published_as: str | None = None  # the title in print, where it differs
    authors: tuple[str, ...] = ()  # family names; "others" at the end where only the first are known
    year: int | None = None
    venue: str | None = None
    entry: Literal["inproceedings", "article", "mastersthesis"] = "inproceedings"  # in BibTeX, if it has a venue
    arxiv: str | None = None
    code: str | None = None  # the authors' own, as owner/name on GitHub
    note: str | None = None
    place: Place  # where its memory lies
    room: Place  # where its code lies
    module: str | None = None  # dotted name
    state: State

    @property
    def claim(self) -> str:
        """The module that measures the paper's headline, whether it is written already or not."""
        return f"loci.claims.{self.name}"

    @property
    def test(self) -> str:
        """The system's test file, relative to the project's folder: it is called after the module."""
        name = self.module.rpartition(".")[2] if self.module else self.name
        return f"tests/{self.room}/test_{name}.py"

    @property
    def built(self) -> bool:
        """Whether there is anything to run."""
        return self.state != "planned"

    def as_row(self) -> dict[str, Any]:
        """Every field by name, for JSON."""
        return {**asdict(self), "claim": self.claim, "test": self.test}


@cache
def _all() -> tuple[System, ...]:
    rows = tomllib.loads(files("loci").joinpath("catalog.toml").read_text(encoding="utf-8"))["system"]
    return tuple(System(**{**row, "authors": tuple(row.get("authors", ()))}) for row in rows)


def systems(*, room: str | None = None, state: str | None = None) -> tuple[System, ...]:
    """The systems in the project's order, or those of one room, of one state, or both.

    Raises:
        UnknownName: no such room or state; the message lists them.
    """
    if room is not None and room not in ROOMS:
        raise UnknownName.among("room", room, ROOMS)
    if state is not None and state not in STATES:
        raise UnknownName.among("state", state, STATES)
    return tuple(row for row in _all() if room in (None, row.room) and state in (None, row.state))


def find(name: str) -> System:
    """The system called `name`; a hyphen is as good as an underscore.

    Raises:
        UnknownName: no such system; the message names its nearest neighbour.
    """
    wanted = name.replace("-", "_").lower()
    for system in _all():
        if system.name == wanted:
            return system
    raise UnknownName.among("system", name, (system.name for system in _all()))


def author_line(system: System) -> str | None:
    """Authors as a sentence shows them, `Xu, Liang and Mei`; None where they are not known."""
    if not system.authors:
        return None
    *first, last = system.authors
    if last == "others":
        return f"{', '.join(first)} et al."
    return f"{', '.join(first)} and {last}" if first else last


def reference(system: System) -> str:
    """Where the paper is found, in short: `NeurIPS 2025, arXiv:2502.12110`, as far as it is known."""
    venue = system.venue
    if venue is not None and system.year is not None and str(system.year) not in venue:
        venue = f"{venue} {system.year}"
    parts = [venue or (str(system.year) if system.year else None), f"arXiv:{system.arxiv}" if system.arxiv else None]
    return ", ".join(part for part in parts if part) or "no reference known yet"


def cite(name: str) -> str:
    """The system's paper as a BibTeX entry (UTF-8). Fields that are not known are left out.

    Raises:
        UnknownName: no such system.
    """
    system = find(name)
    place = {"inproceedings": "booktitle", "article": "journal", "mastersthesis": "school"}[system.entry]
    eprint = system.arxiv is not None
    fields: dict[str, object | None] = {
        "title": f"{{{system.published_as or system.title}}}",  # the inner braces keep its capitals
        "author": " and ".join(f"{{{each}}}" if " " in each else each for each in system.authors) or None,
        "year": system.year,
        place: system.venue,
        "eprint": system.arxiv,
        "archivePrefix": "arXiv" if eprint else None,
        "url": f"https://arxiv.org/abs/{system.arxiv}" if eprint else None,
        "note": system.note,
    }
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items() if value is not None]
    return "\n".join([f"@{system.entry if system.venue else 'misc'}{{{_key(system)},", *lines, "}"])


def _key(system: System) -> str:
    if not system.authors or system.year is None:
        return system.name
    decomposed = unicodedata.normalize("NFKD", system.authors[0]).lower()
    return "".join(sign for sign in decomposed if sign.isascii() and sign.isalpha()) + f"{system.year}{system.name}"
