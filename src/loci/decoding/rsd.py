"""Recursive speculative decoding: trees whose siblings are drawn without replacement, so that no guess comes twice.

Source  Jeon et al. 2024, arXiv:2402.14160: constant branching (RSD-C, section 3.1, algorithm 3), stochastic beams
        (RSD-S, algorithm 5), recursive rejection (section 3.2; it stands in `lm.verify`). Gumbel-top-k and stochastic
        beam search: Kool et al. 2019, arXiv:1903.06059, whose appendix B.3 gives the stable form of the truncated key.
        Baselines: a chain (Leviathan et al. 2023, arXiv:2211.17192), and independent sequences with several rounds of
        rejection (Miao et al. 2023, arXiv:2305.09781).
Letters q: the drafter's distribution at a node. Key: log-probability of a sequence plus Gumbel noise; the largest keys
        are a sample without replacement, in the order in which it is drawn.
Ours    noise is an exponential race, q / E, which has the same order as log q + Gumbel and costs one division; only the
        few winners of a node get their keys. At temperature 0 the best guesses take the place of drawn ones (law
        "point"). A shape that is larger than the budget loses its deepest levels.
Cost    one pass of the source for each level, plus about 0.3 ms for each node that gets children (49,152 tokens).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from loci.decoding.distill import DistilledText, teacher_pass
from loci.decoding.draft_model import Draft, DraftLM, DraftSource, own_part, shallow
from loci.errors import BadInput
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.model import LanguageModel
from loci.lm.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from loci.lm.train import Artifact
else:
    Tensor = Any  # checked for shape and dtype all the same, without importing torch

NAME = "rsd"
_PLAIN = Sampling(temperature=1.0)
_ROWS = 128  # of a product with the vocabulary at once: what is worked on stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class RSDC:
    """Constant branching: every node of level l gets `branching[l]` children."""

    branching: tuple[int, ...] = (4, 2, 1)  # ours

    law: Law = "without_replacement"

    def __post_init__(self) -> None:
        if not self.branching or min(self.branching) < 1:
            raise BadInput(f"branching is {self.branching}; every level needs at least 1 child.")

    @property
    def size(self) -> int:
        """Nodes below the root."""
        return sum(math.prod(self.branching[: level + 1]) for level in range(len(self.branching)))

    @property
    def length(self) -> int:
        return len(self.branching)

    def cut(self, *, size: int, length: int) -> RSDC | None:
        """The levels that fit into so many nodes and levels; None if not even a single node does."""
        branching = self.branching[:length]
        while len(branching) > 1 and RSDC(branching=branching).size > size:
            branching = branching[:-1]
        if not branching or size < 1:
            return None
        return RSDC(branching=(min(branching[0], size), *branching[1:]))


@dataclass(frozen=True, kw_only=True)
class RSDS:
    """Stochastic beams: every level holds the `width` largest keys over all parents."""

    width: int = 5  # ours: with the root, 16 nodes, the budget of a step unless costs were measured
    length: int = 3  # ours

    law: Law = "without_replacement"

    def __post_init__(self) -> None:
        if self.width < 1 or self.length < 1:
            raise BadInput(f"a beam of {self.width} x {self.length} has no nodes; both must be at least 1.")

    @property
    def size(self) -> int:
        return self.width * self.length

    def cut(self, *, size: int, length: int) -> RSDS | None:
        length, width = min(self.length, length), min(self.width, size)
        if length < 1 or width < 1:
            return None
        return RSDS(width=width, length=min(length, size // width))


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One guess after another: ordinary speculative decoding."""

    length: int = 4

    law: Law = "without_replacement"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise BadInput(f"a chain of {self.length} has no nodes; it needs at least 1.")

    @property
    def size(self) -> int:
        return self.length

    def cut(self, *, size: int, length: int) -> Chain | None:
        fits = min(self.length, size, length)
        return Chain(length=fits) if fits > 0 else None


@dataclass(frozen=True, kw_only=True)
class IID:
    """Independent sequences that may repeat each other: what drawing without replacement is compared with."""

    count: int = 4
    length: int = 4

    law: Law = "iid"

    def __post_init__(self) -> None:
        if self.count < 1 or self.length < 1:
            raise BadInput(f"{self.count} sequences of {self.length} have no nodes; both must be at least 1.")

    @property
    def size(self) -> int:
        return self.count * self.length

    def cut(self, *, size: int, length: int) -> IID | None:
        length, count = min(self.length, length), min(self.count, size)
        if length < 1 or count < 1:
            return None
        return IID(count=count, length=min(length, size // count))


Shape = RSDC | RSDS | Chain | IID
Rows = Callable[[Draft, Sequence[int]], Float32[np.ndarray, "node vocabulary"]]


def gumbel_top_k(
    logq: Float64[np.ndarray, " token"] | Float32[np.ndarray, " token"], k: int, generator: np.random.Generator
) -> tuple[Int64[np.ndarray, " drawn"], Float64[np.ndarray, " drawn"]]:
    """An ordered sample of k tokens without replacement, and their keys log q + Gumbel, falling.

    Fewer than k where q has a smaller support (log q of minus infinity is no support).
    """
    return race(np.exp(logq.astype(np.float64)), k, generator)


def race(
    q: Float64[np.ndarray, " token"] | Float32[np.ndarray, " token"], k: int, generator: np.random.Generator
) -> tuple[Int64[np.ndarray, " drawn"], Float64[np.ndarray, " drawn"]]:
    """`gumbel_top_k` of probabilities. A token arrives after E / q, E exponential; the first k are the sample, and the
    key of one is -log of its time. q need not sum to 1; its sum shifts the keys."""
    # In float32 the small numbers that win would come in steps of several per cent of their size.
    speed = q / np.maximum(generator.standard_exponential(len(q)), np.finfo(np.float64).tiny)
    k = min(k, len(q))
    if k <= 8:  # the best one, k times: cheaper than ordering a whole vocabulary
        drawn = np.empty(k, dtype=np.int64)
        times = np.empty(k)
        for place in range(k):
            drawn[place] = best = int(speed.argmax())
            times[place] = speed[best]
            speed[best] = 0.0
    else:
        top = np.argpartition(speed, -k)[-k:]
        drawn = top[np.argsort(-speed[top], kind="stable")].astype(np.int64)
        times = speed[drawn].astype(np.float64)
    there = times > 0
    return drawn[there], np.log(times[there])


def truncated(raw: Float64[np.ndarray, " drawn"], *, largest: float, key: float) -> Float64[np.ndarray, " drawn"]:
    """Keys of a parent's children, given that the largest of them is the parent's own key.

    -log(exp(-key) - exp(-largest) + exp(-raw)), without overflow.

    Args:
        raw: children's keys as drawn, `largest` the greatest among all children's.
    """
    with np.errstate(divide="ignore"):
        v = key - raw + np.log1p(-np.exp(np.minimum(raw - largest, 0.0)))
    return np.asarray(key - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v))), dtype=np.float64)


def stochastic_beam(rows: Rows, root: int, *, width: int, length: int, generator: np.random.Generator) -> TokenTree:
    """A tree of `width` sequences drawn without replacement; see `RSDS`.

    Args:
        rows: q after nodes of the draft so far.
    """
    draft = Draft([root])
    tree, _ = _beam(draft, rows, width, length, generator)
    return tree


def _beam(
    draft: Draft, rows: Rows, width: int, length: int, generator: np.random.Generator
) -> tuple[TokenTree, dict[int, float]]:
    """The tree, and every node's key."""
    drawn = _Drawn(draft, "without_replacement")
    level, logs, keys = [0], {0: 0.0}, {0: 0.0}
    for _ in range(length):
        offers: list[tuple[float, int, int, float]] = []  # key, parent's place in the level, token, log-probability
        found = drawn.ask(rows, level)
        for place, (parent, q) in enumerate(zip(level, found, strict=True)):
            tokens, raw = race(q, width, generator)
            if not len(tokens):
                continue
            raw = raw + logs[parent]
            for token, key in zip(tokens.tolist(), truncated(raw, largest=raw[0], key=keys[parent]), strict=True):
                offers.append((float(key), place, token, logs[parent] + math.log(q[token])))
        offers.sort(key=lambda offer: -offer[0])  # so children of a node are added by falling key
        grown = []
        for key, place, token, log in offers[:width]:
            node = draft.add(level[place], token)
            logs[node], keys[node] = log, key
            grown.append(node)
        level = grown
        if not level:
            break
    return drawn.tree(), keys


class _Drawn:
    """A draft, and the distributions that its nodes' children were drawn from."""

    def __init__(self, draft: Draft, law: Law) -> None:
        self.draft, self.law = draft, law
        self.q: list[Float32[np.ndarray, "node vocabulary"]] = []
        self.q_row: dict[int, int] = {}

    def ask(self, rows: Rows, nodes: Sequence[int]) -> Float32[np.ndarray, "node vocabulary"]:
        found = rows(self.draft, nodes)
        start = sum(map(len, self.q))
        self.q.append(found)
        self.q_row.update((node, start + place) for place, node in enumerate(nodes))
        return found

    def tree(self) -> TokenTree:
        size = len(self.draft.tokens)
        return TokenTree(
            tokens=np.array(self.draft.tokens, dtype=np.int32),
            parents=np.array(self.draft.parents, dtype=np.int32),
            law=self.law,
            q=np.concatenate(self.q).astype(np.float32, copy=False),
            q_row=np.array([self.q_row.get(node, -1) for node in range(size)], dtype=np.int32),
        )


class RSD:
    """Draws a tree from a source of distributions; `lm.verify.RECURSIVE_REJECTION` checks it.

    Args:
        draft: a draft model, or heads (`HeadSource`), or any other source over the target's tokens.
        shape: of the tree.
        draft_temperature: of the draws; the user's unless given. The output's distribution does not depend on it.
    """

    name = NAME

    def __init__(
        self,
        draft: DraftSource,
        shape: Shape = RSDS(),
        *,
        draft_temperature: float | None = None,
    ) -> None:
        if draft_temperature is not None and not 0.0 < draft_temperature < float("inf"):
            raise BadInput(f"draft_temperature is {draft_temperature}; drawing needs a positive one.")
        self.draft, self.shape, self.draft_temperature = draft, shape, draft_temperature
        self.needs: Needs = draft.needs
        self.law: Law = shape.law

    @property
    def nbytes(self) -> int:
        return self.draft.nbytes

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self.draft.start(state, prefill)

    def observe(self, result: StepResult) -> None:
        self.draft.observe(result)

    def propose(self, state: DraftState) -> TokenTree:
        root = int(state.tokens[-1])
        shape = self._fitting(state)
        if shape is None:
            return TokenTree.root(root)
        draft = Draft([root])
        if state.sampling.greedy:
            state.note("temperature 0: the drafter's best guesses are checked, none are drawn")
            return best_guesses(draft, self._rows(_PLAIN), shape)
        sampling = state.sampling
        if self.draft_temperature is not None:
            sampling = replace(sampling, temperature=self.draft_temperature)
        tree, short = drawn_tree(draft, self._rows(sampling), shape, state.rng)
        if short:
            state.note("somewhere the drafter's distribution had fewer tokens than children were asked for")
        return tree

    def _rows(self, sampling: Sampling) -> Rows:
        return lambda draft, nodes: self.draft.distribution(draft, nodes, sampling=sampling)

    def _fitting(self, state: DraftState) -> Shape | None:
        """The shape as far as budget, window and source allow."""
        horizon = self.shape.length if self.draft.horizon is None else self.draft.horizon
        if isinstance(self.draft, DraftLM):
            horizon = min(horizon, self.draft.room)
        if horizon < 1:
            return None
        if self.shape.size > state.budget - 1:
            state.note(f"the tree of {self.shape.size + 1} nodes was cut to the budget of {state.budget}")
        return self.shape.cut(size=state.budget - 1, length=horizon)


def drawn_tree(draft: Draft, rows: Rows, shape: Shape, generator: np.random.Generator) -> tuple[TokenTree, bool]:
    """A tree of this shape whose tokens are drawn from `rows`, and whether some list of children came out short."""
    if isinstance(shape, RSDS):
        tree, _ = _beam(draft, rows, shape.width, shape.length, generator)
        return tree, tree.size - 1 < shape.size
    drawn = _Drawn(draft, shape.law)
    if isinstance(shape, IID):
        level = [0]
        for _ in range(shape.length):
            found = drawn.ask(rows, level)
            if len(level) == 1 and shape.count > 1:
                level = [draft.add(0, _one(found[0], generator)) for _ in range(shape.count)]
            else:
                level = [draft.add(node, _one(q, generator)) for node, q in zip(level, found, strict=True)]
        return drawn.tree(), False
    level, short = [0], False
    for count in shape.branching if isinstance(shape, RSDC) else (1,) * shape.length:
        grown = []
        for node, q in zip(level, drawn.ask(rows, level), strict=True):
            tokens, _ = race(q, count, generator)
            short |= len(tokens) < count
            grown += [draft.add(node, token) for token in tokens.tolist()]
        level = grown
    return drawn.tree(), short


def _one(q: Float32[np.ndarray, " token"], generator: np.random.Generator) -> int:
    tokens, _ = race(q, 1, generator)
    return int(tokens[0])


def best_guesses(draft: Draft, rows: Rows, shape: Shape) -> TokenTree:
    """The same shape without chance: the most probable children of each node; for beams the most probable sequences,
    level by level; for independent sequences the most probable beginnings, each gone on with its best guess."""
    if isinstance(shape, IID):
        shape = RSDC(branching=(shape.count,) + (1,) * (shape.length - 1))
    level, logs = [0], {0: 0.0}
    for place in range(shape.length):
        count = shape.width if isinstance(shape, RSDS) else 1 if isinstance(shape, Chain) else shape.branching[place]
        offers: list[tuple[float, int, int]] = []
        for node, q in zip(level, rows(draft, level), strict=True):
            top = np.argpartition(q, -count)[-count:] if count < len(q) else np.arange(len(q))
            offers += [(logs[node] + math.log(q[token]), node, int(token)) for token in top if q[token] > 0]
        offers.sort(key=lambda offer: (-offer[0], offer[1], offer[2]))
        grown = []
        for log, parent, token in offers[: count if isinstance(shape, RSDS) else None]:
            node = draft.add(parent, token)
            logs[node] = log
            grown.append(node)
        level = grown
    return TokenTree(tokens=np.array(draft.tokens, dtype=np.int32), parents=np.array(draft.parents, dtype=np.int32))


def load(path: str | Path, model: LanguageModel) -> RSD:
    """A drafter from what `train_draft` wrote (a file, or its folder), from the folder of a whole model, or from a name
    that `loci.lm.load` knows.

    Raises:
        ModelNotFound: nothing is there.
        BadModel: the layers belong to another model.
        BadInput: a model with another tokenizer.
    """
    place = Path(path).expanduser()
    trained = place / f"{NAME}.safetensors" if place.is_dir() else place
    if trained.suffix == ".safetensors" and trained.is_file():
        return RSD(DraftLM.from_layers(model, adapter=trained))
    return RSD(DraftLM.from_pretrained(path, target=model))


@dataclass(frozen=True, kw_only=True)
class DraftRecipe:
    """How a draft model is made of a model's first layers. Defaults are ours."""

    layers: int = 4  # of SmolLM2's 30: a pass costs a third of a step, the head included
    top: int = 64  # tokens of the target's distribution that are kept; the others count as one
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: float = 0.03  # part of all steps; after it the rate falls along half a cosine
    clip: float = 1.0  # longest gradient
    epochs: int = 3
    tokens_per_step: int = 2048  # at least one text
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("layers", "top", "epochs", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; a recipe needs at least 1.")


def train_draft(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    *,
    folder: str | Path,
    data: str,
    recipe: DraftRecipe = DraftRecipe(),
    teacher: str | Path | None = None,
    resume: bool = True,
    minutes: float | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> Artifact | None:
    """Teach copies of the first layers and the final norm to predict what the whole model predicts.

    The loss is the divergence of the target's distribution (its `top` most probable tokens, and all others as one)
    from the draft model's, after every token that stands before one the model wrote. Embedding and head are the
    model's own and are not trained. Products run in the model's precision, weights and optimiser stay in float32.

    Args:
        data: one line that says what the texts are; stored.
        teacher: folder of the target's pass over the texts (`distill.teacher_pass` with `top`); made if it is not
            there. Inside `folder` unless given.
        minutes: the rate falls so that it reaches zero after about so long, if that is sooner.
        stop_after: steps after which to save a checkpoint and return None.

    Returns:
        What lies in `folder` then: `rsd.safetensors`, bfloat16, and its JSON. Ctrl-C saves a checkpoint, from which the
        same call goes on.

    Raises:
        BadInput: no texts, or a checkpoint of another training.
    """
    import torch

    from loci.lm.train import Artifact, TrainingState, fingerprint, restore_checkpoint, save_checkpoint

    if not texts:
        raise BadInput("there are no texts to train on.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    taught = teacher_pass(model, texts, Path(teacher or folder / "teacher"), top=recipe.top, progress=progress)
    kept = (taught.top_ids, taught.top_logprobs, taught.rest)
    draft = shallow(model, layers=recipe.layers, own=True)
    part = own_part(draft).float().requires_grad_(True)
    head = draft.model.get_output_embeddings().weight.detach()  # type: ignore[no-untyped-call]
    weights = dict(part.named_parameters())
    optimizer = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    body: Any = draft.model.base_model
    low = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)

    def learn(numbers: Sequence[int]) -> float:
        ids, places, rows = _batch(texts, taught.starts, numbers)
        with low:
            hidden = body(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        known = (torch.from_numpy(np.asarray(part[rows])).to(model.device) for part in kept if part is not None)
        loss = divergence(hidden.flatten(0, 1)[places.to(model.device)], head, *known) / len(rows)
        torch.autograd.backward(loss, inputs=list(weights.values()))  # the embedding is the model's, and learns nothing
        return float(loss.detach())

    steps = sum(1 for _ in _steps(texts, recipe, 0)) * recipe.epochs
    base = fingerprint(model.model)
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}
    tokens = int(taught.starts[-1])
    run = TrainingState(
        identity={"recipe": settings, "base": base, "data": data, "texts": len(texts), "tokens": tokens}
    )
    if resume:
        run = restore_checkpoint(folder, run, weights, optimizer)
    began = saved = time.monotonic() - run.seconds
    order: list[list[int]] = []
    try:
        with _Bar(steps, run.step, shown=progress) as bar:
            while run.step < steps and (minutes is None or run.seconds < 60 * minutes):
                epoch, place = divmod(run.step, steps // recipe.epochs)
                if place == 0 or not order:
                    order = list(_steps(texts, recipe, epoch))
                done = run.step / steps if minutes is None else max(run.step / steps, run.seconds / (60 * minutes))
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * _rate(done, recipe.warmup)
                run.losses.append(learn(order[place]))
                torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
                run.step += 1
                run.seconds = time.monotonic() - began
                bar(run.step, sum(run.losses[-50:]) / len(run.losses[-50:]))
                stopped = run.step == stop_after and run.step < steps
                if stopped or time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    save_checkpoint(folder, run, weights, optimizer)
                    saved = time.monotonic()
                if stopped:
                    return None
    except KeyboardInterrupt:
        save_checkpoint(folder, run, weights, optimizer)
        raise
    return _saved(folder, model, part, run, base, data, recipe, settings, Artifact)


def _saved(
    folder: Path,
    model: LanguageModel,
    part: Any,
    run: Any,
    base: str,
    data: str,
    recipe: DraftRecipe,
    settings: dict[str, Any],
    kind: type[Artifact],
) -> Artifact:
    import torch
    from safetensors.torch import save_file

    path = folder / f"{NAME}.safetensors"
    save_file({key: value.to("cpu", torch.bfloat16).contiguous() for key, value in part.state_dict().items()}, path)
    artifact = kind(
        path=path,
        name=NAME,
        recipe=settings,
        data=data,
        seed=recipe.seed,
        base=base,
        base_name=model.name,
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        minutes=round(run.seconds / 60, 1),
    )
    last = run.losses[-max(1, len(run.losses) // 20) :]
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    score = {"divergence": round(sum(last) / len(last), 4), "steps": run.step}
    return artifact.saved_with(score=score, settings={"layers": recipe.layers})


def _rate(done: float, warmup: float) -> float:
    """The part of the learning rate that applies when so much (0 to 1) of the training is done."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (done - warmup) / max(1e-9, 1.0 - warmup))))


def _steps(texts: Sequence[DistilledText], recipe: DraftRecipe, epoch: int) -> Iterator[list[int]]:
    """Texts of about one length together, so that little is padding: each epoch the same groups, in another order."""
    lengths = [len(text.tokens) for text in texts]
    groups: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda number: (lengths[number], number)):
        if not groups or (len(groups[-1]) + 1) * lengths[number] > recipe.tokens_per_step:
            groups.append([])
        groups[-1].append(number)
    for place in np.random.default_rng([recipe.seed, epoch]).permutation(len(groups)).tolist():
        yield groups[place]


def _batch(
    texts: Sequence[DistilledText], starts: Int64[np.ndarray, " text_end"], numbers: Sequence[int]
) -> tuple[Tensor, Tensor, Int64[np.ndarray, " place"]]:
    """Padded ids; the places in them (row by row) before tokens the model wrote; their rows in the teacher's pass."""
    import torch

    longest = max(len(texts[number].tokens) for number in numbers)
    ids = np.zeros((len(numbers), longest), dtype=np.int64)
    places, rows = [], []
    for row, number in enumerate(numbers):
        text = texts[number]
        ids[row, : len(text.tokens)] = text.tokens  # padding stands behind, where causal attention never looks
        before = np.flatnonzero(text.written[1:])
        places.append(row * longest + before)
        rows.append(starts[number] + before)
    return torch.from_numpy(ids), torch.from_numpy(np.concatenate(places)), np.concatenate(rows)


def divergence(hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor) -> Tensor:
    """The sum over rows of KL(target || draft), all tokens outside the target's top taken as one.

    The logits are never all there at once: gradients are worked out on the way.

    Args:
        hidden: (place, width), after the final norm. head: (vocabulary, width).
        ids, logprobs: (place, rank), the target's most probable tokens. rest: (place,), log of what all others hold.
    """
    loss: Tensor = _divergence().apply(hidden, head, ids, logprobs, rest)
    return loss


@functools.cache
def _divergence() -> Any:
    import torch

    class Divergence(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, head: Tensor, ids: Tensor, logprobs: Tensor, rest: Tensor) -> Tensor:
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            low = hidden.detach().to(head.dtype)
            back = torch.empty_like(low)
            for start in range(0, len(low), _ROWS):
                rows = slice(start, start + _ROWS)
                top, log_p, log_rest = ids[rows].long(), logprobs[rows].float(), rest[rows].float()
                p, p_rest = log_p.exp(), log_rest.exp()
                whole = p.sum(dim=1) + p_rest  # float16 rounds
                p, p_rest = p / whole[:, None], p_rest / whole
                q = (low[rows] @ head.T).float().softmax(dim=1)
                q_top = q.gather(1, top).clamp_min(1e-30)
                q.scatter_(1, top, 0.0)
                q_rest = q.sum(dim=1).clamp_min(1e-30)
                total += (p * (p.clamp_min(1e-30).log() - q_top.log())).sum()
                total += (p_rest * (p_rest.clamp_min(1e-30).log() - q_rest.log())).sum()
                q *= (1.0 - p_rest / q_rest)[:, None]  # the slope with respect to the logits
                q.scatter_(1, top, q_top - p)
                torch.mm(q.to(head.dtype), head, out=back[rows])
            ctx.save_for_backward(back)
            ctx.kind = hidden.dtype
            return total

        @staticmethod
        def backward(ctx: Any, *slopes: Any) -> Any:
            (back,) = ctx.saved_tensors
            return (back * slopes[0]).to(ctx.kind), None, None, None, None

    return Divergence


class _Bar:
    """A progress bar on standard error; called with the steps done and the mean loss."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task(NAME, total=total, completed=done)

    def __enter__(self) -> Callable[[int, float], None]:
        self.bar.start()
        return lambda done, loss: self.bar.update(self.task, completed=done, description=f"{NAME}  {loss:.3f}")

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def acceptance(
    model: LanguageModel, draft: DraftLM, texts: Sequence[DistilledText], *, temperature: float = 1.0
) -> float:
    """How much of the target's next token a single draft explains: the mean of sum(min(p, q)), over all places before a
    token that the model wrote."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for text in texts:
            places = torch.from_numpy(np.flatnonzero(text.written[1:]))
            if not len(places):
                continue
            ids = torch.from_numpy(text.tokens[None].astype(np.int64)).to(model.device)
            p, q = (
                some(input_ids=ids, use_cache=False, logits_to_keep=places.to(model.device)).logits[0].float()
                for some in (model.model, draft.model.model)
            )
            both = torch.minimum((p / temperature).softmax(-1), (q / temperature).softmax(-1))
            total, count = total + float(both.sum()), count + len(places)
    if not count:
        raise BadInput("none of the texts has a token that the model wrote.")
    return total / count
