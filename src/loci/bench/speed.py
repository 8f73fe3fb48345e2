"""How fast notes are written and read, and what they take: one memory filled to a size, then timed.

The notes are turns of invented conversations (`loci.bench.invented`), so their words, names and dates are drawn as in
real ones. Timed, embedding included: bulk writing in transactions of 512, as an import does, single writes, and reads
of questions that were not asked before. The slope of the read between the sizes is what one more note costs.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loci.bench.invented import invent
from loci.bench.recipe import recipe
from loci.errors import BadInput
from loci.lm.embed import Embedder, load_embedder
from loci.text.amem import AMem, NewNote
from loci.text.store import Store

Progress = Callable[[str, int, int], None]
_BATCH = 512  # notes in one transaction of the bulk


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times in milliseconds at the median and the 99th percentile; rates in notes a second; sizes in bytes."""

    notes: int
    bulk_notes_a_second: float
    write_ms_p50: float
    write_ms_p99: float
    read_ms_p50: float
    read_ms_p99: float
    reopen_seconds: float
    file_bytes: int
    index_bytes: int


def turns(seed: int = 0) -> Iterator[NewNote]:
    """Turns of one invented conversation after another, without end; each answers the one before it in its chat."""
    for number in itertools.count(seed):
        conversation = invent(number)
        for place, turn in enumerate(conversation.turns):
            yield NewNote(text=turn.text, source=turn.speaker, at=turn.at, follows=None if place == 0 else -1)


def run(
    sizes: Sequence[int] = (10_000,),
    *,
    samples: int = 200,
    embedder: Embedder | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fill one memory to each size in turn and time it there.

    Args:
        sizes: notes held when times are taken, rising.
        samples: single writes and reads timed at each size.
        progress: what is being done, notes written and notes to write.

    Returns:
        {"sizes": one `Speed` each, "read_ms_per_1000_notes": the slope, None for one size, "recipe": ...}
    """
    if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 64:
        raise BadInput(f"sizes must rise and begin with at least 64 notes; found {list(sizes)}.")
    embedder = embedder or load_embedder()
    if embedder is None:
        raise BadInput("speed is measured with an embedder: 'none' was given.")
    rows: list[Speed] = []
    with tempfile.TemporaryDirectory(prefix="loci-speed-") as folder:
        path = Path(folder) / "notes.db"
        questions = [question.text for seed in range(900_000, 900_040) for question in invent(seed).questions]
        source = turns()
        store = Store.open(path)
        memory = AMem(store, embedder)
        written = 0
        try:
            for size in sizes:
                began, first = time.perf_counter(), written
                while written < size - samples:
                    batch = _linked(itertools.islice(source, min(_BATCH, size - samples - written)))
                    memory.write_many(batch)
                    written += len(batch)
                    if progress is not None:
                        progress("writing", written, sizes[-1])
                rate = (written - first) / max(time.perf_counter() - began, 1e-9)
                writes = []
                last: str | None = None
                for note in itertools.islice(source, samples):
                    began = time.perf_counter()
                    reply = last if note.follows is not None else None
                    last = memory.write(note.text, source=note.source, at=note.at, reply_to=reply).id
                    writes.append(time.perf_counter() - began)
                written += samples
                reads = []
                for question in questions[len(rows) * samples : (len(rows) + 1) * samples]:
                    began = time.perf_counter()
                    memory.read(question, k=10)
                    reads.append(time.perf_counter() - began)
                store.close()
                began = time.perf_counter()
                store = Store.open(path)
                memory = AMem(store, embedder)
                index_bytes = store.index(memory.space).nbytes
                reopened = time.perf_counter() - began
                rows.append(
                    Speed(
                        notes=written,
                        bulk_notes_a_second=round(rate, 1),
                        write_ms_p50=_ms(writes, 50.0),
                        write_ms_p99=_ms(writes, 99.0),
                        read_ms_p50=_ms(reads, 50.0),
                        read_ms_p99=_ms(reads, 99.0),
                        reopen_seconds=round(reopened, 3),
                        file_bytes=store.file_bytes,
                        index_bytes=index_bytes,
                    )
                )
        finally:
            store.close()
    slope = None
    if len(rows) > 1:
        slope = 1_000 * (rows[-1].read_ms_p50 - rows[0].read_ms_p50) / (rows[-1].notes - rows[0].notes)
    return {
        "sizes": [asdict(row) for row in rows],
        "read_ms_per_1000_notes": slope,
        "recipe": recipe(
            task="speed",
            version=1,
            data=[],
            seed=0,
            examples=samples,
            config={"sizes": list(sizes), "samples": samples, "batch": _BATCH},
            model=None,
            embedder={"name": embedder.name, "dimension": embedder.dimension},
        ),
    }


def _linked(batch: Iterator[NewNote]) -> list[NewNote]:
    """The batch with each turn following the one before it; the first of a batch has nothing to follow."""
    return [
        replace(note, follows=place - 1 if note.follows is not None and place else None)
        for place, note in enumerate(batch)
    ]


def _ms(seconds: Sequence[float], percentile: float) -> float:
    return round(1_000 * float(np.percentile(seconds, percentile)), 2)
