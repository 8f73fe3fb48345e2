"""`loci generate`: a language model continues a prompt, word by word."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from loci import settings
from loci.cli import output
from loci.errors import BadInput, BadModel

if TYPE_CHECKING:
    from loci.lm.chat import Message
    from loci.lm.generate import GenerationStats, StreamChunk
    from loci.lm.model import LanguageModel


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or to answer; '-' reads it from standard input.")],
    model: Annotated[
        str | None,
        typer.Option(help="'default', a hub name, a folder or a GGUF file; else LOCI_MODEL.", show_default=False),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue the bare text, without the chat layout.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast it was, on standard error.")] = False,
    as_json: output.Json = False,
) -> None:
    """Continue a prompt with a language model.

    A model that has a chat layout answers the prompt as a message; `--plain` continues the text as it stands.

    \b
    Examples:
      loci generate "Three uses of a memory palace:"
      loci generate --temperature 0.7 --seed 1 "A haiku about forgetting"
      echo "The capital of France is" | loci generate - --plain --max-new-tokens 5
    """
    words = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not words.strip():
        raise BadInput("the prompt holds no words; give some, or '-' to read them from standard input.")
    from loci.lm import Sampling, load, stream

    loaded = load(model or settings.model())
    pieces: list[str] = []
    last: StreamChunk | None = None
    for last in stream(
        loaded,
        _laid_out(words, loaded, plain=plain),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p),
        seed=seed,
    ):
        pieces.append(last.text)
        if not as_json:
            output.data(last.text, end="")
    if last is None:
        raise BadModel(f"{loaded.name} gave not even one token; `loci doctor` examines the model.")
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


def _show(stats: GenerationStats) -> None:
    output.say(
        f"{stats.new_tokens} tokens in {output.human_seconds(stats.seconds)}, "
        f"{stats.decode_tokens_per_second:.1f} a second after the prompt; "
        f"the first after {output.human_seconds(stats.first_token_seconds)}"
    )
    output.say(
        f"prompt {stats.prompt_tokens} tokens in {output.human_seconds(stats.prefill_seconds)}; "
        f"{stats.tokens_per_step:.2f} tokens a step; engine {stats.engine}, drafter {stats.drafter or 'none'}"
    )
    output.say(f"held: model {output.human_bytes(stats.model_bytes)}, cache {output.human_bytes(stats.kv_bytes_peak)}")


def _laid_out(words: str, model: LanguageModel, *, plain: bool) -> str | list[Message]:
    from loci.lm.chat import Message

    if plain or not model.tokenizer.chat_template:
        return words
    return [Message(role="user", content=words)]
