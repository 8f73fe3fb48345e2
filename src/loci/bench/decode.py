"""Decoding speed: tokens per step and per second, for each drafter on each engine, beside plain decoding and peers.

Protocol the questions of Spec-Bench, turn by turn through the model's chat template; a second turn has the plain answer
         of the first engine as its history, so that every arm reads the same text. Or, for long contexts, excerpts of
         books. Greedy unless a temperature is given.
Timing   all arms run one after the other on each prompt, beginning with another arm each time, in one process: what the
         machine does meanwhile hits all alike. Plain decoding on the same engine is always among them; no ratio is
         told without it. Tokens per second count the time after the prompt; `total_tokens_per_second` all of it.
         Intervals are 95 % bootstrap intervals over prompts.
State    a drafter keeps what it learned from prompt to prompt, and starts with nothing of other arms. `learning` shows
         its tokens per step over the first 5 prompts, the next 20 and the rest.
Exact    `identical` is the share of prompts with plain decoding's tokens. Where one differs first, the gap between the
         plain run's two highest logits is told: in bfloat16 near-ties flip with the shape of a product.
Peers    "transformers": its own generate, plain, with prompt lookup, with its first layers as an assistant, and with
         early exit; "llama.cpp" through llama-cpp-python on the same GGUF file. Reading the prompt is left out of their
         tokens per second too: it is their longest single call.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gzip
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from loci import settings
from loci.bench import spec_bench
from loci.bench.recipe import recipe
from loci.bench.statistics import median
from loci.decoding import names
from loci.errors import BadInput, DataNotFound, MissingExtra, UnknownName, Unsupported
from loci.lm.chat import Message
from loci.lm.draft import Drafter, Needs, TokenTree
from loci.lm.engine.base import StepEngine
from loci.lm.sampling import Sampling

if TYPE_CHECKING:
    from loci.lm.generate import GenerationStats
    from loci.lm.model import LanguageModel

Progress = Callable[[str, int, int], None]

PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("transformers", "transformers lookup", "transformers assistant", "transformers early exit"),
    "llama.cpp": ("llama.cpp",),
}
LLAMA_CPP = "llama_cpp"  # the package of the peer; it is no dependency of ours
_ASSISTANT_LAYERS = 4  # of 30, as many as the draft models of the decoding room have
_LOOKUP_TOKENS = 10  # what the documentation of transformers recommends
_PREFILL_TOKENS, _PREFILL_RUNS = 2048, 3
_RESAMPLES = 10_000
_LEARNING = (("first 5", 0, 5), ("next 20", 5, 25), ("rest", 25, None))


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    drafters: tuple[str, ...] = ("auto",)
    engines: tuple[str, ...] = ("auto",)
    peers: tuple[str, ...] = ()
    limit: int | None = None  # questions; all unless given
    max_new_tokens: int = 256
    max_nodes: int | None = None  # of a tree, root included; what generate takes by itself unless given
    context: int | None = None  # tokens of book before each answer, instead of Spec-Bench's questions
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    threads: int | None = None
    timings: bool = True  # also time single steps by their nodes, and the reading of 2,048 tokens
    gaps: bool = True  # look at the logits where a text differs first


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What all arms read: token ids, and which task they belong to."""

    task: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm on one prompt. `seconds` are those after the prompt."""

    tokens: tuple[int, ...]
    seconds: float
    prefill_seconds: float
    steps: int
    stats: GenerationStats | None = None


@runtime_checkable
class Arm(Protocol):
    name: str
    engine: str
    kind: str  # "plain", "drafter" or "peer"
    plain: str  # name of the arm that its ratio is to

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(kw_only=True)
class ArmResult:
    name: str
    engine: str
    kind: str
    plain: str
    exact: bool | None = None
    nbytes: int = 0
    runs: list[Run] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # at first differences
    prefill_ms: float | None = None


@dataclass(kw_only=True)
class Result:
    """What was measured. `complete` is false when it was interrupted: then the figures cover what had been done."""

    arms: list[ArmResult]
    prompts: list[Prompt]
    recipe: dict[str, Any]
    complete: bool
    skipped: dict[str, str]  # peers that could not run, and why
    step_ms: dict[str, dict[int, dict[int, float]]]  # of each engine, by tokens of context and by nodes

    def as_json(self) -> dict[str, Any]:
        by_name = {(arm.name, arm.engine): arm for arm in self.arms}
        llama = next((arm for arm in self.arms if arm.name == "llama.cpp"), None)
        rivals = [arm for arm in self.arms if arm.name.startswith("transformers ")]
        best = max(rivals, key=_speed, default=None)
        return {
            "rows": [self._row(arm, by_name, llama, best) for arm in self.arms],
            "skipped": self.skipped,
            "step_ms": self.step_ms,
            "complete": self.complete,
            "recipe": self.recipe,
        }

    def _row(
        self,
        arm: ArmResult,
        by_name: Mapping[tuple[str, str], ArmResult],
        llama: ArmResult | None,
        best: ArmResult | None,
    ) -> dict[str, Any]:
        done = min(len(one.runs) for one in self.arms)  # an interrupted run has fewer of some
        runs, prompts = arm.runs[:done], self.prompts[:done]
        plain = by_name[arm.plain, arm.engine].runs[:done]
        reference = self.arms[0].runs[:done]  # plain on the first engine
        same = [one.tokens == other.tokens for one, other in zip(runs, plain, strict=True)]
        row: dict[str, Any] = {
            "name": arm.name,
            "engine": arm.engine,
            "kind": arm.kind,
            "tokens_per_step": _over(_new(runs), sum(run.steps for run in runs)),
            "tokens_per_second": _over(_new(runs), sum(run.seconds for run in runs)),
            "total_tokens_per_second": _over(_new(runs), sum(run.seconds + run.prefill_seconds for run in runs)),
            "ratio_to_plain": ratio(runs, plain)["ratio"],
            "ratio_to_plain_interval": ratio(runs, plain)["interval"],
            "ratio_to_llama_cpp": None if llama is None else ratio(runs, llama.runs[:done]),
            "ratio_to_best_transformers": None if best is None else ratio(runs, best.runs[:done]) | {"of": best.name},
            "identical": _over(sum(same), len(same)),
            "identical_to_first_plain": _over(
                sum(one.tokens == other.tokens for one, other in zip(runs, reference, strict=True)), len(runs)
            ),
            "largest_gap_at_difference": max(arm.gaps, default=None),
            "exact": arm.exact,
            "bytes": arm.nbytes,
            "prompts": len(runs),
            "new_tokens": _new(runs),
            "prefill_ms_2048": arm.prefill_ms,
            "tasks": {
                task: {
                    "tokens_per_step": _over(_new(own), sum(run.steps for run in own)),
                    "tokens_per_second": _over(_new(own), sum(run.seconds for run in own)),
                    "ratio_to_plain": ratio(own, [plain[place] for place in places])["ratio"],
                    "identical": _over(sum(same[place] for place in places), len(places)),
                    "prompts": len(own),
                }
                for task, places in _by_task(prompts).items()
                if (own := [runs[place] for place in places])
            },
            "learning": {
                label: _over(_new(part), sum(run.steps for run in part))
                for label, first, end in _LEARNING
                if (part := runs[first:end])
            },
        }
        told = [run.stats for run in runs if run.stats is not None]
        if told:
            total = told[0]
            for stats in told[1:]:
                total = total + stats
            row |= {
                "nodes_per_step": _over(total.proposed_nodes, total.steps),
                "acceptance": total.acceptance,
                "accepted_by_depth": total.accepted_by_depth,
                "ms_per_step": {
                    part: 1000 * getattr(total, f"{part}_seconds") / max(total.steps, 1)
                    for part in ("draft", "step", "verify", "commit")
                },
                "model_bytes": total.model_bytes,
                "kv_bytes_peak": total.kv_bytes_peak,
                "notes": getattr(total, "notes", []),
            }
        return row


def run(
    model: LanguageModel,
    data: Path,
    *,
    config: DecodeConfig = DecodeConfig(),
    gguf: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Measure every drafter on every engine, and the peers, on the same prompts; Ctrl-C ends it and returns what was
    measured so far.

    Args:
        data: the folder of Spec-Bench's questions; with a `context`, of books.
        gguf: the file that llama.cpp reads.

    Raises:
        DataNotFound: there is no data.
        UnknownName: a drafter, an engine or a peer that does not exist.
        Unsupported: an engine that cannot run this model.
    """
    if config.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {config.max_new_tokens}; it must be at least 1.")
    from loci.lm.threads import use_threads

    threads = use_threads(config.threads)
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
    asked: _Asked
    if config.context is None:
        asked = _Questions(model, data, config.limit)
    else:
        asked = _Excerpts(model, data, config.limit, config.context, config.max_new_tokens)
    arms: list[Arm] = []
    for engine in config.engines:
        arms += _arms_of(model, engine, config, sampling)
    skipped: dict[str, str] = {}
    for peer in config.peers:
        if peer not in PEERS:
            raise UnknownName.among("peer", peer, PEERS)
        try:
            arms += _peers(peer, model, gguf, threads)
        except (MissingExtra, Unsupported) as why:
            skipped[peer] = str(why)
    results = [ArmResult(name=arm.name, engine=arm.engine, kind=arm.kind, plain=arm.plain) for arm in arms]
    prompts: list[Prompt] = []
    step_ms: dict[str, dict[int, dict[int, float]]] = {}
    complete = True
    total = len(asked) * len(arms)
    try:
        if config.timings:
            _time_prefill(model, arms, results, progress)
            for arm in arms:
                if isinstance(arm, _Ours) and arm.kind == "plain":
                    if progress is not None:
                        progress(f"timing steps of {arm.engine}", 0, 1)
                    step_ms[arm.engine] = step_times(model, arm.stepper)
        for place, prompt in enumerate(asked):
            made: dict[int, Run] = {}
            for turn in range(len(arms)):
                number = (turn + place) % len(arms)
                if progress is not None:
                    progress("decoding", place * len(arms) + turn, total)
                made[number] = arms[number].run(prompt, config.max_new_tokens)
            prompts.append(prompt)
            for number, result in enumerate(results):
                result.runs.append(made[number])
            asked.answered(made[0].tokens)
        if config.gaps and sampling.greedy:
            _find_gaps(model, results, prompts, {arm.engine: arm for arm in arms if arm.kind == "plain"})
    except KeyboardInterrupt:
        complete = False
    finally:
        for arm in arms:
            close = getattr(arm, "close", None)
            if close is not None:
                close()
    if not prompts:
        raise KeyboardInterrupt
    for arm, result in zip(arms, results, strict=True):
        result.nbytes = arm.nbytes
        told = [run.stats.exact for run in result.runs if run.stats is not None]
        result.exact = all(told) if told else None
    return Result(
        arms=results,
        prompts=prompts,
        complete=complete,
        skipped=skipped,
        step_ms=step_ms,
        recipe=recipe(
            task="decode",
            version=spec_bench.VERSION,
            data=asked.files,
            seed=config.seed,
            examples=len(prompts),
            config={**asdict(config), "threads": threads, "dtype": str(model.dtype)},
            model={"name": model.name, "hash": model.hash},
        ),
    )


# What is asked


@runtime_checkable
class _Asked(Protocol):
    files: list[Path]

    def __iter__(self) -> Iterator[Prompt]: ...

    def __len__(self) -> int:
        """Prompts in all."""

    def answered(self, tokens: Sequence[int]) -> None:
        """What plain decoding said to the last prompt."""


class _Questions:
    """Spec-Bench's questions; each later turn has the plain answers before it."""

    def __init__(self, model: LanguageModel, data: Path, limit: int | None) -> None:
        self.model = model
        self.files = [spec_bench.file_of(data)]
        self.questions = spec_bench.pick(spec_bench.read(data), limit)
        self._said = ""

    def __len__(self) -> int:
        return sum(len(question.turns) for question in self.questions)

    def __iter__(self) -> Iterator[Prompt]:
        for question in self.questions:
            messages: list[Message] = []
            for turn in question.turns:
                messages.append(Message(role="user", content=turn))
                tokens = self.model.encode(messages)
                yield Prompt(task=question.task, tokens=tuple(tokens[-(self.model.window // 2) :]))
                messages.append(Message(role="assistant", content=self._said))

    def answered(self, tokens: Sequence[int]) -> None:
        self._said = self.model.decode(tokens) or "-"


class _Excerpts:
    """Excerpts of books that a reader is to retell."""

    def __init__(self, model: LanguageModel, data: Path, limit: int | None, context: int, new: int) -> None:
        self.files = sorted([*data.glob("*.txt"), *data.glob("*.txt.gz")]) if data.is_dir() else []
        if not self.files:
            raise DataNotFound(f"{data} holds no *.txt or *.txt.gz; give a folder of books as plain text.")
        frame = len(model.encode([Message(role="user", content=_RETELL)]))
        self.size = min(context, model.window - new) - frame - 8
        if self.size < 64:
            raise BadInput(
                f"a context of {context:,} tokens leaves no room for an excerpt; give at least {frame + 72}."
            )
        self.model = model
        self.count = 6 if limit is None else limit

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Prompt]:
        for number in range(self.count):
            file = self.files[number % len(self.files)]
            text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            words = text.decode("utf-8")
            start = (number // len(self.files) + 1) * len(words) // (self.count // len(self.files) + 2)
            tokens = self.model.encode(words[start : start + 8 * self.size])[: self.size]
            excerpt = self.model.decode(tokens)
            prompt = self.model.encode([Message(role="user", content=f"{excerpt}\n\n{_RETELL}")])
            yield Prompt(task=file.name.partition(".")[0], tokens=tuple(prompt))

    def answered(self, tokens: Sequence[int]) -> None:
        pass


_RETELL = "Retell in your own words what happens in this excerpt, and quote its most important sentences."


# Our own arms


class _Ours:
    """One drafter, or none, on an engine of its own."""

    def __init__(
        self, model: LanguageModel, engine: StepEngine, drafter: Drafter | None, name: str, config: DecodeConfig
    ) -> None:
        self.model, self.stepper, self.drafter = model, engine, drafter
        self.name, self.engine = name, engine.name
        self.kind, self.plain = ("plain" if drafter is None else "drafter"), "plain"
        self.config = config
        self.sampling = Sampling(temperature=config.temperature, top_p=config.top_p)

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        from loci.lm.generate import generate

        self.stepper.reset()  # every arm reads the whole prompt
        made = generate(
            self.model,
            list(prompt.tokens),
            max_new_tokens=max_new_tokens,
            sampling=self.sampling,
            seed=self.config.seed,
            drafter=self.drafter,
            engine=self.stepper,
            max_nodes="auto" if self.config.max_nodes is None else self.config.max_nodes,
        )
        stats = made.stats
        return Run(
            tokens=made.tokens,
            seconds=stats.seconds - stats.prefill_seconds,
            prefill_seconds=stats.prefill_seconds,
            steps=stats.steps,
            stats=stats,
        )

    def prefill(self, tokens: Sequence[int]) -> None:
        self.stepper.reset()
        self.stepper.prefill([[*tokens, tokens[-1]]], want=Needs() if self.drafter is None else self.drafter.needs)

    @property
    def nbytes(self) -> int:
        return 0 if self.drafter is None else self.drafter.nbytes


def _arms_of(model: LanguageModel, engine: str, config: DecodeConfig, sampling: Sampling) -> list[Arm]:
    from loci.lm.engine.choose import choose

    arms: list[Arm] = [_Ours(model, choose(model, name=engine), None, "plain", config)]
    for spec in dict.fromkeys(config.drafters):
        drafter = names.drafter(spec, model, alone=True)
        if drafter is not None:
            arms.append(_Ours(model, choose(model, needs=drafter.needs, name=engine), drafter, spec, config))
    # A drafter that needs more than the fastest engine gives runs on another one, and is compared with plain there.
    for missing in dict.fromkeys(arm.engine for arm in arms):
        if not any(arm.engine == missing and arm.kind == "plain" for arm in arms):
            arms.append(_Ours(model, choose(model, name=missing), None, "plain", config))
    return arms


def _find_gaps(
    model: LanguageModel, results: Sequence[ArmResult], prompts: Sequence[Prompt], plain: Mapping[str, Arm]
) -> None:
    """At each first difference from plain decoding, the gap between the plain run's two highest logits."""
    by_engine = {result.engine: result for result in results if result.kind == "plain"}
    for result in results:
        arm = plain.get(result.engine)
        if result.kind != "drafter" or not isinstance(arm, _Ours):
            continue
        for prompt, run, other in zip(prompts, result.runs, by_engine[result.engine].runs, strict=True):
            if run.tokens != other.tokens:
                place = next(
                    (at for at, pair in enumerate(zip(run.tokens, other.tokens, strict=False)) if pair[0] != pair[1]),
                    min(len(run.tokens), len(other.tokens)),
                )
                result.gaps.append(_gap(arm.stepper, [*prompt.tokens, *other.tokens[:place]]))


def _gap(engine: StepEngine, tokens: list[int]) -> float:
    engine.reset()
    engine.prefill([tokens], want=Needs())
    logits = engine.step([TokenTree.root(tokens[-1])], want=Needs()).logits(0, 0)
    engine.commit([[0]])
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)


# Peers


def _peers(peer: str, model: LanguageModel, gguf: Path | None, threads: int) -> list[Arm]:
    if peer == "llama.cpp":
        return [_LlamaCpp(model, gguf, threads)]
    assistant = _first_layers(model, _ASSISTANT_LAYERS)
    return [
        _Transformers(model, "transformers", {}),
        _Transformers(model, "transformers lookup", {"prompt_lookup_num_tokens": _LOOKUP_TOKENS}),
        _Transformers(model, "transformers assistant", {"assistant_model": assistant}),
        _Transformers(model, "transformers early exit", {"assistant_early_exit": _ASSISTANT_LAYERS}),
    ]


def _first_layers(model: LanguageModel, layers: int) -> Any:
    """The model's first layers with its own embedding, norm and head, sharing every weight."""
    body = getattr(model.model, "model", None)
    if body is None or len(getattr(body, "layers", ())) <= layers:
        raise Unsupported(f"{model.name} has no more than {layers} layers to make an assistant of.")
    config = copy.deepcopy(model.model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    shared = {id(weight): weight for weight in [*model.model.parameters(), *model.model.buffers()]}
    kept = list(body.layers)
    try:
        body.layers = type(body.layers)(kept[:layers])
        small = copy.deepcopy(model.model, shared)
    finally:
        body.layers = type(body.layers)(kept)
    small.config = config
    small.model.config = config
    return small


class _Transformers:
    """`generate` of transformers, as it is."""

    engine, kind, plain = "transformers", "peer", "transformers"

    def __init__(self, model: LanguageModel, name: str, options: Mapping[str, Any]) -> None:
        self.model, self.name, self.options = model, name, dict(options)

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        import torch

        calls: list[float] = []
        began = [0.0]
        whole = len(self.model.model.model.layers)
        counted = [0]

        def before(*_: object) -> None:
            began[0] = time.perf_counter()

        def after(module: Any, *_: object) -> None:
            calls.append(time.perf_counter() - began[0])
            counted[0] += int(module.config.num_hidden_layers == whole)

        hooks = [
            self.model.model.register_forward_pre_hook(before),
            self.model.model.register_forward_hook(after),
        ]
        forward: Any = self.model.model
        ids = torch.tensor([prompt.tokens])
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                made = forward.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self.model.tokenizer.pad_token_id or self.model.tokenizer.eos_token_id,
                    **self.options,
                )
        finally:
            for hook in hooks:
                hook.remove()
        seconds = time.perf_counter() - start
        tokens = tuple(made[0, len(prompt.tokens) :].tolist())
        prefill = max(calls)
        return Run(tokens=tokens, seconds=seconds - prefill, prefill_seconds=prefill, steps=counted[0])

    def prefill(self, tokens: Sequence[int]) -> None:
        import torch

        forward: Any = self.model.model
        with torch.inference_mode():
            forward(input_ids=torch.tensor([list(tokens)]), use_cache=True, logits_to_keep=1)

    @property
    def nbytes(self) -> int:
        assistant = self.options.get("assistant_model")
        if assistant is None:
            return 0
        held = {weight.data_ptr() for weight in self.model.model.parameters()}
        return sum(weight.nbytes for weight in assistant.parameters() if weight.data_ptr() not in held)


class _LlamaCpp:
    """llama.cpp's own loop: decode, argmax over the logits where they lie, decode."""

    name, engine, kind, plain = "llama.cpp", "llama.cpp", "peer", "llama.cpp"

    def __init__(self, model: LanguageModel, gguf: Path | None, threads: int) -> None:
        if gguf is None:
            raise Unsupported("llama.cpp reads GGUF files, and this model was not loaded from one.")
        try:
            self.library: Any = importlib.import_module(LLAMA_CPP)
        except ImportError as absent:
            raise MissingExtra.needs(
                "the peer llama.cpp", "the package llama-cpp-python", "pip install llama-cpp-python"
            ) from absent
        self.ends = model.end_tokens
        self.loaded: Any = self.library.Llama(
            model_path=str(gguf),
            n_ctx=min(model.window, 8192),
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        self.vocabulary = model.vocabulary

    def run(self, prompt: Prompt, max_new_tokens: int) -> Run:
        self.loaded.reset()
        start = time.perf_counter()
        self._decode(list(prompt.tokens))
        read = time.perf_counter()
        tokens: list[int] = []
        while len(tokens) < max_new_tokens:
            tokens.append(self._best())
            if tokens[-1] in self.ends or len(tokens) == max_new_tokens:
                break
            self._decode([tokens[-1]])
        done = time.perf_counter()
        return Run(tokens=tuple(tokens), seconds=done - read, prefill_seconds=read - start, steps=len(tokens))

    def prefill(self, tokens: Sequence[int]) -> None:
        self.loaded.reset()
        self._decode(list(tokens))

    def _decode(self, tokens: list[int]) -> None:
        """Feed tokens behind what the cache holds, without copying logits as the binding's own `eval` does."""
        low, held = self.library.llama_cpp, self.loaded
        if held.n_tokens == 0:
            memory = low.llama_get_memory(held._ctx.ctx)
            low.llama_memory_clear(memory, True)
        for first in range(0, len(tokens), held.n_batch):
            piece = tokens[first : first + held.n_batch]
            array = (low.llama_token * len(piece))(*piece)
            if low.llama_decode(held._ctx.ctx, low.llama_batch_get_one(array, len(piece))) != 0:
                raise Unsupported(f"llama.cpp could not read {len(piece)} tokens.")
            held.n_tokens += len(piece)

    def _best(self) -> int:
        logits = self.library.llama_cpp.llama_get_logits_ith(self.loaded._ctx.ctx, -1)
        array = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))
        return int(array.argmax())

    @property
    def nbytes(self) -> int:
        return 0

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self.loaded.close()


# Figures


def _time_prefill(
    model: LanguageModel, arms: Sequence[Arm], results: Sequence[ArmResult], progress: Progress | None
) -> None:
    """Milliseconds to read 2,048 tokens: the median of three runs, arms in turn."""
    size = min(_PREFILL_TOKENS, model.window - 2)
    random = np.random.default_rng(0)
    tokens = random.integers(3, model.vocabulary, size).tolist()
    taken: dict[int, list[float]] = {number: [] for number in range(len(arms))}
    for turn in range(_PREFILL_RUNS + 1):  # the first one warms up
        for number, arm in enumerate(arms):
            prefill = getattr(arm, "prefill", None)
            if prefill is None or arm.name.startswith("transformers "):
                continue
            if progress is not None:
                progress("reading 2,048 tokens", turn * len(arms) + number, (_PREFILL_RUNS + 1) * len(arms))
            start = time.perf_counter()
            prefill(tokens)
            if turn:
                taken[number].append(1000 * (time.perf_counter() - start))
    for number, result in enumerate(results):
        result.prefill_ms = round(median(taken[number]), 1) if taken[number] else None


def step_times(model: LanguageModel, engine: StepEngine) -> dict[int, dict[int, float]]:
    """Milliseconds of a step by tokens of context and by nodes."""
    from loci.lm.cost import CONTEXTS, StepCost

    room = model.window - 65
    cost = StepCost.measure(engine, contexts=sorted({min(context, room) for context in CONTEXTS}))
    return {context: {size: round(1000 * cost(size, context), 2) for size in cost.nodes} for context in cost.contexts}


def ratio(ours: Sequence[Run], theirs: Sequence[Run], *, resamples: int = _RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Tokens per second of the first over those of the second on the same prompts, with a 95 % bootstrap interval."""
    counts = np.array([[len(run.tokens), run.seconds] for run in ours], dtype=np.float64)
    others = np.array([[len(run.tokens), run.seconds] for run in theirs], dtype=np.float64)
    if not len(counts):
        return {"ratio": None, "interval": None}

    def value(places: np.ndarray) -> np.ndarray:
        mine, other = counts[places].sum(axis=-2), others[places].sum(axis=-2)
        return np.asarray((mine[..., 0] / mine[..., 1]) / (other[..., 0] / other[..., 1]))

    drawn = value(np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(value(np.arange(len(counts)))), "interval": [float(low), float(high)]}


def _speed(arm: ArmResult) -> float:
    return _over(_new(arm.runs), sum(run.seconds for run in arm.runs)) or 0.0


def _new(runs: Sequence[Run]) -> int:
    return sum(len(run.tokens) for run in runs)


def _over(part: int | float, whole: int | float) -> float | None:
    return part / whole if whole else None


def _by_task(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt.task, []).append(place)
    return places


def default_data(context: int | None) -> Path:
    """Where the prompts lie unless a folder is named."""
    return settings.data() / ("spec_bench" if context is None else "books")


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a model's name means; None where it means something else."""
    if name == "default":
        from loci.lm import bundled

        return bundled.find()
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        return found[0] if len(found) == 1 else None
    return path if path.suffix == ".gguf" and path.is_file() else None
