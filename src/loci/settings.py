"""The environment: the one module that reads environment variables and knows the user's folders.

LOCI_HOME      where memories live            default: the platform's data folder for `loci`
LOCI_CACHE     converted models, measurements default: the platform's cache folder for `loci`
LOCI_DATA      data sets of the benchmarks    default: `../shared/data` beside the project's root
LOCI_MODEL     which model to load            default: "default", the bundled one
LOCI_BASE_URL  an OpenAI-compatible endpoint  else OPENAI_BASE_URL
LOCI_API_KEY   its key                        else OPENAI_API_KEY
NO_COLOR       any value but "": no colours (no-color.org)

A variable that is set to the empty string counts as absent. Functions, not constants: a test or a program may change
the environment while it runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def _read(*names: str) -> str | None:
    """The first of these variables that holds something."""
    return next((value for name in names if (value := os.environ.get(name))), None)


def home() -> Path:
    """The folder of the user's memories. It is not created here."""
    value = _read("LOCI_HOME")
    return Path(value).expanduser() if value else platformdirs.user_data_path("loci", appauthor=False)


def database() -> Path:
    """The store that commands use when no other is named."""
    return home() / "memory.db"


def cache() -> Path:
    """The folder for what can be made again: converted models, measured costs. It is not created here."""
    value = _read("LOCI_CACHE")
    return Path(value).expanduser() if value else platformdirs.user_cache_path("loci", appauthor=False)


def data() -> Path:
    """The folder of the data sets; it may be absent."""
    value = _read("LOCI_DATA")
    return Path(value).expanduser() if value else Path(__file__).resolve().parents[3] / "shared" / "data"


def model() -> str:
    """The model to load where none is named."""
    return _read("LOCI_MODEL") or "default"


def base_url() -> str | None:
    """The address of an OpenAI-compatible endpoint."""
    return _read("LOCI_BASE_URL", "OPENAI_BASE_URL")


def api_key() -> str | None:
    """The key for that endpoint."""
    return _read("LOCI_API_KEY", "OPENAI_API_KEY")


def no_color() -> bool:
    """Whether colours are unwanted (https://no-color.org)."""
    return _read("NO_COLOR") is not None
