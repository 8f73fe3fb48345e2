"""How RAPID is measured: one fact in a long book, asked for with and without passages, and the speed against its parts.

Data     books in the public domain (`LOCI_DATA/books`). A question is a piece of a book of a given length with a fact
         put between two of its sentences at a given depth ("The code of NAME is NNNN.") and other people's codes at
         random places. Everything follows from the seed.
Figures  an answer is right when its first number is the code. Errors are 95 % intervals over questions, of differences
         on the same questions where two arms are compared. The share of accepted drafts counts drafts that were looked
         at: one after the first rejection is not.
Arms     "long" is the target with the whole context, "rag" the drafter alone with its passages; "rapid ETA" the target
         moved by so much, "random ETA" the same with passages that hold no code.
"""

from __future__ import annotations

import copy
import gzip
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loci import settings
from loci.bench.statistics import paired_bootstrap, standard_error
from loci.decoding.draft_model import DraftLM, shallow, warped
from loci.decoding.rapid import ContextRetriever, RagDrafter, Selection, ShiftedTarget, TargetLaw, drawn, prompt
from loci.errors import BadInput, DataNotFound
from loci.lm.cost import StepCost
from loci.lm.draft import TokenTree
from loci.lm.embed import Embedder, load_embedder
from loci.lm.engine.base import StepEngine
from loci.lm.engine.choose import choose
from loci.lm.generate import Generation, GenerationStats, Stop, generate
from loci.lm.model import LanguageModel
from loci.lm.sampling import GREEDY, Noise, Sampling
from loci.lm.verify import Allowed, Logits, exact_rule

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
ETAS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
GAMMA = 10
ANSWER_TOKENS = 24
WARM = Sampling(temperature=1.0)
_STOP = Stop()

_FIRST = (
    "Adele Bruno Clara Dario Edith Felix Greta Henry Irene Jonas Klara Lewis Maria Nadia Oscar Paula Quinn Rosa Simon"
    " Tilda Ulric Viola Walter Xenia Yusuf Zelda"
).split()
_LAST = (
    "Abbot Barlow Carver Dunmore Ellery Farrow Gilder Harrow Ingram Jessop Kendal Larkin Mercer Norton Osgood Pruett"
    " Quigley Redfern Sorrel Thorne Underhill Varley Whitlock Yardley"
).split()

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Needle:
    """One question. `context` are token ids; `depth` is where the fact stands in it, between 0 and 1."""

    name: str
    code: str
    depth: float
    context: tuple[int, ...]
    others: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        return f"According to the text above, what is the code of {self.name}?"

    def right(self, answer: str) -> bool:
        """Whether the first number of an answer is the code."""
        found = re.search(r"\d[\d,]*", answer)
        return found is not None and found.group().replace(",", "") == self.code


def fact(name: str, code: str) -> str:
    """The sentence that tells a code."""
    return f"The code of {name} is {code}."


def read_books(folder: Path | None = None) -> list[str]:
    """The texts of all books, by the names of their files.

    Raises:
        DataNotFound: there are none.
    """
    place = folder or settings.data() / "books"
    files = sorted(place.glob("*.txt.gz"))
    if not files:
        raise DataNotFound(f"no books (*.txt.gz) lie in {place}. Set LOCI_DATA to the folder of the data sets.")
    return [gzip.decompress(file.read_bytes()).decode("utf-8") for file in files]


def needles(
    model: LanguageModel,
    *,
    tokens: int,
    count: int,
    distractors: int = 3,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    books: Path | None = None,
) -> list[Needle]:
    """Questions over pieces of books of about `tokens` tokens, facts included; the depths take turns.

    Raises:
        BadInput: pieces too short for the facts.
        DataNotFound: no books.
    """
    if tokens < 64 + 24 * (1 + distractors):
        raise BadInput(f"pieces of {tokens} tokens do not hold {1 + distractors} facts between sentences of a book.")
    texts = read_books(books)
    made = []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        names = [
            f"{_FIRST[int(one)]} {_LAST[int(random.integers(len(_LAST)))]}" for one in random.permutation(len(_FIRST))
        ]
        codes = [str(int(code)) for code in random.choice(9000, size=1 + distractors, replace=False) + 1000]
        people = list(zip(names[: 1 + distractors], codes, strict=True))
        sentences = _piece(model, texts[int(random.integers(len(texts)))], tokens, people, random)
        depth = depths[number % len(depths)]
        places = [depth, *random.uniform(0.05, 0.95, size=distractors).tolist()]
        cuts = [min(len(sentences) - 1, max(1, round(place * len(sentences)))) for place in places]
        told: list[str] = []
        for place, sentence in enumerate(sentences):
            told += [fact(*person) for person, cut in zip(people, cuts, strict=True) if cut == place]
            told.append(sentence)
        ids = model.tokenizer.encode(" ".join(told), add_special_tokens=False)
        made.append(
            Needle(name=people[0][0], code=people[0][1], depth=depth, context=tuple(ids), others=tuple(people[1:]))
        )
    return made


def _piece(
    model: LanguageModel, text: str, tokens: int, people: Sequence[tuple[str, str]], random: np.random.Generator
) -> list[str]:
    """Whole sentences of a book from a random place on, as many as fit with the facts."""
    encode = model.tokenizer.encode
    room = tokens - sum(len(encode(f" {fact(*person)}", add_special_tokens=False)) for person in people)
    start = int(random.uniform(0.02, 0.9) * max(1, len(text) - 8 * tokens))
    flat = re.sub(r"\s+", " ", text[start : start + 8 * tokens + 2000])
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", flat)][1:-1]
    kept = []
    for sentence in sentences:
        room -= len(encode(f" {sentence}", add_special_tokens=False))
        if room < 0:
            break
        kept.append(sentence)
    if len(kept) < 2:
        raise BadInput(f"a piece of {tokens} tokens has fewer than two sentences; ask for longer ones.")
    return kept


class RandomPassages:
    """A retriever that chooses as many chunks as the real one, none of which holds a code. It shows what unrelated
    passages do."""

    def __init__(self, real: ContextRetriever, *, seed: int = 0) -> None:
        self.real, self.seed = real, seed

    @property
    def tokens(self) -> Sequence[int]:
        return self.real.tokens

    @property
    def budget_tokens(self) -> int:
        return self.real.budget_tokens

    @property
    def nbytes(self) -> int:
        return self.real.nbytes

    def select(self, query: str, *, most: int | None = None) -> Selection:
        size, room = self.real.chunk_tokens, min(self.budget_tokens, most or self.budget_tokens)
        scores = self.real.scores(query)
        text = [
            self.real.decode(self.tokens[max(0, at - 32) : at + size + 32]) for at in range(0, len(self.tokens), size)
        ]
        free = [chunk for chunk, words in enumerate(text) if "The code of" not in words]
        chosen = np.random.default_rng(self.seed).permutation(free or [0])[: max(1, room // (size + 2))]
        return self.real.passages(sorted(chosen.tolist()), scores=scores, above=True, seconds=0.0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm over all questions."""

    name: str
    right: tuple[bool, ...]
    stats: GenerationStats

    @property
    def share(self) -> float:
        return float(np.mean(self.right))

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        n, z = len(self.right), 1.96
        middle, width = (
            self.share + z * z / (2 * n),
            z * np.sqrt(self.share * (1 - self.share) / n + z * z / (4 * n * n)),
        )
        return float((middle - width) / (1 + z * z / n)), float((middle + width) / (1 + z * z / n))


class Bench:
    """Target, drafter, retriever and engines that all arms share, so that a context is read once for all of them.

    Args:
        draft: the model that drafts; the target itself unless given.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        draft: LanguageModel | None = None,
        embedder: Embedder | None = None,
        retriever: ContextRetriever | None = None,
        gamma: int = GAMMA,
        engine: str = "auto",
    ) -> None:
        found = embedder or load_embedder()
        if found is None:
            raise BadInput("RAPID needs an embedder to choose passages by.")
        self.model, self.gamma = model, gamma
        self.engine: StepEngine = choose(model, name=engine)
        self.draft = DraftLM(draft or model, engine=engine, shared=model)
        self.draft.check(model)
        self.retriever = retriever or ContextRetriever.fitting(model, found)
        self.last: RagDrafter | None = None  # of the last run that drafted
        self.watched: Watched | None = None

    def run(
        self,
        arm: str,
        context: Sequence[int],
        question: str,
        *,
        sampling: Sampling = GREEDY,
        tokens: int = ANSWER_TOKENS,
        seed: int = 0,
        stop: Stop = _STOP,
        law: TargetLaw = "shifted",
        watched: Mapping[float, ShiftedTarget] | None = None,
    ) -> Generation:
        """One answer of one arm: "long", "rag", "rapid ETA" or "random ETA". What `watched` rules would have accepted
        is then in `self.watched`."""
        self.watched = None
        kind, _, number = arm.partition(" ")
        whole = prompt(self.model, context, question)
        self.retriever.build(context)
        if kind == "long":
            return generate(
                self.model, whole, max_new_tokens=tokens, sampling=sampling, seed=seed, stop=stop, engine=self.engine
            )
        if kind == "rag":
            chosen = self.retriever.select(question)
            asked = prompt(self.draft.model, chosen.ids, question)
            return generate(
                self.draft.model,
                asked,
                max_new_tokens=tokens,
                sampling=sampling,
                seed=seed,
                stop=stop,
                engine=self.draft.engine,
            )
        if kind not in ("rapid", "random"):
            raise BadInput(f"no arm is called {arm!r}. Known: long, rag, rapid ETA, random ETA.")
        retriever = self.retriever if kind == "rapid" else RandomPassages(self.retriever, seed=len(context))
        drafter = self.last = RagDrafter(self.draft, retriever, self.gamma, query=question)
        rule = ShiftedTarget(eta=float(number), law=law, beyond=drafter.after)
        self.watched = Watched(rule, watched) if watched else None
        return generate(
            self.model,
            whole,
            max_new_tokens=tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            drafter=drafter,
            acceptance=self.watched or rule,
            engine=self.engine,
            max_nodes=self.gamma + 1,
        )


def arms(etas: Sequence[float] = ETAS, random_etas: Sequence[float] = ()) -> tuple[str, ...]:
    """The names of arms."""
    return ("long", "rag", *(f"rapid {eta:g}" for eta in etas), *(f"random {eta:g}" for eta in random_etas))


def answers(
    bench: Bench,
    questions: Sequence[Needle],
    names: Sequence[str],
    *,
    sampling: Sampling = GREEDY,
    progress: Progress | None = None,
) -> dict[str, Arm]:
    """Every arm on every question. Questions are the outer loop: their contexts are read once."""
    right: dict[str, list[bool]] = {name: [] for name in names}
    stats: dict[str, GenerationStats] = {}
    for number, needle in enumerate(questions):
        if progress is not None:
            progress("questions", number, len(questions))
        for name in names:
            found = bench.run(name, needle.context, needle.question, sampling=sampling, seed=number)
            right[name].append(needle.right(found.text))
            stats[name] = found.stats if name not in stats else stats[name] + found.stats
    return {name: Arm(name=name, right=tuple(right[name]), stats=stats[name]) for name in names}


def table(found: Mapping[str, Arm]) -> dict[str, dict[str, Any]]:
    """Plain numbers, ready for JSON; differences to the long context in points."""
    rows: dict[str, dict[str, Any]] = {}
    for name, arm in found.items():
        low, high = arm.interval()
        rows[name] = {
            "questions": len(arm.right),
            "right": round(arm.share, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "tokens_per_step": round(arm.stats.tokens_per_step, 3),
            "accepted": round(accepted_share(arm.stats, GAMMA), 4) if arm.stats.proposed_nodes else None,
        }
        if "long" in found and name != "long":
            gap = paired_bootstrap([float(one) for one in arm.right], [float(one) for one in found["long"].right])
            rows[name]["above_long"] = [round(100 * value, 1) for value in (gap.difference, gap.low, gap.high)]
    return rows


def main_bar(found: Mapping[str, Arm], *, points: float = 30.0) -> bool:
    """Whether RAPID at eta 10 is so many points above the long context."""
    return 100 * (found["rapid 10"].share - found["long"].share) >= points


def integration_holds(found: Mapping[str, Arm]) -> dict[str, bool]:
    """At a length where the long context is sometimes right: RAPID keeps the better of both, unrelated passages cost
    little up to eta 20, and much at 50."""
    long, best = found["long"].share, max(found["long"].share, found["rag"].share)
    bars = {"rapid 10 >= best - 2": found["rapid 10"].share >= best - 0.02}
    for name, arm in found.items():
        if name.startswith("random") and float(name.split()[1]) <= 20:
            bars[f"{name} >= long - 3"] = arm.share >= long - 0.03
    if "random 50" in found:
        bars["random 50 < long - 3"] = found["random 50"].share < long - 0.03
    return bars


def accepted_share(stats: GenerationStats, gamma: int) -> float:
    """Accepted drafts over drafts that were looked at."""
    whole = stats.accepted_by_depth[gamma - 1] if len(stats.accepted_by_depth) >= gamma else 0
    rejected = stats.steps - whole
    return stats.accepted_nodes / max(1, stats.accepted_nodes + rejected)


class Watched:
    """A rule that decides as `rule` does, and keeps for every place what others would have accepted there."""

    def __init__(self, rule: ShiftedTarget, others: Mapping[float, ShiftedTarget]) -> None:
        self.rule, self.others = rule, others
        self.name, self.exact, self.laws = rule.name, rule.exact, rule.laws
        self.expected: dict[float, list[float]] = {eta: [] for eta in others}

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        for node, token in self.rule.walk(tree, logits, sampling=sampling, noise=noise, allowed=allowed):
            if tree.children[node]:
                p, q = self.rule.distributions(tree, logits, sampling, allowed, node)
                for eta, other in self.others.items():
                    self.expected[eta].append(other.output(p, p if q is None else q)[1])
            yield node, token


def acceptance(
    bench: Bench,
    questions: Sequence[Needle],
    *,
    etas: Sequence[float] = (0.0, 10.0),
    law: TargetLaw = "shifted",
    tokens: int = 64,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Free answers at temperature 1, by eta: what share of drafts was accepted, and tokens per step. "expected" is what
    each eta would have accepted at the very same places, those of the text without a shift, with its standard error
    (of the difference to the first eta)."""
    total: dict[float, GenerationStats] = {}
    expected: dict[float, list[float]] = {eta: [] for eta in etas}
    rules = {eta: ShiftedTarget(eta=eta, law=law) for eta in etas}
    for number, needle in enumerate(questions):
        if progress is not None:
            progress("acceptance", number, len(questions))
        ask = f"Tell in your own words what happens where the code of {needle.name} is given."
        for eta in etas:
            watched = rules if eta == etas[0] else {}
            stats = bench.run(
                f"rapid {eta:g}",
                needle.context,
                ask,
                sampling=WARM,
                tokens=tokens,
                seed=number,
                stop=Stop(eos=False),
                law=law,
                watched=watched,
            ).stats
            total[eta] = stats if eta not in total else total[eta] + stats
            if bench.watched is not None:
                for other, shares in bench.watched.expected.items():
                    expected[other] += shares
    return {
        f"{eta:g}": {
            "accepted": accepted_share(stats, bench.gamma),
            "of_proposed": stats.acceptance,
            "tokens_per_step": stats.tokens_per_step,
            "expected": float(np.mean(expected[eta])),
            "error": standard_error(np.subtract(expected[eta], expected[etas[0]]).tolist()),
        }
        for eta, stats in total.items()
    }


def random_pairs(*, pairs: int = 40, vocabulary: int = 50, scale: float = 1.0, eta: float = 10.0) -> dict[str, float]:
    """Mean acceptance of random distributions with and without the shift, and how far the paper's law is from p."""
    generator, rows = np.random.default_rng(0), []
    plain, moved, paper = ShiftedTarget(law="lossless"), ShiftedTarget(eta=eta), ShiftedTarget(eta=eta, law="paper")
    for _ in range(pairs):
        p, q = np.exp(scale * generator.standard_normal((2, vocabulary)))
        p, q = p / p.sum(), q / q.sum()
        out, taken = paper.output(p, q)
        rows.append((plain.output(p, q)[1], moved.output(p, q)[1], taken, 0.5 * float(np.abs(out - p).sum())))
    names = ("lossless", "shifted", "paper", "paper_from_p")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """RAPID against plain decoding at one length. Milliseconds, tokens per second; `foretold` from the parts."""

    context: int
    passages: int
    target_plain: float
    target_chain: float
    draft_chain: float
    draw: float
    check: float
    tokens_per_step: float
    accepted: float
    plain: float
    rapid: float
    foretold_plain: float
    foretold: float

    @property
    def speedup(self) -> float:
        return self.rapid / self.plain

    @property
    def foretold_speedup(self) -> float:
        return self.foretold / self.foretold_plain

    @property
    def error(self) -> float:
        """Of the foretold throughput."""
        return abs(self.foretold - self.rapid) / self.rapid

    def row(self) -> dict[str, float]:
        """Plain numbers, ready for JSON."""
        return {
            **{name: round(float(value), 3) for name, value in vars(self).items()},
            "speedup": round(self.speedup, 3),
            "foretold_speedup": round(self.foretold_speedup, 3),
            "error": round(self.error, 3),
        }


def speed(
    bench: Bench,
    needle: Needle,
    *,
    eta: float = 10.0,
    tokens: int = 64,
    repeats: int = 3,
    seconds: float = 5.0,
    sampling: Sampling = WARM,
) -> Speed:
    """Decode with and without RAPID after one context, then time the parts: a step of the target over 1 node and over
    the chain, the drafter's growing steps, drawing and checking. The drafter's passages are those of the needle.

    Decoding alone is compared: reading the prompt, choosing passages and reading those comes on top, once.
    """
    free, name = Stop(eos=False), f"rapid {eta:g}"
    total: GenerationStats | None = None
    plain: list[float] = []
    rapid: list[float] = []
    for number in range(-1, repeats):
        for arm, speeds in (("long", plain), (name, rapid)):
            stats = bench.run(
                arm, needle.context, needle.question, tokens=tokens, seed=max(0, number), stop=free, sampling=sampling
            ).stats
            if number < 0:  # the first of each makes room and lays out its kernels
                continue
            begun = stats.prefill_seconds
            if arm == name and bench.last is not None:
                begun += bench.last.start_seconds
                total = stats if total is None else total + stats
            speeds.append(stats.new_tokens / (stats.seconds - begun))
    if total is None or bench.last is None or bench.last.selection is None:
        raise BadInput(f"a context of {len(needle.context):,} tokens is too short for RAPID; give a longer one.")
    length, passages, gamma = len(needle.context), len(bench.last.selection.ids), bench.gamma
    target = StepCost.measure(bench.engine, nodes=(1, gamma + 1), contexts=(length,), seconds=seconds)
    sizes = tuple(range(1, gamma + 3))
    drafter = StepCost.measure(bench.draft.engine, nodes=sizes, contexts=(passages,), seconds=seconds)
    whole = total.accepted_by_depth[gamma - 1] / total.steps if len(total.accepted_by_depth) >= gamma else 0.0
    # A chain grows behind the token that its cache lacks; after a whole chain one more level is read.
    levels = sum(drafter(size) for size in range(1, gamma + 1)) + whole * drafter(gamma + 1)
    parts = small_parts(bench.model.vocabulary, eta=eta, sampling=sampling)
    step = target(gamma + 1, length) + levels + gamma * parts["draw"] + total.tokens_per_step * parts["check"]
    return Speed(
        context=length,
        passages=passages,
        target_plain=1e3 * target(1, length),
        target_chain=1e3 * target(gamma + 1, length),
        draft_chain=1e3 * levels,
        draw=1e3 * parts["draw"],
        check=1e3 * parts["check"],
        tokens_per_step=total.tokens_per_step,
        accepted=accepted_share(total, gamma),
        plain=statistics.median(plain),
        rapid=statistics.median(rapid),
        foretold_plain=1.0 / (target(1, length) + parts["plain"]),
        foretold=total.tokens_per_step / step,
    )


def small_parts(vocabulary: int, *, eta: float, sampling: Sampling = WARM, repeats: int = 30) -> dict[str, float]:
    """Seconds that one drafted token takes to draw, one node to check, and one token of plain decoding to draw."""
    random = np.random.default_rng(0)
    rows = 3.0 * random.standard_normal((2, vocabulary)).astype(np.float32)
    noise = Noise(seed=0, row=0, position=0)
    (q,) = warped(rows[:1], WARM if sampling.greedy else sampling)
    tree = replace(TokenTree.chain([0, int(q.argmax())]), law="iid", q=q[None], q_row=np.array([0, -1], dtype=np.int32))
    rule = ShiftedTarget(eta=eta, beyond=lambda tree, node, sampling: q)
    times: dict[str, list[float]] = {"draw": [], "check": [], "plain": []}
    for _ in range(repeats):
        began = time.perf_counter()
        drawn(warped(rows[:1], WARM if sampling.greedy else sampling)[0], 0.5)
        times["draw"].append(time.perf_counter() - began)
        for name, (checked, checking) in {
            "check": (tree, rule),
            "plain": (TokenTree.root(0), exact_rule("point", sampling)),
        }.items():
            began = time.perf_counter()
            next(checking.walk(checked, lambda node: rows[1], sampling=sampling, noise=noise))
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def crossing(rows: Sequence[Speed]) -> tuple[float | None, float | None]:
    """The context length where RAPID begins to be faster, as measured and as foretold, along a line between the two
    lengths around it; None where it is not reached."""

    def at(gains: Sequence[float]) -> float | None:
        for left, right, low, high in zip(rows, rows[1:], gains, gains[1:], strict=False):
            if low < 1.0 <= high:
                return left.context + (1.0 - low) / (high - low) * (right.context - left.context)
        return None

    return at([row.speedup for row in rows]), at([row.foretold_speedup for row in rows])


def speed_holds(rows: Sequence[Speed], *, within: float = 0.15) -> dict[str, bool]:
    """Whether the parts foretell every throughput; RAPID is slower at the shortest length, faster at the longest."""
    return {
        **{f"{row.context}: foretold within {within:.0%}": row.error <= within for row in rows},
        "slower at the shortest": rows[0].speedup < 1.0,
        "faster at the longest": rows[-1].speedup > 1.0,
    }


def stretched(model: LanguageModel, *, window: int) -> LanguageModel:
    """The same weights with linearly stretched positions, for timing alone: what it says there is not judged."""
    if window <= model.window:
        return model
    body: Any = model.model
    config = copy.deepcopy(body.config)
    config.max_position_embeddings = window
    rope = dict(getattr(config, "rope_parameters", None) or {})
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": window / model.window}
    whole = type(body)(config).to(body.dtype).to(body.device).eval()
    whole.load_state_dict(body.state_dict())
    whole.generation_config = body.generation_config
    return replace(model, name=f"{model.name}, {window} positions", model=whole)


def thinned(model: LanguageModel, *, dropped: Sequence[int]) -> LanguageModel:
    """A weaker model: the same one without these layers. Layers are copied; the embedding is not.

    Raises:
        BadInput: layers that the model does not have, or all of them.
    """
    body: Any = model.model
    count = len(body.base_model.layers)
    if not set(dropped) < set(range(count)):
        raise BadInput(f"layers {sorted(dropped)} cannot be left out: {model.name} has the layers 0 to {count - 1}.")
    weak = shallow(model, layers=count - len(set(dropped)), own=True)
    kept = [copy.deepcopy(layer) for place, layer in enumerate(body.base_model.layers) if place not in set(dropped)]
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
        weak_layers: Any = weak.model.base_model.layers
        weak_layers[place] = layer
    return replace(weak, name=f"{model.name} without {len(set(dropped))} layers")


def weak_target(model: LanguageModel, *, layers: int) -> LanguageModel:
    """`thinned` by so many layers, evenly from the second third on; those at either end do the most."""
    count = len(model.model.base_model.layers)  # type: ignore[arg-type]
    places = np.linspace(count // 3, count - 4, layers).round().astype(int)
    return thinned(model, dropped=sorted(set(places.tolist())))


def upward(
    model: LanguageModel,
    questions: Sequence[Needle],
    *,
    layers: int = 2,
    etas: Sequence[float] = (10.0, 40.0),
    embedder: Embedder | None = None,
    engine: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Arm]:
    """A target with fewer layers, helped by a drafter that is the whole model."""
    bench = Bench(weak_target(model, layers=layers), draft=model, embedder=embedder, engine=engine)
    return answers(bench, questions, arms(etas), progress=progress)


def upward_holds(found: Mapping[str, Arm], *, points: float = 10.0) -> bool:
    """Whether the best eta is so many points above the weak target's own long context."""
    best = max(arm.share for name, arm in found.items() if name.startswith("rapid"))
    return 100 * (best - found["long"].share) >= points
