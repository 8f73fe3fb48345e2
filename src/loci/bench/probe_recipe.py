"""How prompt tokens and hidden transfer are measured: what the claims of `ppd` and `hidden_transfer` call.

Texts    those of `bench.draft_recipes`: what the model wrote itself, and greedy answers to prompts that are kept out of
         every training. Spec-Bench is for measuring generation only.
Distance tokens ahead of the last one that was read: the model's own head gives distance 1, step i of a chain 1 + i. So
         the three columns of a table are the distances 2, 3 and 4.
Figures  accuracies count tokens of kept-out greedy texts; tokens per step are counted in real greedy generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from loci.decoding import hidden_transfer, ppd
from loci.decoding.blend import BlendedDrafter
from loci.decoding.distill import DistilledText
from loci.decoding.hidden_transfer import HiddenTransfer, HiddenTransferDrafter
from loci.decoding.ppd import PPD, PromptTokens
from loci.decoding.probe_trees import Allocation, DynamicTrees
from loci.decoding.probes import ProbeRecipe, Ranks, measure
from loci.errors import BadInput
from loci.lm.draft import Drafter
from loci.lm.generate import GenerationStats, generate
from loci.lm.model import LanguageModel

SIZES = (16, 32, 64, 105)  # input lengths of the comparisons
RANDOM_DRAWS = 5

MakeDrafter = Callable[[DynamicTrees], Drafter]


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """How often the token at each distance (2, 3, ...) was among the best guesses."""

    name: str
    numbers: int  # that were trained
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    top10: tuple[float, ...]

    @classmethod
    def of(cls, name: str, found: Ranks | Float64[np.ndarray, "step rank"], *, numbers: int = 0) -> AccuracyRow:
        """From ranks, or from accuracies by rank (those of Medusa's heads, from its calibration)."""
        values = found.accuracies(10) if isinstance(found, Ranks) else found
        first, five, ten = (tuple(values[:, :best].sum(axis=1).round(4).tolist()) for best in (1, 5, 10))
        return cls(name=name, numbers=numbers, top1=first, top5=five, top10=ten)


def accuracy_table(
    model: LanguageModel,
    kept_out: Sequence[DistilledText],
    *,
    prompt: PromptTokens | None = None,
    transfer: HiddenTransfer | None = None,
    others: Mapping[str, tuple[int, Float64[np.ndarray, "_ _"]]] | None = None,
) -> list[AccuracyRow]:
    """All of them side by side.

    Args:
        others: by name the numbers trained, and accuracies by distance (from 2) and rank, on the same texts.
    """
    rows = []
    for name, probes in (("ppd", prompt), ("hidden", transfer)):
        if probes is not None:
            numbers = sum(weight.numel() for weight in probes.parameters())
            rows.append(AccuracyRow.of(name, measure(model, kept_out, probes), numbers=numbers))
    for name, (numbers, values) in (others or {}).items():
        rows.append(AccuracyRow.of(name, np.asarray(values, dtype=np.float64), numbers=numbers))
    return rows


def gaps(better: AccuracyRow, other: AccuracyRow) -> tuple[float, ...]:
    """By how much top-10 accuracy is ahead, distance by distance."""
    return tuple(mine - theirs for mine, theirs in zip(better.top10, other.top10, strict=False))


def counted(
    model: LanguageModel,
    make: Callable[[], Drafter | None],
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    max_new_tokens: int = 128,
    engine: str = "auto",
) -> GenerationStats:
    """The statistics of greedy generation over these prompts, all added up."""
    if not prompts:
        raise BadInput("there are no prompts to generate from.")
    total: GenerationStats | None = None
    for prompt in prompts:
        stats = generate(
            model, list(prompt), max_new_tokens=max_new_tokens, drafter=make(), engine=engine, max_nodes=rows
        ).stats
        total = stats if total is None else total + stats
    assert total is not None  # there is at least one prompt
    return total


def makes_ppd(prompt: PromptTokens) -> MakeDrafter:
    """Makes a PPD drafter of these trees, as `sizes` asks for."""
    return lambda trees: PPD(prompt, trees)


def makes_hidden(transfer: HiddenTransfer) -> MakeDrafter:
    """Makes a hidden-transfer drafter of these trees, as `sizes` asks for."""
    return lambda trees: HiddenTransferDrafter(transfer, trees)


@dataclass(frozen=True, kw_only=True)
class SizeRow:
    """Trees of one input length: tokens per step as the Markov chain predicts them, and as they were counted."""

    limit: int
    allocation: Allocation
    predicted: float
    measured: float
    tokens_per_second: float
    tree_kv_bytes: int
    drafter_bytes: int

    @property
    def off(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0


def sizes(
    model: LanguageModel,
    make: MakeDrafter,
    accuracies: Float64[np.ndarray, "step rank"],
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int] = SIZES,
    allocations: Sequence[Allocation] = ("dynamic",),
    draws: int = RANDOM_DRAWS,
    max_new_tokens: int = 128,
    engine: str = "auto",
) -> list[SizeRow]:
    """Predicted and counted tokens per step by input length and allocation; "random" is the mean of `draws`."""
    found = []
    for limit in limits:
        for allocation in allocations:
            several = []
            for seed in range(draws if allocation == "random" else 1):
                trees = DynamicTrees.build(
                    accuracies, limit, allocation=allocation, generator=np.random.default_rng(seed)
                )
                stats = counted(
                    model, lambda trees=trees: make(trees), prompts, rows=limit, max_new_tokens=max_new_tokens,  # type: ignore[misc]
                    engine=engine,
                )  # fmt: skip
                several.append((trees.tau(), stats))
            last = several[-1][1]
            found.append(
                SizeRow(
                    limit=limit,
                    allocation=allocation,
                    predicted=float(np.mean([tau for tau, _ in several])),
                    measured=float(np.mean([stats.tokens_per_step for _, stats in several])),
                    tokens_per_second=float(np.mean([stats.decode_tokens_per_second for _, stats in several])),
                    tree_kv_bytes=last.tree_kv_bytes,
                    drafter_bytes=last.drafter_bytes,
                )
            )
    return found


def dynamic_wins(rows: Sequence[SizeRow]) -> dict[str, int]:
    """At how many input lengths dynamic trees count no fewer tokens than naive ones, and those than random ones."""
    by = {(row.limit, row.allocation): row.measured for row in rows}
    limits = sorted({row.limit for row in rows})
    return {
        "dynamic >= naive": sum(by[limit, "dynamic"] >= by[limit, "naive"] for limit in limits),
        "naive >= random": sum(by[limit, "naive"] >= by[limit, "random"] for limit in limits),
        "lengths": len(limits),
    }


@dataclass(frozen=True, kw_only=True)
class HardwareRow:
    """One engine: the input length its cost curve chooses, and what every length really gave."""

    engine: str
    chosen: int
    best: int
    tokens_per_second: Mapping[int, float]

    @property
    def lost(self) -> float:
        """The part of the best throughput that the choice misses."""
        return 1.0 - self.tokens_per_second[self.chosen] / self.tokens_per_second[self.best]


def hardware(
    model: LanguageModel,
    make: MakeDrafter,
    accuracies: Float64[np.ndarray, "step rank"],
    prompts: Sequence[Sequence[int]],
    costs: Mapping[str, Callable[[int], float]],
    *,
    limits: Sequence[int] = (8, 16, 24, 32, 48, 64, 105),
    max_new_tokens: int = 128,
) -> list[HardwareRow]:
    """For each engine the chosen and the best input length.

    Args:
        costs: by engine, seconds of a step with so many rows.
    """
    rows = []
    for engine, cost in costs.items():
        chosen = DynamicTrees.choose(accuracies, cost, limits=limits).limit
        measured = sizes(model, make, accuracies, prompts, limits=limits, max_new_tokens=max_new_tokens, engine=engine)
        speeds = {row.limit: row.tokens_per_second for row in measured}
        best = max(speeds, key=lambda limit: speeds[limit])
        rows.append(HardwareRow(engine=engine, chosen=chosen, best=best, tokens_per_second=speeds))
    return rows


# What must hurt, by name: the recipe that leaves it out.
PPD_ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "whole": {},
    "not attending to each other": {"chained": False},
    "hard labels": {"labels": "hard"},
    "inserted at the end only": {"where": "end"},
}
HIDDEN_ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "whole": {},
    "not attending to each other": {"chained": False},
    "not seeing the text": {"context": False, "chained": False},
}


def ppd_ablations(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    recipe: ProbeRecipe = ppd.RECIPE,
    minutes: float | None = None,
    progress: bool = True,
) -> list[AccuracyRow]:
    """Prompt tokens trained without one part each, for the same number of steps (or minutes), and untrained words."""
    rows = [AccuracyRow.of("untrained words", measure(model, kept_out, PromptTokens.from_words(model)))]
    for name, changed in PPD_ABLATIONS.items():
        one = replace(recipe, **changed)
        prompt, _ = ppd.train_prompt_tokens(model, texts, recipe=one, minutes=minutes, progress=progress)
        found = measure(model, kept_out, prompt, chained=one.chained, context=one.context)
        rows.append(AccuracyRow.of(name, found, numbers=prompt.embeds.numel()))
    return rows


def hidden_ablations(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    layers: tuple[int, ...] = hidden_transfer.LAYERS,
    recipe: ProbeRecipe = hidden_transfer.RECIPE,
    minutes: float | None = None,
    progress: bool = True,
) -> list[AccuracyRow]:
    """Hidden transfer trained without one part each, and the same maps before the final norm: a linear Medusa."""
    last = int(model.model.config.get_text_config().num_hidden_layers)
    arms = [(name, layers, changed) for name, changed in HIDDEN_ABLATIONS.items()]
    arms.append(("at the last layer", (last,) * len(layers), {}))
    rows = []
    for name, where, changed in arms:
        one = replace(recipe, **changed)
        transfer, _ = hidden_transfer.train_hidden_transfer(
            model, texts, layers=where, recipe=one, minutes=minutes, progress=progress
        )
        found = measure(model, kept_out, transfer, chained=one.chained, context=one.context)
        rows.append(AccuracyRow.of(name, found, numbers=sum(weight.numel() for weight in transfer.parameters())))
    return rows


def layer_table(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    candidates: Sequence[int] = (0, 6, 12, 18, 24, 30),
    recipe: ProbeRecipe = hidden_transfer.RECIPE,
    minutes: float | None = None,
    progress: bool = True,
) -> dict[int, AccuracyRow]:
    """Accuracy by the layer at which all pseudo positions are transferred."""
    table = hidden_transfer.sweep_layers(
        model, texts, kept_out, candidates=candidates, recipe=recipe, minutes=minutes, progress=progress
    )
    return {layer: AccuracyRow.of(f"layer {layer}", ranks) for layer, ranks in table.items()}


def interior(table: Mapping[int, AccuracyRow]) -> bool:
    """Whether the best mean top-1 accuracy lies at neither end of the layers."""
    layers = sorted(table)
    best = max(layers, key=lambda layer: float(np.mean(table[layer].top1)))
    return layers[0] < best < layers[-1]


def rises_with_depth(cosines: Mapping[int, Sequence[float]]) -> float:
    """Spearman's correlation of the mean cosine with the site, from `hidden_transfer.cosines`."""
    sites = sorted(cosines)
    means = np.array([float(np.mean(cosines[site])) for site in sites])
    places = np.argsort(np.argsort(means)).astype(np.float64)
    return float(np.corrcoef(places, np.arange(len(sites)))[0, 1])


def together(
    model: LanguageModel,
    make: Callable[[], Drafter],
    other: Callable[[], Drafter],
    prompts: Sequence[Sequence[int]],
    *,
    rows: int = 32,
    max_new_tokens: int = 128,
    engine: str = "auto",
) -> dict[str, float]:
    """Tokens per step of two drafters alone and in one tree, for the same rows."""

    def blend() -> Drafter:
        return BlendedDrafter([other(), make()], switch_off=False)

    arms = {"first": make, "second": other, "blend": blend}
    return {
        name: counted(model, arm, prompts, rows=rows, max_new_tokens=max_new_tokens, engine=engine).tokens_per_step
        for name, arm in arms.items()
    }


@dataclass(frozen=True, kw_only=True)
class Identity:
    """How many greedy texts are the same with and without the drafter."""

    same: int
    texts: int


def identical(
    model: LanguageModel,
    make: Callable[[], Drafter],
    prompts: Sequence[Sequence[int]],
    *,
    rows: int = 32,
    max_new_tokens: int = 64,
    engine: str = "auto",
) -> Identity:
    """Greedy generation with and without the drafter, text by text. All must be the same in float32."""
    same = 0
    for prompt in prompts:
        plain = generate(model, list(prompt), max_new_tokens=max_new_tokens, engine=engine)
        drafted = generate(
            model, list(prompt), max_new_tokens=max_new_tokens, engine=engine, drafter=make(), max_nodes=rows
        )
        same += plain.tokens == drafted.tokens
    return Identity(same=same, texts=len(prompts))


def seconds_per_text(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kind: Literal["ppd", "hidden"],
    *,
    steps: int = 10,
    recipe: ProbeRecipe | None = None,
) -> float:
    """What one text of a training step costs on this machine, in seconds."""
    began = time.perf_counter()
    if kind == "ppd":
        used = replace(recipe or ppd.RECIPE, steps=steps)
        ppd.train_prompt_tokens(model, texts, recipe=used, progress=False)
    else:
        used = replace(recipe or hidden_transfer.RECIPE, steps=steps)
        hidden_transfer.train_hidden_transfer(model, texts, recipe=used, progress=False)
    return (time.perf_counter() - began) / (steps * used.texts_per_step)


def as_json(rows: Sequence[AccuracyRow] | Sequence[SizeRow] | Sequence[HardwareRow]) -> list[dict[str, Any]]:
    """The table with keys and values that JSON can hold."""
    return [asdict(row) for row in rows]
