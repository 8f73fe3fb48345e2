"""Hidden transfer: guessed states of the next tokens, put in halfway up the network and finished by its own layers.

Source  Wu et al. 2024, arXiv:2404.12022, and by the same authors FIRP, arXiv:2410.20488. A linear map of the state of
        token t, taken before layer l, becomes the state of pseudo position t + i there; from then on it attends to the
        text and to the earlier pseudo positions, and guesses token t + 1 + i. The exact form of the map and the number
        of pseudo positions are not given in the text that is known to us.
Letters site l: the place before layer l; at the number of layers, before the final norm, where the map is a linear
        Medusa head. k: pseudo positions, one per entry of `layers`.
Ours    residual: the map is added to the state, and begins at zero. Trained by the model's own distributions over its
        own text (`decoding.probes`), weights 0.8^(i - 1). Chains hang under every candidate that could end the accepted
        path, cut down by value as in `decoding.probe_trees`.
Near    `ppd` starts from trained embeddings below the first layer: 1,728 numbers instead of a million.
Exact   greedy and sampled: guesses are a function of the past, so they are verified like any point draft.
Cost    k * width * (width + 1) numbers: 997,056 for SmolLM2-135M. An engine with hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from loci.decoding.blend import Guesses
from loci.decoding.distill import DistilledText
from loci.decoding.probe_trees import LIMITS, DynamicTrees, LastChain, falling
from loci.decoding.probes import (
    Chains,
    Fitted,
    FrozenModel,
    ProbeRecipe,
    Probes,
    Ranks,
    check_width,
    fit,
    measure,
    open_artifact,
    remember_limit,
    sample,
    save,
    sites,
    tuned_limit,
)
from loci.errors import BadInput
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.engine.base import Injection
from loci.lm.model import LanguageModel
from loci.lm.train import Artifact

NAME = "hidden"
RANKS = 10
LAYERS = (12, 12, 12)  # ours, of SmolLM2-135M's 30; `sweep_layers` finds them for another model
# 48 chains a text, AdamW at 1e-3 with a warm-up of a twentieth; ours, the paper's are not known.
RECIPE = ProbeRecipe(steps=1000, inserts=48, learning_rate=1e-3, warmup=0.05)


class HiddenTransfer(Probes):
    """One linear map per pseudo position.

    Args:
        width: numbers in a state of the model.
        layers: the site of each pseudo position, never falling: a pseudo position attends to the earlier ones, which
            mean something only from their own site on.
        residual: whether the map is added to the state it starts from.
    """

    def __init__(self, width: int, layers: tuple[int, ...] = LAYERS, residual: bool = True) -> None:
        super().__init__()
        if not layers or layers[0] < 0 or any(before > after for before, after in pairwise(layers)):
            raise BadInput(f"hidden states are transferred at layers that do not fall, from 0 on; found {layers}.")
        self.width, self.k, self.ensemble, self.residual = width, len(layers), 1, residual
        self._layers = layers
        start = torch.zeros(width, width) if residual else torch.eye(width)
        self.weight = nn.Parameter(start.repeat(self.k, 1, 1))
        self.bias = nn.Parameter(torch.zeros(self.k, width))

    @property
    def layers(self) -> tuple[int, ...]:
        return self._layers

    @classmethod
    def load(cls, artifact: Artifact) -> HiddenTransfer:
        tensors, settings = artifact.tensors(), artifact.settings
        transfer = cls(tensors["weight"].shape[1], tuple(settings["layers"]), bool(settings["residual"]))
        with torch.no_grad():
            transfer.weight.copy_(tensors["weight"].float())
            transfer.bias.copy_(tensors["bias"].float())
        return transfer

    def inputs(self) -> Float[Tensor, "step member width"]:
        """Nothing: what layers below the site make of it is overwritten, and no token sees it."""
        return torch.zeros(self.k, 1, self.width, device=self.weight.device)

    def transferred(self, step: int, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        product = hidden @ self.weight[step].to(hidden.dtype).T
        moved = product.float() + self.bias[step]
        return moved + hidden.float() if self.residual else moved

    @property
    def injections(self) -> tuple[Injection, ...]:
        """What an engine does with the probes."""
        return tuple(
            Injection(layer=layer, weight=weight, bias=bias, residual=self.residual)
            for layer, weight, bias in zip(self.layers, self.weight.detach(), self.bias.detach(), strict=True)
        )

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


class HiddenTransferDrafter:
    """A `Drafter`, and `Injecting`. Each row of a batch needs its own; maps and trees can be shared."""

    name = NAME
    law: Law = "point"
    needs = Needs(topk=RANKS, hooks=True)

    def __init__(self, transfer: HiddenTransfer, trees: DynamicTrees) -> None:
        if trees.k != transfer.k or trees.ensemble != 1:
            raise BadInput(
                f"trees for {trees.k} probes in ensembles of {trees.ensemble} were given to {transfer.k} transferred"
                " states, which have no ensembles."
            )
        self.transfer, self.trees = transfer, trees
        embeds = transfer.inputs().detach().cpu().numpy()
        self._chain = LastChain(trees, embeds, ranks=min(RANKS, len(trees.accuracies[0])))

    @property
    def injections(self) -> tuple[Injection, ...]:
        return self.transfer.injections

    def start(self, state: DraftState, prefill: PrefillResult) -> None:
        self._chain.forget()

    def propose(self, state: DraftState) -> TokenTree:
        return self._chain.propose(state)

    def guesses(self, state: DraftState) -> Guesses:
        """The same tree for a blend."""
        return self._chain.guesses(state)

    @property
    def priors(self) -> Mapping[Hashable, float]:
        """How often a guess comes true, by step and rank; for a blend."""
        return self._chain.priors

    def observe(self, result: StepResult) -> None:
        self._chain.observe(result)

    @property
    def nbytes(self) -> int:
        return self.transfer.nbytes + self._chain.nbytes


def train_hidden_transfer(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    *,
    layers: tuple[int, ...] = LAYERS,
    residual: bool = True,
    recipe: ProbeRecipe = RECIPE,
    folder: Path | None = None,
    resume: bool = True,
    minutes: float | None = None,
    progress: bool = True,
) -> tuple[HiddenTransfer, Fitted]:
    """Maps that learned from these texts, and how it went. Arguments and errors as in `probes.fit`; `BadInput` also for
    layers that fall or that the model lacks."""
    width = int(model.model.config.get_text_config().hidden_size)
    transfer = HiddenTransfer(width, layers, residual).to(model.device)
    fitted = fit(
        model,
        texts,
        transfer,
        recipe=recipe,
        folder=folder,
        name=NAME,
        resume=resume,
        minutes=minutes,
        progress=progress,
    )
    if fitted is None:
        raise RuntimeError("a training without a limit of steps ended before its last one")
    return transfer, fitted


def calibrate(
    model: LanguageModel, transfer: HiddenTransfer, texts: Sequence[DistilledText], *, ranks: int = RANKS
) -> Float64[np.ndarray, "step rank"]:
    """The chance that the guess of each rank is right, for every pseudo position, on greedy texts kept out."""
    greedy = [text for text in texts if text.temperature == 0.0] or list(texts)
    return falling(measure(model, greedy, transfer).accuracies(ranks))


def train(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    folder: Path,
    data: str = "texts that the model wrote itself",
    layers: tuple[int, ...] = LAYERS,
    residual: bool = True,
    recipe: ProbeRecipe = RECIPE,
    resume: bool = True,
    minutes: float | None = None,
    progress: bool = True,
) -> Artifact:
    """Train, calibrate on `kept_out`, and leave `hidden.safetensors` and `hidden.json` in `folder`."""
    transfer, fitted = train_hidden_transfer(
        model,
        texts,
        layers=layers,
        residual=residual,
        recipe=recipe,
        folder=folder,
        resume=resume,
        minutes=minutes,
        progress=progress,
    )
    accuracies = calibrate(model, transfer, kept_out)
    return save(
        folder,
        NAME,
        model=model,
        probes=transfer,
        recipe=recipe,
        fitted=fitted,
        data=data,
        score={f"top{best}": accuracies[:, :best].sum(axis=1).round(4).tolist() for best in (1, 5, 10)},
        settings={"accuracies": accuracies.round(5).tolist(), "layers": list(layers), "residual": residual},
        dtype=torch.bfloat16,
    )


def load(path: str | Path, model: LanguageModel, *, limit: int | None = None) -> HiddenTransferDrafter:
    """A drafter from a file, or from a folder that `train` wrote.

    Args:
        limit: rows of its trees; what `tune` found on this machine unless given, and never more than the budget of a
            step.

    Raises:
        ModelNotFound: nothing is there.
        BadModel: it belongs to another model.
    """
    artifact = open_artifact(path, model, name=NAME)
    rows = limit or tuned_limit(artifact) or LIMITS[-1]
    return HiddenTransferDrafter(
        HiddenTransfer.load(artifact), DynamicTrees.build(artifact.settings["accuracies"], rows)
    )


def tune(path: str | Path, model: LanguageModel, *, engine: str, cost: Callable[[int], float]) -> DynamicTrees:
    """Choose the rows that give most tokens per second on this machine, and keep the choice for `load`.

    Args:
        engine: the name of the engine that was measured.
        cost: seconds of its step with so many rows.
    """
    artifact = open_artifact(path, model, name=NAME)
    trees = DynamicTrees.choose(artifact.settings["accuracies"], cost)
    remember_limit(artifact, engine=engine, limit=trees.limit)
    return trees


def sweep_layers(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    candidates: Sequence[int] = (0, 6, 12, 18, 24, 30),
    k: int = 3,
    recipe: ProbeRecipe = RECIPE,
    minutes: float | None = None,
    progress: bool = True,
) -> dict[int, Ranks]:
    """How well k pseudo positions guess when all are transferred at one layer, for each of these layers.

    Args:
        minutes: for each layer.
    """
    table = {}
    for layer in candidates:
        transfer, _ = train_hidden_transfer(
            model, texts, layers=(layer,) * k, recipe=recipe, minutes=minutes, progress=progress
        )
        table[layer] = measure(model, kept_out, transfer)
    return table


@torch.no_grad()
def cosines(
    model: LanguageModel, texts: Sequence[DistilledText], transfer: HiddenTransfer, *, per_text: int = 32, seed: int = 0
) -> dict[int, tuple[float, ...]]:
    """How close pseudo states are to the true ones, by site: for each step the mean cosine with the state of token
    t + i. From the last step's site to the place before the final norm."""
    check_width(model, transfer)
    last = len(sites(model.model)) - 1
    shown = range(transfer.layers[-1], last + 1)
    sums: dict[int, Any] = {site: np.zeros(transfer.k) for site in shown}
    count = 0
    with FrozenModel(model, {*transfer.layers, *shown}) as frozen:
        for number, text in enumerate(texts):
            parents = sample(text, k=transfer.k, count=per_text, seed=[seed, number])
            if not len(parents):
                continue
            reading = frozen.read(text.tokens.astype(np.int64), np.zeros(1, dtype=np.int64))
            chains = Chains(parents=parents, k=transfer.k)
            states: dict[int, Tensor] = {}
            frozen.guess(reading, chains, transfer, states=states)
            true = torch.from_numpy(chains.targets).to(model.device)
            for site in shown:
                near = torch.cosine_similarity(states[site].float(), reading.hidden[site][true].float(), dim=-1)
                sums[site] += near.sum(dim=0).cpu().numpy()
            count += len(parents)
    if not count:
        raise BadInput(f"none of the {len(texts)} texts has {transfer.k + 2} tokens in a row that the model wrote.")
    return {site: tuple(float(value) for value in sums[site] / count) for site in shown}
