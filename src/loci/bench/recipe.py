"""What a figure needs beside it to be made again: versions, commit, machine, model, embedder, data, seed, settings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import loci

_PACKAGES = ("numpy", "sqlalchemy", "pystemmer", "numkong", "torch", "transformers", "tokenizers")
_GIT_SECONDS = 5


def recipe(
    *,
    task: str,
    version: int,
    data: Sequence[Path],
    seed: int,
    examples: int,
    config: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    embedder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that could move a figure, ready for JSON.

    Args:
        task, version: which yardstick.
        data: the files that were read; each is named with its bytes and sha256.
        examples: how many examples were scored.
        config: the settings that differ from run to run.
        model, embedder: names, and the hash of the weights where there is one.
    """
    return {
        "task": {"name": task, "version": version},
        "loci": {"version": loci.__version__, **_checkout()},
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "machine": machine(),
        "model": model,
        "embedder": embedder,
        "data": [data_file(path) for path in data],
        "seed": seed,
        "examples": examples,
        "config": dict(config),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and memory in bytes. No name of the machine or of its user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
    }


def data_file(path: Path) -> dict[str, Any]:
    """A data file's name, size and content hash; its folder is the reader's own business."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _checkout() -> dict[str, Any]:
    """Commit of the checkout that this package runs from and whether it was changed since; nothing when installed."""
    folder = Path(loci.__file__).parent
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    return {"commit": commit, "changed_since": bool(_git(folder, "status", "--porcelain", "--", "."))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
