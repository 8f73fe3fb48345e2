"""Medusa: heads on the last hidden state that guess the tokens after the next one.

Source  Cai et al. 2024, arXiv:2401.10774: heads (section 2.1), Medusa-1 and Medusa-2 (2.2), typical acceptance (2.3.1),
        self-distillation (2.3.2), calibrated trees (2.3.3).
Letters head k, from 1: guesses the token at t + 1 + k from the state at t, from which the model's own head gives t + 1,
        the root of the next tree. So head k fills depth k. `draft`: an index into the tokens that heads know.
Ours    W1 *and* its bias begin at zero, so every head begins as the model's head; each block of a head has its own
        weights; the model's head is shared (a full one of a small model is larger than its layers), and only its rows
        of the tokens that the model writes most are read. Heads are trained on states that were computed once. Sampling
        is exact, by one draw per node (`lm.verify.MATCH`); typical acceptance draws its last token and says that it is
        not exact.
Near    `ppd` and `hidden_transfer` guess by probe rows that pass through the network. Heads cost no rows at all.
Cost    a draft reads the blocks (0.33 million numbers a head for SmolLM2-135M) and the draft rows of the model's head
        once: on one busy core 0.5 + 0.9 ms with 8,192 tokens, 0.5 + 9 ms with all 49,152.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, Integer
from torch import Tensor, nn
from torch.nn.functional import silu

from loci.decoding import tree_search
from loci.decoding.blend import Guesses
from loci.decoding.distill import DistilledText, TeacherPass, teacher_pass
from loci.decoding.tree_search import NOTHING, best_tree, targets_ahead
from loci.errors import BadInput, BadModel, Unsupported
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree, TreeTemplate
from loci.lm.model import LanguageModel
from loci.lm.sampling import Noise, Sampling, Support, warp
from loci.lm.train import (
    Artifact,
    LoraRecipe,
    TrainingState,
    Workers,
    attach,
    fingerprint,
    load_artifact,
    restore_checkpoint,
    save_checkpoint,
    weight_name,
    with_adapters,
)
from loci.lm.verify import GREEDY, Allowed, Logits

NAME = "medusa"
RANKS = 10  # guesses per head that a tree may use; the official code's
_ROWS = 128  # of a product with the vocabulary at once: what is worked on stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class MedusaRecipe:
    """How heads are made and trained. Defaults without a source are ours."""

    heads: int = 4  # table 1's releases have 5; the official trees use 4
    blocks: int = 1  # residual blocks per head; section 2.1.1
    share_lm_head: bool = True  # the paper gives each head its own
    draft_vocab: int | None = 8192  # tokens that heads know, the most frequent ones; None: all, as in the paper
    start: Literal["base", "random"] = "base"  # as the model's head; "random" is an ablation
    decay: float = 0.8  # head k counts decay ** k; section 2.2.1
    learning_rate: float = 1e-3  # the official script of Medusa-1
    warmup: float = 0.1  # part of all steps; ibid.
    weight_decay: float = 0.0  # ibid.
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 3
    positions: int = 1024  # of one step
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("heads", "blocks", "epochs", "positions"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; a recipe needs at least 1.")
        if self.draft_vocab is not None and self.draft_vocab < RANKS:
            raise BadInput(f"draft_vocab is {self.draft_vocab}; heads need at least {RANKS} tokens to rank.")
        if not 0.0 < self.decay <= 1.0:
            raise BadInput(f"decay is {self.decay}; it must be above 0 and at most 1.")
        if self.start == "random" and self.share_lm_head:
            raise BadInput('heads that start "random" have output layers of their own; set share_lm_head=False.')


class MedusaHeads(nn.Module):
    """Head k of a state h is W2 (h + silu(W1 h + b)), block by block.

    Args:
        output: the rows of the model's head for the draft tokens, or for all tokens in order.
        draft_tokens: the ids of the tokens that heads know, rising; None: all.
        share_lm_head: read `output`, which is not trained and not saved. Otherwise each head begins with a copy.

    Before training every head gives exactly what the model's head gives.
    """

    blocks_weight: nn.Parameter
    blocks_bias: nn.Parameter
    output: Tensor

    def __init__(
        self,
        output: Float[Tensor, "draft width"],
        *,
        vocabulary: int,
        heads: int = 4,
        blocks: int = 1,
        share_lm_head: bool = True,
        draft_tokens: Integer[np.ndarray, " draft"] | None = None,
    ) -> None:
        super().__init__()
        known = vocabulary if draft_tokens is None else len(draft_tokens)
        if len(output) != known:
            raise BadInput(f"heads that know {known:,} tokens were given {len(output):,} rows of the model's head.")
        if draft_tokens is not None and (
            np.any(np.diff(draft_tokens) <= 0) or draft_tokens[0] < 0 or draft_tokens[-1] >= vocabulary
        ):
            raise BadInput(f"draft tokens must rise, within the vocabulary of {vocabulary:,} tokens.")
        width = output.shape[1]
        self.vocabulary, self.heads, self.blocks, self.width = vocabulary, heads, blocks, width
        self.share_lm_head, self.draft_tokens = share_lm_head, draft_tokens
        self.blocks_weight = nn.Parameter(torch.zeros(blocks, heads, width, width))
        self.blocks_bias = nn.Parameter(torch.zeros(blocks, heads, width))
        if share_lm_head:
            self.register_buffer("output", output.detach(), persistent=False)
        else:
            self.output = nn.Parameter(output.detach().float().repeat(heads, 1, 1))

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        *,
        heads: int = 4,
        blocks: int = 1,
        share_lm_head: bool = True,
        draft_tokens: Integer[np.ndarray, " draft"] | None = None,
    ) -> MedusaHeads:
        """Fresh heads for a model. Raises `Unsupported` where the model's head is no plain matrix."""
        rows = _head_of(model)
        if draft_tokens is not None:
            rows = rows[torch.from_numpy(draft_tokens.astype(np.int64)).to(rows.device)]
        return cls(
            rows,
            vocabulary=model.vocabulary,
            heads=heads,
            blocks=blocks,
            share_lm_head=share_lm_head,
            draft_tokens=draft_tokens,
        )

    def randomize(self, seed: int) -> None:
        """Forget the start from the model's head: small random blocks and output rows. For ablations."""
        generator = torch.Generator().manual_seed(seed)
        for weight in (self.blocks_weight, *([] if self.share_lm_head else [self.output])):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * self.width**-0.5)

    def features(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "head *rows width"]:
        """What each head multiplies with its output rows; in the precision of `hidden`."""
        flat = hidden.reshape(1, -1, self.width).expand(self.heads, -1, -1)
        for weight, bias in zip(self.blocks_weight, self.blocks_bias, strict=True):
            inner = torch.baddbmm(bias.to(flat.dtype)[:, None], flat, weight.to(flat.dtype).transpose(1, 2))
            flat = flat + silu(inner)
        return flat.reshape(self.heads, *hidden.shape)

    def forward(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "head *rows draft"]:
        """Logits of the draft tokens, all heads."""
        features = self.features(hidden)
        if self.share_lm_head:
            return features @ self.output.to(features.dtype).T
        flat = features.reshape(self.heads, -1, self.width)
        return (flat @ self.output.to(flat.dtype).transpose(1, 2)).reshape(*features.shape[:-1], -1)

    @torch.inference_mode()
    def distributions(
        self, hidden: Float[Tensor, " width"], *, temperature: float = 1.0
    ) -> Float32[np.ndarray, "head vocabulary"]:
        """What each head expects at its depth, over the whole vocabulary; 0 for tokens that heads do not know."""
        if not temperature > 0.0:
            raise BadInput(f"temperature is {temperature}; a distribution needs a positive one.")
        known = (self(hidden.to(self.output.dtype)).float() / temperature).softmax(dim=-1).cpu().numpy()
        if self.draft_tokens is None:
            return np.asarray(known, dtype=np.float32)
        whole = np.zeros((self.heads, self.vocabulary), dtype=np.float32)
        whole[:, self.draft_tokens] = known
        return whole

    def ids(self, drafts: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Token ids of draft indices."""
        return drafts if self.draft_tokens is None else np.asarray(self.draft_tokens[drafts])

    def drafts(self, tokens: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Draft indices of token ids; `NOTHING` for tokens that heads do not know, and for `NOTHING`."""
        if self.draft_tokens is None:
            return tokens
        index = np.full(self.vocabulary + 1, NOTHING, dtype=np.int64)  # the last entry is that of NOTHING, -1
        index[self.draft_tokens] = np.arange(len(self.draft_tokens))
        return np.asarray(index[tokens])

    @property
    def nbytes(self) -> int:
        """Bytes of the heads, and of the rows of the model's head where these are a copy."""
        own = sum(weight.nbytes for weight in self.parameters())
        return own + (self.output.nbytes if self.share_lm_head and self.draft_tokens is not None else 0)

    def save(self, path: Path) -> None:
        """Write safetensors: parameters in bfloat16, and the draft tokens."""
        from safetensors.torch import save_file

        tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in self._trained()}
        if self.draft_tokens is not None:
            tensors["draft_tokens"] = torch.from_numpy(self.draft_tokens.astype(np.int32))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path, model: LanguageModel) -> MedusaHeads:
        """What `save` wrote, for the model that it was trained for; whose it is, `load` of this module looks at.

        Raises:
            BadModel: the file holds no heads, or heads of another width or vocabulary.
        """
        from safetensors.torch import load_file

        tensors = load_file(path)
        weight, bias = tensors.get("blocks_weight"), tensors.get("blocks_bias")
        if weight is None or bias is None or weight.dim() != 4:
            raise BadModel(f"{path} holds {', '.join(sorted(tensors))}; Medusa heads hold blocks_weight, blocks_bias.")
        width = _head_of(model).shape[1]
        if weight.shape[-1] != width:
            raise BadModel(f"{path} holds heads for states of {weight.shape[-1]} numbers; {model.name} has {width}.")
        draft = tensors.get("draft_tokens")
        known = None if draft is None else draft.numpy()
        if known is not None and len(known) and int(known[-1]) >= model.vocabulary:
            raise BadModel(f"{path} knows token {int(known[-1])}; {model.name} has {model.vocabulary:,} tokens.")
        blocks, heads = weight.shape[:2]
        found = cls.of(model, heads=heads, blocks=blocks, share_lm_head="output" not in tensors, draft_tokens=known)
        for name, own in found._trained():
            if own.shape != tensors[name].shape:
                raise BadModel(f"{path}: {name} is {tuple(tensors[name].shape)}, and {tuple(own.shape)} was expected.")
            own.data.copy_(tensors[name])
        return found

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.named_parameters()]


def _head_of(model: LanguageModel) -> Tensor:
    head: Any = model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or getattr(head, "bias", None) is not None:
        raise Unsupported(f"{model.name} has no output layer that is a plain matrix; Medusa heads cannot share it.")
    weight: Tensor = head.weight
    return weight.detach()


class Medusa:
    """Drafts from the heads at the last accepted node; proposes nothing before the first step, and then a tree.

    Args:
        accuracies: of the heads, from calibration; needed by the template "auto".
        template: the tree's shape; "auto" takes, for each budget of nodes, the best one.
        dtype: of the copies that are read at each step. bfloat16 halves what a draft costs.

    Raises:
        BadInput: a template deeper than there are heads, or "auto" without accuracies.
    """

    name = NAME
    law: Law = "point"
    needs = Needs(hidden=(-1,))

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        accuracies: Float[np.ndarray, "depth rank"] | None = None,
        template: Literal["auto"] | TreeTemplate = "auto",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if isinstance(template, str) and accuracies is None:
            raise BadInput('the template "auto" needs accuracies; calibrate the heads, or give a template.')
        self.heads, self.template, self.accuracies = heads, template, accuracies
        if not isinstance(template, str):
            self._fits(template)
        if accuracies is not None and len(accuracies) > heads.heads:
            raise BadInput(f"accuracies of {len(accuracies)} depths were given for {heads.heads} heads.")
        # How often a guess comes true once its parent has, by head and rank.
        known = np.zeros((0, 0)) if accuracies is None else accuracies
        self.priors: Mapping[Hashable, float] = {(NAME, *place): float(value) for place, value in np.ndenumerate(known)}
        self._fast = _Fast(heads, dtype)
        self._templates: dict[int, tuple[TreeTemplate, Int64[np.ndarray, " node"], Int64[np.ndarray, " node"]]] = {}
        self._hidden: Tensor | None = None

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self._hidden = None

    def propose(self, state: DraftState) -> TokenTree:
        root = int(state.tokens[-1])
        if self._hidden is None or state.budget < 2:
            return TokenTree.root(root)
        template, depth, rank = self._template(state.budget)
        tokens = self._fast.ranked(self._hidden)[depth - 1, rank]
        return TokenTree.from_template(template, [root, *tokens.tolist()])

    def guesses(self, state: DraftState) -> Guesses:
        """The same tree for a blend; kinds of guesses are head and rank."""
        root = int(state.tokens[-1])
        if self._hidden is None or state.budget < 2:
            return Guesses(tokens=[root], parents=[-1], keys=[(NAME,)])
        template, depth, rank = self._template(state.budget)
        tokens = self._fast.ranked(self._hidden)[depth - 1, rank]
        keys: list[Hashable] = [(NAME, *place) for place in zip((depth - 1).tolist(), rank.tolist(), strict=True)]
        return Guesses(tokens=[root, *tokens.tolist()], parents=template.shape.parents.tolist(), keys=[(NAME,), *keys])

    def observe(self, result: StepResult) -> None:
        if result.hidden is None:
            raise BadInput("Medusa needs the hidden state of every node, and the engine gave none.")
        self._hidden = result.hidden[-1, result.accepted[-1]].clone()

    @property
    def nbytes(self) -> int:
        """Of the copies that drafting reads; the trained heads themselves can be dropped."""
        return self._fast.nbytes

    def _fits(self, template: TreeTemplate) -> None:
        depth = max(map(len, template.ranks), default=0)
        widest = max((rank for path in template.ranks for rank in path), default=0) + 1
        if depth > self.heads.heads or widest > RANKS:
            raise BadInput(
                f"a template of depth {depth} with {widest} ranks needs as many heads and ranks; there are"
                f" {self.heads.heads} heads with {RANKS}."
            )

    def _template(self, budget: int) -> tuple[TreeTemplate, Int64[np.ndarray, " node"], Int64[np.ndarray, " node"]]:
        """For a budget the template, and depth and rank of each of its nodes but the root."""
        if budget not in self._templates:
            if isinstance(self.template, TreeTemplate):
                template = TreeTemplate(self.template.order[1:budget])
            elif self.accuracies is None:
                raise BadInput('the template "auto" needs accuracies.')
            else:
                template = best_tree(self.accuracies, nodes=budget)
            paths = template.order[1:]
            self._templates[budget] = (
                template,
                np.array([len(path) for path in paths], dtype=np.int64),
                np.array([path[-1] for path in paths], dtype=np.int64),
            )
        return self._templates[budget]


class _Fast:
    """The heads as a step reads them: one row, all heads, the best tokens of each."""

    def __init__(self, heads: MedusaHeads, dtype: torch.dtype) -> None:
        self.heads, self.dtype = heads, dtype
        with torch.no_grad():
            self.weights = [weight.to(dtype).contiguous() for weight in heads.blocks_weight]
            self.biases = [bias.float() for bias in heads.blocks_bias]
            self.output = heads.output.detach().to(dtype).contiguous()
        if heads.draft_tokens is None:
            self.tokens = None
        else:
            self.tokens = torch.from_numpy(heads.draft_tokens.astype(np.int64)).to(self.output.device)

    @torch.inference_mode()
    def ranked(self, hidden: Float[Tensor, " width"]) -> Int64[np.ndarray, "head rank"]:
        state = hidden.to(self.output.device, torch.float32).expand(self.heads.heads, -1)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = state.to(self.dtype)
            if number == 0:  # all heads read the same row: one product
                inner = (weight.reshape(-1, self.heads.width) @ rows[0]).reshape(self.heads.heads, -1)
            else:
                inner = torch.bmm(weight, rows[:, :, None])[:, :, 0]
            state = state + silu(inner.float() + bias)
        rows = state.to(self.dtype)
        if self.heads.share_lm_head:
            logits = (self.output @ rows.T).T  # this way round the vocabulary is walked through once, row by row
        else:
            logits = torch.bmm(self.output, rows[:, :, None])[:, :, 0]
        best = logits.float().topk(min(RANKS, logits.shape[1]), dim=1).indices
        found: np.ndarray = (best if self.tokens is None else self.tokens[best]).cpu().numpy()
        return found

    @property
    def nbytes(self) -> int:
        shared = self.heads.share_lm_head and self.output.data_ptr() == self.heads.output.data_ptr()
        own = [*self.weights, *self.biases, *([] if shared and self.tokens is None else [self.output])]
        return sum(part.nbytes for part in own)


@dataclass(frozen=True, kw_only=True)
class TypicalAcceptance:
    """Accept what is typical, not what was drawn: faster when sampling, and not the model's distribution any more.

    A child x of an accepted node is accepted where p(x) > min(epsilon, delta exp(-H(p))), p after temperature and the
    other sampling options, H its entropy. The longest accepted path wins, of several the most probable one; its last
    token is drawn from p. Greedy decoding is left as it is.

    Raises:
        BadInput: epsilon or delta outside (0, 1].
    """

    epsilon: float = 0.09  # section 2.3.1's official setting
    delta: float = 0.3  # the root of epsilon; ibid.
    name: str = "typical"
    exact: bool = False
    laws: frozenset[Law] = field(default=frozenset(("point",)))

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1.")

    def walk(
        self, tree: TokenTree, logits: Logits, *, sampling: Sampling, noise: Noise, allowed: Allowed | None = None
    ) -> Iterator[tuple[int, int]]:
        if sampling.greedy:
            yield from GREEDY.walk(tree, logits, sampling=sampling, noise=noise, allowed=allowed)
            return
        supports: dict[int, Support] = {}
        best: tuple[int, float, int] = (0, 0.0, 0)  # depth, log-likelihood, minus node; node of the lowest number wins
        reached = [(0, 0.0)]
        while reached:
            node, likelihood = reached.pop()
            best = max(best, (int(tree.depth[node]), likelihood, -node))
            children = [child for child in tree.children[node] if not tree.is_probe[child]]
            if not children and best[2] != -node:
                continue
            support = supports[node] = warp(logits(node), sampling, allowed=None if allowed is None else allowed(node))
            p = support.probabilities
            least = min(self.epsilon, self.delta * math.exp(float((p * np.log(p + 1e-5)).sum())))
            for child in children:
                place = int(np.searchsorted(support.tokens, tree.tokens[child]))
                if place < len(p) and support.tokens[place] == tree.tokens[child] and p[place] > least:
                    reached.append((child, likelihood + math.log(p[place])))
        last = -best[2]
        path = np.flatnonzero(tree.ancestors[last]).tolist()
        for node, child in itertools.pairwise(path):
            yield node, int(tree.tokens[child])
        yield last, noise.draw(supports[last], depth=int(tree.depth[last]))


def frequent_tokens(texts: Sequence[DistilledText], *, count: int, vocabulary: int) -> Int64[np.ndarray, " draft"]:
    """The ids, rising, of the tokens that the model wrote most often; where it wrote fewer, the lowest other ids, which
    a byte-pair vocabulary gives to its most frequent pieces."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for text in texts:
        counts += np.bincount(text.tokens[text.written], minlength=vocabulary)
    order = np.lexsort((np.arange(vocabulary), -counts))
    return np.asarray(np.sort(order[:count]), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a training came to. losses: one a step."""

    losses: tuple[float, ...]
    seconds: float

    @property
    def loss(self) -> float:
        """The mean of the last twentieth."""
        last = self.losses[-max(1, len(self.losses) // 20) :]
        return round(sum(last) / max(1, len(last)), 4)


def train_medusa1(
    model: LanguageModel,
    texts: Sequence[DistilledText] | TeacherPass,
    *,
    recipe: MedusaRecipe = MedusaRecipe(),
    folder: Path,
    resume: bool = True,
    minutes: float | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> tuple[MedusaHeads, Fitted] | None:
    """Train heads on a frozen model, from states that are computed once.

    Args:
        folder: for checkpoints, and for the states unless a `TeacherPass` is given.
        minutes: end after so long (earlier runs counted in); the learning rate then falls with the time.
        stop_after: steps after which to save a checkpoint and return None. For tests and for sharing a machine.

    Ctrl-C saves a checkpoint and is raised again. Raises `BadInput` without a position to learn from, or where the
    checkpoint belongs to another recipe.
    """
    teacher = texts if isinstance(texts, TeacherPass) else teacher_pass(model, texts, folder / "teacher")
    draft = None
    if recipe.draft_vocab is not None and recipe.draft_vocab < model.vocabulary:
        draft = frequent_tokens(teacher.texts, count=recipe.draft_vocab, vocabulary=model.vocabulary)
    heads = MedusaHeads.of(
        model, heads=recipe.heads, blocks=recipe.blocks, share_lm_head=recipe.share_lm_head, draft_tokens=draft
    )
    if recipe.start == "random":
        heads.randomize(recipe.seed)
    targets = heads.drafts(targets_ahead(teacher.tokens, teacher.written, depth=recipe.heads))
    places = np.flatnonzero((targets != NOTHING).any(axis=1))
    if not len(places):
        raise BadInput(f"none of the {len(teacher.texts)} texts has 3 tokens in a row that the model wrote.")
    weights = dict(heads._trained())
    parameters = list(heads.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    per_epoch = -(-len(places) // recipe.positions)
    scales = torch.tensor([recipe.decay**number for number in range(1, recipe.heads + 1)])
    device = model.device

    def learn(step: int) -> float:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(places))
        chosen = np.sort(places[order[place * recipe.positions : (place + 1) * recipe.positions]])
        hidden = teacher.hidden[torch.from_numpy(chosen)].to(device)
        loss = heads_loss(heads, hidden, torch.from_numpy(targets[chosen]).to(device), scales.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    identity = {
        "recipe": _plain(recipe),
        "positions": len(places),
        "base": fingerprint(model.model),
    }
    heads.to(device)
    fitted = _fit(
        learn,
        steps=per_epoch * recipe.epochs,
        weights=weights,
        optimizer=optimizer,
        recipe=recipe,
        identity=identity,
        folder=folder,
        resume=resume,
        minutes=minutes,
        stop_after=stop_after,
        progress=progress,
        name="medusa",
    )
    return None if fitted is None else (heads, fitted)


def heads_loss(
    heads: MedusaHeads,
    hidden: Float[Tensor, "row width"],
    targets: Int64[Tensor, "row head"],
    scales: Float[Tensor, " head"],
) -> Float[Tensor, ""]:
    """The sum over heads of scale times the mean cross-entropy over the rows that have a target.

    A head's softmax runs over the tokens that it knows, and a target that it does not know counts as none: what it
    learns is the distribution given that the token is a known one.
    """
    features = heads.features(hidden)
    known = targets != NOTHING
    weights = scales / known.sum(dim=0).clamp(min=1)
    if heads.share_lm_head:  # one product over all heads' rows that have a target
        number, row = known.T.nonzero(as_tuple=True)
        loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            features[number, row], heads.output, targets[row, number], weights[number], False
        )
        return loss
    total = features.new_zeros((), dtype=torch.float32)
    for place in range(heads.heads):
        rows = known[:, place].nonzero()[:, 0]
        total = total + _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            features[place, rows], heads.output[place], targets[rows, place], weights[place].expand(len(rows)), True
        )
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_i weight_i CE(features_i W', target_i), whose logits are never all there at once.

    Gradients are worked out on the way: p - 1[target] while p is in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, matrix: Tensor, targets: Tensor, weights: Tensor, learns_matrix: bool
    ) -> Tensor:
        low = matrix.detach().to(features.dtype)
        total = torch.zeros((), dtype=torch.float32, device=features.device)
        back = torch.empty_like(features)
        back_matrix = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) if learns_matrix else None
        transposed = low.T
        for start in range(0, len(features), _ROWS):
            rows = slice(start, start + _ROWS)
            logits = (features[rows] @ transposed).float()
            logits -= logits.amax(dim=1, keepdim=True)
            own = logits.gather(1, targets[rows, None])
            logits.exp_()
            mass = logits.sum(dim=1, keepdim=True)
            total += ((mass.log() - own)[:, 0] * weights[rows]).sum()
            logits *= weights[rows, None] / mass
            logits.scatter_add_(1, targets[rows, None], -weights[rows, None].to(logits.dtype))
            slope = logits.to(features.dtype)
            torch.mm(slope, low, out=back[rows])
            if back_matrix is not None:
                back_matrix += (slope.T @ features[rows]).float()
        ctx.save_for_backward(back, back_matrix if back_matrix is not None else back[:0])
        ctx.learns_matrix = learns_matrix
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        back, back_matrix = ctx.saved_tensors
        scale = gradients[0]
        return (back * scale.to(back.dtype), back_matrix * scale if ctx.learns_matrix else None, None, None, None)


class _LinearKL(torch.autograd.Function):
    """sum_i weight_i KL(softmax(teacher_i W') || softmax(student_i W')), with respect to the student's states."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        low = matrix.detach().to(student.dtype)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        back = torch.empty_like(student)
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            wanted = (teacher[rows].to(low.dtype) @ low.T).float().log_softmax(dim=1)
            found = (student[rows] @ low.T).float().log_softmax(dim=1)
            p = wanted.exp()
            total += ((p * (wanted - found)).sum(dim=1) * weights[rows]).sum()
            slope = found.exp_().sub_(p).mul_(weights[rows, None])
            torch.mm(slope.to(low.dtype), low, out=back[rows])
        ctx.save_for_backward(back)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (back,) = ctx.saved_tensors
        return back * gradients[0].to(back.dtype), None, None, None


def _fit(
    learn: Callable[[int], float],
    *,
    steps: int,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    recipe: MedusaRecipe | Medusa2Recipe,
    identity: Mapping[str, Any],
    folder: Path,
    resume: bool,
    minutes: float | None,
    stop_after: int | None,
    progress: bool,
    name: str,
) -> Fitted | None:
    """The loop: `learn` leaves gradients and returns a loss; rates follow half a cosine after a warm-up."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    run = TrainingState(identity=identity)
    if resume:
        run = restore_checkpoint(folder, run, weights, optimizer)
    began = saved = time.monotonic() - run.seconds

    def done() -> float:
        share = run.step / steps
        return share if minutes is None else max(share, run.seconds / (60.0 * minutes))

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not progress,
    )  # fmt: skip
    try:
        with bar:
            task = bar.add_task(name, total=steps, completed=run.step)
            while (share := done()) < 1.0:
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * _rate(share, recipe.warmup)
                run.losses.append(learn(run.step))
                optimizer.step()
                optimizer.zero_grad()
                run.step += 1
                run.seconds = time.monotonic() - began
                recent = run.losses[-50:]
                bar.update(task, completed=run.step, description=f"{name}  loss {sum(recent) / len(recent):.3f}")
                if run.step == stop_after and done() < 1.0:
                    save_checkpoint(folder, run, weights, optimizer)
                    return None
                if time.monotonic() - saved > 60.0 * recipe.checkpoint_minutes:
                    save_checkpoint(folder, run, weights, optimizer)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        save_checkpoint(folder, run, weights, optimizer)
        console.print(f"Stopped after step {run.step} of {steps}; it goes on from {folder}.", soft_wrap=True)
        raise
    return Fitted(losses=tuple(run.losses), seconds=run.seconds)


def _rate(done: float, warmup: float) -> float:
    """The part of the learning rate that applies when so much (0 to 1) of the training is done."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / max(1e-9, 1.0 - warmup)))


def _plain(recipe: MedusaRecipe | Medusa2Recipe) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


@dataclass(frozen=True, kw_only=True)
class Medusa2Recipe:
    """How heads and model are trained together. Defaults are those of section 2.2.2 and of the official code for
    self-distilled data, unless marked as ours.

    protect: learn the model's own distribution. Without it: the text's tokens, one learning rate for all, and heads at
        full weight from the beginning, which is what harms the model.
    """

    rank: int = 32
    alpha: float = 16.0
    learning_rate: float = 1e-4  # of the adapters
    heads_rate: float = 4.0  # times the adapters'
    heads_weight: float = 0.01  # reached along a quarter of a sine
    decay: float = 0.8
    warmup: float = 0.05  # ours
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 1  # ours; two in the official code
    texts_per_step: int = 4  # ours
    protect: bool = True
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "texts_per_step"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; a recipe needs at least 1.")


def train_medusa2(
    model: LanguageModel,
    heads: MedusaHeads,
    texts: Sequence[DistilledText] | TeacherPass,
    *,
    recipe: Medusa2Recipe = Medusa2Recipe(),
    folder: Path,
    resume: bool = True,
    minutes: float | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> tuple[MedusaHeads, Artifact, Fitted] | None:
    """Train heads and adapters together: the result belongs to a *different model*, `attach(model, artifact)`.

    L = KL(model || adapted model) + 0.01 sin(pi t / 2T) sum_k 0.8^k CE_k. The model's own distribution comes from the
    states of its `TeacherPass`, which are those of the network with its adapters off. Adapters sit on all linear
    layers; not on the head, which the default model shares with its embedding.

    Args:
        heads: to go on from, changed in place; fresh ones (`MedusaHeads.of`) or those of `train_medusa1`.
        folder: for checkpoints and the adapters, `medusa2-lora.safetensors`.

    Raises:
        BadInput: no text to learn from, or a checkpoint of another recipe.
        MissingExtra: without peft.
    """
    teacher = texts if isinstance(texts, TeacherPass) else teacher_pass(model, texts, folder / "teacher")
    usable = [number for number, text in enumerate(teacher.texts) if text.written[1:].any()]
    if not usable:
        raise BadInput("no text has a token that the model wrote.")
    lora = LoraRecipe(rank=recipe.rank, alpha=recipe.alpha, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    base = fingerprint(model.model)
    matrix = _head_of(model)
    adapted = with_adapters(model.model, lora)
    whole: Any = adapted.base_model.model
    body: Any = whole.base_model
    adapters = {weight_name(key): weight for key, weight in adapted.named_parameters() if weight.requires_grad}
    heads.to(model.device)
    own = dict(heads.named_parameters())
    weights = {**adapters, **{f"heads.{key}": weight for key, weight in own.items()}}
    heads_rate = recipe.heads_rate if recipe.protect else 1.0
    optimizer = torch.optim.AdamW(
        [
            {"params": list(adapters.values()), "lr": recipe.learning_rate * (1.0 if recipe.protect else 4.0)},
            {"params": list(own.values()), "lr": recipe.learning_rate * (heads_rate if recipe.protect else 4.0)},
        ],
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
    )
    per_epoch = -(-len(usable) // recipe.texts_per_step)
    steps = per_epoch * recipe.epochs
    scales = torch.tensor([recipe.decay**number for number in range(1, heads.heads + 1)], device=model.device)
    every = tuple(weights.values())
    workers = Workers(recipe.texts_per_step, device=model.device.type)

    def loss_of(number: int, share: float) -> Tensor:
        text, start = teacher.texts[number], int(teacher.starts[number])
        ids = torch.from_numpy(text.tokens).long()[None].to(model.device)
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0]
        places = torch.from_numpy(np.flatnonzero(text.written[1:])).to(model.device)  # that predict a written token
        even = torch.full((len(places),), 1.0 / len(places), device=model.device)
        targets = torch.from_numpy(heads.drafts(targets_ahead(text.tokens, text.written, depth=heads.heads)))
        ahead = heads_loss(heads, hidden[places], targets.to(model.device)[places], scales)
        if not recipe.protect:
            labels = ids[0, places + 1]
            plain: Tensor = _LinearCrossEntropy.apply(hidden[places], matrix, labels, even, False)  # type: ignore[no-untyped-call]
            return plain + ahead
        states = teacher.hidden[start : start + len(text.tokens)].to(model.device)[places]
        kept: Tensor = _LinearKL.apply(hidden[places], states, matrix, even)  # type: ignore[no-untyped-call]
        return kept + recipe.heads_weight * math.sin(0.5 * math.pi * share) * ahead

    def learn(step: int) -> float:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(usable))
        chosen = [usable[n] for n in order[place * recipe.texts_per_step : (place + 1) * recipe.texts_per_step]]
        share = (step + 1) / steps

        def one(number: int) -> tuple[float, tuple[Tensor, ...]]:
            loss = loss_of(number, share)
            return float(loss.detach()), torch.autograd.grad(loss, every)

        total = 0.0
        for loss, gradients in workers.run(one, chosen):
            total += loss / len(chosen)
            for weight, gradient in zip(every, gradients, strict=True):
                part = gradient / len(chosen)
                weight.grad = part if weight.grad is None else weight.grad.add_(part)
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        return total

    adapted.train()
    try:
        fitted = _fit(
            learn,
            steps=steps,
            weights=weights,
            optimizer=optimizer,
            recipe=recipe,
            identity={"recipe": _plain(recipe), "texts": len(usable), "base": base},
            folder=folder,
            resume=resume,
            minutes=minutes,
            stop_after=stop_after,
            progress=progress,
            name="medusa-2",
        )
    finally:
        workers.close()
        adapted.unload()
        model.model.train(False)
    if fitted is None:
        return None
    from safetensors.torch import save_file

    path = folder / "medusa2-lora.safetensors"
    save_file({key: weight.detach().to("cpu", torch.bfloat16).contiguous() for key, weight in adapters.items()}, path)
    artifact = Artifact(
        path=path,
        name="medusa2-lora",
        recipe={**_plain(recipe), "targets": list(lora.targets)},
        data="texts that the model wrote itself",
        seed=recipe.seed,
        base=base,
        base_name=model.name,
        versions=_versions("torch", "transformers", "peft"),
        minutes=round(fitted.seconds / 60.0, 1),
    ).saved_with(
        score={"loss": fitted.loss, "steps": len(fitted.losses)},
        settings={"different_model": "the adapters change what the model says; its heads do not fit the original"},
    )
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return heads, artifact, fitted


def calibrate(
    heads: MedusaHeads,
    teacher: TeacherPass,
    *,
    ranks: int = RANKS,
    positions: int = 8000,
    seed: int = 0,
) -> Float64[np.ndarray, "depth rank"]:
    """How often each head's guesses were right on texts that the model wrote: greedy ones, not those trained on.

    Args:
        positions: at most so many are looked at, drawn evenly.
    """
    ahead = targets_ahead(teacher.tokens, teacher.written, depth=heads.heads)
    chosen = _sample(np.flatnonzero((ahead != NOTHING).any(axis=1)), positions, seed)
    return np.asarray(
        tree_search.accuracies(_ranked(heads, teacher.hidden, chosen, ranks), ahead[chosen]), dtype=np.float64
    )


def _sample(places: Int64[np.ndarray, " place"], count: int, seed: int) -> Int64[np.ndarray, " place"]:
    if len(places) <= count:
        return places
    return np.sort(np.random.default_rng(seed).choice(places, count, replace=False))


@torch.inference_mode()
def _ranked(
    heads: MedusaHeads, hidden: Tensor, chosen: Int64[np.ndarray, " place"], ranks: int
) -> Integer[np.ndarray, "place head rank"]:
    pieces = []
    for start in range(0, len(chosen), _ROWS):
        rows = hidden[torch.from_numpy(chosen[start : start + _ROWS])].to(heads.blocks_weight.device)
        logits = heads(rows)
        pieces.append(logits.float().topk(ranks, dim=-1).indices.transpose(0, 1).cpu().numpy())
    return np.asarray(heads.ids(np.concatenate(pieces)))


def baselines(
    training: Sequence[DistilledText],
    teacher: TeacherPass,
    *,
    depth: int,
    ranks: int = RANKS,
    positions: int = 8000,
    seed: int = 0,
) -> dict[str, Float64[np.ndarray, "depth rank"]]:
    """What guessing without a model would give at the same positions: "unigram", the most frequent tokens; and
    "bigram", those that most often stood so far behind the same root."""
    vocabulary = 1 + max(int(text.tokens.max()) for text in (*training, *teacher.texts))
    counts = np.zeros(vocabulary, dtype=np.int64)
    pairs: list[list[Int64[np.ndarray, " pair"]]] = [[] for _ in range(depth)]
    for text in training:
        counts += np.bincount(text.tokens[text.written], minlength=vocabulary)
        seen = targets_ahead(text.tokens, text.written, depth=depth)
        for level in range(depth):
            where = np.flatnonzero(seen[:, level] != NOTHING)
            pairs[level].append(text.tokens[where + 1].astype(np.int64) * vocabulary + seen[where, level])
    common = np.argsort(-counts, kind="stable")[:ranks]
    ahead = targets_ahead(teacher.tokens, teacher.written, depth=depth)
    chosen = _sample(np.flatnonzero((ahead != NOTHING).any(axis=1)), positions, seed)
    roots = teacher.tokens[chosen + 1]
    unigram = np.broadcast_to(common, (len(chosen), depth, ranks))
    bigram = unigram.copy()
    for level in range(depth):
        codes, often = np.unique(np.concatenate(pairs[level]), return_counts=True)
        order = np.lexsort((codes, -often, codes // vocabulary))
        first, follower = codes[order] // vocabulary, codes[order] % vocabulary
        begin, end = np.searchsorted(first, roots), np.searchsorted(first, roots, side="right")
        for row, (start, stop) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
            known = follower[start : min(stop, start + ranks)]
            rest = common[~np.isin(common, known)]
            bigram[row, level] = np.concatenate([known, rest])[:ranks]
    return {
        "unigram": np.asarray(tree_search.accuracies(unigram, ahead[chosen]), dtype=np.float64),
        "bigram": np.asarray(tree_search.accuracies(bigram, ahead[chosen]), dtype=np.float64),
    }


def save(
    folder: Path,
    *,
    model: LanguageModel,
    heads: MedusaHeads,
    recipe: MedusaRecipe,
    fitted: Fitted,
    data: str,
    accuracies: Float64[np.ndarray, "depth rank"],
    nodes: int = 16,
    score: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    base: str | None = None,
    name: str = NAME,
) -> Artifact:
    """Write `<name>.safetensors` and `<name>.json` and drop the checkpoint.

    Args:
        nodes: of the template that is written down; drafting finds the best one for each budget again.
        base: fingerprint of the weights that the heads belong to; the model's unless given.
    """
    path = folder / f"{name}.safetensors"
    heads.save(path)
    artifact = Artifact(
        path=path,
        name=name,
        recipe=_plain(recipe),
        data=data,
        seed=recipe.seed,
        base=base or fingerprint(model.model),
        base_name=model.name,
        versions=_versions("torch", "transformers"),
        minutes=round(fitted.seconds / 60.0, 1),
    )
    tops = {f"top{best}": accuracies[:, :best].sum(axis=1).round(4).tolist() for best in (1, 5, 10)}
    template = best_tree(accuracies, nodes=nodes)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return artifact.saved_with(
        score={"loss": fitted.loss, "steps": len(fitted.losses), **tops, **(score or {})},
        settings={
            "accuracies": accuracies.round(5).tolist(),
            "template": [list(path) for path in template.order[1:]],
            "expected_tokens": round(tree_search.expected_tokens(template, accuracies), 4),
            **(settings or {}),
        },
    )


def load(path: str | Path, model: LanguageModel) -> Medusa:
    """A drafter from a file, or from a folder that a training wrote.

    Raises:
        ModelNotFound: nothing is there.
        BadModel: the heads belong to another model.
    """
    path = Path(path).expanduser()
    artifact = load_artifact(path / f"{NAME}.safetensors" if path.is_dir() else path)
    found = fingerprint(model.model)
    if found != artifact.base:
        raise BadModel(
            f"{artifact.path} was trained for {artifact.base_name} (weights {artifact.base[:12]}), and {model.name} has"
            f" weights {found[:12]}. Load {artifact.base_name}, or train heads for it:  loci draft train medusa"
        )
    accuracies = np.array(artifact.settings["accuracies"], dtype=np.float64)
    return Medusa(MedusaHeads.load(artifact.path, model), accuracies=accuracies)


def load_medusa2(folder: str | Path, model: LanguageModel) -> tuple[LanguageModel, Medusa]:
    """The different model that `train_medusa2` made out of `model`, and its drafter."""
    changed = attach(model, load_artifact(Path(folder).expanduser() / "medusa2-lora.safetensors"))
    return changed, load(Path(folder).expanduser(), changed)


def _versions(*parts: str) -> dict[str, str]:
    return {part: importlib.metadata.version(part) for part in parts}
