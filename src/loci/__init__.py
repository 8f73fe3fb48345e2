"""Loci: memory for language models, in every place a model can hold it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loci.text.memory import Answer, AsyncMemory, Memory

__version__ = "0.1.0"
__all__ = ["Answer", "AsyncMemory", "Memory", "__version__"]


def __getattr__(name: str) -> Any:
    """The text room is imported when it is first used, so that `import loci` costs nothing."""
    if name in ("Answer", "AsyncMemory", "Memory"):
        from loci.text import memory

        return getattr(memory, name)
    raise AttributeError(f"module 'loci' has no attribute {name!r}")
