"""Teach a model something small: the LoRA recipe that all rooms share.

Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) leave the model's weights as they are and learn two thin matrices
beside each of them, so what was learned is a file of a few megabytes. Here `peft` puts the adapters in, and the loop is
ours:

- products run in the model's own precision (bfloat16 as a rule); adapters and optimiser stay in float32;
- `peft`'s forward pass is replaced by an equal one of three products that write into each other (`_thin_forward`);
  on CPU, examples of one step run side by side, one thread each, because small products gain nothing from two threads.
  Together that is five times as fast as `peft` under automatic mixed precision;
- an `Example` may hold one *prefix* and many *branches*: a text and ten questions about it become one sequence in which
  each branch sees the prefix and itself. It trains as ten sequences would, and the prefix is computed once;
- a prompt may be read *both ways*: inside a block every token sees every other one, as in an encoder, while answers
  are still written left to right (the prefix language model of Raffel et al. 2019, arXiv:1910.10683);
- logits are computed at the positions that learn, and only there;
- a checkpoint is safetensors and JSON, and a resumed run goes on exactly as if it had not been interrupted.

The outcome is an `Artifact`: safetensors with the adapters in bfloat16, and a JSON beside it that says how it was made
and for which weights. `attach` gives a copy of the model with the adapters merged in, and needs no `peft`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from loci.errors import BadInput, BadModel, MissingExtra, ModelNotFound
from loci.lm.model import LanguageModel

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOTHING = -1  # the target of a token that has nothing to predict
CAUSAL = -1  # the block of a token that sees only what came before it


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """How to train. Every default that names no source is ours, measured on the reader."""

    rank: int = 16  # of each adapter
    alpha: float = 32.0  # adapters count alpha / rank
    targets: tuple[str, ...] = LINEAR  # all linear layers, as arXiv:2305.14314 found necessary
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # longest gradient
    warmup: float = 0.03  # part of all steps; after it the rate falls along half a cosine
    final_rate: float = 0.0  # part of `learning_rate` left at the end
    epochs: int = 1
    examples_per_step: int = 6  # gradients of so many examples are added up
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "examples_per_step"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; a recipe needs at least 1.")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A prompt, and the answer that is learned after it. `weight` scales its loss."""

    prompt: Sequence[int]
    answer: Sequence[int]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One sequence to learn from, perhaps with branches.

    `targets` is the token to predict after each position, or `NOTHING`; `weights` scales its loss. A token sees another
    one if that lies in branch 0 or in its own branch, and comes no later or lies in the same block (`CAUSAL` is none).
    """

    tokens: Int64[np.ndarray, " token"]
    targets: Int64[np.ndarray, " token"]
    weights: Float32[np.ndarray, " token"]
    positions: Int64[np.ndarray, " token"]
    branch: Int64[np.ndarray, " token"]
    block: Int64[np.ndarray, " token"]

    @classmethod
    def plain(cls, prompt: Sequence[int], answer: Sequence[int]) -> Example:
        """An ordinary causal sequence: the prompt, then the answer that is learned."""
        return cls.packed((), [Branch(prompt=prompt, answer=answer)], both_ways=False)

    @classmethod
    def packed(cls, prefix: Sequence[int], branches: Sequence[Branch], *, both_ways: bool = True) -> Example:
        """One prefix and many branches. `both_ways` lets prompts (not answers) look ahead inside themselves.

        The last token of an answer is learned and not read. Raises `BadInput` for a branch without prompt or answer.
        """
        tokens, targets, weights = list(prefix), [NOTHING] * len(prefix), [0.0] * len(prefix)
        positions, numbers = list(range(len(prefix))), [0] * len(prefix)
        blocks = [0 if both_ways else CAUSAL] * len(prefix)
        for number, branch in enumerate(branches, start=1):
            prompt, answer = list(branch.prompt), list(branch.answer)
            if not prompt or not answer:
                raise BadInput(
                    f"branch {number} has {len(prompt)} prompt and {len(answer)} answer tokens; 1 is needed."
                )
            read, quiet = prompt + answer[:-1], len(prompt) - 1
            tokens += read
            targets += [NOTHING] * quiet + answer
            weights += [0.0] * quiet + [branch.weight] * len(answer)
            positions += range(len(prefix), len(prefix) + len(read))
            numbers += [number] * len(read)
            blocks += [number if both_ways else CAUSAL] * len(prompt) + [CAUSAL] * (len(answer) - 1)
        return cls(
            tokens=np.array(tokens, dtype=np.int64),
            targets=np.array(targets, dtype=np.int64),
            weights=np.array(weights, dtype=np.float32),
            positions=np.array(positions, dtype=np.int64),
            branch=np.array(numbers, dtype=np.int64),
            block=np.array(blocks, dtype=np.int64),
        )

    def visible(self) -> Bool[np.ndarray, "query key"]:
        """Which token (row) sees which (column)."""
        order = np.arange(len(self.tokens))
        reach = (self.branch[None] == 0) | (self.branch[None] == self.branch[:, None])
        together = (self.block[None] == self.block[:, None]) & (self.block[:, None] != CAUSAL)
        return np.asarray(reach & ((order[None] <= order[:, None]) | together))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A trained part: its safetensors file, and what the JSON beside it says."""

    path: Path
    name: str
    recipe: Mapping[str, Any]
    data: str
    seed: int
    base: str  # fingerprint of the weights it belongs to
    base_name: str
    versions: Mapping[str, str]
    minutes: float
    score: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)  # what its user needs besides the weights

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path)

    def saved_with(self, *, score: Mapping[str, Any], settings: Mapping[str, Any]) -> Artifact:
        """The same artifact with figures and settings; its JSON is written anew."""
        changed = replace(self, score=dict(score), settings=dict(settings))
        fields = {key: value for key, value in asdict(changed).items() if key != "path"}
        _write(self.path.with_suffix(".json"), json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        return changed


def fingerprint(model: PreTrainedModel) -> str:
    """Names the weights of a model: sha256 over the shape of each matrix and up to 4,096 of its numbers.

    The numbers are taken in bfloat16, so that a copy loaded in float32 has the fingerprint of the file it came from.
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 4096)].to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_artifact(path: str | Path) -> Artifact:
    """Read an artifact by the path of its safetensors file. Raises `ModelNotFound`, `BadModel`."""
    path = Path(path)
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise ModelNotFound(f"no trained part at {file}. A trained part is a .safetensors and a .json file.")
    try:
        fields = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return Artifact(path=path, **fields)
    except (json.JSONDecodeError, TypeError) as error:
        raise BadModel(f"{path.with_suffix('.json')} does not describe a trained part: {error}") from error


def attach(model: LanguageModel, artifact: Artifact) -> LanguageModel:
    """A copy of the model with the adapters merged into its weights. The model that was given stays as it is.

    Raises `BadModel` where the artifact was trained for other weights.
    """
    import torch

    found = fingerprint(model.model)
    if found != artifact.base:
        raise BadModel(
            f"{artifact.name} was trained for {artifact.base_name} (weights {artifact.base[:12]}), and {model.name} "
            f"has weights {found[:12]}. Load {artifact.base_name}, or train it again for {model.name}."
        )
    merged = copy.deepcopy(model.model)
    scale = float(artifact.recipe["alpha"]) / int(artifact.recipe["rank"])
    tensors = artifact.tensors()
    with torch.no_grad():
        for name in sorted(key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")):
            weight = merged.get_parameter(f"{name}.weight")
            down, up = (tensors[f"{name}.lora_{side}"].to(weight.device, torch.float32) for side in "AB")
            weight.copy_(weight.float() + scale * (up @ down))
    merged.train(False)
    return replace(model, model=merged, name=f"{model.name}+{artifact.name}", hash=f"{model.hash}+{artifact.base[:12]}")


def train_lora(
    model: LanguageModel,
    examples: Sequence[Example],
    *,
    recipe: LoraRecipe,
    folder: str | Path,
    name: str,
    data: str,
    resume: bool = True,
    stop_after: int | None = None,
    progress: bool = True,
) -> Artifact | None:
    """Train adapters and leave `<name>.safetensors` and `<name>.json` in `folder`.

    Args:
        examples: looked up by position, so they may be made when asked for. Order is drawn anew each epoch.
        name: of the artifact.
        data: one line that says what the examples are; stored.
        resume: go on from the checkpoint in `folder`, if there is one of the same recipe and number of examples.
        stop_after: steps after which to save a checkpoint and return None. For tests and for sharing a machine.

    The model's own weights are not touched. Ctrl-C saves a checkpoint, says how to resume, and is raised again.
    Raises `BadInput` without examples, or where the checkpoint belongs to another recipe; `MissingExtra` without peft.
    """
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not len(examples):
        raise BadInput("there are no examples to train on.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    base = fingerprint(model.model)
    torch.manual_seed(recipe.seed)
    adapted = with_adapters(model.model, recipe)
    weights = {weight_name(key): weight for key, weight in adapted.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    per_epoch = math.ceil(len(examples) / recipe.examples_per_step)
    total = per_epoch * recipe.epochs
    workers = Workers(recipe.examples_per_step, device=model.device.type)
    run = TrainingState(identity={"recipe": _plain(recipe), "examples": len(examples), "base": base, "data": data})
    if resume:
        run = restore_checkpoint(folder, run, weights, optimizer)
    adapted.train()
    began = saved = time.monotonic() - run.seconds
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, disable=not progress,
    )  # fmt: skip
    try:
        with bar:
            task = bar.add_task(name, total=total, completed=run.step)
            order_of, order = -1, np.arange(0)
            while run.step < total:
                epoch, place = divmod(run.step, per_epoch)
                if epoch != order_of:
                    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(examples))
                    order_of = epoch
                chosen = order[place * recipe.examples_per_step : (place + 1) * recipe.examples_per_step]
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * _rate(run.step / total, recipe)
                loss = _step(adapted, examples, chosen.tolist(), weights, optimizer, workers, recipe.clip)
                run.losses.append(loss)
                run.step += 1
                run.seconds = time.monotonic() - began
                recent = run.losses[-50:]
                bar.update(task, completed=run.step, description=f"{name}  loss {sum(recent) / len(recent):.3f}")
                if run.step == stop_after and run.step < total:
                    save_checkpoint(folder, run, weights, optimizer)
                    return None
                if time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                    save_checkpoint(folder, run, weights, optimizer)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        save_checkpoint(folder, run, weights, optimizer)
        console.print(f"Stopped after step {run.step} of {total}; it goes on from {folder}.", soft_wrap=True)
        raise
    finally:
        workers.close()
        adapted.unload()
    return _finish(folder, run, weights, model, name=name, data=data, recipe=recipe, base=base)


@dataclass
class TrainingState:
    """What a checkpoint remembers besides tensors."""

    identity: Mapping[str, Any]
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def with_adapters(model: PreTrainedModel, recipe: LoraRecipe) -> PeftModel:
    """The model with trainable adapters in it. `unload` takes them out again; the weights are never written."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra.needs("training", "peft", "pip install 'loci-lm[train]'") from error
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # peft divides it, whole or not
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.forward = functools.partial(_thin_forward, module)
    return adapted


def _thin_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What the adapted linear layer computes: x W' + scaling (x A') B'."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    outcome: torch.Tensor = _thin_product().apply(x, layer.base_layer.weight, down, up, layer.scaling["default"])
    return outcome


@functools.cache
def _thin_product() -> Any:
    import torch

    class ThinProduct(torch.autograd.Function):
        """A linear layer with frozen weights and a low-rank adapter, whose sums are written in place."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: Any, up: Any, scale: float) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            down, up = down.to(x.dtype), (up * scale).to(x.dtype)
            inner = flat @ down.T
            ctx.save_for_backward(flat, inner, down, up, weight)
            ctx.scale = scale
            return torch.mm(flat, weight.T).addmm_(inner, up.T).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            flat, inner, down, up, weight = ctx.saved_tensors
            outer = gradient.reshape(-1, gradient.shape[-1])
            thin = outer @ up
            back = torch.mm(outer, weight).addmm_(thin, down).view(*gradient.shape[:-1], -1)
            return back, None, (thin.T @ flat).float(), (outer.T @ inner).float() * ctx.scale, None

    return ThinProduct


class Workers:
    """Runs examples side by side on CPU, one after another elsewhere. Results come in the order of the examples.

    One thread more than cores: each waits now and then for the interpreter's lock, and would leave its core idle.
    """

    def __init__(self, examples: int, *, device: str) -> None:
        import torch

        self.before = torch.get_num_threads()
        self.count = min(examples, self.before + 1) if device == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, function: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[Any]:
        return self.pool.map(function, numbers)

    def close(self) -> None:
        import torch

        self.pool.shutdown()
        torch.set_num_threads(self.before)


def weight_name(key: str) -> str:
    """The name under which an adapter's weight is stored."""
    return key.removeprefix("base_model.model.").removesuffix(".default.weight")


def _plain(recipe: LoraRecipe) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(recipe))))


def _rate(done: float, recipe: LoraRecipe) -> float:
    """The part of the learning rate that applies when so much (0 to 1) of the training is done."""
    if done < recipe.warmup:
        return (done + 1e-3) / (recipe.warmup + 1e-3)
    rest = (done - recipe.warmup) / max(1e-9, 1 - recipe.warmup)
    return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * rest))


def example_loss(model: PreTrainedModel | PeftModel, example: Example) -> torch.Tensor:
    """The weighted sum of the cross-entropies of all targets of one example."""
    import torch
    from torch.nn.functional import cross_entropy

    device, dtype = model.device, model.dtype
    places = torch.from_numpy(np.flatnonzero(example.targets != NOTHING)).to(device)
    visible = torch.from_numpy(example.visible())[None, None].to(device)
    logits = model(
        input_ids=torch.from_numpy(example.tokens)[None].to(device),
        attention_mask=torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min),
        position_ids=torch.from_numpy(example.positions)[None].to(device),
        logits_to_keep=places,
        use_cache=False,
    ).logits[0]
    targets, weights = torch.from_numpy(example.targets).to(device), torch.from_numpy(example.weights).to(device)
    losses = cross_entropy(logits.float(), targets[places], reduction="none")
    return (losses * weights[places]).sum()


def _step(
    model: PeftModel,
    examples: Sequence[Example],
    chosen: Sequence[int],
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    workers: Workers,
    clip: float,
) -> float:
    """One step of the optimiser over the chosen examples; returns the mean loss of their targets."""
    import torch

    def learn(number: int) -> tuple[float, float, tuple[torch.Tensor, ...]]:
        example = examples[number]
        loss = example_loss(model, example)
        return float(loss.detach()), float(example.weights.sum()), torch.autograd.grad(loss, tuple(weights.values()))

    total = summed = 0.0
    for loss, weight_of_example, gradients in workers.run(learn, chosen):
        summed, total = summed + loss, total + weight_of_example
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    for weight in weights.values():
        assert weight.grad is not None  # every adapter was asked for a gradient above
        weight.grad.div_(total)
    torch.nn.utils.clip_grad_norm_(weights.values(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return summed / total


def save_checkpoint(
    folder: Path, run: TrainingState, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state beside the old one, then put it in its place: a crash leaves one of the two whole."""
    import torch
    from safetensors.torch import save_file

    new, place = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    tensors = {"random": torch.get_rng_state()}
    for name, weight in weights.items():
        tensors[f"weight.{name}"] = weight.detach()
        for key, value in optimizer.state[weight].items():
            tensors[f"{key}.{name}"] = value
    save_file(tensors, new / "state.safetensors")
    state = {"identity": run.identity, "step": run.step, "seconds": run.seconds, "losses": run.losses}
    (new / "state.json").write_text(json.dumps(state), encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


def restore_checkpoint(
    folder: Path, fresh: TrainingState, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> TrainingState:
    """The state that `save_checkpoint` left in the folder, its tensors put back; `fresh` where there is none."""
    import torch
    from safetensors.torch import load_file

    place = next((p for p in (folder / "checkpoint", folder / "checkpoint.new") if (p / "state.json").is_file()), None)
    if place is None:
        return fresh
    state = json.loads((place / "state.json").read_text(encoding="utf-8"))
    if state["identity"] != fresh.identity:
        differs = sorted(key for key in fresh.identity if state["identity"].get(key) != fresh.identity[key])
        raise BadInput(
            f"the checkpoint in {folder} was made with another {', '.join(differs)}. "
            "Give another folder, delete it, or start anew with resume=False."
        )
    tensors = load_file(place / "state.safetensors")
    for name, weight in weights.items():
        weight.data.copy_(tensors[f"weight.{name}"])
        kept = {key.split(".", 1)[0]: value for key, value in tensors.items() if key.split(".", 1)[1:] == [name]}
        kept.pop("weight")
        optimizer.state[weight] = kept
    torch.set_rng_state(tensors["random"])
    return replace(fresh, step=state["step"], seconds=state["seconds"], losses=state["losses"])


def _finish(
    folder: Path,
    run: TrainingState,
    weights: Mapping[str, torch.Tensor],
    model: LanguageModel,
    *,
    name: str,
    data: str,
    recipe: LoraRecipe,
    base: str,
) -> Artifact:
    import importlib.metadata

    import torch
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    save_file({key: weight.detach().to("cpu", torch.bfloat16).contiguous() for key, weight in weights.items()}, path)
    artifact = Artifact(
        path=path,
        name=name,
        recipe=_plain(recipe),
        data=data,
        seed=recipe.seed,
        base=base,
        base_name=model.name,
        versions={part: importlib.metadata.version(part) for part in ("torch", "transformers", "peft")},
        minutes=round(run.seconds / 60, 1),
    )
    last = run.losses[-max(1, len(run.losses) // 20) :]
    artifact = artifact.saved_with(score={"loss": round(sum(last) / len(last), 4), "steps": run.step}, settings={})
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    return artifact


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
