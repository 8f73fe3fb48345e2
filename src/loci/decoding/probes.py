"""Probes: rows beside a text that guess the tokens after the next one, trained while the model stays as it is.

Source  prompt tokens (Chen et al. 2024, arXiv:2405.18628, section 3) and hidden transfer (Wu et al. 2024,
        arXiv:2404.12022) are both probes: rows that attend to the text and to earlier rows of their own chain, and that
        no token attends to. The model's own distribution over its own text teaches them.
Letters parent: the token (place t) under which a chain hangs; step i of a chain, 1 to k, stands at position t + i and
        guesses token t + 1 + i; member: one of the parallel chains of an ensemble, whose logits are averaged; site l:
        the place before layer l, at the number of layers the place before the final norm.
Ours    many chains hang in one text at random places. Because tokens never see probes, the text is read first and
        without gradients; the probes then run over its keys and values, and only their few rows are differentiated.
        Targets are the text's own logits at t + i, from that same reading.
Cost    SmolLM2-135M in bfloat16, 512 tokens, 32 chains of 3, one thread: see `bench.probe_recipe`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from loci import settings as user
from loci.decoding.distill import DistilledText
from loci.errors import BadInput, BadModel, Unsupported
from loci.lm.engine.hf import HFEngine
from loci.lm.model import LanguageModel
from loci.lm.train import (
    Artifact,
    TrainingState,
    Workers,
    fingerprint,
    load_artifact,
    restore_checkpoint,
    save_checkpoint,
)

# Chains that are evaluated together: bounds the logits held (chains x steps x vocabulary).
_TOGETHER = 32


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """How probes are trained. Defaults without a source are ours.

    labels: "soft" learns the model's distribution, "hard" its text.
    where: "anywhere" in what the model wrote, or only at the "end" of each text.
    greedy: whether only greedily written texts are learned from, where there are any: there the text is what follows.
    chained: whether a probe sees the earlier ones of its chain.
    context: whether it sees the text before its parent.
    """

    steps: int = 1500
    texts_per_step: int = 2  # the paper: 16 texts with one chain each
    inserts: int = 32  # chains per text
    decay: float = 0.8  # weight of step i is decay^(i - 1); the official code of arXiv:2405.18628
    learning_rate: float = 0.01  # ibid.; AdamW without weight decay, falling along half a cosine
    warmup: float = 0.0  # part of all steps; ibid.
    betas: tuple[float, float] = (0.9, 0.99)
    labels: Literal["soft", "hard"] = "soft"
    where: Literal["anywhere", "end"] = "anywhere"
    greedy: bool = True
    chained: bool = True
    context: bool = True
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("steps", "texts_per_step", "inserts"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; a recipe needs at least 1.")
        if not 0.0 < self.decay <= 1.0:
            raise BadInput(f"decay is {self.decay}; it must be above 0 and at most 1.")


class Probes(nn.Module, ABC):
    """What is trained: where a probe's states come from."""

    k: int
    ensemble: int
    width: int

    @abstractmethod
    def inputs(self) -> Float[Tensor, "step member width"]:
        """The embeddings that enter the first layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Sites at which steps 1, 2, ... are overwritten; empty if none is."""
        return ()

    def transferred(self, step: int, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """What step `step` (from 0) becomes at its site, given its parent's state there."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class Chains:
    """Chains of probes under some tokens of a text. Rows go by chain, in it by member, in it by step."""

    parents: Int64[np.ndarray, " chain"]
    k: int
    ensemble: int = 1
    chained: bool = True
    context: bool = True

    @property
    def rows(self) -> int:
        return len(self.parents) * self.ensemble * self.k

    @property
    def positions(self) -> Int64[np.ndarray, " row"]:
        steps = np.tile(np.arange(1, self.k + 1), len(self.parents) * self.ensemble)
        return np.asarray(np.repeat(self.parents, self.ensemble * self.k) + steps, dtype=np.int64)

    @property
    def targets(self) -> Int64[np.ndarray, "chain step"]:
        """The place of the token whose output each step should equal."""
        return np.asarray(self.parents[:, None] + np.arange(1, self.k + 1), dtype=np.int64)

    def visible(self, tokens: int) -> Bool[np.ndarray, "row column"]:
        """Which tokens, then which rows, each row attends to."""
        parents = np.repeat(self.parents, self.ensemble * self.k)[:, None]
        places = np.arange(tokens)
        text = places <= parents if self.context else places == parents
        chain = np.arange(self.rows) // self.k
        step = np.arange(self.rows) % self.k
        same = chain[:, None] == chain
        own = same & (step[None] <= step[:, None]) if self.chained else np.eye(self.rows, dtype=bool)
        return np.concatenate([text, own], axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A text as the model read it: its cache, the logits at the places asked for, and the states at the sites."""

    length: int
    cache: Any
    logits: Float[Tensor, "kept vocabulary"]
    hidden: Mapping[int, Float[Tensor, "token width"]]


def sites(model: nn.Module) -> list[nn.Module]:
    """The modules whose inputs are the states at each site: the layers, then the final norm.

    Raises:
        Unsupported: the model keeps its layers elsewhere.
    """
    inner = getattr(model, "model", None)
    layers, norm = getattr(inner, "layers", None), getattr(inner, "norm", None)
    if not isinstance(layers, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise Unsupported(
            f"{type(model).__name__} keeps its layers where hooks cannot find them; expected were model.model.layers"
            " and model.model.norm."
        )
    return [*layers, norm]


class FrozenModel:
    """A model that is read but not changed, with a view of its states between layers. Use it in a `with` block.

    While the block lasts the weights ask for no gradients and the chosen sites carry hooks; then all is as before.
    Several threads may use it at once.

    Args:
        layers: the sites at which states are read or overwritten.

    Raises:
        Unsupported: the model takes no 4-D mask, or its cache does not just grow.
        BadInput: a site that the model lacks.
    """

    def __init__(self, language_model: LanguageModel, layers: Collection[int] = ()) -> None:
        capabilities = HFEngine(language_model).capabilities
        if capabilities.max_nodes == 1:
            raise Unsupported(f"probes cannot run in {language_model.name}: {capabilities.why}.")
        self.model: Any = language_model.model
        self.layers = tuple(sorted(set(layers)))
        self._places = sites(self.model) if self.layers else []
        if self.layers and not 0 <= self.layers[0] <= self.layers[-1] < len(self._places):
            raise BadInput(
                f"layers {list(self.layers)} were asked for; {language_model.name} has the sites 0 to"
                f" {len(self._places) - 1}."
            )
        accepts = inspect.signature(self.model.forward).parameters
        self._cache = "cache" if "cache" in accepts else "past_key_values"
        self._float_mask = self.model.config._attn_implementation == "eager"  # it adds its mask to the scores
        self._thread = threading.local()
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> FrozenModel:
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in learning:
            weight.requires_grad_(False)
        self._undo = [partial(weight.requires_grad_, True) for weight in learning]
        for layer in self.layers:
            hook = self._places[layer].register_forward_pre_hook(partial(self._visit, layer), with_kwargs=True)
            self._undo.append(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _visit(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        action = getattr(self._thread, "action", None)
        if action is None:
            return None
        if args:
            return (action(layer, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": action(layer, kwargs["hidden_states"])}

    @contextmanager
    def _acting(self, action: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        self._thread.action = action
        try:
            yield
        finally:
            self._thread.action = None

    def read(self, tokens: Int64[np.ndarray, " token"], keep: Int64[np.ndarray, " kept"]) -> Reading:
        """Run the text without gradients. `keep` are the places whose logits are wanted."""
        hidden: dict[int, Tensor] = {}

        def note(layer: int, states: Tensor) -> Tensor:
            hidden[layer] = states[0]
            return states

        device = self.model.device
        with torch.no_grad(), self._acting(note):
            found = self.model(
                input_ids=torch.from_numpy(tokens)[None].to(device),
                use_cache=True,
                logits_to_keep=torch.from_numpy(keep).to(device),
            )
        return Reading(length=len(tokens), cache=getattr(found, self._cache), logits=found.logits[0], hidden=hidden)

    def guess(
        self,
        reading: Reading,
        chains: Chains,
        probes: Probes,
        *,
        states: dict[int, Float[Tensor, "chain step width"]] | None = None,
    ) -> Float[Tensor, "chain step vocabulary"]:
        """The probes' logits, averaged over the members of an ensemble. Differentiable in the probes' parameters.

        The reading serves again afterwards, except under gradients, where it is used up.

        Args:
            states: is filled with the probes' states at the sites (the first member's), after any overwriting.
        """
        count, members, k = len(chains.parents), chains.ensemble, chains.k
        parents = torch.from_numpy(chains.parents).to(self.model.device)

        def act(layer: int, rows: Tensor) -> Tensor:
            steps = [step for step, site in enumerate(probes.layers) if site == layer]
            if steps:
                grid = list(rows[0].view(count * members, k, -1).unbind(dim=1))
                source = reading.hidden[layer][parents]  # one member: transfers have no ensembles
                for step in steps:
                    grid[step] = probes.transferred(step, source).to(rows.dtype)
                rows = torch.stack(grid, dim=1).view(rows.shape)
            if states is not None:
                states[layer] = rows[0].view(count, members, k, -1)[:, 0]
            return rows

        device, dtype = self.model.device, self.model.dtype
        inputs = probes.inputs().to(dtype).transpose(0, 1).reshape(members * k, -1)
        mask = torch.from_numpy(chains.visible(reading.length))[None, None].to(device)
        if self._float_mask:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        arguments = {self._cache: reading.cache}
        with self._acting(act):
            logits = self.model(
                inputs_embeds=inputs.repeat(count, 1)[None],
                position_ids=torch.from_numpy(chains.positions)[None].to(device),
                attention_mask=mask,
                use_cache=True,
                **arguments,
            ).logits[0]
        reading.cache.crop(-chains.rows)
        grouped: Tensor = logits.view(count, members, k, -1)
        return grouped[:, 0].float() if members == 1 else grouped.float().mean(dim=1)


def places(text: DistilledText, *, k: int) -> Int64[np.ndarray, " place"]:
    """Tokens under which a chain may hang: the next k + 1 tokens are there, and the model wrote them."""
    length = len(text.tokens)
    if length < k + 2:
        return np.zeros(0, dtype=np.int64)
    good = np.ones(length - k - 1, dtype=bool)
    for ahead in range(1, k + 2):
        good &= text.written[ahead : length - k - 1 + ahead]
    return np.flatnonzero(good).astype(np.int64)


def text_loss(
    frozen: FrozenModel, text: DistilledText, parents: Int64[np.ndarray, " chain"], probes: Probes, recipe: ProbeRecipe
) -> Float[Tensor, ""]:
    """The loss of chains under these tokens: the weighted sum over the steps, averaged over steps and chains."""
    chains = Chains(
        parents=parents, k=probes.k, ensemble=probes.ensemble, chained=recipe.chained, context=recipe.context
    )
    tokens = text.tokens.astype(np.int64)
    kept, where = np.unique(chains.targets, return_inverse=True)
    reading = frozen.read(tokens, kept)
    guessed = torch.log_softmax(frozen.guess(reading, chains, probes), dim=-1)
    if recipe.labels == "hard":
        labels = torch.from_numpy(tokens[chains.targets + 1]).to(guessed.device)
        losses = -guessed.gather(-1, labels[..., None])[..., 0]
    else:
        teacher = torch.log_softmax(reading.logits.float(), dim=-1)
        chance = teacher.exp()
        own = (chance * teacher).sum(dim=-1)  # minus the entropy
        index = torch.from_numpy(where.reshape(chains.targets.shape)).to(guessed.device)
        losses = own[index] - torch.einsum("csv,csv->cs", chance[index], guessed)
    weights = torch.tensor([recipe.decay**step for step in range(probes.k)], device=losses.device)
    return (losses * weights).mean()


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a training came to. losses: one a step."""

    losses: tuple[float, ...]
    seconds: float


def fit(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    probes: Probes,
    *,
    recipe: ProbeRecipe,
    folder: Path | None = None,
    name: str = "probes",
    resume: bool = True,
    minutes: float | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> Fitted | None:
    """Train probes in place.

    Args:
        folder: where checkpoints go, and where an interrupted training is taken up. None keeps none.
        minutes: end after so long (earlier runs counted in); the learning rate then falls with the time.
        stop_after: steps after which to save a checkpoint and return None. For tests and for sharing a machine.

    Ctrl-C saves a checkpoint and is raised again. Raises `BadInput` without a text that has room for a chain, where
    the probes are of another width, or where the checkpoint belongs to another recipe.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    check_width(model, probes)
    usable = [(text, where) for text in texts if len(where := places(text, k=probes.k))]
    if recipe.greedy:
        usable = [(text, where) for text, where in usable if text.temperature == 0.0] or usable
    if not usable:
        raise BadInput(f"none of the {len(texts)} texts has {probes.k + 2} tokens in a row that the model wrote.")
    console = Console(stderr=True)
    weights = dict(probes.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=0.0)
    identity = {
        "recipe": plain(recipe),
        "texts": len(usable),
        "base": fingerprint(model.model),
        "layers": list(probes.layers),
    }
    run = TrainingState(identity=identity)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            run = restore_checkpoint(folder, run, weights, optimizer)
    workers = Workers(recipe.texts_per_step, device=model.device.type)
    began = saved = time.monotonic() - run.seconds

    def save() -> None:
        if folder is not None:
            save_checkpoint(folder, run, weights, optimizer)

    def done() -> float:
        share = run.step / recipe.steps
        return share if minutes is None else max(share, run.seconds / (60.0 * minutes))

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not progress,
    )  # fmt: skip
    try:
        with bar, FrozenModel(model, probes.layers) as frozen:
            task = bar.add_task(name, total=recipe.steps, completed=run.step)
            while (share := done()) < 1.0:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * _rate(share, recipe.warmup)
                run.losses.append(_step(frozen, usable, probes, recipe, run.step, weights, optimizer, workers))
                run.step += 1
                run.seconds = time.monotonic() - began
                recent = run.losses[-50:]
                bar.update(task, completed=run.step, description=f"{name}  loss {sum(recent) / len(recent):.3f}")
                if run.step == stop_after and done() < 1.0:
                    save()
                    return None
                if time.monotonic() - saved > 60.0 * recipe.checkpoint_minutes:
                    save()
                    saved = time.monotonic()
    except KeyboardInterrupt:
        save()
        console.print(f"Stopped after step {run.step} of {recipe.steps}; it goes on from {folder}.", soft_wrap=True)
        raise
    finally:
        workers.close()
    return Fitted(losses=tuple(run.losses), seconds=run.seconds)


def _step(
    frozen: FrozenModel,
    usable: Sequence[tuple[DistilledText, Int64[np.ndarray, " _"]]],
    probes: Probes,
    recipe: ProbeRecipe,
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    workers: Workers,
) -> float:
    """One step of the optimiser; returns the mean loss of its texts."""

    def learn(place: int) -> tuple[float, tuple[Tensor, ...]]:
        number = _order(recipe, step * recipe.texts_per_step + place, len(usable))
        text, where = usable[number]
        if recipe.where == "end":
            parents = where[-1:]
        else:
            draw = np.random.default_rng([recipe.seed, step, place])
            parents = np.sort(draw.choice(where, min(recipe.inserts, len(where)), replace=False))
        loss = text_loss(frozen, text, parents, probes, recipe)
        return float(loss.detach()), torch.autograd.grad(loss, tuple(weights.values()))

    total = 0.0
    for loss, gradients in workers.run(learn, range(recipe.texts_per_step)):
        total += loss / recipe.texts_per_step
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            share = gradient / recipe.texts_per_step
            weight.grad = share if weight.grad is None else weight.grad.add_(share)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _order(recipe: ProbeRecipe, place: int, count: int) -> int:
    """The number of the text that is taken at this place: every text once an epoch, in a new order each time."""
    epoch, within = divmod(place, count)
    return int(np.random.default_rng([recipe.seed, epoch]).permutation(count)[within])


def _rate(done: float, warmup: float) -> float:
    """The part of the learning rate that applies when so much (0 to 1) of the training is done."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / max(1e-9, 1.0 - warmup)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """Where the tokens that really came stood among each step's guesses, 0 the best. Rows are places in texts."""

    ranks: Int64[np.ndarray, "place step"]

    def accuracies(self, ranks: int = 10) -> Float64[np.ndarray, "step rank"]:
        """The share of places where the guess of each rank was right."""
        return np.stack(
            [np.bincount(np.minimum(step, ranks), minlength=ranks + 1)[:ranks] for step in self.ranks.T]
        ) / (len(self.ranks))

    def top(self, best: int) -> tuple[float, ...]:
        """For each step the share of places where the token was among the `best` guesses."""
        return tuple(float(share) for share in (self.ranks < best).mean(axis=0))


@torch.no_grad()
def measure(
    model: LanguageModel,
    texts: Sequence[DistilledText],
    probes: Probes,
    *,
    per_text: int = 64,
    chained: bool = True,
    context: bool = True,
    seed: int = 0,
) -> Ranks:
    """How good the guesses are on texts that were kept out. The places are drawn with `seed`; at most `per_text` each.

    Raises:
        BadInput: no text has room for a chain.
    """
    check_width(model, probes)
    found: list[np.ndarray] = []
    with FrozenModel(model, probes.layers) as frozen:
        for number, text in enumerate(texts):
            parents = sample(text, k=probes.k, count=per_text, seed=[seed, number])
            if not len(parents):
                continue
            tokens = text.tokens.astype(np.int64)
            reading = frozen.read(tokens, np.zeros(1, dtype=np.int64))
            for start in range(0, len(parents), _TOGETHER):
                chains = Chains(
                    parents=parents[start : start + _TOGETHER],
                    k=probes.k,
                    ensemble=probes.ensemble,
                    chained=chained,
                    context=context,
                )
                logits = frozen.guess(reading, chains, probes)
                came = torch.from_numpy(tokens[chains.targets + 1]).to(logits.device)[..., None]
                found.append((logits > logits.gather(-1, came)).sum(dim=-1).cpu().numpy())
    if not found:
        raise BadInput(f"none of the {len(texts)} texts has {probes.k + 2} tokens in a row that the model wrote.")
    return Ranks(ranks=np.concatenate(found).astype(np.int64))


def sample(text: DistilledText, *, k: int, count: int, seed: Sequence[int]) -> Int64[np.ndarray, " place"]:
    """At most `count` of the places where a chain may hang, drawn without replacement, in order."""
    where = places(text, k=k)
    draw = np.random.default_rng(list(seed))
    return np.sort(draw.choice(where, min(count, len(where)), replace=False)) if len(where) else where


def check_width(model: LanguageModel, probes: Probes) -> None:
    """Raise BadModel where probes were made for states of another size."""
    width = int(model.model.config.get_text_config().hidden_size)
    if probes.width != width:
        raise BadModel(
            f"these probes have {probes.width} numbers each, and {model.name} has states of {width}: they belong to"
            " another model. Load that model, or train probes for this one."
        )


def plain(recipe: ProbeRecipe) -> dict[str, Any]:
    """The recipe as JSON has it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}


def save(
    folder: Path,
    name: str,
    *,
    model: LanguageModel,
    probes: Probes,
    recipe: ProbeRecipe,
    fitted: Fitted,
    data: str,
    score: Mapping[str, Any],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Artifact:
    """Write `<name>.safetensors` and `<name>.json` and drop the checkpoint."""
    import shutil

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file({key: weight.detach().to("cpu", dtype).contiguous() for key, weight in probes.named_parameters()}, path)
    artifact = Artifact(
        path=path,
        name=name,
        recipe=plain(recipe),
        data=data,
        seed=recipe.seed,
        base=fingerprint(model.model),
        base_name=model.name,
        versions={part: importlib.metadata.version(part) for part in ("torch", "transformers")},
        minutes=round(fitted.seconds / 60.0, 1),
    )
    last = fitted.losses[-max(1, len(fitted.losses) // 20) :]
    loss = {"loss": round(sum(last) / len(last), 4), "steps": len(fitted.losses)}
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return artifact.saved_with(score={**loss, **score}, settings=settings)


def open_artifact(path: str | Path, model: LanguageModel, *, name: str) -> Artifact:
    """The artifact at `path`, a file or a folder that holds `<name>.safetensors`, after a look at whose it is.

    Raises:
        ModelNotFound: there is none.
        BadModel: it was trained for other weights.
    """
    path = Path(path).expanduser()
    artifact = load_artifact(path / f"{name}.safetensors" if path.is_dir() else path)
    found = fingerprint(model.model)
    if found != artifact.base:
        raise BadModel(
            f"{artifact.path} was trained for {artifact.base_name} (weights {artifact.base[:12]}), and {model.name} has"
            f" weights {found[:12]}. Load {artifact.base_name}, or train it again for {model.name}."
        )
    return artifact


def tuned_limit(artifact: Artifact) -> int | None:
    """The rows of trees that were found to pay on this machine, on the engine that was tuned last; None if never."""
    known = _tuned().get(_tuned_key(artifact), {})
    return None if not known else int(known["limits"][known["last"]])


def remember_limit(artifact: Artifact, *, engine: str, limit: int) -> Path:
    """Keep the rows that pay on this machine with this engine; returns the file, which lies in the user's cache."""
    file = _tuned_file()
    known = _tuned()
    mine = known.setdefault(_tuned_key(artifact), {"limits": {}})
    mine["limits"][engine] = limit
    mine["last"] = engine
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".new")
    part.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def _tuned_file() -> Path:
    return user.cache() / "drafters" / "tuned.json"


def _tuned_key(artifact: Artifact) -> str:
    return f"{artifact.name} {artifact.base[:16]} {artifact.recipe['steps']} steps"


def _tuned() -> dict[str, Any]:
    try:
        return dict(json.loads(_tuned_file().read_text(encoding="utf-8")))
    except (OSError, ValueError):  # none yet, or half written: tuning makes it anew
        return {}
