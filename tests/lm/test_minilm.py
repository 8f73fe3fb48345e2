"""The bundled embedder equals the reference, whatever a text is and whoever stands beside it."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from loci.errors import BadInput, BadModel
from loci.lm.minilm import MiniLM, Packed, batches, bundled_folder, few_sizes, runs

WORDS = ["we", "met", "in", "Paris", "last", "May", "and", "talked", "about", "gardens,", "trains", "weather", "1998"]
NASTY = [
    "",
    " \n\t",
    "a",
    "👩‍👩‍👧 and 🎈",
    "日本語のテキスト",
    "x" * 5000,
    "e\u0301 naïve Ünï",
    "\x00\x01\u200b",
    "tab\tand\r\nline\u2028ends",
    "[CLS] [SEP] [MASK]",
    "word " * 2000,
    "?!" * 300,
]


@pytest.fixture(scope="module")
def model() -> MiniLM:
    return MiniLM()


def sentences(count: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for _ in range(count)]


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(axis=1)


class Reference:
    """The same weights run as their authors run them: transformers, float32, the mean over a text's word pieces."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer, BertModel

        self.tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
        self.model = BertModel.from_pretrained(bundled_folder(), attn_implementation="eager").eval()

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:
            given = self.tokenizer(text, truncation=True, max_length=256, padding=False, return_tensors="pt")
            mean = self.model(**given).last_hidden_state[0].mean(dim=0)
            rows.append(torch.nn.functional.normalize(mean, dim=0).numpy())
        return np.stack(rows)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def test_every_text_has_the_reference_s_vector(model, reference):
    texts = NASTY + sentences(60)
    ours, theirs = model.embed(texts), reference.encode(texts)
    assert cosines(ours, theirs).min() > 0.9998
    assert np.abs(ours - theirs).max() < 1e-2


def test_float32_equals_the_reference_closely(reference):
    texts = NASTY + sentences(20)
    assert np.abs(MiniLM(dtype=torch.float32).embed(texts) - reference.encode(texts)).max() < 1e-5


def test_a_text_has_the_same_vector_alone_and_among_others(model):
    texts = NASTY + sentences(60)
    together = model.embed(texts)
    alone = np.concatenate([model.embed([text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-2
    assert cosines(together, alone).min() > 0.999
    order = np.random.default_rng(0).permutation(len(texts))
    assert np.abs(model.embed([texts[place] for place in order]) - together[order]).max() < 1e-2


def test_rows_have_unit_norm_and_no_text_gives_no_row(model):
    rows = model.embed(NASTY)
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0, abs=1e-5)
    assert model.embed([]).shape == (0, 384)


def test_words_beyond_the_window_change_nothing_and_cost_nothing(model):
    long = " ".join(sentences(1000))  # 170,000 letters
    begun = time.perf_counter()
    vast = model.embed([long * 60])
    assert time.perf_counter() - begun < 5.0
    assert np.array_equal(vast, model.embed([long]))


def test_a_window_that_is_filled_late_is_filled_all_the_same(model, reference):
    late = "x" * 20_000 + " " * 20_000 + "so much later we met in Paris"
    assert cosines(model.embed([late]), reference.encode([late])).min() > 0.999


def test_a_lone_surrogate_is_read_as_a_question_mark(model):
    assert np.array_equal(model.embed(["half a \ud83c pair"]), model.embed(["half a ? pair"]))


def test_threads_may_share_one_model(model):
    texts = sentences(30)
    expected = model.embed(texts)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(model.embed(texts))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.abs(rows - expected).max() < 1e-2 for rows in found)
    assert len(found) == 4


def test_batches_hold_every_row_once_and_keep_their_budget():
    lengths = [random.Random(0).randint(2, 256) for _ in range(500)]
    made = list(batches(lengths, budget=512))
    assert sorted(index for batch in made for index in batch) == list(range(500))
    assert all(sum(lengths[index] for index in batch) <= 512 for batch in made)
    assert list(batches([900], budget=512)) == [[0]]
    assert list(batches([], budget=512)) == []


def test_runs_are_slices_of_the_texts_and_of_their_pieces():
    lengths = [3, 3, 5, 2, 2, 2]
    found = list(runs(lengths, 10))
    assert [(run.length, run.texts, run.pieces) for run in found] == [
        (3, slice(0, 2), slice(10, 16)),
        (5, slice(2, 3), slice(16, 21)),
        (2, slice(3, 6), slice(21, 27)),
    ]


@pytest.mark.parametrize("least", [1, 8])
def test_sizes_are_few_and_at_most_an_eighth_too_large(least):
    sizes = [few_sizes(count, least=least) for count in range(1, 2049)]
    assert all(size % least == 0 for size in sizes)
    assert all(count <= size <= max(count * 1.125 + 1, count + least - 1) for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) <= 72
    assert few_sizes(2048, least=least) == 2048


@pytest.mark.parametrize("lengths", [[7], [7, 7], [31, 32, 33], [2, 2, 16, 17, 31, 64, 65, 65, 65, 256], [40] * 9])
def test_attention_over_packed_texts_is_attention_over_each(lengths):
    heads, size = 12, 32
    packed = Packed(lengths, heads=heads, width=heads * size, dtype=torch.float32, device=torch.device("cpu"))
    x = torch.randn(packed.size, 3 * heads * size, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # what a layer left behind must not reach the next
        found = packed.attend(x)
        start = 0
        for length in lengths:
            query, key, value = x[start : start + length].view(length, 3, heads, size).permute(1, 2, 0, 3)
            scores = torch.softmax(query @ key.transpose(1, 2), dim=-1)
            expected = (scores @ value).transpose(0, 1).reshape(length, -1)
            torch.testing.assert_close(found[start : start + length], expected, atol=1e-5, rtol=1e-4)
            start += length
        assert not found[start:].any()
        x = x.flip(0)
    sums = packed.sums(found)
    assert sums.shape == (len(lengths), heads * size)
    torch.testing.assert_close(sums.sum(dim=0), found.sum(dim=0), atol=1e-3, rtol=1e-4)


def test_bytes_held_are_those_of_the_weights(model):
    numbers = 22_713_216 - 384  # the second token type is never used; the pooler's weights are not loaded
    pooler = 384 * 384 + 384
    positions = 512 * 384
    table = (30_522 * 384) * 4 + positions * 4 + 2 * 384 * 4
    layers = numbers - pooler - 30_522 * 384 - positions - 384 - 2 * 384
    assert model.nbytes == table + layers * (2 if model.dtype == torch.bfloat16 else 4)


def test_a_folder_that_lacks_a_part_or_holds_another_architecture_is_refused(tmp_path):
    source = bundled_folder()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, tmp_path / name)
    with pytest.raises(BadModel, match=r"no model\.safetensors"):
        MiniLM(tmp_path)
    os.symlink(source / "model.safetensors", tmp_path / "model.safetensors")
    assert MiniLM(tmp_path).dimension == 384
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(BadModel, match="'gpt2'"):
        MiniLM(tmp_path)


def test_one_string_is_no_list_of_texts(model):
    with pytest.raises(BadInput, match=r"embed\(\['hello'\]\)"):
        model.embed("hello")


@pytest.mark.slow
def test_short_texts_are_embedded_several_times_faster_than_by_the_plain_library(model):
    library = pytest.importorskip("sentence_transformers", reason="the library to compare with is not installed")
    plain = library.SentenceTransformer(str(bundled_folder()), device="cpu")
    texts = [" ".join(random.Random(seed).choices(WORDS, k=20)) for seed in range(800)]
    seconds = {}
    for name, embed in (("ours", model.embed), ("plain", plain.encode)):
        embed(texts[:100])
        begun = time.perf_counter()
        embed(texts)
        seconds[name] = time.perf_counter() - begun
    print({name: f"{len(texts) / taken:.0f} texts a second" for name, taken in seconds.items()})
    assert seconds["ours"] < seconds["plain"] / 2
