"""What all tests share: the real default model, once a session, and the folder of the data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings as hypothesis_settings

from loci import settings

if TYPE_CHECKING:
    from loci.lm.model import LanguageModel

# The same examples every time, and no deadline: how long one takes says more about the machine than about the code.
hypothesis_settings.register_profile("loci", deadline=None, derandomize=True)
hypothesis_settings.load_profile("loci")


@pytest.fixture(scope="session")
def default_model() -> Iterator[LanguageModel]:
    """The bundled model in float32, where exactness is claimed. At most two threads: tests seldom run alone."""
    pytest.importorskip("torch", reason="needs the extra loci-lm[local]")
    import torch

    from loci.lm.bundled import INSTALL, find
    from loci.lm.load import load

    if find() is None:
        pytest.skip(f"needs the bundled model: {INSTALL}")
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    yield load("default", dtype="float32", device="cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the data sets; tests that need it are skipped where it is absent."""
    folder = settings.data()
    if not folder.is_dir():
        pytest.skip(f"needs the data sets in {folder}; set LOCI_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A random Llama of two layers that reads and writes bytes: 256 byte tokens, then `<end>` and `<start>`."""
    pytest.importorskip("torch", reason="needs the extra loci-lm[local]")
    from loci.lm.load import load

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return load(folder, dtype="float32", device="cpu")


def save_tiny(folder: Path) -> None:
    """Write the tiny model: weights, config and tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: token for token, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,  # wide, so that its choices differ from place to place
        eos_token_id=fast.eos_token_id,
        bos_token_id=fast.bos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = fast.eos_token_id
    model.save_pretrained(folder)
