"""`loci draft`: make the trained drafters again, and fit drafters to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loci import settings
from loci.cli import output
from loci.cli.app import Row, group

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

ROWS = {
    "distill": Row("loci.cli.draft:distill", "Let the model write the texts that drafters learn from."),
    "train": Row("loci.cli.draft:train", "Train a drafter."),
    "tune": Row("loci.cli.draft:tune", "Fit a drafter to this machine."),
}

draft = group(
    """Make drafters: what guesses ahead while text is generated.

    \b
    Examples:
      loci draft distill --tokens 800000
      loci draft train ppd --out drafters/ppd
      loci draft tune ppd:drafters/ppd
    """,
    ROWS,
)

_CONTEXT = 256  # tokens behind which steps are compared

_Model = Annotated[
    str | None,
    typer.Option(help="'default', a hub name, a folder or a GGUF file; else LOCI_MODEL.", show_default=False),
]
_Instructions = Annotated[
    Path | None,
    typer.Option(help="A folder with the prompts; unless given, instructions in LOCI_DATA.", show_default=False),
]


def _loaded(model: str | None) -> LanguageModel:
    from loci.lm import load

    return load(model or settings.model())


def distill(
    model: _Model = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the texts go; else a folder of the user's cache.", show_default=False)
    ] = None,
    data: _Instructions = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model writes in all.")] = 800_000,
    kept_out: Annotated[int, typer.Option(min=1, help="Tokens of greedy answers to prompts kept out.")] = 40_000,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="What runs the model: auto, native, packed, cuda or hf.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the drawn answers.")] = 0,
    as_json: output.Json = False,
) -> None:
    """Let the model write the texts that drafters learn from.

    It answers prompts, plays the user and invents questions of its own. Interrupted work is taken up again. 800,000
    tokens take about twenty minutes on two cores.

    \b
    Examples:
      loci draft distill
      loci draft distill --tokens 20000 --out texts --data ../shared/data/instructions
    """
    from loci.bench import draft_recipes
    from loci.decoding.distill import folder

    texts = draft_recipes.write_texts(
        _loaded(model),
        out or folder(),
        instructions=data,
        tokens=tokens,
        kept_out_tokens=kept_out,
        seed=seed,
        engine=engine,
        minutes=minutes,
    )
    if as_json:
        output.print_json({"folder": texts.folder, "texts": len(texts.training), "kept_out": len(texts.kept_out)})
        return
    output.data(str(texts.folder))
    output.say(f"{len(texts.training)} texts to train on, {len(texts.kept_out)} kept out")
    output.next_command("loci draft train ppd --out DIR", "trains a drafter on them")


def train(
    name: Annotated[str, typer.Argument(help="medusa, ppd, hidden or rsd.")],
    out: Annotated[Path, typer.Option(help="Where checkpoints and the trained part go.", show_default=False)],
    model: _Model = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts of `loci draft distill`; else those in the cache.", show_default=False)
    ] = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="2 trains Medusa's model along with its heads.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after so long.", show_default=False)] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores to use; else torch's own choice.", show_default=False)
    ] = None,
    as_json: output.Json = False,
) -> None:
    """Train a drafter.

    It learns from texts that the model wrote itself (`loci draft distill`), and belongs to exactly these weights.

    \b
    Examples:
      loci draft train ppd --out drafters/ppd
      loci draft train medusa --out drafters/medusa --minutes 30
      loci draft train medusa --out drafters/medusa2 --stage 2 --resume
    """
    from loci.bench import draft_recipes
    from loci.decoding.distill import folder
    from loci.errors import UnknownName
    from loci.lm.threads import use_threads

    if name not in draft_recipes.RECIPES:
        raise UnknownName.among("trained drafter", name, draft_recipes.RECIPES)
    use_threads(threads)
    read = draft_recipes.read_texts(texts or folder())
    made = draft_recipes.train(name, _loaded(model), read, folder=out, resume=resume, minutes=minutes, stage=stage)
    if as_json:
        output.print_json(made)
        return
    output.data(str(made.path))
    output.next_command(f"loci bench decode --drafter {name}:{out}", "measures what it is worth")


def tune(
    drafter: Annotated[str, typer.Argument(help="ppd:PATH, hidden:PATH, or recycle.")],
    model: _Model = None,
    engine: Annotated[str, typer.Option(help="Which engine it is for: auto, native, packed, cuda or hf.")] = "auto",
    data: _Instructions = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="recycle: answer so many prompts.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="recycle: longest answer.")] = 128,
    as_json: output.Json = False,
) -> None:
    """Fit a drafter to this machine.

    For prompt tokens and hidden transfer a step is timed at several sizes, and the size of tree that gives most tokens
    per second is kept in the cache. For recycling, prompts are answered and the best trees of 15 and 31 nodes are told;
    its matrix is filled from single tokens once, which takes half a minute, and kept in the cache.

    \b
    Examples:
      loci draft tune ppd:drafters/ppd --engine native
      loci draft tune recycle --limit 60
    """
    loaded = _loaded(model)
    with output.steps() as progress:
        if drafter == "recycle":
            from loci.bench.draft_recipes import prompts_for_counting
            from loci.decoding.token_recycling import TokenRecycling, best_template, count_hits, warm_file, written

            prompts = prompts_for_counting(data, limit)
            counted = count_hits(loaded, prompts, max_new_tokens=max_new_tokens, engine=engine, progress=progress)
            steps = counted.offer_counts[(0,)]
            shares = {"".join(map(str, path)): hits / steps for path, hits in counted.hit_counts.most_common()}
            trees = {str(nodes): written(best_template(counted.hit_counts, nodes)) for nodes in (15, 31)}
            TokenRecycling.warm(loaded)
            if as_json:
                output.print_json({"steps": steps, "shares": shares, "templates": trees, "warm": warm_file(loaded)})
            else:
                output.table(["nodes", "tree"], list(trees.items()))
                output.say(f"counted over {steps} steps; the matrix of single tokens lies in {warm_file(loaded)}")
            return
        from loci.bench.draft_recipes import tune as fit
        from loci.lm.cost import StepCost
        from loci.lm.engine.choose import choose

        runs_on = choose(loaded, name=engine)
        progress(f"timing steps on {runs_on.name}", 0, 1)
        cost = StepCost.of(loaded, runs_on)
        rows = fit(drafter, loaded, engine=runs_on.name, cost=lambda nodes: cost(nodes, _CONTEXT))
    times = {nodes: 1000 * cost(nodes, _CONTEXT) for nodes in cost.nodes}
    if as_json:
        output.print_json({"engine": runs_on.name, "rows": rows, "step_ms": times})
        return
    output.table(["rows", "step"], [(nodes, f"{ms:.1f} ms") for nodes, ms in times.items()], right=["rows", "step"])
    output.say(cost.summary())
    output.say(f"{drafter} drafts trees of {rows} rows on the engine {runs_on.name} from now on")
    output.next_command(f"loci bench decode --drafter {drafter}", "measures what it is worth")
