"""`loci bench`: memories measured on tasks, every row with the whole recipe beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loci import settings
from loci.cli import output
from loci.cli.app import Row, group

if TYPE_CHECKING:
    from loci.bench.locomo import Result

MAIN_ARMS = ("none", "latest", "plain", "amem")

ROWS = {
    "locomo": Row("loci.cli.bench:locomo", "Questions about conversations that run over months."),
    "speed": Row("loci.cli.bench:speed", "How fast notes are written and read."),
}

bench = group(
    """Measure memories on a task.

    \b
    Examples:
      loci bench locomo --data ../shared/data/locomo --no-answers
      loci bench locomo --data ../shared/data/locomo --arm plain --arm amem --json
      loci bench speed --notes 10000
    """,
    ROWS,
)


def locomo(
    data: Annotated[
        Path | None,
        typer.Option(help="A folder with LoCoMo's files; unless given, locomo in LOCI_DATA.", show_default=False),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="none, latest, plain, amem or one of its ablations; repeat it for several.", show_default=False
        ),
    ] = None,
    no_answers: Annotated[bool, typer.Option("--no-answers", help="Measure what is found, and ask no reader.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many questions only.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of questions and of the bootstrap.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Keep figures and recipe as a file in results/.")] = False,
    as_json: output.Json = False,
) -> None:
    """Questions about conversations that run over months.

    Evidence found and answers given are scored apart. Category 5 asks for what was never said and is right when
    refused. Unless arms are named, no memory, the latest 7,500 tokens, a plain store and A-MEM are compared.

    \b
    Examples:
      loci bench locomo --data ../shared/data/locomo --no-answers
      loci bench locomo --data ../shared/data/locomo --arm plain --arm amem --limit 50
      loci bench locomo --json --save
    """
    from loci.bench import locomo as task

    with output.steps() as progress:
        chosen = tuple(arm) if arm else MAIN_ARMS
        result = task.run(
            data or settings.data() / "locomo",
            chosen,
            answers=not no_answers,
            limit=limit,
            seed=seed,
            progress=progress,
        )
    if as_json:
        output.print_json(result.as_json())
    else:
        _show(result)
    if save:
        output.say(f"saved {output.save(result.as_json(), kind='locomo')}")
    if not result.complete:
        raise KeyboardInterrupt
    if not as_json and not save:
        output.next_command("loci bench locomo --json --save ...", "keeps every figure with its recipe")


def speed(
    notes: Annotated[
        list[int] | None, typer.Option(help="Notes held when times are taken; repeat it for several sizes.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Single writes and reads timed at each size.")] = 200,
    save: Annotated[bool, typer.Option("--save", help="Keep figures and recipe as a file in results/.")] = False,
    as_json: output.Json = False,
) -> None:
    """How fast notes are written and read.

    A memory is filled with invented conversations and timed at each size, embedding included. 10,000 notes take
    about a minute.

    \b
    Examples:
      loci bench speed --notes 1000
      loci bench speed --notes 10000 --notes 100000 --json
    """
    from loci.bench import speed as task

    with output.steps() as progress:
        result = task.run(tuple(notes) if notes else (10_000,), samples=samples, progress=progress)
    if as_json:
        output.print_json(result)
    else:
        names = ["notes", "bulk", "write p50", "write p99", "read p50", "read p99", "reopened", "file", "in memory"]
        output.table(
            names,
            [
                (
                    row["notes"],
                    f"{row['bulk_notes_a_second']:.0f} /s",
                    f"{row['write_ms_p50']:.1f} ms",
                    f"{row['write_ms_p99']:.1f} ms",
                    f"{row['read_ms_p50']:.1f} ms",
                    f"{row['read_ms_p99']:.1f} ms",
                    f"{row['reopen_seconds']:.2f} s",
                    output.human_bytes(row["file_bytes"]),
                    output.human_bytes(row["index_bytes"]),
                )
                for row in result["sizes"]
            ],
            right=names,
        )
        if result["read_ms_per_1000_notes"] is not None:
            output.say(f"a read costs {result['read_ms_per_1000_notes']:.3f} ms more for every 1,000 notes")
    if save:
        output.say(f"saved {output.save(result, kind='speed')}")
    if not as_json and not save:
        output.next_command("loci bench speed --json --save ...", "keeps every figure with its recipe")


def _show(result: Result) -> None:
    rows = [arm.as_json() for arm in result.arms]
    names = ["arm", "recall@10", "recall@20", "all@20", "F1", "refusal", "tokens", "read", "held"]
    output.table(
        names,
        [
            (
                row["arm"],
                _with_error(row, "recall@10"),
                _with_error(row, "recall@20"),
                _with_error(row, "all@20"),
                _with_error(row, "f1"),
                _with_error(row, "refusal"),
                None if row["tokens_per_answer"] is None else f"{row['tokens_per_answer']:.0f}",
                None if row["read_ms_p50"] is None else f"{row['read_ms_p50']:.0f} ms",
                output.human_bytes(row["bytes_held"]),
            )
            for row in rows
        ],
        right=names[1:],
    )
    for each in result.as_json()["comparisons"]:
        output.say(
            f"{each['arm']} against {each['against']}, {each['measure']}: {each['difference']:+.3f} "
            f"({each['low']:+.3f} to {each['high']:+.3f})"
        )
    about = result.recipe
    output.say(f"{about['examples']} questions, seed {about['seed']}, loci {about['loci']['version']}")


def _with_error(row: dict[str, Any], measure: str) -> str | None:
    if row[measure] is None:
        return None
    error = row["standard_errors"][measure]
    return f"{row[measure]:.3f}" if error is None else f"{row[measure]:.3f} ±{error:.3f}"
