"""A loaded causal language model and its tokenizer, as one value that the rest of Loci passes around."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loci.errors import Unsupported
from loci.lm.chat import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel:
    """What `loci.lm.load` returns. `folder` is where its files lie. `hash` names the weights: sha256 of the file that
    they came from (the GGUF file, or the safetensors file), the same on every machine and in every precision."""

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
        """Tokens that fit into one context; `sys.maxsize` for models that set no limit."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer; masks over tokens have this length."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer, as the model's generation config and its tokenizer name them."""
        told = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        ids = told if isinstance(told, list) else [told]
        return frozenset(int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of plain text, or of messages laid out by the model's own chat template, ready for an answer.

        Raises:
            Unsupported: messages, and a model without a chat template.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        if not self.tokenizer.chat_template:
            raise Unsupported(
                f"{self.name} has no chat template, so it cannot be given messages. Give it plain text, or load an"
                " instruction-tuned model."
            )
        rows = [{"role": message.role, "content": message.content} for message in prompt]
        text = self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(str(text), add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens, special ones left out, spaces as they are."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
