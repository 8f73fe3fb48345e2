"""How Medusa's heads are trained and measured: what `loci train medusa` and the claim of `medusa` call.

Texts    what the model wrote itself (`bench.draft_recipes.write_texts`). Calibration and every accuracy below use
         greedy answers to the tenth of the prompts that is kept out. Spec-Bench is for measuring generation only.
Depth    d is the token d behind the root of a tree: head d's business.
Figures  accuracies count tokens of kept-out texts; tokens per step are counted in real generation.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from loci import settings
from loci.bench import spec_bench
from loci.bench.draft_recipes import KEPT_OUT, Texts, read_texts, write_texts
from loci.bench.draft_recipes import train as train_drafter
from loci.decoding import distill, medusa
from loci.decoding.blend import BlendedDrafter
from loci.decoding.distill import TeacherPass
from loci.decoding.medusa import Medusa, MedusaHeads, MedusaRecipe, TypicalAcceptance
from loci.decoding.prompt_lookup import PromptLookup
from loci.decoding.token_recycling import TokenRecycling
from loci.decoding.tree_search import best_dense_tree, best_tree, dense_tree, expected_tokens, random_tree
from loci.errors import BadInput, DataNotFound
from loci.lm.chat import Message
from loci.lm.draft import Drafter, Needs, TreeTemplate
from loci.lm.generate import GenerationStats, generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Noise, Sampling
from loci.lm.train import Artifact
from loci.lm.verify import MATCH, Acceptance

NODES = (16, 64)
RANDOM_DRAWS = 5
EPSILONS = (0.25, 0.09, 0.02)
RECIPE = MedusaRecipe()
WARM = Sampling(temperature=0.7)

Make = Callable[[], Drafter | None]


def train(
    folder: Path | None = None,
    *,
    minutes: float | None = None,
    resume: bool = False,
    model: LanguageModel | None = None,
    texts: Path | None = None,
    tokens: int = 800_000,
    kept_out_tokens: int = 40_000,
    instructions: Path | None = None,
    engine: str = "auto",
    progress: bool = True,
) -> Artifact:
    """From nothing to heads that draft: texts, states, heads, calibration, one file with its JSON.

    Texts that lie there already are not written again, and half-written ones are taken up.

    Args:
        folder: for checkpoints and the artifact; "medusa" in the cache folder's "training" unless given.
        minutes: of the heads' training alone.
        texts: folder of the texts; `distill.folder()` unless given.
    """
    if model is None:
        from loci.lm import load

        model = load("default")
    made = write_texts(
        model,
        texts or distill.folder(),
        instructions=instructions,
        tokens=tokens,
        kept_out_tokens=kept_out_tokens,
        engine=engine,
        progress=progress,
    )
    place = folder or settings.cache() / "training" / medusa.NAME
    return train_drafter(medusa.NAME, model, made, folder=place, resume=resume, minutes=minutes)


def prompts(model: LanguageModel, *, limit: int | None = None, data: Path | None = None) -> list[list[int]]:
    """The first turns of Spec-Bench's questions, evenly over its tasks, as token ids."""
    questions = spec_bench.pick(spec_bench.read(data or settings.data() / "spec_bench"), limit)
    asked = [model.encode([Message(role="user", content=question.turns[0])]) for question in questions]
    return [tokens[-(model.window // 2) :] for tokens in asked]


def counted(
    model: LanguageModel,
    make: Make,
    asked: Sequence[Sequence[int]],
    *,
    nodes: int = 16,
    new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    acceptance: Acceptance | None = None,
    engine: str = "auto",
) -> tuple[GenerationStats, list[tuple[int, ...]]]:
    """Statistics of generation over these prompts, added up, and the tokens of each. `make` is called once."""
    if not asked:
        raise BadInput("there are no prompts to generate from.")
    drafter, total, said = make(), GenerationStats(engine=""), []
    for number, prompt in enumerate(asked):
        found = generate(
            model,
            list(prompt),
            max_new_tokens=new_tokens,
            sampling=sampling,
            seed=number,
            drafter=drafter,
            acceptance=acceptance,
            engine=engine,
            max_nodes=nodes,
        )
        total = found.stats if number == 0 else total + found.stats
        said.append(found.tokens)
    return total, said


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """How often the token at each depth was among the best guesses."""

    name: str
    top1: tuple[float, ...]
    top5: tuple[float, ...]
    top10: tuple[float, ...]

    @classmethod
    def of(cls, name: str, values: Float64[np.ndarray, "depth rank"]) -> AccuracyRow:
        first, five, ten = (tuple(values[:, :best].sum(axis=1).round(4).tolist()) for best in (1, 5, 10))
        return cls(name=name, top1=first, top5=five, top10=ten)


def accuracy_table(heads: MedusaHeads, texts: Texts, kept_out: TeacherPass) -> list[AccuracyRow]:
    """The heads, and what guessing without a model gives at the same positions."""
    rows = [AccuracyRow.of("medusa", medusa.calibrate(heads, kept_out))]
    for name, values in medusa.baselines(texts.training, kept_out, depth=heads.heads).items():
        rows.append(AccuracyRow.of(name, values))
    return rows


@dataclass(frozen=True, kw_only=True)
class TreeRow:
    """One tree: what calibration expects of it, and what it gave."""

    name: str
    nodes: int  # root included
    expected: float
    measured: float  # tokens per step


def ladder(
    model: LanguageModel,
    heads: MedusaHeads,
    accuracies: Float64[np.ndarray, "depth rank"],
    asked: Sequence[Sequence[int]],
    *,
    nodes: Sequence[int] = NODES,
    draws: int = RANDOM_DRAWS,
    new_tokens: int = 128,
    engine: str = "auto",
) -> list[TreeRow]:
    """The chain of best guesses, and for each size the best dense tree, the calibrated one, and random ones."""
    depth, ranks = accuracies.shape
    trees: list[tuple[str, int, TreeTemplate]] = [("chain", depth + 1, dense_tree((1,) * depth))]
    for size in nodes:
        trees.append(("dense", size, best_dense_tree(accuracies, nodes=size)))
        trees.append(("calibrated", size, best_tree(accuracies, nodes=size)))
        for draw in range(draws):
            generator = np.random.default_rng([size, draw])
            drawn = random_tree(nodes=size, depth=depth, ranks=ranks, generator=generator)
            trees.append((f"random {draw + 1}", size, drawn))
    rows = []
    for name, size, template in trees:
        drafter = Medusa(heads, template=template)
        stats, _ = counted(
            model, lambda drafter=drafter: drafter, asked, nodes=size, new_tokens=new_tokens, engine=engine  # type: ignore[misc]
        )  # fmt: skip
        expected = expected_tokens(template, accuracies)
        rows.append(TreeRow(name=name, nodes=size, expected=round(expected, 4), measured=stats.tokens_per_step))
    return rows


def ladder_holds(rows: Sequence[TreeRow], *, margin: float = 0.08) -> dict[str, bool]:
    """For each size: chain < dense < calibrated, and calibrated ahead of the random trees' mean by the margin."""
    chain = next(row.measured for row in rows if row.name == "chain")
    held = {}
    for size in sorted({row.nodes for row in rows if row.name == "calibrated"}):
        by = {row.name: row.measured for row in rows if row.nodes == size}
        drawn = [value for name, value in by.items() if name.startswith("random")]
        held[f"ladder at {size}"] = chain < by["dense"] < by["calibrated"]
        held[f"random at {size}"] = by["calibrated"] >= (1.0 + margin) * float(np.mean(drawn))
    return held


def main_bar(
    model: LanguageModel,
    drafter: Medusa,
    asked: Sequence[Sequence[int]],
    *,
    nodes: int = 16,
    new_tokens: int = 256,
    engine: str = "auto",
) -> dict[str, float]:
    """Tokens per step, speed against plain decoding in the same run, the share of identical outputs, and what the heads
    add to lookup and recycling. Times and identity are worth what the engine and the model's precision are."""
    plain, said = counted(model, lambda: None, asked, new_tokens=new_tokens, engine=engine)
    own, also = counted(model, lambda: drafter, asked, nodes=nodes, new_tokens=new_tokens, engine=engine)

    def blend(*more: Drafter) -> Make:
        return lambda: BlendedDrafter([PromptLookup(), TokenRecycling(model.vocabulary), *more], switch_off=False)

    without, _ = counted(model, blend(), asked, nodes=nodes, new_tokens=new_tokens, engine=engine)
    joined, _ = counted(model, blend(drafter), asked, nodes=nodes, new_tokens=new_tokens, engine=engine)
    return {
        "tokens_per_step": own.tokens_per_step,
        "ratio_to_plain": own.decode_tokens_per_second / plain.decode_tokens_per_second,
        "draft_ms": 1000.0 * own.draft_seconds / max(1, own.steps),
        "step_ms": 1000.0 * own.step_seconds / max(1, own.steps),
        "plain_step_ms": 1000.0 * plain.step_seconds / max(1, plain.steps),
        "identical": float(np.mean([one == other for one, other in zip(said, also, strict=True)])),
        "blend_without": without.tokens_per_step,
        "blend_with": joined.tokens_per_step,
        "blend_gain": joined.tokens_per_step / without.tokens_per_step - 1.0,
    }


def typical_table(
    model: LanguageModel,
    drafter: Medusa,
    asked: Sequence[Sequence[int]],
    *,
    temperature: float = 0.7,
    epsilons: Sequence[float] = EPSILONS,
    nodes: int = 16,
    new_tokens: int = 128,
    engine: str = "auto",
) -> list[dict[str, Any]]:
    """Exact sampling, then typical acceptance with falling thresholds (delta the root of epsilon): tokens per step."""
    rules: list[tuple[str, Acceptance | None]] = [("match", None)]
    rules += [
        (f"typical {epsilon}", TypicalAcceptance(epsilon=epsilon, delta=math.sqrt(epsilon))) for epsilon in epsilons
    ]
    rows = []
    for name, rule in rules:
        stats, _ = counted(
            model, lambda: drafter, asked, nodes=nodes, new_tokens=new_tokens,
            sampling=Sampling(temperature=temperature), acceptance=rule, engine=engine,
        )  # fmt: skip
        rows.append({"rule": name, "tokens_per_step": stats.tokens_per_step, "exact": stats.exact})
    return rows


def first_two_tokens(
    model: LanguageModel,
    drafter: Medusa,
    prompt: Sequence[int],
    rule: Acceptance,
    *,
    sampling: Sampling = WARM,
    runs: int = 20_000,
    nodes: int = 16,
    engine: str = "auto",
) -> dict[str, float]:
    """Chi-square of the first two tokens after a prompt against the model's own distribution, over many
    verifications of one tree whose logits are computed once.

    Cells that expect fewer than 5 runs are pooled. Returns the statistic, its degrees of freedom, and its distance
    from them in standard deviations: beyond 4 the rule is not exact.
    """
    from loci.lm.draft import DraftState, StepResult, TokenTree
    from loci.lm.engine.choose import choose
    from loci.lm.sampling import warp

    stepper = choose(model, needs=drafter.needs, name=engine)
    stepper.prefill([list(prompt)], want=drafter.needs)
    output = stepper.step([TokenTree.root(prompt[-1])], want=drafter.needs)
    root = int(output.best()[0, 0])
    stepper.commit([[0]])
    drafter.observe(
        StepResult(
            tree=TokenTree.root(prompt[-1]),
            logits=lambda node: output.logits(0, node),
            accepted=(0,),
            bonus=root,
            committed=(root,),
            hidden=output.hidden(0),
        )
    )
    state = DraftState(tokens=[*prompt, root], sampling=sampling, rng=np.random.default_rng(0), budget=nodes)
    tree = drafter.propose(state)
    checked = stepper.step([tree], want=Needs())
    logits = {node: np.array(checked.logits(0, node)) for node in range(tree.size)}
    stepper.reset()
    children = {int(tree.tokens[child]): child for child in tree.children[0]}
    first = warp(logits[0], sampling)
    expected: dict[tuple[int, ...], float] = {}
    for token, p in zip(first.tokens.tolist(), first.probabilities.tolist(), strict=True):
        if token in children:
            second = warp(logits[children[token]], sampling)
            for other, q in zip(second.tokens.tolist(), second.probabilities.tolist(), strict=True):
                expected[token, other] = p * q
        else:
            expected[token,] = p
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(runs):
        walk = rule.walk(tree, logits.__getitem__, sampling=sampling, noise=Noise(seed=seed, row=0, position=0))
        tokens = [token for (_, token), _ in zip(walk, range(2), strict=False)]
        key = tuple(tokens) if tokens[0] in children else (tokens[0],)
        seen[key] = seen.get(key, 0) + 1
    statistic, cells, rest, rest_seen = 0.0, 0, 0.0, runs
    for cell, p in expected.items():
        if p * runs >= 5.0:
            statistic += (seen.get(cell, 0) - p * runs) ** 2 / (p * runs)
            cells += 1
            rest_seen -= seen.get(cell, 0)
        else:
            rest += p * runs
    if rest >= 5.0:
        statistic += (rest_seen - rest) ** 2 / rest
        cells += 1
    freedom = max(1, cells - 1)
    return {
        "statistic": statistic,
        "degrees_of_freedom": float(freedom),
        "deviations": (statistic - freedom) / math.sqrt(2.0 * freedom),
    }


def ablations(
    model: LanguageModel,
    training: TeacherPass,
    kept_out: TeacherPass,
    *,
    folder: Path,
    recipe: MedusaRecipe = RECIPE,
    minutes: float | None = None,
    progress: bool = True,
) -> list[AccuracyRow]:
    """The recipe with heads of their own from the model's head, the same from a random start, and all heads counting
    alike (decay 1), after equal steps or equal time; and the recipe as it is."""
    recipes = {
        "recipe": recipe,
        "own output": replace(recipe, share_lm_head=False),
        "random start": replace(recipe, share_lm_head=False, start="random"),
        "decay 1": replace(recipe, decay=1.0),
    }
    rows = []
    for name, changed in recipes.items():
        found = medusa.train_medusa1(
            model, training, recipe=changed, folder=folder / name.replace(" ", "-"), minutes=minutes, progress=progress
        )
        if found is not None:
            rows.append(AccuracyRow.of(name, medusa.calibrate(found[0], kept_out)))
    return rows


def drift(model: LanguageModel, changed: LanguageModel, kept_out: TeacherPass, *, texts: int = 30) -> float:
    """Mean KL of a changed model from the original, in nats, where the original wrote on texts kept out.

    Args:
        kept_out: the original's pass over them.
    """
    import torch

    matrix = medusa._head_of(model)
    total = count = 0.0
    with torch.inference_mode():
        for number, text in enumerate(kept_out.texts[:texts]):
            ids = torch.from_numpy(text.tokens).long()[None].to(changed.device)
            now = changed.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            place = slice(int(kept_out.starts[number]), int(kept_out.starts[number + 1]))
            states = kept_out.hidden[place].to(model.device, matrix.dtype)
            was = (states @ matrix.T).float().log_softmax(-1)
            where = torch.from_numpy(np.flatnonzero(text.written[1:]))
            total += float((was[where].exp() * (was[where] - now[where])).sum())
            count += len(where)
    return total / max(1.0, count)


def perplexity(model: LanguageModel, *, data: Path | None = None, tokens: int = 8192, window: int = 1024) -> float:
    """On the first tokens of WikiText-2's test half, in windows that do not overlap.

    Raises:
        DataNotFound: the text is absent.
    """
    import torch
    from torch.nn.functional import cross_entropy

    file = (data or settings.data() / "wikitext2") / "test_first_half.txt.gz"
    if not file.is_file():
        raise DataNotFound(f"no {file.name} in {file.parent}. Name its folder, or set LOCI_DATA to the data sets.")
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    ids = model.encode(text[: 8 * tokens])[:tokens]
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, window):
            piece = torch.tensor([ids[start : start + window]], device=model.device)
            logits = model.model(piece, use_cache=False).logits[0, :-1].float()
            total += float(cross_entropy(logits, piece[0, 1:], reduction="sum"))
            count += piece.shape[1] - 1
    return math.exp(total / count)


def medusa2_table(
    model: LanguageModel,
    first: Medusa,
    second: tuple[LanguageModel, Medusa],
    asked: Sequence[Sequence[int]],
    kept_out: TeacherPass,
    *,
    nodes: int = 16,
    new_tokens: int = 128,
    engine: str = "auto",
) -> dict[str, float]:
    """Heads alone against heads with their model: tokens per step, and how far the model moved."""
    changed, drafter = second
    one, _ = counted(model, lambda: first, asked, nodes=nodes, new_tokens=new_tokens, engine=engine)
    two, _ = counted(changed, lambda: drafter, asked, nodes=nodes, new_tokens=new_tokens, engine=engine)
    before, after = perplexity(model), perplexity(changed)
    return {
        "medusa1": one.tokens_per_step,
        "medusa2": two.tokens_per_step,
        "gain": two.tokens_per_step / one.tokens_per_step - 1.0,
        "kl": drift(model, changed, kept_out),
        "perplexity_before": before,
        "perplexity_after": after,
        "perplexity_change": after / before - 1.0,
    }


def initial_gap(model: LanguageModel, *, heads: int = 4) -> float:
    """The largest difference between any untrained head's logits and the model's own, in double precision."""
    import torch

    hidden = torch.randn(8, medusa._head_of(model).shape[1], generator=torch.Generator().manual_seed(0)).double()
    fresh = MedusaHeads.of(model, heads=heads).double()
    own = hidden.to(fresh.output.device) @ medusa._head_of(model).double().T
    with torch.inference_mode():
        return float((fresh(hidden.to(own.device)) - own).abs().max())


def measure(
    model: LanguageModel,
    part: str | Path,
    *,
    texts: Path | None = None,
    stage2: Path | None = None,
    unprotected: Path | None = None,
    limit: int = 24,
    new_tokens: int = 128,
    engine: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> Mapping[str, Any]:
    """Every figure of the claim but the ablations, which train: see `ablations`.

    Args:
        part: the trained heads, a file or a folder.
        texts: the folder of the texts; `distill.folder()` unless given.
        stage2: folder of `train_medusa2`'s outcome; unprotected: the same without its recipe.
        limit: Spec-Bench questions.
    """
    drafter = medusa.load(part, model)
    values = np.array(drafter.accuracies, dtype=np.float64)
    known = read_texts(texts or distill.folder())
    kept_out = distill.teacher_pass(model, known.kept_out, known.folder / KEPT_OUT / "teacher", progress=False)
    asked = prompts(model, limit=limit)
    told = progress or (lambda what, done, steps: None)
    figures: dict[str, Any] = {"initial_gap": initial_gap(model)}
    told("accuracies", 1, 6)
    figures["accuracies"] = [asdict(row) for row in accuracy_table(drafter.heads, known, kept_out)]
    told("trees", 2, 6)
    rows = ladder(model, drafter.heads, values, asked, new_tokens=new_tokens, engine=engine)
    figures["ladder"] = [asdict(row) for row in rows]
    figures["ladder_holds"] = ladder_holds(rows)
    told("speed", 3, 6)
    figures["main"] = main_bar(model, drafter, asked, new_tokens=new_tokens, engine=engine)
    told("typical acceptance", 4, 6)
    figures["typical"] = typical_table(model, drafter, asked, new_tokens=new_tokens, engine=engine)
    told("exactness", 5, 6)
    # Several prompts: where the heads' guesses are not typical, typical acceptance has nothing to do and passes.
    figures["exactness"] = {
        rule.name: [first_two_tokens(model, drafter, prompt, rule, engine=engine) for prompt in asked[:6]]
        for rule in (MATCH, TypicalAcceptance())
    }
    told("medusa-2", 6, 6)
    if stage2 is not None:
        second = medusa.load_medusa2(stage2, model)
        figures["medusa2"] = medusa2_table(
            model, drafter, second, asked, kept_out, new_tokens=new_tokens, engine=engine
        )
    if unprotected is not None:
        changed, _ = medusa.load_medusa2(unprotected, model)
        figures["unprotected_kl"] = drift(model, changed, kept_out)
    return figures
