"""What every command prints through: data to standard output, prose to standard error.

Whoever pipes a command into another sees data alone; whoever reads a terminal sees both. Colour is used only where a
terminal shows it and NO_COLOR is not set. Nothing here imports anything heavy; progress bars import `rich` when the
first one is drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loci import settings
from loci.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress

RESULTS = Path("results")  # relative to where the command runs

Json = Annotated[bool, typer.Option("--json", help="Print the data as JSON.")]
"""The type of every command's `as_json` parameter: `as_json: Json = False`."""

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before something is destroyed.")]

Colour = Literal["red", "green", "yellow", "dim", "bold"]
_CODES: Mapping[Colour, str] = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}


def coloured(words: str, colour: Colour, *, to: Literal["stdout", "stderr"]) -> str:
    """The words in colour, or as they are where `to` is no terminal or NO_COLOR is set (https://no-color.org)."""
    stream = sys.stdout if to == "stdout" else sys.stderr
    if settings.no_color() or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return words
    return f"\x1b[{_CODES[colour]}m{words}\x1b[0m"


def say(words: str) -> None:
    """Prose, to standard error."""
    print(words, file=sys.stderr, flush=True)


def data(words: str, *, end: str = "\n") -> None:
    """Data, to standard output; shown at once, so that a stream of words can be read while it grows."""
    print(words, end=end, flush=True)


def error(words: str) -> None:
    """One sentence in red, to standard error; lines after the first (the way out) keep their colour."""
    first, *rest = words.splitlines() or [""]
    say("\n".join([coloured(first, "red", to="stderr"), *rest]))


def next_command(command: str, purpose: str = "") -> None:
    """The last line of a command: what to run next, and what for."""
    say(coloured(f"next: {command}" + (f"   {purpose}" if purpose else ""), "dim", to="stderr"))


def as_plain(value: Any) -> Any:
    """The value in JSON's own kinds: data classes as objects, times in ISO 8601, paths and unknown kinds refused
    or written as text. Numbers of numpy and torch become Python's through their `item` method.

    Raises:
        TypeError: for a kind that JSON has no words for.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain(item) for item in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "tolist", None)):  # arrays and numbers of numpy and torch
        return as_plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def print_json(value: Any) -> None:
    """One JSON document to standard output. Numbers that JSON lacks (NaN, infinity) are refused, not misspelt."""
    data(json.dumps(as_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def width(words: str) -> int:
    """Columns that a terminal gives the words: wide signs count two, combining ones none."""
    shown = 0
    for sign in words:
        if not unicodedata.combining(sign):
            shown += 2 if unicodedata.east_asian_width(sign) in "WF" else 1
    return shown


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """Rows under a head, in columns two spaces apart, to standard output. Columns named in `right` end flush."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(width(row[column]) for row in cells) for column in range(len(head))]
    flush_right = [name in set(right) for name in head]
    for number, row in enumerate(cells):
        parts = []
        for text, room, to_right in zip(row, widths, flush_right, strict=True):
            gap = " " * (room - width(text))
            parts.append(gap + text if to_right else text + gap)
        line = "  ".join(parts).rstrip()
        data(coloured(line, "bold", to="stdout") if number == 0 else line)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("\n", " ")


def human_bytes(count: int | float) -> str:
    """Bytes in the unit that keeps the number below a thousand: `23.6 MB`. Powers of ten."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: int | float) -> str:
    """A duration as people say it: `41 ms`, `3.2 s`, `4 min 5 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


@contextmanager
def progress(what: str, *, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for work that takes longer than a moment; yields a function that moves it on.

    Where standard error is no terminal, one line says what is being done and nothing moves.
    """
    if not sys.stderr.isatty():
        say(f"{what} ...")
        yield lambda steps: None
        return
    with _bar() as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Like `progress`, for work that tells itself what it does: yields a function of (what, steps done, steps in all).

    Where standard error is no terminal, each new thing that is done gets one line.
    """
    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(what: str, done: int, total: int) -> None:
            if what not in told:
                told.add(what)
                say(f"{what} ...")

        yield tell
        return
    with _bar() as bar:
        task = bar.add_task("", total=None)

        def move(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield move


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def save(value: Any, *, kind: str, folder: Path = RESULTS) -> Path:
    """Keep figures as `results/<kind>-<hash>.json`; the same figures keep the same name. Returns the file.

    Raises:
        BadInput: the folder cannot be written.
    """
    text = json.dumps(as_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise BadInput(f"{path} cannot be written ({problem.strerror}); run this where you may write.") from problem
    return path


def confirm(question: str, *, yes: bool) -> bool:
    """Ask before something is destroyed. Without a terminal to ask at, `--yes` is needed.

    Raises:
        BadInput: nobody can be asked and `yes` is false.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise BadInput(f"{question} Nobody can be asked here: repeat the command with --yes if you mean it.")
    return typer.confirm(question, err=True)
