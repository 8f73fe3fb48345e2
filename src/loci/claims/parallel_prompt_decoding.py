"""Parallel Prompt Decoding's headline, measured here: three trained embeddings guess distant tokens better than heads.

Guesses are compared on texts that the model writes for the purpose, to prompts that no drafter learned from. What they
are worth is counted on Spec-Bench at four sizes of a step, beside plain decoding and Medusa.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from loci.claims.base import Claim, Measured, Progress
from loci.claims.drafting import medusa_guesses

CLAIM = Claim(
    system="parallel_prompt_decoding",
    paper="arXiv:2405.18628, abstract and the comparison of accuracies with Medusa by distance (MobileLLaMA, Vicuna)",
    says=(
        "prompt tokens, 0.0002 % of the model's numbers, guess distant tokens better than Medusa's heads, top-10 "
        "accuracy 0.03 higher two tokens ahead and 0.12 higher four ahead; generation is up to 2.49 times as fast"
    ),
    here=(
        "SmolLM2-135M-Instruct with the 1,728 numbers and the Medusa heads that ship for it; top-10 accuracy 2, 3 and "
        "4 tokens ahead on 6,000 tokens of greedy answers to instructions kept out of all training; tokens a step for "
        "12 Spec-Bench questions x 128 tokens at 16, 32, 64 and 105 rows"
    ),
    differs=(
        "a model a fiftieth of the size; Medusa's heads share the model's output layer; both learned from the same "
        "texts that the model wrote, for the minutes that are told; speed on a processor, where rows are not free, is "
        "told and not judged"
    ),
    minutes=9.0,
)


def measure(
    *,
    model: str = "default",
    questions: int = 12,
    max_new_tokens: int = 128,
    kept_out_tokens: int = 6000,
    rows: tuple[int, ...] = (16, 32, 64, 105),
    progress: Progress | None = None,
) -> Measured:
    """Accuracies by distance, and tokens per step by rows as predicted and as counted.

    Args:
        kept_out_tokens: of answers that the guesses are tried on.

    Raises:
        DataNotFound: the instructions or Spec-Bench's questions are absent.
        ModelNotFound: prompt tokens or heads are absent; the message says how to train them.
    """
    from loci.bench import medusa_recipe, probe_recipe
    from loci.decoding import distill, names, ppd
    from loci.lm import load
    from loci.lm.train import load_artifact

    told = progress or (lambda what, done, steps: None)
    loaded = load(model)
    part, heads = (names.trained_part(name, loaded) for name in ("ppd", "medusa"))
    drafter = ppd.load(part, loaded)
    told("writing texts", 0, 4)
    texts = distill.self_distill(
        loaded, distill.read_instructions()[1], tokens=kept_out_tokens, temperatures=(0.0,), user_turns=0,
        openings=False, progress=False,
    )  # fmt: skip
    told("guessing", 1, 4)
    others = {"medusa": medusa_guesses(loaded, heads, texts)}
    table = probe_recipe.accuracy_table(loaded, texts, prompt=drafter.prompt, others=others)
    told("counting", 2, 4)
    asked = medusa_recipe.prompts(loaded, limit=questions)
    accuracies, make = np.array(drafter.trees.accuracies), probe_recipe.makes_ppd(drafter.prompt)
    plain = probe_recipe.counted(loaded, lambda: None, asked, rows=1, max_new_tokens=max_new_tokens)
    counted = probe_recipe.sizes(loaded, make, accuracies, asked, limits=rows, max_new_tokens=max_new_tokens)
    told("the same words in float32", 3, 4)
    exact = load(model, dtype="float32")
    same = probe_recipe.identical(exact, lambda: ppd.load(part, exact), asked[: max(1, questions // 2)])
    sizes: dict[str, Any] = {
        str(row.limit): asdict(row) | {"ratio_to_plain": row.tokens_per_second / plain.decode_tokens_per_second}
        for row in counted
    }
    return {
        "accuracies": {row.name: asdict(row) for row in table},
        "ahead_of_medusa": list(probe_recipe.gaps(table[0], table[1])),
        "trained_minutes": {"ppd": load_artifact(part).minutes, "medusa": load_artifact(heads).minutes},
        "sizes": sizes,
        "plain": {"engine": plain.engine, "tokens_per_second": plain.decode_tokens_per_second},
        "float32": asdict(same),
    }


def holds(measured: Measured) -> bool:
    """Top-10 accuracy no lower than Medusa's 3 and 4 tokens ahead, and further ahead of it with every token."""
    two, three, four = measured["ahead_of_medusa"][:3]
    return bool(three >= 0.0 and four >= 0.0 and two < three < four)
