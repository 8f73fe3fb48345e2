"""A loaded causal language model and its tokenizer, as one value that the rest of Loci passes around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loci.lm.chat import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel:
    """What `loci.lm.load` returns. `folder` is where its files lie, `hash` names the weights (sha256 of the files)."""

    name: str
    folder: Path
    hash: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def parameters(self) -> int:
        """Numbers in the weights, tied ones counted once."""
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def window(self) -> int:
        """Tokens that fit into one context."""
        return int(self.model.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer; masks over tokens have this length."""
        return int(self.model.config.vocab_size)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of plain text, or of messages laid out by the model's own chat template, ready for an answer."""
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        rows = [{"role": message.role, "content": message.content} for message in prompt]
        text = self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
