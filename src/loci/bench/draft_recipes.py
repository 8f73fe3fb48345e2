"""How the trained drafters are made: texts that the model wrote itself, a training, a calibration on texts kept out.

Data     `distill.read_instructions`: every tenth prompt is kept out. The others are answered at temperatures 0, 0.7 and
         1, the model plays the user for up to two more turns, and where prompts run out it invents openings. Those kept
         out are answered greedily, which is what calibration and its trees stand on. Spec-Bench is for measuring alone.
Here     each function takes the model, both kinds of texts and a folder, and leaves `<name>.safetensors` and
         `<name>.json` in it; Ctrl-C keeps a checkpoint from which the same call goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loci.decoding import distill
from loci.decoding.distill import DistilledText
from loci.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel
    from loci.lm.train import Artifact

KEPT_OUT = "kept-out"  # folder of the texts for calibration, inside that of the others


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a drafter learns from, what it is calibrated on, and one line that says what they are."""

    training: list[DistilledText]
    kept_out: list[DistilledText]
    data: str
    folder: Path


def write_texts(
    model: LanguageModel,
    folder: Path,
    *,
    instructions: Path | None = None,
    tokens: int = 800_000,
    kept_out_tokens: int = 40_000,
    seed: int = 0,
    engine: str = "auto",
    minutes: float | None = None,
    progress: bool = True,
) -> Texts:
    """Let the model write; what lies half done in the folder is taken up again.

    Args:
        tokens: of answers, all temperatures together.
        kept_out_tokens: of greedy answers to the prompts that are kept out; fewer where those prompts are answered.
        minutes: end the texts to train on after about so long.
    """
    training, calibration = distill.read_instructions(instructions)
    distill.self_distill(
        model, calibration, tokens=kept_out_tokens, temperatures=(0.0,), user_turns=0, openings=False, seed=seed,
        engine=engine, folder=folder / KEPT_OUT, progress=progress,
    )  # fmt: skip
    distill.self_distill(
        model, training, tokens=tokens, seed=seed, engine=engine, folder=folder, minutes=minutes, progress=progress
    )
    return read_texts(folder)


def read_texts(folder: Path) -> Texts:
    """Texts that `write_texts` left in this folder.

    Raises:
        DataNotFound: there are none.
    """
    training, kept_out = distill.load_texts(folder), distill.load_texts(folder / KEPT_OUT)
    written = sum(int(text.written.sum()) for text in training)
    heat = ", ".join(str(heat) for heat in sorted({text.temperature for text in training}))
    return Texts(
        training=training,
        kept_out=kept_out,
        data=f"{len(training)} texts with {written} tokens that the model wrote to self-instruct prompts and to"
        f" openings of its own, temperatures {heat}",
        folder=folder,
    )


def ppd(
    model: LanguageModel, texts: Texts, *, folder: Path, resume: bool, minutes: float | None, stage: int
) -> Artifact:
    """Prompt tokens for parallel prompt decoding."""
    from loci.decoding import ppd as system

    _only_stage_one("ppd", stage)
    return system.train(
        model, texts.training, texts.kept_out, folder=folder, data=texts.data, resume=resume, minutes=minutes
    )


def hidden(
    model: LanguageModel, texts: Texts, *, folder: Path, resume: bool, minutes: float | None, stage: int
) -> Artifact:
    """Projections for hidden transfer."""
    from loci.decoding import hidden_transfer as system

    _only_stage_one("hidden", stage)
    return system.train(
        model, texts.training, texts.kept_out, folder=folder, data=texts.data, resume=resume, minutes=minutes
    )


def rsd(
    model: LanguageModel, texts: Texts, *, folder: Path, resume: bool, minutes: float | None, stage: int
) -> Artifact:
    """A draft model out of the model's first layers."""
    from loci.decoding import rsd as system

    _only_stage_one("rsd", stage)
    made = system.train_draft(model, texts.training, folder=folder, data=texts.data, resume=resume, minutes=minutes)
    if made is None:
        raise RuntimeError("a training without a limit of steps ended before its last one")
    return made


def medusa(
    model: LanguageModel, texts: Texts, *, folder: Path, resume: bool, minutes: float | None, stage: int
) -> Artifact:
    """Medusa's heads. Stage 1 leaves the model as it is; stage 2 goes on from the heads in the folder and changes the
    model too, by adapters beside the heads: `medusa.load_medusa2`."""
    from loci.decoding import medusa as system
    from loci.lm.train import attach, fingerprint

    if stage not in (1, 2):
        raise BadInput(f"stage is {stage}; Medusa is trained in stage 1 or 2.")
    # States are computed once and serve both stages, and other drafters that read them.
    teacher = distill.teacher_pass(model, texts.training, texts.folder / "teacher")
    if stage == 1:
        trained = system.train_medusa1(model, teacher, folder=folder, resume=resume, minutes=minutes)
        if trained is None:
            raise RuntimeError("a training without a limit of steps ended before its last one")
        heads, fitted = trained
        kept_out = distill.teacher_pass(model, texts.kept_out, texts.folder / KEPT_OUT / "teacher")
        return system.save(
            folder, model=model, heads=heads, recipe=system.MedusaRecipe(), fitted=fitted, data=texts.data,
            accuracies=system.calibrate(heads, kept_out),
        )  # fmt: skip
    start = folder / "stage-1" / "medusa.safetensors"
    if not start.is_file():
        start = folder / "medusa.safetensors"
    heads = system.MedusaHeads.load(start, model) if start.is_file() else system.MedusaHeads.of(model)
    both = system.train_medusa2(model, heads, teacher, folder=folder, resume=resume, minutes=minutes)
    if both is None:
        raise RuntimeError("a training without a limit of steps ended before its last one")
    heads, adapters, fitted = both
    changed = attach(model, adapters)
    kept_out = distill.teacher_pass(changed, texts.kept_out, folder / "teacher-kept-out")
    return system.save(
        folder, model=changed, heads=heads, recipe=system.MedusaRecipe(), fitted=fitted, data=texts.data,
        accuracies=system.calibrate(heads, kept_out), base=fingerprint(changed.model),
    )  # fmt: skip


Recipe = Callable[..., "Artifact"]
RECIPES: dict[str, Recipe] = {"medusa": medusa, "ppd": ppd, "hidden": hidden, "rsd": rsd}


def train(
    name: str,
    model: LanguageModel,
    texts: Texts,
    *,
    folder: Path,
    resume: bool = False,
    minutes: float | None = None,
    stage: int = 1,
) -> Artifact:
    """Train the drafter of this name.

    Raises:
        UnknownName: it needs no training, or there is none of that name.
    """
    if name not in RECIPES:
        raise UnknownName.among("trained drafter", name, RECIPES)
    return RECIPES[name](model, texts, folder=folder, resume=resume, minutes=minutes, stage=stage)


def tune(spec: str, model: LanguageModel, *, engine: str, cost: Callable[[int], float]) -> int:
    """Find the rows of trees that pay on this machine, and keep them in the user's cache.

    Args:
        spec: "ppd", "ppd:PATH", "hidden" or "hidden:PATH".
        cost: seconds of the engine's step with so many rows.
    """
    from loci.decoding import hidden_transfer, names
    from loci.decoding import ppd as prompt_tokens

    systems = {"ppd": prompt_tokens.tune, "hidden": hidden_transfer.tune}
    name, _, path = spec.partition(":")
    if name not in systems:
        raise UnknownName.among("drafter that can be tuned", name, [*systems, "recycle"])
    return systems[name](names.trained_part(name, model, path), model, engine=engine, cost=cost).limit


def _only_stage_one(name: str, stage: int) -> None:
    if stage != 1:
        raise BadInput(f"stage is {stage}; {name} is trained in one stage. Only medusa has a second.")


def prompts_for_counting(instructions: Path | None, limit: int | None) -> Sequence[str]:
    """Prompts to count hits of recycling's tree on, spread evenly over those that are not kept out."""
    prompts, _ = distill.read_instructions(instructions)
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // limit] for place in range(limit)]
