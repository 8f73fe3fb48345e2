"""The fastest engine on processors: a compiled step for Llama-family models. See `engine`."""

from loci.lm.engine.native.engine import NativeEngine, available, supports

__all__ = ["NativeEngine", "available", "supports"]
