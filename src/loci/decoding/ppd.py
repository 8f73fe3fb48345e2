"""Parallel Prompt Decoding: a few trained embeddings behind every candidate guess the tokens after the next ones.

Source  Chen et al. 2024, arXiv:2405.18628 (EMNLP 2025): prompt tokens (section 3), the dynamic sparse tree (section 4)
        and its size by the measured cost of a step (section 4.3). The official code takes the KL divergence with the
        model's distribution first, which the paper's formula writes the other way round.
Letters k: prompt tokens in a chain; member: one embedding of an ensemble (the paper's EPT), whose logits are averaged.
Ours    trained on texts that the model wrote itself, many chains in one text (`decoding.probes`); the trees stand in
        `decoding.probe_trees`. The first step of a text carries the root's chain only, instead of an extra pass.
Near    `hidden_transfer` starts its probes from the model's own states in the middle of the network.
Exact   greedy and sampled: guesses are a function of the past, so they are verified like any point draft.
Cost    k * width numbers: 1,728 for SmolLM2-135M. An ensemble of E makes every chain E times as many rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from loci.decoding.blend import Guesses
from loci.decoding.distill import DistilledText
from loci.decoding.probe_trees import LIMITS, DynamicTrees, LastChain, falling
from loci.decoding.probes import (
    Fitted,
    ProbeRecipe,
    Probes,
    fit,
    measure,
    open_artifact,
    remember_limit,
    save,
    tuned_limit,
)
from loci.errors import BadInput
from loci.lm.draft import DraftState, Law, Needs, PrefillResult, StepResult, TokenTree
from loci.lm.model import LanguageModel
from loci.lm.train import Artifact

log = logging.getLogger(__name__)

NAME = "ppd"
RANKS = 10  # guesses per probe; the official code's
RECIPE = ProbeRecipe()
# Words whose embeddings the prompt tokens start from; ours, in the manner of the official "Next 2 word".
WORDS = " next word after that and then another one follows"


class PromptTokens(Probes):
    """k trained embeddings, or k ensembles of them.

    Args:
        width: numbers in an embedding of the model.
    """

    def __init__(self, width: int, k: int = 3, ensemble: int = 1) -> None:
        super().__init__()
        if k < 1 or ensemble < 1:
            raise BadInput(f"{k} prompt tokens with {ensemble} embeddings each were asked for; both are at least 1.")
        self.width, self.k, self.ensemble = width, k, ensemble
        self.embeds = nn.Parameter(torch.randn(k, ensemble, width, generator=torch.Generator().manual_seed(0)) * 0.02)

    @classmethod
    def from_words(cls, model: LanguageModel, *, k: int = 3, ensemble: int = 1, words: str = WORDS) -> PromptTokens:
        """Prompt tokens that start as embeddings of ordinary words, a different one for each as far as they reach."""
        table: Any = model.model.get_input_embeddings().weight
        prompt = cls(table.shape[1], k, ensemble)
        ids = model.encode(words)
        chosen = torch.tensor([ids[place % len(ids)] for place in range(k * ensemble)], device=table.device)
        with torch.no_grad():
            prompt.embeds.copy_(table[chosen].float().view(ensemble, k, -1).transpose(0, 1).cpu())
        return prompt.to(table.device)

    @classmethod
    def load(cls, artifact: Artifact) -> PromptTokens:
        embeds = artifact.tensors()["embeds"]
        prompt = cls(embeds.shape[2], embeds.shape[0], embeds.shape[1])
        with torch.no_grad():
            prompt.embeds.copy_(embeds.float())
        return prompt

    def inputs(self) -> Float[Tensor, "step member width"]:
        return self.embeds

    @property
    def numbers(self) -> Float32[np.ndarray, "step member width"]:
        return self.embeds.detach().float().cpu().numpy()

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes


class PPD:
    """A `Drafter`. Each row of a batch needs its own; prompt tokens and trees can be shared."""

    name = NAME
    law: Law = "point"
    needs = Needs(topk=RANKS)

    def __init__(self, prompt: PromptTokens, trees: DynamicTrees) -> None:
        if trees.k != prompt.k or trees.ensemble != prompt.ensemble:
            raise BadInput(
                f"trees for {trees.k} probes in ensembles of {trees.ensemble} were given to {prompt.k} prompt tokens in"
                f" ensembles of {prompt.ensemble}."
            )
        if prompt.ensemble > 1:
            log.warning(
                "an ensemble of %d makes every chain of %d prompt tokens %d rows instead of %d",
                prompt.ensemble, prompt.k, prompt.k * prompt.ensemble, prompt.k,
            )  # fmt: skip
        self.prompt, self.trees = prompt, trees
        self._chain = LastChain(trees, prompt.numbers, ranks=min(RANKS, len(trees.accuracies[0])))

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
        return self._chain.nbytes


def train_prompt_tokens(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    *,
    k: int = 3,
    ensemble: int = 1,
    recipe: ProbeRecipe = RECIPE,
    folder: Path | None = None,
    resume: bool = True,
    minutes: float | None = None,
    progress: bool = True,
) -> tuple[PromptTokens, Fitted]:
    """Prompt tokens that learned from these texts, and how it went. Arguments and errors as in `probes.fit`."""
    prompt = PromptTokens.from_words(model, k=k, ensemble=ensemble)
    fitted = fit(
        model, texts, prompt, recipe=recipe, folder=folder, name=NAME, resume=resume, minutes=minutes, progress=progress
    )
    if fitted is None:
        raise RuntimeError("a training without a limit of steps ended before its last one")
    return prompt, fitted


def calibrate(
    model: LanguageModel, prompt: PromptTokens, texts: Sequence[DistilledText], *, ranks: int = RANKS
) -> Float64[np.ndarray, "step rank"]:
    """The chance that the guess of each rank is right, for every prompt token, on greedy texts that were kept out."""
    greedy = [text for text in texts if text.temperature == 0.0] or list(texts)
    return falling(measure(model, greedy, prompt).accuracies(ranks))


def train(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    kept_out: Sequence[DistilledText],
    *,
    folder: Path,
    data: str = "texts that the model wrote itself",
    k: int = 3,
    ensemble: int = 1,
    recipe: ProbeRecipe = RECIPE,
    resume: bool = True,
    minutes: float | None = None,
    progress: bool = True,
) -> Artifact:
    """Train, calibrate on `kept_out`, and leave `ppd.safetensors` and `ppd.json` in `folder`."""
    prompt, fitted = train_prompt_tokens(
        model,
        texts,
        k=k,
        ensemble=ensemble,
        recipe=recipe,
        folder=folder,
        resume=resume,
        minutes=minutes,
        progress=progress,
    )
    accuracies = calibrate(model, prompt, kept_out)
    return save(
        folder,
        NAME,
        model=model,
        probes=prompt,
        recipe=recipe,
        fitted=fitted,
        data=data,
        score=scores(accuracies),
        settings={"accuracies": accuracies.round(5).tolist(), "ensemble": ensemble},
    )


def scores(accuracies: Float64[np.ndarray, "step rank"]) -> dict[str, list[float]]:
    """Top-1, top-5 and top-10 accuracy by distance: the first figure is of the token 2 ahead."""
    return {f"top{best}": accuracies[:, :best].sum(axis=1).round(4).tolist() for best in (1, 5, 10)}


def load(path: str | Path, model: LanguageModel, *, limit: int | None = None) -> PPD:
    """A drafter from a file, or from a folder that `train` wrote.

    Args:
        limit: rows of its trees; what `tune` found on this machine unless given, and never more than the budget of a
            step.

    Raises:
        ModelNotFound: nothing is there.
        BadModel: it belongs to another model.
    """
    artifact = open_artifact(path, model, name=NAME)
    prompt = PromptTokens.load(artifact)
    return PPD(prompt, _trees(artifact.settings, limit or tuned_limit(artifact) or LIMITS[-1]))


def tune(path: str | Path, model: LanguageModel, *, engine: str, cost: Callable[[int], float]) -> DynamicTrees:
    """Choose the rows that give most tokens per second on this machine, and keep the choice for `load`.

    Args:
        engine: the name of the engine that was measured.
        cost: seconds of its step with so many rows.
    """
    artifact = open_artifact(path, model, name=NAME)
    trees = DynamicTrees.choose(artifact.settings["accuracies"], cost, ensemble=int(artifact.settings["ensemble"]))
    remember_limit(artifact, engine=engine, limit=trees.limit)
    return trees


def _trees(settings: Mapping[str, Any], limit: int) -> DynamicTrees:
    return DynamicTrees.build(settings["accuracies"], limit, ensemble=int(settings["ensemble"]))
