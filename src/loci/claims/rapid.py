"""RAPID's headline, measured here: with passages for a drafter, a model finds a fact that it loses in a long context.

Quality, acceptance and speed are taken from one model that is target and drafter at once. The bars are those of
`loci.bench.rapid_recipe`; what is too long for a claim (every eta at two lengths, 16,384 and 32,768 tokens) is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loci.bench import rapid_recipe
from loci.claims.base import Claim, Measured, Progress

CLAIM = Claim(
    system="rapid",
    paper="arXiv:2502.20330, tables 1 and 2 (LLaMA-3.1-8B, self-speculation, eta 10)",
    says=(
        "InfiniteBench rises from 39.33 (the long context alone) to 42.83 with RAPID, more than with the passages alone"
        " (40.40); 75-85 % of drafts are accepted instead of 60-70 %; decoding is 2.10 times as fast beyond 32K tokens"
    ),
    here=(
        "SmolLM2-135M-Instruct, bfloat16, as target and drafter; 40 questions for a code in 6,000 tokens of a book with"
        " three other people's codes, greedy; acceptance at temperature 1; speed at 4,000 and 7,500 tokens; seed 0"
    ),
    differs=(
        "a model of 135 million parameters with a window of 8,192 tokens: no gain in speed is expected below the length"
        " where the cache outweighs the weights, and the parts of a step must foretell what is measured. Chunks of 128"
        " tokens and a budget of an eighth of the context. The paper's benchmarks are not used"
    ),
    minutes=15.0,
)

TOKENS, QUESTIONS = 6000, 40
LENGTHS = (4000, 7500)
ARMS = ("long", "rag", "rapid 0", "rapid 2", "rapid 5", "rapid 10", "random 10")


def measure(
    *,
    tokens: int = TOKENS,
    questions: int = QUESTIONS,
    arms: Sequence[str] = ARMS,
    acceptance_questions: int = 6,
    acceptance_tokens: int = 64,
    lengths: Sequence[int] = LENGTHS,
    speed_tokens: int = 64,
    engine: str = "auto",
    progress: Progress | None = None,
) -> Measured:
    """Answers by arm, acceptance by eta, and speed by length. Smaller sizes make a quick look, not a claim.

    Args:
        tokens: of a question's context.
        lengths: of the contexts that are timed; none leaves speed out.
    """
    from loci.lm import load

    model = load("default")
    bench = rapid_recipe.Bench(model, engine=engine)
    asked = rapid_recipe.needles(model, tokens=tokens, count=questions)
    found = rapid_recipe.answers(bench, asked, arms, progress=progress)
    figures: dict[str, Any] = {"answers": rapid_recipe.table(found), "random_pairs": rapid_recipe.random_pairs()}
    figures["acceptance"] = rapid_recipe.acceptance(
        bench, asked[:acceptance_questions], tokens=acceptance_tokens, progress=progress
    )
    figures["speed"] = []
    for number, length in enumerate(lengths):
        if progress is not None:
            progress("speed", number, len(lengths))
        (needle,) = rapid_recipe.needles(model, tokens=length, count=1)
        figures["speed"].append(rapid_recipe.speed(bench, needle, tokens=speed_tokens).row())
    return figures


def holds(measured: Measured) -> bool:
    """All bars: 30 points above the long context; 5 points more accepted drafts; a speed foretold within 15 %; and what
    must hurt hurts."""
    return all(bars(measured).values())


def bars(measured: Measured) -> dict[str, bool]:
    """Each bar by name."""
    answers, acceptance = measured["answers"], measured["acceptance"]
    right = {name: row["right"] for name, row in answers.items()}
    return {
        "30 points above the long context": right["rapid 10"] >= right["long"] + 0.30,
        "without the shift no more than the long context": right["rapid 0"] <= right["long"] + 0.05,
        "random passages are worse": right["random 10"] <= right["rapid 10"] - 0.10,
        "5 points more accepted": acceptance["10"]["expected"] >= acceptance["0"]["expected"] + 0.05,
        "more tokens a step": acceptance["10"]["tokens_per_step"] > acceptance["0"]["tokens_per_step"],
        "the parts foretell the speed": all(row["error"] <= 0.15 for row in measured["speed"]),
        "slower at the shortest length": measured["speed"][0]["speedup"] < 1.0,
    }
