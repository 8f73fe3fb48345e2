"""How drawing drafts without replacement is measured: tokens per step at equal length, at equal budget, and in seconds.

Data     Spec-Bench's questions with even numbers: multi_turn, translation and summarization, which stand in for the
         paper's Dolly, WMT and XSum. Texts that the model wrote itself for what a draft model learned; they are kept
         apart from those it was trained on.
Figures  block efficiency is tokens per step of the target; the memory-bound speed-up multiplies it by the target's
         bytes over all bytes that a step reads (target once, drafter once a level). Errors are standard errors over
         prompts, of differences where two shapes are compared on the same prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from loci import settings
from loci.bench import spec_bench
from loci.decoding.draft_model import Draft, DraftLM, HeadSource
from loci.decoding.rsd import IID, RSD, RSDC, RSDS, Chain, Shape, acceptance
from loci.lm.chat import Message
from loci.lm.engine.base import StepEngine
from loci.lm.engine.choose import choose
from loci.lm.generate import Generation, Stop, generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import Sampling

if TYPE_CHECKING:
    from loci.decoding.distill import DistilledText

TASKS = ("multi_turn", "translation", "summarization")
LENGTHS = (2, 3, 4, 5)
# Trees of at most so many tokens below the root, as many as the paper compares; RSD-S as width x length.
BUDGETS: Mapping[int, Mapping[str, Shape]] = {
    6: {"RSD-C": RSDC(branching=(2, 2)), "RSD-S 2x3": RSDS(width=2, length=3), "RSD-S 3x2": RSDS(width=3, length=2)},
    10: {
        "RSD-C": RSDC(branching=(2, 1, 1, 1, 1)),
        "RSD-S 2x5": RSDS(width=2, length=5),
        "RSD-S 5x2": RSDS(width=5, length=2),
    },
    14: {
        "RSD-C": RSDC(branching=(2, 2, 2)),
        "RSD-S 2x7": RSDS(width=2, length=7),
        "RSD-S 7x2": RSDS(width=7, length=2),
    },
    21: {
        "RSD-C": RSDC(branching=(3, 2, 2)),
        "RSD-S 3x7": RSDS(width=3, length=7),
        "RSD-S 7x3": RSDS(width=7, length=3),
    },
    30: {
        "RSD-C": RSDC(branching=(2, 2, 2, 2)),
        "RSD-S 5x6": RSDS(width=5, length=6),
        "RSD-S 6x5": RSDS(width=6, length=5),
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape over all prompts."""

    name: str
    nodes: int
    per_prompt: tuple[float, ...]  # tokens per step of the target
    memory_bound: float  # speed-up if reading weights were all that takes time
    tokens_per_second: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.per_prompt))

    @property
    def error(self) -> float:
        return standard_error(self.per_prompt)

    def above(self, other: Row) -> float:
        """The mean difference to another shape in its standard errors."""
        gaps = np.subtract(self.per_prompt, other.per_prompt)
        return float(gaps.mean() / max(standard_error(gaps.tolist()), 1e-12))


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean of these values, one a prompt."""
    return float(np.std(numbers, ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else float("nan")


def prompts(model: LanguageModel, *, limit: int | None = None, data: Path | None = None) -> list[list[int]]:
    """The first turns of Spec-Bench's even questions of the three tasks, as token ids."""
    held = spec_bench.read(data or settings.data() / "spec_bench")
    chosen = spec_bench.pick([one for one in held if one.task in TASKS and one.id % 2 == 0], limit)
    return [model.encode([Message(role="user", content=question.turns[0])]) for question in chosen]


def measure(
    model: LanguageModel,
    draft: DraftLM | HeadSource,
    shapes: Mapping[str, Shape | None],
    texts: Sequence[Sequence[int]],
    *,
    temperature: float,
    tokens: int = 100,
    seed: int = 0,
    engine: str | StepEngine = "auto",
) -> dict[str, Row]:
    """Every shape on every prompt; None stands for plain sampling. Prompts are the outer loop, so that a machine that
    slows down slows all shapes."""
    running = choose(model, name=engine, needs=draft.needs) if isinstance(engine, str) else engine
    found: dict[str, list[Generation]] = {name: [] for name in shapes}
    for prompt in texts:
        for name, shape in shapes.items():
            found[name].append(
                generate(
                    model,
                    list(prompt),
                    max_new_tokens=tokens,
                    sampling=Sampling(temperature=temperature),
                    seed=seed,
                    stop=Stop(eos=False),
                    drafter=None if shape is None else RSD(draft, shape),
                    engine=running,
                    max_nodes=256 if shape is None else shape.size + 1,
                )
            )
    target_bytes = sum(weight.nbytes for weight in model.model.parameters())
    return {name: _row(name, shapes[name], results, target_bytes, draft) for name, results in found.items()}


def _row(
    name: str, shape: Shape | None, results: Sequence[Generation], target_bytes: int, draft: DraftLM | HeadSource
) -> Row:
    per_prompt = tuple(result.stats.tokens_per_step for result in results)
    read = 0
    if shape is not None:
        read = draft.read_bytes * shape.length if isinstance(draft, DraftLM) else draft.nbytes
    seconds = sum(result.stats.seconds - result.stats.prefill_seconds for result in results)
    return Row(
        name=name,
        nodes=0 if shape is None else shape.size,
        per_prompt=per_prompt,
        memory_bound=float(np.mean(per_prompt)) * target_bytes / (target_bytes + read),
        tokens_per_second=sum(result.stats.new_tokens for result in results) / seconds,
    )


def fixed_length(
    model: LanguageModel,
    draft: DraftLM,
    texts: Sequence[Sequence[int]],
    *,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = 100,
    engine: str | StepEngine = "auto",
) -> dict[int, dict[str, Row]]:
    """At temperature 1, by draft length: 2 sequences and 4, without replacement, independent, and a single chain."""
    return {
        length: measure(
            model,
            draft,
            {
                "RSD-C 2": RSDC(branching=(2,) + (1,) * (length - 1)),
                "RSD-S 4": RSDS(width=4, length=length),
                "iid 2": IID(count=2, length=length),
                "iid 4": IID(count=4, length=length),
                "SD": Chain(length=length),
            },
            texts,
            temperature=1.0,
            tokens=tokens,
            engine=engine,
        )
        for length in lengths
    }


def fixed_length_holds(table: Mapping[int, Mapping[str, Row]], *, errors: float = 2.0) -> dict[str, bool]:
    """Whether every gap is larger than so many standard errors: RSD over independent draws over a chain."""
    pairs = (("RSD-C 2", "iid 2"), ("iid 2", "SD"), ("RSD-S 4", "iid 4"), ("iid 4", "SD"))
    return {
        f"L={length}: {first} > {second}": rows[first].above(rows[second]) > errors
        for length, rows in table.items()
        for first, second in pairs
    }


def fixed_budget(
    model: LanguageModel,
    draft: DraftLM,
    texts: Sequence[Sequence[int]],
    *,
    temperature: float,
    budgets: Sequence[int] = tuple(BUDGETS),
    tokens: int = 100,
    engine: str | StepEngine = "auto",
) -> dict[int, dict[str, Row]]:
    """By budget of tokens: the shapes of `BUDGETS`, independent sequences of the same widths, and a chain."""
    table = {}
    for budget in budgets:
        shapes: dict[str, Shape | None] = dict(BUDGETS[budget])
        for shape in BUDGETS[budget].values():
            if isinstance(shape, RSDS):
                shapes[f"iid {shape.width}x{shape.length}"] = IID(count=shape.width, length=shape.length)
        shapes["SD"] = Chain(length=budget)
        table[budget] = measure(model, draft, shapes, texts, temperature=temperature, tokens=tokens, engine=engine)
    return table


def fixed_budget_holds(table: Mapping[int, Mapping[str, Row]]) -> dict[int, bool]:
    """By budget, whether the best of RSD is at least the best baseline."""

    def best(rows: Mapping[str, Row], ours: bool) -> float:
        return max(row.mean for name, row in rows.items() if name.startswith("RSD") == ours)

    return {budget: best(rows, True) >= best(rows, False) for budget, rows in table.items()}


def distillation(
    model: LanguageModel,
    trained: DraftLM,
    kept_out: Sequence[DistilledText],
    *,
    texts: int = 60,
) -> dict[str, float]:
    """First-token acceptance of the trained draft model, and of as many layers without training."""
    layers = int(trained.model.model.config.get_text_config().num_hidden_layers)
    untrained = DraftLM.from_layers(model, layers=layers, engine="hf")
    some = [text for text in kept_out if text.written[1:].any()][:texts]
    found = {"trained": acceptance(model, trained, some), "untrained": acceptance(model, untrained, some)}
    return {**found, "ratio": found["trained"] / found["untrained"]}


def distillation_holds(found: Mapping[str, float]) -> bool:
    """Whether the trained drafter is accepted often enough, and clearly more often than the untrained one."""
    return found["trained"] >= 0.55 and found["ratio"] >= 2.0


def cost_of_steps(
    model: LanguageModel,
    draft: DraftLM,
    text: Sequence[int],
    *,
    shape: Shape,
    engine: str | StepEngine = "auto",
    repeats: int = 15,
) -> dict[str, float]:
    """Median milliseconds of what a step is made of: the target's step over the tree, one level of the drafter,
    drawing, and a plain step of the target.

    The levels are timed by drafting; the rest of `propose` is drawing.
    """
    from loci.lm.draft import DraftState, Needs, TokenTree

    running = choose(model, name=engine) if isinstance(engine, str) else engine
    running.prefill([list(text)], want=Needs())
    draft.begin(text)
    generator = np.random.default_rng(0)
    state = DraftState(tokens=list(text), sampling=Sampling(temperature=1.0), rng=generator, budget=shape.size + 1)
    times: dict[str, list[float]] = {"plain": [], "tree": [], "propose": [], "levels": []}
    levels = _Timed(draft)
    for _ in range(repeats):
        levels.seconds = 0.0
        started = time.perf_counter()
        tree = RSD(levels, shape).propose(state)
        times["propose"].append(time.perf_counter() - started)
        times["levels"].append(levels.seconds)
        for name, some in (("tree", tree), ("plain", TokenTree.root(int(text[-1])))):
            started = time.perf_counter()
            output = running.step([some], want=Needs())
            output.best()
            times[name].append(time.perf_counter() - started)
            running.commit([[]])
    found = {name: 1e3 * float(np.median(seconds)) for name, seconds in times.items()}
    return {**found, "level": found["levels"] / shape.length, "draw": found["propose"] - found["levels"]}


class _Timed:
    """A draft model that adds up the time its levels take."""

    def __init__(self, draft: DraftLM) -> None:
        self._draft, self.seconds = draft, 0.0
        self.name, self.needs, self.vocabulary, self.horizon = draft.name, draft.needs, draft.vocabulary, None
        self.nbytes = draft.nbytes
        self.start, self.observe = draft.start, draft.observe

    def distribution(
        self, draft: Draft, nodes: Sequence[int], *, sampling: Sampling
    ) -> Float32[np.ndarray, "node vocabulary"]:
        started = time.perf_counter()
        found = self._draft.distribution(draft, nodes, sampling=sampling)
        self.seconds += time.perf_counter() - started
        return found


def wall_clock(
    model: LanguageModel,
    draft: DraftLM | HeadSource,
    texts: Sequence[Sequence[int]],
    *,
    shapes: Mapping[str, Shape] | None = None,
    temperature: float = 1.0,
    tokens: int = 100,
    engine: str | StepEngine = "auto",
) -> dict[str, Any]:
    """Tokens per second against plain sampling on the same engine, for a draft model also what the costs of the parts
    foretell: tokens per step over the time of a tree's step and its levels."""
    running = choose(model, name=engine, needs=draft.needs) if isinstance(engine, str) else engine
    tried: Mapping[str, Shape] = shapes or {
        "RSD-S 4x3": RSDS(width=4, length=3),
        "RSD-C 2,2,1": RSDC(branching=(2, 2, 1)),
    }
    arms: dict[str, Shape | None] = {"plain": None, **tried}
    rows = measure(model, draft, arms, texts, temperature=temperature, tokens=tokens, engine=running)
    found: dict[str, Any] = {
        name: {
            "tokens_per_step": row.mean,
            "memory_bound": row.memory_bound,
            "tokens_per_second": row.tokens_per_second,
            "ratio_to_plain": row.tokens_per_second / rows["plain"].tokens_per_second,
        }
        for name, row in rows.items()
    }
    if isinstance(draft, DraftLM):
        for name, shape in tried.items():
            costs = cost_of_steps(model, draft, texts[0], shape=shape, engine=running)
            found[name]["foretold"] = 1e3 * rows[name].mean / (costs["tree"] + costs["propose"])
            found[name]["milliseconds"] = costs
    return found


def ablations(
    model: LanguageModel,
    draft: DraftLM,
    texts: Sequence[Sequence[int]],
    *,
    tokens: int = 100,
    engine: str | StepEngine = "auto",
) -> dict[str, Row]:
    """Siblings drawn independently at the same number of nodes. (That beams with fresh keys at every level are no
    samples without replacement is a test of `loci.decoding.rsd`.)"""
    shapes: dict[str, Shape | None] = {
        "without replacement": RSDS(width=4, length=3),
        "independent": IID(count=4, length=3),
    }
    return measure(model, draft, shapes, texts, temperature=1.0, tokens=tokens, engine=engine)


def table_of(rows: Mapping[Any, Mapping[str, Row]]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Plain numbers, ready for JSON."""
    return {
        str(key): {
            name: {
                "nodes": row.nodes,
                "tokens_per_step": round(row.mean, 4),
                "error": round(row.error, 4),
                "memory_bound": round(row.memory_bound, 4),
                "tokens_per_second": round(row.tokens_per_second, 2),
            }
            for name, row in some.items()
        }
        for key, some in rows.items()
    }
