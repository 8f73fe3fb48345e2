"""The seam between words and vectors, and the embedders that need no model on this machine.

An embedder's `name` and `dimension` are stored with whatever it indexed, so that two of them never mix. The bundled one
lives in `loci.lm.minilm`; `load_embedder` finds it, an endpoint's, or none. Importing this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from loci.errors import BadInput, BadOutput
from loci.lm.imports import require
from loci.lm.ledger import Ledger

if TYPE_CHECKING:
    from loci.lm.endpoint import EndpointLimits


@runtime_checkable
class Embedder(Protocol):
    """`name` and `dimension` are stored with whatever was indexed, so that two embedders never mix."""

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int:
        """Numbers in a row. An endpoint may have to be asked for it once."""

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        """One unit-norm row per text, in order. Safe to call from several threads."""


class EndpointEmbedder:
    """A model behind an OpenAI-compatible `/embeddings` address.

    Args:
        base_url: such as "http://127.0.0.1:11434/v1".
        model: its name there.
        dimension: numbers in a row, where they are known; by default the first reply tells.
        batch: texts in one request; ours, within what vendors and local servers accept.

    `embed` raises the errors of `loci.lm.endpoint`, and `BadOutput` for rows of another size or without a direction.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        dimension: int | None = None,
        batch: int = 64,
        limits: EndpointLimits | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        from loci.lm.endpoint import Endpoint

        self.name = model
        self.batch = batch
        self.ledger = ledger or Ledger()
        self.endpoint = Endpoint(base_url, model, api_key=api_key, limits=limits)
        self._dimension = dimension

    def __repr__(self) -> str:
        return f"EndpointEmbedder({self.endpoint.shown!r}, {self.name!r})"

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            self._rows(["dimension"])
        return self._dimension or 0

    def embed(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        check_texts(texts)
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        starts = range(0, len(texts), self.batch)
        return np.concatenate([self._rows(texts[start : start + self.batch]) for start in starts])

    def _rows(self, texts: Sequence[str]) -> Float32[np.ndarray, "text dimension"]:
        # Vendors refuse the empty text; a blank has the same meaning.
        given = [text.encode("utf-8", "replace").decode("utf-8") or " " for text in texts]
        with self.ledger.call("embed", self.name) as call:
            with self.endpoint.asked() as client:
                reply = client.embeddings.create(model=self.name, input=given, encoding_format="float")
            found = sorted(getattr(reply, "data", None) or [], key=lambda entry: entry.index)
            if [entry.index for entry in found] != list(range(len(given))):
                raise self.endpoint.malformed(f"{len(found)} rows for {len(given)} texts")
            call.tokens_in += getattr(reply.usage, "prompt_tokens", None) or 0
            return self._checked([entry.embedding for entry in found])

    def _checked(self, found: Sequence[Sequence[float]]) -> Float32[np.ndarray, "text dimension"]:
        sizes = {len(row) for row in found}
        self._dimension = self._dimension or max(sizes)
        if sizes != {self._dimension}:
            raise BadOutput(
                f"{self.endpoint.shown} (model {self.name!r}) gave rows of {sorted(sizes)} numbers, expected "
                f"{self._dimension}. The model behind this name has changed: use another name, or index again."
            )
        rows = np.array(found, dtype=np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and norms.all()):
            raise BadOutput(
                f"{self.endpoint.shown} (model {self.name!r}) gave a row without a direction (all 0, or NaN)."
            )
        return np.asarray(rows / norms, dtype=np.float32)


def check_texts(texts: Sequence[str]) -> None:
    """Raise `BadInput` where one string was given in place of a list of texts."""
    if isinstance(texts, str):
        raise BadInput(f"embed takes a list of texts, found one string. Write embed([{texts[:30]!r}]).")


def load_embedder(spec: str = "default", *, api_key: str | None = None) -> Embedder | None:
    """The embedder that a short text names.

    Args:
        spec: "default" (the bundled all-MiniLM-L6-v2, in about 1 s with torch's import), "none" (words only: returns
            None), or an endpoint as "https://host/v1#model".
        api_key: the endpoint's key.

    Raises:
        MissingExtra: the bundled embedder's packages are not installed.
        BadInput: a text that names none of the three.
    """
    if spec == "none":
        return None
    if spec in ("default", "all-MiniLM-L6-v2"):
        for package in ("torch", "tokenizers", "safetensors"):
            require(package, purpose="the bundled embedder")
        from loci.lm.minilm import MiniLM

        return MiniLM()
    base_url, _, model = spec.partition("#")
    if not base_url.startswith(("http://", "https://")) or not model:
        raise BadInput(
            f"no embedder is called {spec!r}. Give 'default', 'none', or an endpoint as "
            "'http://127.0.0.1:11434/v1#nomic-embed-text'."
        )
    return EndpointEmbedder(base_url, model, api_key=api_key)
