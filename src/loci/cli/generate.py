"""`loci generate`: a language model continues a prompt, word by word."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loci import settings
from loci.cli import output
from loci.errors import BadInput, BadModel, UnknownName

if TYPE_CHECKING:
    from loci.decoding.rapid import Prepared
    from loci.lm.chat import Message
    from loci.lm.generate import GenerationStats, StreamChunk
    from loci.lm.model import LanguageModel
    from loci.lm.verify import Acceptance


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or to answer; '-' reads it from standard input.")],
    model: Annotated[
        str | None,
        typer.Option(help="'default', a hub name, a folder or a GGUF file; else LOCI_MODEL.", show_default=False),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the bare text, without the chat layout.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from this share of probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many tokens; 0 draws from all.")] = 0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Drop tokens below this share of the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    drafter: Annotated[
        str,
        typer.Option(
            help="Who guesses ahead: auto, none, lookup, recycle, medusa:PATH, ppd:PATH, hidden:PATH or rsd:PATH. Every"
            " guess is checked, so only the speed changes. With --context also rapid, which moves the model towards"
            " what passages of the context say."
        ),
    ] = "auto",
    accept: Annotated[
        str | None,
        typer.Option(
            help="exact, or typical: also take guesses that the model finds plausible; not exact. For rapid: exact,"
            " shifted (its own, not exact) or paper.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="A text file that the prompt is about; it is put before the prompt.", show_default=False),
    ] = None,
    eta: Annotated[float, typer.Option(min=0.0, help="How far rapid moves the model; 0 leaves it as it is.")] = 10.0,
    draft_model: Annotated[
        str | None,
        typer.Option(help="Who reads the passages for rapid; else the model itself.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the model: auto, native, packed, cuda or hf.")] = "auto",
    max_nodes: Annotated[
        int | None, typer.Option(min=1, help="Largest tree of guesses, its root included; else 16.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Cores to use; else torch's own choice.", show_default=False)
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast it was, on standard error.")] = False,
    as_json: output.Json = False,
) -> None:
    """Continue a prompt with a language model.

    A model that has a chat layout answers the prompt as a message; `--plain` continues the text as it stands. Several
    tokens are guessed and checked at once where that is faster; the words are the same as without (`--drafter none`).

    \b
    Examples:
      loci generate "Three uses of a memory palace:"
      loci generate --temperature 0.7 --seed 1 "A haiku about forgetting"
      loci generate --drafter lookup --stats "Repeat this sentence three times: ..."
      loci generate --context book.txt --drafter rapid --stats "Who lives in Baker Street?"
      echo "The capital of France is" | loci generate - --plain --max-new-tokens 5
    """
    words = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not words.strip():
        raise BadInput("the prompt holds no words; give some, or '-' to read them from standard input.")
    if drafter == "rapid" and context is None:
        raise BadInput("the drafter 'rapid' drafts from passages of a long text; name its file with --context FILE.")
    text = None if context is None else _read(context)
    from loci.lm import Sampling, load, stream

    if threads is not None:
        from loci.lm.threads import use_threads

        use_threads(threads)
    loaded = load(model or settings.model())
    given: dict[str, Any] = {"drafter": drafter, "acceptance": None, "max_nodes": max_nodes or "auto"}
    ready = None
    if drafter == "rapid" and text is not None:
        ready = _rapid(loaded, text, words, accept=accept, eta=eta, draft_model=draft_model, engine=engine, plain=plain)
        given = {"drafter": ready.drafter, "acceptance": ready.acceptance, "max_nodes": max_nodes or ready.max_nodes}
    else:
        given["acceptance"] = _acceptance(accept or "exact")
    pieces: list[str] = []
    last: StreamChunk | None = None
    for last in stream(
        loaded,
        ready.prompt if ready is not None else _laid_out(words, loaded, context=text, plain=plain),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        seed=seed,
        engine=engine,
        **given,
    ):
        pieces.append(last.text)
        if not as_json:
            output.data(last.text, end="")
    if last is None:
        raise BadModel(f"{loaded.name} gave not even one token; `loci doctor` examines the model.")
    if ready is not None:
        ready.count(last.stats)
    if as_json:
        output.print_json(
            {
                "model": loaded.name,
                "prompt": words,
                "text": "".join(pieces),
                "finish_reason": last.finish_reason,
                "stats": last.stats,
            }
        )
        return
    output.data("")
    if stats:
        _show(last.stats)
    else:
        output.next_command("loci generate --stats ...", "says how fast it was")


def _acceptance(name: str) -> Acceptance | None:
    if name == "exact":
        return None
    if name != "typical":
        raise UnknownName.among("way to accept guesses", name, ["exact", "typical"])
    from loci.decoding.medusa import TypicalAcceptance

    return TypicalAcceptance()


def _read(file: Path) -> str:
    try:
        text = file.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--context {file} cannot be read as a text in UTF-8: {error}.") from error
    if not text.strip():
        raise BadInput(f"--context {file} holds no words.")
    return text


def _rapid(
    model: LanguageModel,
    context: str,
    words: str,
    *,
    accept: str | None,
    eta: float,
    draft_model: str | None,
    engine: str,
    plain: bool,
) -> Prepared:
    from loci.decoding import rapid

    laws: dict[str, rapid.TargetLaw] = {"exact": "lossless", "shifted": "shifted", "paper": "paper"}
    if accept is not None and accept not in laws:
        raise UnknownName.among("way of rapid to accept guesses", accept, laws)
    return rapid.prepare(
        model,
        context,
        words,
        draft_model=draft_model,
        eta=eta,
        law=laws[accept or "shifted"],
        draft_engine=engine,
        plain=plain,
    )


def _show(stats: GenerationStats) -> None:
    output.say(
        f"{stats.new_tokens} tokens in {output.human_seconds(stats.seconds)}, "
        f"{stats.decode_tokens_per_second:.1f} a second after the prompt; "
        f"the first after {output.human_seconds(stats.first_token_seconds)}"
    )
    output.say(
        f"prompt {stats.prompt_tokens} tokens in {output.human_seconds(stats.prefill_seconds)}; "
        f"engine {stats.engine}, drafter {stats.drafter or 'none'}, exact {'yes' if stats.exact else 'no'}"
    )
    if stats.drafter is not None and stats.steps:
        each = 1000 / stats.steps
        output.say(
            f"{stats.tokens_per_step:.2f} tokens a step, {stats.proposed_nodes / stats.steps:.1f} guesses of which "
            f"{stats.acceptance:.0%} came true; a step {each * stats.step_seconds:.1f} ms, guessing "
            f"{each * stats.draft_seconds:.2f} ms"
        )
    for note in stats.notes:
        output.say(note)
    held = [f"model {output.human_bytes(stats.model_bytes)}", f"cache {output.human_bytes(stats.kv_bytes_peak)}"]
    if stats.drafter is not None:
        held.append(f"drafter {output.human_bytes(stats.drafter_bytes)}")
    output.say(f"held: {', '.join(held)}")
    if stats.drafter is not None:
        output.next_command("loci bench decode --limit 12", "measures it beside plain decoding, the only fair way")


def _laid_out(words: str, model: LanguageModel, *, context: str | None, plain: bool) -> str | list[Message] | list[int]:
    from loci.lm.chat import Message

    if context is not None:
        from loci.decoding.rapid import prompt

        return prompt(model, model.tokenizer.encode(context, add_special_tokens=False), words, plain=plain)
    if plain or not model.tokenizer.chat_template:
        return words
    return [Message(role="user", content=words)]
