"""`loci systems` and `loci cite`: the catalog on the command line."""

from __future__ import annotations

from typing import Annotated

import typer

from loci import catalog
from loci.cli import output
from loci.errors import BadInput


def systems(
    name: Annotated[str | None, typer.Argument(help="Show this one system.", show_default=False)] = None,
    room: Annotated[str | None, typer.Option(help="Only this room: text, context, state, weights, ...")] = None,
    state: Annotated[str | None, typer.Option(help="Only this state: planned, built, holds, 'does not hold'.")] = None,
    as_json: output.Json = False,
) -> None:
    """List the 61 systems, or show one.

    \b
    Examples:
      loci systems --room text
      loci systems --state built --json
      loci systems amem
    """
    if name is not None:
        if room is not None or state is not None:
            raise BadInput(f"{name!r} names one system already; leave --room and --state out.")
        _show(catalog.find(name), as_json=as_json)
        return
    found = catalog.systems(room=room, state=state)
    if as_json:
        output.print_json([system.as_row() for system in found])
        return
    output.table(
        ["name", "room", "state", "year", "title"],
        [(system.name, system.room, system.state, system.year, system.title) for system in found],
        right=["year"],
    )
    output.say(f"{len(found)} of {len(catalog.systems())} systems")
    output.next_command(f"loci systems {found[0].name if found else 'amem'}", "shows one of them")


def _show(system: catalog.System, *, as_json: bool) -> None:
    if as_json:
        output.print_json(system.as_row())
        return
    output.data(f"{system.label}: {system.idea}")
    facts = {
        "paper": f"{system.title} ({catalog.reference(system)})",
        "authors": catalog.author_line(system),
        "code": system.code,
        "place": system.place,
        "room": system.room,
        "module": system.module,
        "claim": system.claim,
        "state": system.state,
    }
    for fact, value in facts.items():
        output.data(f"  {fact:8} {value or '-'}")
    output.next_command(
        f"loci cite {system.name}" if system.state == "planned" else f"loci claim {system.name}",
        "prints its reference" if system.state == "planned" else "measures its paper's claim here",
    )


def cite(
    name: Annotated[str, typer.Argument(help="A name from `loci systems`.")],
    as_json: output.Json = False,
) -> None:
    """Print a system's paper as BibTeX.

    \b
    Examples:
      loci cite amem
      loci cite amem >> references.bib
    """
    reference = catalog.cite(name)
    if as_json:
        output.print_json({"name": name, "bibtex": reference})
        return
    output.data(reference)
    output.next_command(f"loci systems {name}", "says what it does")
