"""What this machine is: cores, memory, vector units, and how fast memory is read.

Source  /proc/cpuinfo on Linux; elsewhere the flags are unknown and the set is empty.
Ours    `available_cores` counts what this process may use (affinity and container quota), not what is in the box.
"""

from __future__ import annotations

import os
import platform
import time
from functools import cache
from pathlib import Path

import numpy as np

# Vector and matrix units that change which kernels are fast.
UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd")


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """The processor's name, as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def units() -> frozenset[str]:
    """Which of `UNITS` the processor has."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("features") or "").split())
    return frozenset(flags.intersection(UNITS))


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; without, bfloat16 is slower than float32."""
    return not units().isdisjoint({"amx_bf16", "avx512_bf16"})


def available_cores() -> int:
    """Cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def bandwidth(*, seconds: float = 0.3, bytes_read: int = 1 << 28) -> float:
    """Bytes a second that one pass over a large array reads, the best of the passes that fit into `seconds`.

    One thread: the figure is a floor of what all cores together reach.
    """
    block = np.ones(bytes_read // 8, dtype=np.uint64)
    best = float("inf")
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        block.max()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best
