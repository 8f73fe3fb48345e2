"""The seam between words and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float32


class Embedder(Protocol):
    """`name` and `dimension` are stored with whatever was indexed, so that two embedders never mix."""

    name: str
    dimension: int

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        """One unit-norm row per text, in order."""
