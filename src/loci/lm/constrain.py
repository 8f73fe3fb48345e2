"""Masks over the next token: only what a constraint allows can be generated."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jaxtyping import Bool


class Constraint(Protocol):
    """What may be said. One constraint serves many generations; each begins with `start`."""

    def start(self) -> ConstraintState: ...


class ConstraintState(Protocol):
    """How far one generation has come."""

    def allowed(self) -> Bool[np.ndarray, " vocabulary"]:
        """True for every token that may come next. The end token is among them only where the text may end."""

    def accept(self, token: int) -> None:
        """Move on by one token. Raises `BadInput` for a token that `allowed` forbids."""

    @property
    def finished(self) -> bool:
        """True once nothing but the end may follow."""
