"""Heavy packages: imported late, and with a message that mends it where they are absent."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from loci.errors import MissingExtra

LOCAL = 'pip install "loci-lm[local]"'


def require(package: str, *, purpose: str, command: str = LOCAL) -> ModuleType:
    """The package, or `MissingExtra` with the command that installs it."""
    try:
        with paused_collection():
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise MissingExtra.needs(purpose, f"the package {package.split('.')[0]}", command) from error


@contextmanager
def paused_collection() -> Iterator[None]:
    """No garbage collection inside. Importing torch and transformers makes a million objects that all stay; looking
    through them again and again takes a quarter of the import's time (2.2 s without, 2.8 s with)."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@contextmanager
def silent_bars() -> Iterator[None]:
    """No progress bars of `transformers` inside."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The gist of another library's error, for a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
