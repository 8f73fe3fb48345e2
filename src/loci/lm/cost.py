"""What a step costs by its number of nodes, measured here, and the tree size that pays best.

Letters  nodes: of all rows together; context: tokens in the cache; tau: new tokens per step that a drafter expects.
Source   the speed of speculative decoding is tau(n) / (L(n) + draft(n)); choosing n by a measured L is the
         hardware-aware tree of parallel prompt decoding (Chen et al. 2024, arXiv:2405.18628, section 4).
Ours     rounds over all sizes instead of ten runs of one size after another, so that a moment's load falls on all of
         them; medians are made to rise with the nodes. A measurement that wavers is used once and not stored.

A stored table holds for one machine, model, engine, precision and number of threads, and for one version of torch and
of Loci. If any of them differs there is another table; `forget` removes them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from loci import settings
from loci.errors import BadInput
from loci.lm import machine
from loci.lm.draft import Needs, TokenTree
from loci.lm.engine.base import StepEngine
from loci.lm.model import LanguageModel

NODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
CONTEXTS = (256, 1024)
ROUNDS = 10
SECONDS = 5.0  # after so long no further round begins, if there were three
FORMAT = 1
# Half of the runs of a size lie within this share of its median, or the table is not stored: the machine was busy.
STEADY = 0.3
_NOTHING = Needs()


@dataclass(frozen=True, kw_only=True)
class Where:
    """What a table holds for. `threads` is None where the engine runs on an accelerator."""

    machine: str
    model: str  # its hash
    engine: str
    dtype: str
    threads: int | None
    versions: str

    @classmethod
    def of(cls, language_model: LanguageModel, engine: StepEngine) -> Where:
        import torch

        device = language_model.device
        if device.type == "cpu":
            box = f"{machine.processor()}, {machine.available_cores()} cores, {' '.join(sorted(machine.units()))}"
        else:
            box = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        threads = int(getattr(engine, "threads", torch.get_num_threads())) if device.type == "cpu" else None
        kernel = getattr(engine, "kernel", "")
        return cls(
            machine=box,
            model=language_model.hash,
            engine=f"{engine.name} {kernel}".strip(),
            dtype=str(language_model.dtype).removeprefix("torch."),
            threads=threads,
            versions=f"loci {_version()}, torch {torch.__version__}",
        )

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return folder() / f"{digest[:16]}.json"


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds of a step: `seconds[context][nodes]`. `spread` is the middle half of the runs around their medians."""

    nodes: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    spread: float
    name: str = ""  # of the model, for readers
    where: Where | None = None

    def __call__(self, nodes: int, context: int = 0) -> float:
        """Seconds of a step; between measured sizes and contexts along a line, beyond them along the last one.

        Raises:
            BadInput: fewer than 1 node.
        """
        if nodes < 1:
            raise BadInput(f"a step has at least 1 node, not {nodes}.")
        columns = [_along(self.nodes, row, nodes) for row in self.seconds]
        least = min(self.seconds[0])
        return max(least / 2, _along(self.contexts, columns, context))

    @classmethod
    def measure(
        cls,
        engine: StepEngine,
        *,
        nodes: Sequence[int] = NODES,
        contexts: Sequence[int] = CONTEXTS,
        rounds: int = ROUNDS,
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> StepCost:
        """Time steps of chains on an engine; it forgets its texts. Sizes above what it can run are left out.

        Args:
            seconds: how long to measure, about; at least three rounds are run whatever it takes.
        """
        sizes = tuple(size for size in nodes if size <= engine.capabilities.max_nodes)
        table: list[tuple[float, ...]] = []
        spreads = []
        for place, context in enumerate(contexts):
            runs: dict[int, list[float]] = {size: [] for size in sizes}
            _at(engine, context)
            for size in sizes:
                _step(engine, size, clock)  # the first of a size lays out its kernels
            end = clock() + seconds / len(contexts)
            for number in range(rounds):
                if number >= 3 and clock() > end:
                    break
                for size in sizes:
                    runs[size].append(_step(engine, size, clock))
            medians = [statistics.median(runs[size]) for size in sizes]
            spreads += [_middle(runs[size]) / median for size, median in zip(sizes, medians, strict=True) if median]
            rising = _rising(medians)
            if place:  # nor does a longer context make a step cheaper
                rising = [max(pair) for pair in zip(rising, table[-1], strict=True)]
            table.append(tuple(rising))
        engine.reset()
        spread = statistics.median(spreads) if spreads else 0.0
        return cls(nodes=sizes, contexts=tuple(contexts), seconds=tuple(table), spread=spread)

    @classmethod
    def of(cls, language_model: LanguageModel, engine: StepEngine, *, seconds: float = SECONDS) -> StepCost:
        """The stored table for this model and engine here; measured now, and stored, where there is none.

        The measurement needs an engine that nobody is using: it forgets its texts.
        """
        where = Where.of(language_model, engine)
        stored = _read(where.file)
        if stored is not None and stored.where == where:
            return stored
        room = language_model.window - max(NODES) - 1
        contexts = sorted({max(1, min(context, room)) for context in CONTEXTS})
        found = cls.measure(engine, contexts=contexts, seconds=seconds)
        found = replace(found, name=language_model.name, where=where)
        if found.spread <= STEADY:
            _write(where.file, found)
        return found

    def summary(self) -> str:
        """One line for people: where it holds, one token's cost, a tree's, and what a long context adds."""
        parts = []
        if self.where is not None:
            threads = "" if self.where.threads is None else f", {self.where.threads} threads"
            parts.append(f"{self.name} on {self.where.engine}, {self.where.dtype}{threads}:")
        tree = min(16, self.nodes[-1])
        first, last = self.contexts[0], self.contexts[-1]
        parts.append(f"{1000 * self(1, first):.1f} ms a token, {1000 * self(tree, first):.1f} ms a tree of {tree}")
        parts.append(f"after {first:,} tokens")
        if last > first:
            parts.append(f"({1000 * self(1, last):.1f} and {1000 * self(tree, last):.1f} after {last:,})")
        if self.spread > STEADY:
            parts.append(f"- measured on a busy machine (spread {self.spread:.0%}), not stored")
        return " ".join(parts)


def best_size(
    tau: Callable[[int], float],
    cost: Callable[[int, int], float],
    draft_cost: Callable[[int], float] | None = None,
    *,
    context: int = 256,
    rows: int = 1,
    limit: int = 64,
) -> int:
    """The nodes per row, root included, that give the most tokens per second: the n of the highest
    tau(n) / (L(rows * n) + draft(n)). Of equals the smallest; 1 means that drafting does not pay.

    Args:
        tau: new tokens per step with a tree of n nodes; tau(1) is 1.
        cost: seconds of a step by nodes and context: a `StepCost`.
        draft_cost: seconds of drafting a tree of n nodes for one row; it is not asked for n = 1.
        limit: nodes of all rows together that the engine runs.
    """
    if rows < 1 or limit < rows:
        raise BadInput(f"{rows} rows do not fit into a step of at most {limit} nodes.")

    def speed(size: int) -> float:
        draft = draft_cost(size) * rows if draft_cost is not None and size > 1 else 0.0
        return tau(size) / (cost(rows * size, context) + draft)

    return max(range(1, limit // rows + 1), key=speed)


def known() -> list[StepCost]:
    """All stored tables, by model and engine."""
    found = [cost for file in sorted(folder().glob("*.json")) if (cost := _read(file)) is not None]
    return sorted(found, key=lambda cost: (cost.name, cost.where.engine if cost.where else ""))


def forget() -> int:
    """Remove all stored tables, so that costs are measured anew. Returns how many there were."""
    files = list(folder().glob("*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


def folder() -> Path:
    """Where tables are stored; it may not exist yet."""
    return settings.cache() / "costs"


def _version() -> str:
    try:
        return metadata.version("loci-lm")
    except metadata.PackageNotFoundError:  # run from its folder, without being installed
        return "unknown"


def _at(engine: StepEngine, context: int) -> None:
    """Fill the cache with a text of this length. Which tokens it has does not matter."""
    engine.reset()
    engine.prefill([[place % 2 for place in range(context + 1)]], want=_NOTHING)


def _step(engine: StepEngine, size: int, clock: Callable[[], float]) -> float:
    tree = TokenTree.chain([place % 2 for place in range(size)])
    start = clock()
    engine.step([tree], want=_NOTHING).best()
    engine.commit([[]])
    return clock() - start


def _middle(runs: Sequence[float]) -> float:
    """The width of the middle half."""
    low, _, high = statistics.quantiles(runs, n=4)
    return high - low


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls: neighbours in the wrong order share their mean."""
    groups: list[tuple[float, int]] = []
    for value in values:
        groups.append((value, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (one, first), (two, second) = groups[-2:]
            groups[-2:] = [((one * first + two * second) / (first + second), first + second)]
    return [mean for mean, count in groups for _ in range(count)]


def _along(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """Linear between the places, and beyond them along the nearest piece."""
    if len(places) == 1:
        return values[0]
    right = next((index for index, place in enumerate(places) if at <= place), len(places) - 1)
    right = max(1, right)
    left = right - 1
    share = (at - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])


def _read(file: Path) -> StepCost | None:
    """A stored table, or None for what is absent, damaged or of another format."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if found.pop("format") != FORMAT:
            return None
        seconds = tuple(tuple(map(float, row)) for row in found["seconds"])
        cost = StepCost(
            nodes=tuple(map(int, found["nodes"])),
            contexts=tuple(map(int, found["contexts"])),
            seconds=seconds,
            spread=float(found["spread"]),
            name=str(found["name"]),
            where=Where(**found["where"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    whole = len(seconds) == len(cost.contexts) > 0 and all(len(row) == len(cost.nodes) > 0 for row in seconds)
    return cost if whole else None


def _write(file: Path, cost: StepCost) -> None:
    """Write the table whole or not at all. A folder that cannot be written costs a measurement, nothing else."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"format": FORMAT, **asdict(cost)}, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
