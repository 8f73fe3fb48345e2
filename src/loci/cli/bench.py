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
    "decode": Row("loci.cli.bench:decode", "How fast text is generated, with and without drafts."),
    "speed": Row("loci.cli.bench:speed", "How fast notes are written and read."),
}

bench = group(
    """Measure memories on a task.

    \b
    Examples:
      loci bench locomo --data ../shared/data/locomo --no-answers
      loci bench locomo --data ../shared/data/locomo --arm plain --arm amem --json
      loci bench speed --notes 10000
      loci bench decode --drafter auto --peers llama.cpp,transformers
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


def decode(
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with Spec-Bench's questions, or with books for --context; unless given, spec_bench or books"
            " in LOCI_DATA.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="'default', a hub name, a folder or a GGUF file; else LOCI_MODEL.", show_default=False),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="auto, lookup, recycle, medusa:PATH, ppd:PATH, hidden:PATH or rsd:PATH; repeat it."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="auto, native, packed, cuda or hf; repeat it for several.")
    ] = None,
    peers: Annotated[
        str | None, typer.Option(help="transformers, llama.cpp, or both with a comma between.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many questions only.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop each answer after so many tokens.")] = 256,
    max_nodes: Annotated[
        int | None, typer.Option(min=1, help="Largest tree, its root included; 16 unless given.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=128, help="Retell excerpts of books of so many tokens instead.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from this share of probability.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; exactness is claimed in float32.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores to use; torch's own choice unless given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of drawn tokens.")] = 0,
    no_timings: Annotated[
        bool, typer.Option("--no-timings", help="Do not time single steps and the reading of 2,048 tokens.")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep figures and recipe as a file in results/.")] = False,
    as_json: output.Json = False,
) -> None:
    """How fast text is generated, with and without drafts.

    Plain decoding on the same engine is always measured too, in turn with the drafters on every prompt. Drafters are
    compared with it, peers with their own plain decoding.

    \b
    Examples:
      loci bench decode --limit 12 --max-new-tokens 64
      loci bench decode --drafter lookup --drafter recycle --drafter auto --engine native --engine hf
      loci bench decode --drafter auto --peers llama.cpp,transformers --threads 2 --save
      loci bench decode --context 8000 --limit 4
    """
    from loci.bench import decode as task
    from loci.lm import load

    name = model or settings.model()
    config = task.DecodeConfig(
        drafters=tuple(drafter or ("auto",)),
        engines=tuple(engine or ("auto",)),
        peers=tuple(part.strip() for part in (peers or "").split(",") if part.strip()),
        limit=limit,
        max_new_tokens=max_new_tokens,
        max_nodes=max_nodes,
        context=context,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
        timings=not no_timings,
    )
    loaded = load(name, dtype=dtype)
    with output.steps() as progress:
        result = task.run(
            loaded, data or task.default_data(context), config=config, gguf=task.gguf_of(name), progress=progress
        )
    found = result.as_json()
    if as_json:
        output.print_json(found)
    else:
        _show_decoding(found)
    for peer, why in result.skipped.items():
        output.say(f"{peer} was left out: {why}")
    if save:
        output.say(f"saved {output.save(found, kind='decode')}")
    if not result.complete:
        raise KeyboardInterrupt
    if not as_json and not save:
        output.next_command("loci bench decode --json --save ...", "keeps every figure with its recipe")


def _show_decoding(found: dict[str, Any]) -> None:
    names = ["name", "engine", "tokens/step", "tokens/s", "to plain", "identical", "exact", "bytes", "prefill"]
    output.table(
        names,
        [
            (
                row["name"],
                row["engine"],
                _rounded(row["tokens_per_step"]),
                _rounded(row["tokens_per_second"], digits=1),
                _with_interval(row["ratio_to_plain"], row["ratio_to_plain_interval"]),
                _rounded(row["identical"]),
                {True: "yes", False: "no", None: None}[row["exact"]],
                output.human_bytes(row["bytes"]),
                None if row["prefill_ms_2048"] is None else f"{row['prefill_ms_2048']:.0f} ms",
            )
            for row in found["rows"]
        ],
        right=names[2:],
    )
    for row in found["rows"]:
        if row["kind"] != "drafter":
            continue
        told = [f"{task} {_rounded(each['tokens_per_step'])}" for task, each in row["tasks"].items()]
        output.say(f"{row['name']} on {row['engine']}, tokens a step: {', '.join(told)}")
        if row["largest_gap_at_difference"] is not None:
            output.say(
                f"{row['name']} on {row['engine']}: where a text differs first, the two highest logits lie at most"
                f" {row['largest_gap_at_difference']:.3f} apart"
            )
        for key, rival in (("ratio_to_llama_cpp", "llama.cpp"), ("ratio_to_best_transformers", "transformers")):
            if row[key] is not None:
                against = row[key].get("of", rival)
                output.say(
                    f"{row['name']} on {row['engine']}: {_with_interval(row[key]['ratio'], row[key]['interval'])} times"
                    f" the tokens a second of {against}"
                )
    for engine, by_context in found["step_ms"].items():
        for context, each in by_context.items():
            steps = ", ".join(f"{nodes} nodes {ms:.1f} ms" for nodes, ms in each.items())
            output.say(f"a step on {engine} behind {context:,} tokens: {steps}")
    about = found["recipe"]
    output.say(
        f"{about['examples']} prompts, seed {about['seed']}, {about['config']['threads']} threads,"
        f" {about['config']['dtype']}, loci {about['loci']['version']}"
    )


def _rounded(value: float | None, *, digits: int = 2) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _with_interval(value: float | None, interval: list[float] | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


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
