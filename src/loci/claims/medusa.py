"""Medusa's headline on Spec-Bench, measured here: heads on a frozen model make it faster and change no word.

Speed is measured on the fastest engine and on unmodified transformers, each beside plain decoding; the same words in
float32, where exactness is claimed; what heads add to drafters that train nothing; and what the tree is worth.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from loci.claims.base import Claim, Measured, Progress
from loci.claims.drafting import decoded, first_engine

CLAIM = Claim(
    system="medusa",
    paper="arXiv:2401.10774, abstract and the speed-ups on MT-bench (Vicuna 7B and 13B, one A100)",
    says=(
        "with heads alone trained (Medusa-1) generation is more than 2.2 times as fast without a loss of quality: "
        "about 1.5 by the heads, 1.9 with tree attention, 2.2 with a calibrated tree"
    ),
    here=(
        "SmolLM2-135M-Instruct with the heads that ship for it, trees of at most 16 nodes, 24 Spec-Bench questions, at "
        "most 128 tokens each, greedy, on the fastest engine of this machine and on transformers; half of them again "
        "in float32"
    ),
    differs=(
        "a model a fiftieth of the size; four heads that share the model's own output layer and know 8,192 tokens; 15 "
        "nodes instead of 63, because a processor pays for each; trained on text that the model wrote; Medusa-2 is not "
        "measured"
    ),
    minutes=11.0,
)

NODES = 16  # root included


def measure(
    *, model: str = "default", questions: int = 24, max_new_tokens: int = 128, progress: Progress | None = None
) -> Measured:
    """Speed on both engines, the share of the same words in float32, the gain in a blend, and trees of one size.

    Raises:
        ModelNotFound: no heads ship for the model; the message says how to train them.
    """
    from loci.bench import medusa_recipe as recipe
    from loci.bench.decode import DecodeConfig
    from loci.decoding import medusa, names
    from loci.lm import load

    loaded = load(model)
    drafter = medusa.load(names.trained_part("medusa", loaded), loaded)
    fewer = max(1, questions // 2)
    common: dict[str, Any] = {"drafters": ("medusa",), "max_nodes": NODES, "timings": False}
    figures: dict[str, Any] = {}
    for name, engine in (("fastest", "auto"), ("transformers", "hf")):
        config = DecodeConfig(**common, engines=(engine,), limit=questions, max_new_tokens=max_new_tokens)
        figures[name] = decoded(loaded, config, progress=progress)
    exact = DecodeConfig(**common, engines=("hf",), limit=fewer, max_new_tokens=max(1, max_new_tokens // 2))
    figures["float32"] = decoded(load(model, dtype="float32"), exact, progress=progress)
    told = progress or (lambda what, done, steps: None)
    told("blends", 0, 2)
    asked = recipe.prompts(loaded, limit=questions)
    figures["blend"] = recipe.main_bar(loaded, drafter, asked, nodes=NODES, new_tokens=max_new_tokens)
    told("trees", 1, 2)
    values = np.array(drafter.accuracies, dtype=np.float64)
    rows = recipe.ladder(
        loaded, drafter.heads, values, asked[:fewer], nodes=(NODES,), draws=2, new_tokens=max_new_tokens
    )
    figures["trees"] = {row.name: asdict(row) for row in rows}
    return figures


def holds(measured: Measured) -> bool:
    """1.7 tokens a step; 1.15 times plain decoding's speed on the fastest engine and 1.3 times on transformers; the
    same words in float32; 10 % more tokens a step in a blend."""
    fastest, slow, exact = (first_engine(measured[name])["medusa"] for name in ("fastest", "transformers", "float32"))
    fast = fastest["tokens_per_step"] >= 1.7 and fastest["ratio_to_plain"] >= 1.15 and slow["ratio_to_plain"] >= 1.3
    return bool(fast and exact["identical"] == 1.0 and measured["blend"]["blend_gain"] >= 0.10)
