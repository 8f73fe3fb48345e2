"""What the claims of the drafters share: one decoding run beside plain decoding, and what guesses are held against.

A drafter's trained part is the one that ships with the package, or lies in the cache, for the model's weights;
`loci.decoding.names.trained_part` says how to make one that is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from loci import settings
from loci.claims.base import Progress

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float64

    from loci.bench.decode import DecodeConfig
    from loci.decoding.distill import DistilledText
    from loci.lm.model import LanguageModel

KEPT = (
    "tokens_per_step",
    "tokens_per_second",
    "ratio_to_plain",
    "ratio_to_plain_interval",
    "identical",
    "exact",
    "nodes_per_step",
    "ms_per_step",
    "bytes",
    "learning",
    "tasks",
)


def decoded(model: LanguageModel, config: DecodeConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Spec-Bench's questions answered by every arm of a decoding run: figures by engine and drafter, and the recipe.

    Raises:
        DataNotFound: Spec-Bench's questions are absent.
        ModelNotFound: a drafter's trained part is absent.
    """
    from loci.bench import decode

    result = decode.run(model, settings.data() / "spec_bench", config=config, progress=progress)
    if not result.complete:  # the run keeps what an interruption left; a claim judges the whole or nothing
        raise KeyboardInterrupt
    found = result.as_json()
    engines: dict[str, Any] = {}
    for row in found["rows"]:
        engines.setdefault(row["engine"], {})[row["name"]] = {name: row[name] for name in KEPT if name in row}
    return {"engines": engines, "prompts": len(result.prompts), "recipe": found["recipe"]}


def first_engine(run: dict[str, Any]) -> dict[str, Any]:
    """Figures by drafter on the first engine that a run of `decoded` asked for."""
    figures: dict[str, Any] = next(iter(run["engines"].values()))
    return figures


def medusa_guesses(
    model: LanguageModel, part: Path, texts: Sequence[DistilledText]
) -> tuple[int, Float64[np.ndarray, "step rank"]]:
    """How many numbers Medusa's heads have, and how often their guesses were right on these texts, from distance 2."""
    from loci.decoding import distill, medusa

    heads = medusa.load(part, model).heads
    with TemporaryDirectory() as folder:
        states = distill.teacher_pass(model, texts, Path(folder), progress=False)
        values = medusa.calibrate(heads, states)
    return sum(weight.numel() for weight in heads.parameters()), values
