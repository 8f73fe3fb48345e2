"""Hidden transfer's headline, measured here: guesses that pass through the upper layers are better than guesses made
after them.

The same linear map is trained here in the middle and before the final norm, for the same time on the same texts; the
maps that ship are held against the Medusa heads that ship. What they are worth is counted on Spec-Bench.
"""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np

from loci.claims.base import Claim, Measured, Progress
from loci.claims.drafting import medusa_guesses

CLAIM = Claim(
    system="hidden_transfer",
    paper="arXiv:2404.12022, abstract and the comparison of accuracies by token",
    says=(
        "pseudo hidden states that are put in midway and refined by the remaining layers guess the next tokens better "
        "than Medusa's heads, and accelerate more than other single-model methods without loss"
    ),
    here=(
        "SmolLM2-135M-Instruct; top-1 accuracy 2, 3 and 4 tokens ahead on 40 greedy answers kept out of all training: "
        "linear maps trained here for 5 minutes each before layer 12 and after layer 30, and the maps and Medusa heads "
        "that ship; tokens a step for 12 Spec-Bench questions x 128 tokens at 32 and 64 rows"
    ),
    differs=(
        "a model a fiftieth of the size; one linear map a token, added to the state it starts from; trained on text "
        "that the model wrote; the paper's further comparisons are not repeated"
    ),
    minutes=16.0,
)


def measure(
    *,
    model: str = "default",
    minutes: float = 5.0,
    kept_out: int = 40,
    questions: int = 12,
    max_new_tokens: int = 128,
    rows: tuple[int, ...] = (32, 64),
    progress: Progress | None = None,
) -> Measured:
    """Accuracies by distance of all four, and tokens per step by rows beside Medusa and plain decoding.

    Args:
        minutes: of each of the two trainings.
        kept_out: texts that the guesses are tried on.

    Raises:
        DataNotFound: the texts of `loci draft distill`, or Spec-Bench's questions, are absent.
        ModelNotFound: maps or heads are absent; the message says how to train them.
    """
    from loci.bench import medusa_recipe, probe_recipe
    from loci.bench.draft_recipes import read_texts
    from loci.decoding import distill, hidden_transfer, medusa, names
    from loci.lm import load
    from loci.lm.train import load_artifact

    told = progress or (lambda what, done, steps: None)
    loaded = load(model)
    part, heads = (names.trained_part(name, loaded) for name in ("hidden", "medusa"))
    drafter = hidden_transfer.load(part, loaded)
    texts = read_texts(distill.folder())
    held = texts.kept_out[:kept_out]
    middle, last = drafter.transfer.layers[0], int(loaded.model.config.get_text_config().num_hidden_layers)
    told("training in the middle and at the end", 0, 4)
    trained = probe_recipe.layer_table(
        loaded, texts.training, held, candidates=(middle, last), minutes=minutes, progress=False
    )
    told("guessing", 1, 4)
    others = {"medusa": medusa_guesses(loaded, heads, held)}
    shipped, rival = probe_recipe.accuracy_table(loaded, held, transfer=drafter.transfer, others=others)
    told("counting", 2, 4)
    asked = medusa_recipe.prompts(loaded, limit=questions)
    accuracies, make = np.array(drafter.trees.accuracies), probe_recipe.makes_hidden(drafter.transfer)
    plain = probe_recipe.counted(loaded, lambda: None, asked, rows=1, max_new_tokens=max_new_tokens)
    sizes: dict[str, Any] = {}
    for row in probe_recipe.sizes(loaded, make, accuracies, asked, limits=rows, max_new_tokens=max_new_tokens):
        beside = probe_recipe.counted(
            loaded, lambda: medusa.load(heads, loaded), asked, rows=row.limit, max_new_tokens=max_new_tokens
        )
        sizes[str(row.limit)] = asdict(row) | {
            "ratio_to_plain": row.tokens_per_second / plain.decode_tokens_per_second,
            "medusa": beside.tokens_per_step,
        }
    told("the same words in float32", 3, 4)
    exact = load(model, dtype="float32")
    same = probe_recipe.identical(exact, lambda: hidden_transfer.load(part, exact), asked[: max(1, questions // 2)])
    return {
        "accuracies": {
            "middle": asdict(trained[middle]),
            "last": asdict(trained[last]),
            "shipped": asdict(shipped),
            "medusa": asdict(rival),
        },
        "trained_minutes": {"shipped": load_artifact(part).minutes, "medusa": load_artifact(heads).minutes},
        "sizes": sizes,
        "plain": {"engine": plain.engine, "tokens_per_second": plain.decode_tokens_per_second},
        "float32": asdict(same),
    }


def holds(measured: Measured) -> bool:
    """Transferred in the middle, top-1 accuracy is 3 points higher than at the last layer at every distance; what ships
    is 2 points above Medusa in the mean of the tokens 3 and 4 ahead."""
    middle, last, shipped, medusa = (
        measured["accuracies"][name]["top1"][:3] for name in ("middle", "last", "shipped", "medusa")
    )
    refined = all(high - low >= 0.03 for high, low in zip(middle, last, strict=True))
    return bool(refined and fmean(shipped[1:]) - fmean(medusa[1:]) >= 0.02)
