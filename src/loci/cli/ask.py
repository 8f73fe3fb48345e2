"""`loci ask`: an answer from memory, with the notes it rests on."""

from __future__ import annotations

from typing import Annotated

import typer

from loci.cli import memories, output


def ask(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to answer; '-' reads standard input.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many notes the answer may rest on.")] = 20,
    why: Annotated[bool, typer.Option("--why", help="Show the notes that were considered, with their scores.")] = False,
    at: memories.At = None,
    db: memories.Database = None,
    space: memories.Space = "default",
    embedder: memories.EmbedderName = "auto",
    model: memories.Model = None,
    base_url: memories.BaseUrl = None,
    as_json: output.Json = False,
) -> None:
    """Answer a question from what was remembered.

    The answer's sources stand below it. Where the notes do not hold an answer, that is the answer.

    \b
    Examples:
      loci ask "When does the ferry leave?"
      loci ask "What did Ada plan for last week?" --at "9 May 2026" --why
      loci ask "Who mended the roof?" --json
    """
    words = memories.given_words(question, "the question")
    with memories.opened(db, space, embedder=embedder, model=memories.chat_model(model, base_url)) as memory:
        answer = memory.ask(words, k=k, at=at, why=why)
    if as_json:
        output.print_json({"question": words, **output.as_plain(answer)})
        return
    memories.show_answer(answer)
    if why:
        output.say(
            f"confidence {answer.confidence:.2f}, {answer.tokens_in:,} tokens in, {answer.tokens_out} out, "
            f"{output.human_seconds(answer.seconds)}"
        )
        if answer.considered:
            memories.found_table(answer.considered, why=True)
    output.next_command(
        'loci recall "..."' if why else 'loci ask "..." --why',
        "shows the nearest notes alone" if why else "shows what was considered",
    )
