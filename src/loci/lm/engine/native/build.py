"""The native engine's library: found in the package, or compiled once on this machine.

A wheel for x86-64 Linux may carry the library. Where it does not, the first use compiles the sources, which every
distribution carries, with the system's compiler into the user's cache: some seconds, once per version of the sources.

Ours    each instruction set is compiled for itself and chosen when the program runs; one that the compiler does not
        know is left out. The file is written elsewhere and renamed when whole, and a lock lets two processes that come
        at once compile it once. The name holds a hash of sources and flags, so an old library is never loaded.

This module imports nothing but the standard library at its top: the wheel's build loads it by its path.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)
LEVELS = ("scalar", "avx2", "avx512", "amx")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
LEVEL_FLAGS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    # GCC 12 warns about its own header: https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
    "avx512": (*_AVX512, "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    "amx": (*_AVX512, "-mavx512bf16", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
}
_SECONDS = 300.0


class CannotBuild(Exception):
    """Why there is no library; one sentence."""


def file_name() -> str:
    """The library's file name, which changes with its sources and flags."""
    digest = hashlib.sha256(repr((FLAGS, LEVEL_FLAGS)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"libloci-{digest.hexdigest()[:16]}.so"


def why_not_here() -> str:
    """What stands against this machine, whatever compiler it has; empty if nothing does."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"it is written for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return ""


def library() -> Path:
    """The library's file, compiled now if it is not there.

    Raises:
        CannotBuild: another kind of machine, no compiler, or a compiler that fails.
    """
    why = why_not_here()
    if why:
        raise CannotBuild(why)
    shipped = Path(__file__).parent / file_name()
    if shipped.is_file():
        return shipped
    from filelock import FileLock, Timeout

    from loci import settings

    folder = settings.cache() / "native"
    target = folder / shipped.name
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock"), timeout=_SECONDS):
            if not target.is_file():
                log.info("compiling the native engine, once")
                compile_into(target)
    except Timeout as error:
        raise CannotBuild(
            f"another process has been compiling for {_SECONDS:.0f} s; it holds {error.lock_file}"
        ) from error
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written ({error.strerror})") from error
    return target


def compile_into(target: Path) -> None:
    """Compile the library to this file, which appears whole or not at all.

    Raises:
        CannotBuild: there is no compiler, or it fails; its first error is in the message.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotBuild(f"there is no C++ compiler (looked for {', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory(prefix="loci-native-", dir=target.parent) as work:
        jobs: dict[str, tuple[Path, tuple[str, ...]]] = {
            name: (SOURCES / f"{name}.cpp", FLAGS) for name in ("model", "session", "team", "try")
        }
        for number, level in enumerate(LEVELS):
            jobs[level] = (SOURCES / "level.cpp", (*FLAGS, *LEVEL_FLAGS[level], f"-DLOCI_LEVEL={number}"))
        # The large ones first; at most as many at once as there are cores.
        order = sorted(jobs, key=lambda name: -len(jobs[name][1]))
        failed = _compile_all(compiler, {name: jobs[name] for name in order}, Path(work))
        absent = {
            name: (jobs[name][0], (*FLAGS, *jobs[name][1][-1:], "-DLOCI_ABSENT"))
            for name in failed
            if name in LEVELS[1:]
        }
        for name, message in failed.items():
            if name not in absent:
                raise CannotBuild(f"{compiler} cannot compile {name}: {message}")
            log.info("the compiler knows no %s: %s", name, message)
        for name, message in _compile_all(compiler, absent, Path(work)).items():
            raise CannotBuild(f"{compiler} cannot compile {name}: {message}")
        made = Path(work) / "library.so"
        objects = [str(Path(work) / f"{name}.o") for name in jobs]
        linked = subprocess.run(
            [compiler, "-shared", "-pthread", "-o", str(made), *objects],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if linked.returncode:
            raise CannotBuild(f"{compiler} cannot link: {_first_error(linked.stderr)}")
        made.replace(target)


def _compile_all(compiler: str, jobs: dict[str, tuple[Path, tuple[str, ...]]], work: Path) -> dict[str, str]:
    """Compile side by side; the first error of each that failed."""
    failed: dict[str, str] = {}
    waiting, running = list(jobs), list[tuple[str, subprocess.Popen[str]]]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name = waiting.pop(0)
            source, flags = jobs[name]
            command = [compiler, *flags, "-c", str(source), "-o", str(work / f"{name}.o")]
            running.append((name, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        name, process = running.pop(0)
        _, errors = process.communicate(timeout=_SECONDS)
        if process.returncode:
            failed[name] = _first_error(errors)
    return failed


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing")
