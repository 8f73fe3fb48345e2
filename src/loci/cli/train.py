"""`loci train`: make a trained part again, from its recipe and its data."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loci.cli import output
from loci.errors import UnknownName

# Recipes by name; each is a function of `folder`, `resume` and `minutes` that returns the `Artifact` it made.
RECIPES: Mapping[str, str] = {"reader": "loci.bench.reader_recipe:train"}


def train(
    name: Annotated[
        str | None, typer.Argument(help="Which part; without it they are listed.", show_default=False)
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where checkpoints and the part go.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long.", show_default=False)] = None,
    as_json: output.Json = False,
) -> None:
    """Make a trained part again.

    \b
    Examples:
      loci train
      loci train reader --minutes 60
      loci train reader --resume
    """
    if name is None:
        if as_json:
            output.print_json(sorted(RECIPES))
        else:
            output.table(["name", "recipe"], sorted(RECIPES.items()))
            output.next_command(f"loci train {next(iter(RECIPES))}", "makes it again; takes hours on two cores")
        return
    if name not in RECIPES:
        raise UnknownName.among("trained part", name, RECIPES)
    module, attribute = RECIPES[name].split(":")
    made: Any = getattr(importlib.import_module(module), attribute)(folder=folder, resume=resume, minutes=minutes)
    if as_json:
        output.print_json(made)
        return
    output.data(str(made.path))
    output.next_command("loci bench locomo --data DIR", "measures what it is worth")
