"""Token Recycling's headline on Spec-Bench, measured here: tokens that were computed and thrown away draft the next
ones.

Both trees in turn, each beside plain decoding on the same engine: the one of 15 nodes for processors, with prompt
lookup as the other method that trains nothing, and the paper's own of 80.
"""

from __future__ import annotations

from loci.claims.base import Claim, Measured, Progress
from loci.claims.drafting import decoded, first_engine

CLAIM = Claim(
    system="token_recycling",
    paper="arXiv:2408.08696, abstract and the results on Spec-Bench (Vicuna 7B, 13B and 33B, greedy, one A100)",
    says=(
        "about twice the speed of plain decoding for models of every size, with less than 2 MB and no training; 30 % "
        "ahead of other methods that train nothing and 25 % ahead of Medusa"
    ),
    here=(
        "SmolLM2-135M-Instruct on the fastest engine of this machine, 24 Spec-Bench questions over its six tasks, at "
        "most 256 tokens each, greedy; an empty matrix, kept from question to question; trees of 15 and of 80 nodes"
    ),
    differs=(
        "a model a fiftieth of the size, whose step costs more for more nodes on a processor, so 15 nodes are judged "
        "by speed and the paper's 80 by tokens a step alone; 24 of 480 questions; the prompt's outputs are recycled "
        "too"
    ),
    minutes=7.0,
)

DRAFTER, LARGE = "recycle:cold", "recycle:2.2.2,cold"  # cold: not what an earlier run left in the cache


def measure(
    *, model: str = "default", questions: int = 24, max_new_tokens: int = 256, progress: Progress | None = None
) -> Measured:
    """Tokens per step and speed of both trees, by task, beside plain decoding and prompt lookup."""
    from loci.bench.decode import DecodeConfig
    from loci.decoding.token_recycling import TEMPLATES
    from loci.lm import load

    loaded = load(model)

    def run(*drafters: str, nodes: int) -> Measured:
        config = DecodeConfig(
            drafters=drafters, limit=questions, max_new_tokens=max_new_tokens, max_nodes=nodes, timings=False
        )
        return decoded(loaded, config, progress=progress)

    return {
        "16 nodes": run(DRAFTER, "lookup", nodes=TEMPLATES["15"].size),
        "81 nodes": run(LARGE, nodes=TEMPLATES["2.2.2"].size),
    }


def holds(measured: Measured) -> bool:
    """1.8 tokens a step and 1.35 times plain decoding's speed with 16 nodes, root included; 2.0 tokens with 81."""
    small = first_engine(measured["16 nodes"])[DRAFTER]
    large = first_engine(measured["81 nodes"])[LARGE]
    return bool(small["tokens_per_step"] >= 1.8 and small["ratio_to_plain"] >= 1.35 and large["tokens_per_step"] >= 2.0)
