"""`loci claim`: a paper's headline, measured on this machine."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loci.cli import output

if TYPE_CHECKING:
    from loci.claims.base import Outcome


def claim(
    name: Annotated[str | None, typer.Argument(help="A name from `loci systems`.", show_default=False)] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the outcome as a file in results/.")] = False,
    as_json: output.Json = False,
) -> None:
    """Measure a paper's headline claim on this machine.

    Without a name it lists the claims that are written. A claim that does not hold is no error: its numbers are shown.

    \b
    Examples:
      loci claim
      loci claim amem
      loci claim amem --json --save
    """
    from loci.claims import base

    if name is None:
        _list(as_json=as_json)
        return
    about = base.load_claim(name).CLAIM
    output.say(f"measuring {about.system}: about {about.minutes:g} min on two cores")
    with output.steps() as progress:
        outcome = base.run_claim(name, progress=progress)
    if as_json:
        output.print_json(outcome.as_row())
    else:
        _show(outcome)
    if save:
        output.say(f"saved {output.save(outcome.as_row(), kind=f'claim-{about.system}')}")
    elif not as_json:
        output.next_command(f"loci claim {about.system} --json --save", "keeps the figures")


def _list(*, as_json: bool) -> None:
    from loci.claims import base

    claims = [base.load_claim(name).CLAIM for name in base.written()]
    if as_json:
        output.print_json(claims)
        return
    output.table(
        ["system", "minutes", "the paper says"],
        [(each.system, f"{each.minutes:g}", textwrap.shorten(each.says, 90)) for each in claims],
        right=["minutes"],
    )
    output.next_command(f"loci claim {claims[0].system if claims else 'amem'}", "measures one")


def _show(outcome: Outcome) -> None:
    about = outcome.claim
    for fact, words in {
        "paper": about.paper,
        "says": about.says,
        "here": about.here,
        "differs": about.differs,
    }.items():
        indent = " " * 9
        output.data(textwrap.fill(words, 100, initial_indent=f"{fact:9}", subsequent_indent=indent))
    output.data("measured")
    _figures(outcome.measured, depth=1)
    output.data(f"{outcome.verdict} ({output.human_seconds(outcome.seconds)})")


def _figures(measured: Mapping[str, Any], *, depth: int) -> None:
    longest = max((output.width(str(name)) for name in measured), default=0)
    for name, value in measured.items():
        if isinstance(value, Mapping):
            output.data(f"{'  ' * depth}{name}")
            _figures(value, depth=depth + 1)
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            output.data(f"{'  ' * depth}{name:{longest}}  {shown}")
