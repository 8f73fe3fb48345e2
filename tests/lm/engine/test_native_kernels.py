"""Every kernel of every instruction set against its scalar form, and the scalar forms against numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra loci-lm[local]")

from loci.errors import LociError  # noqa: E402
from loci.lm.engine import native  # noqa: E402
from loci.lm.engine.native import library  # noqa: E402

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

FORMATS = ("Q4_0", "Q4_1", "Q8_0", "BF16")
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "BF16": 64}  # of 32 weights of a row
SCALAR = 0


@pytest.fixture(params=library.LEVELS)
def level(request) -> int:
    if request.param not in library.levels():
        pytest.skip(f"this machine has no {request.param}")
    return library.LEVELS.index(request.param)


def bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().float().numpy()


def random_rows(generator: np.random.Generator, form: str, rows: int, inputs: int) -> np.ndarray:
    """Random blocks as a file holds them."""
    data = generator.integers(0, 256, (rows, inputs // 32, BLOCK_BYTES[form]), dtype=np.uint8)
    if form == "BF16":
        weights = torch.from_numpy(generator.normal(size=(rows, inputs)).astype(np.float32)).bfloat16()
        return weights.view(torch.int16).numpy().view(np.uint8).reshape(rows, -1)
    for place in range(2 if form == "Q4_1" else 1):
        scales = generator.normal(0, 0.02, (rows, inputs // 32, 1)).astype(np.float16)
        data[..., 2 * place : 2 * place + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


def weights_in(form: str, data: np.ndarray) -> np.ndarray:
    """What the blocks mean, written down from the format's description."""
    if form == "BF16":
        return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    blocks = data.reshape(len(data), -1, BLOCK_BYTES[form])
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if form == "Q8_0":
        return (blocks[..., 2:].view(np.int8) * scale).reshape(len(data), -1)
    first = 4 if form == "Q4_1" else 2
    numbers = np.concatenate([blocks[..., first:] & 15, blocks[..., first:] >> 4], axis=-1).astype(np.float32)
    minimum = blocks[..., 2:4].copy().view(np.float16).astype(np.float32) if form == "Q4_1" else -8 * scale
    return (numbers * scale + minimum).reshape(len(data), -1)


class Packed:
    """A model that is only its head: one matrix to try kernels on."""

    def __init__(self, form: str, data: np.ndarray, inputs: int) -> None:
        self.library, self.handle = library.load(), ctypes.c_void_p()
        shape = library.Shape(
            layers=1, width=inputs, heads=1, kv_heads=1, head_size=32, inner=32, vocabulary=len(data), tied=True
        )
        library.check(self.library.loci_model_new(ctypes.byref(shape), ctypes.byref(self.handle)))
        places = np.arange(len(data), dtype=np.int32)
        for code in (
            self.library.loci_model_matrix(self.handle, library.HEAD, 0, library.FORMATS[form]),
            self.library.loci_model_rows(
                self.handle, library.HEAD, 0, data.ctypes.data, data.shape[1], len(data), places.ctypes.data
            ),
        ):
            library.check(code)

    def multiply(self, level: int, x: np.ndarray, strip: int) -> np.ndarray:
        output = np.full((len(x), 32), np.nan, dtype=np.float32)
        library.check(
            self.library.loci_try_multiply(
                self.handle, level, library.HEAD, 0, strip, x.ctypes.data, len(x), output.ctypes.data
            )
        )
        return output

    def __del__(self) -> None:
        self.library.loci_model_free(self.handle)


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_matrix_is_what_its_blocks_mean(form):
    generator = np.random.default_rng(0)
    data = random_rows(generator, form, 70, 96)
    packed, weights = Packed(form, data, 96), weights_in(form, data)
    places, count = np.arange(70, dtype=np.int32), ctypes.c_int32()
    for change, expected in ((0, 0), (1, 3)):
        given = weights.copy()
        given.reshape(-1)[: 3 * change] += 1
        library.check(
            packed.library.loci_model_matches(
                packed.handle, library.HEAD, 0, given.ctypes.data, 1, 70, places.ctypes.data, ctypes.byref(count)
            )
        )
        assert count.value == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_half_block_expands_to_the_same_bits_everywhere(form, level):
    generator = np.random.default_rng(1)
    size = {"Q4_0": 288, "Q4_1": 320, "Q8_0": 544, "BF16": 1024}[form]
    half = generator.integers(0, 256, size, dtype=np.uint8)
    if form != "BF16":
        scales = generator.normal(0, 0.02, 32 if form == "Q4_1" else 16).astype(np.float16)
        half[512 if form == "Q8_0" else 256 :] = scales.view(np.uint8)
    tiles = []
    for each in (SCALAR, level):
        tile = (ctypes.c_uint16 * 512)()
        library.check(library.load().loci_try_expand(each, library.FORMATS[form], half.ctypes.data, tile))
        tiles.append(list(tile))
    assert tiles[0] == tiles[1]


@pytest.mark.parametrize("form", FORMATS)
def test_products_are_those_of_the_rounded_numbers(form, level):
    generator = np.random.default_rng(2)
    inputs = 160
    data = random_rows(generator, form, 70, inputs)  # the last strip is not full
    packed, weights = Packed(form, data, inputs), bf16(weights_in(form, data))
    x = generator.normal(size=(130, inputs)).astype(np.float32)
    for rows in (1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 47, 64, 65, 96, 97, 130):
        for strip in (0, 1, 2):
            found = packed.multiply(level, x[:rows], strip)
            some = weights[strip * 32 : strip * 32 + 32]
            np.testing.assert_allclose(found[:, : len(some)], bf16(x[:rows]) @ some.T, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_rows_products_do_not_depend_on_other_rows(form, level):
    generator = np.random.default_rng(3)
    packed = Packed(form, random_rows(generator, form, 64, 576), 576)
    x = generator.normal(size=(150, 576)).astype(np.float32)
    alone = np.concatenate([packed.multiply(level, x[row : row + 1], 1) for row in range(40)])
    for rows in (2, 5, 16, 30, 40, 64, 100, 150):
        found = packed.multiply(level, x[:rows], 1)
        np.testing.assert_array_equal(found[:40], alone[:rows])


@pytest.mark.parametrize("head_size", [32, 64, 96, 128])
@pytest.mark.parametrize(
    ("past", "nodes", "count"),
    [(0, 1, 1), (0, 40, 16), (5, 12, 9), (127, 3, 16), (120, 64, 16), (700, 17, 3), (1000, 60, 16), (3000, 2, 5)],
)
def test_attention_is_softmax_over_what_is_seen(head_size, past, nodes, count, level):
    generator = np.random.default_rng(past + nodes)
    slots = past + nodes
    queries = bf16(generator.normal(size=(count, head_size)) * 2)
    keys, values = (bf16(generator.normal(size=(slots, head_size))) for _ in range(2))
    seen = np.zeros((count, 2), dtype=np.uint64)
    visible = np.ones((count, slots), dtype=bool)
    for query in range(count):
        inside = generator.random(nodes) < 0.5
        inside[0] = True
        visible[query, past:] = inside
        seen[query, 0] = sum(1 << int(i) for i in np.flatnonzero(inside))
    output = np.empty((count, head_size), dtype=np.float32)
    scale = head_size**-0.5
    bits = seen.ctypes.data_as(ctypes.POINTER(ctypes.c_uint64))
    library.check(
        library.load().loci_try_attend(
            level, head_size, count, past, nodes, bits,
            queries.ctypes.data, keys.ctypes.data, values.ctypes.data, scale, output.ctypes.data,
        )
    )  # fmt: skip
    scores = np.where(visible, queries @ keys.T * scale, -np.inf).astype(np.float64)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = weights @ values / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(output, wanted, atol=6e-3)  # weights are rounded to bf16


def elementwise(
    level: int, what: int, x: np.ndarray, y: np.ndarray | None = None, z: np.ndarray | None = None
) -> np.ndarray:
    output = np.empty_like(x)
    pointers = [None if each is None else each.ctypes.data for each in (x, y, z)]
    library.check(library.load().loci_try_elementwise(level, what, len(x), *pointers, output.ctypes.data))
    return output


def test_what_happens_between_products_is_what_numpy_says(level):
    generator = np.random.default_rng(4)
    x, y = (generator.normal(size=192).astype(np.float32) * 3 for _ in range(2))
    x[:4] = (90, -90, 700, -700)  # where the exponential ends
    norm = x / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5) * y
    np.testing.assert_allclose(elementwise(level, 0, x, y), norm, rtol=1e-5)
    angle = generator.normal(size=96)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    turned = np.concatenate([x[:96] * cosine - x[96:] * sine, x[96:] * cosine + x[:96] * sine])
    np.testing.assert_allclose(elementwise(level, 1, x, cosine, sine), turned, rtol=1 / 128, atol=1e-4)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        gated = wide / (1 + np.exp(-wide)) * y
    np.testing.assert_allclose(elementwise(level, 2, x, y), gated, rtol=1 / 128, atol=1e-6)
    np.testing.assert_array_equal(elementwise(level, 3, x, y), x + y)
    matrix = generator.normal(size=(192, 192)).astype(np.float32)
    np.testing.assert_allclose(elementwise(level, 4, x, y, matrix), matrix @ x + y, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(elementwise(level, 5, x), bf16(x))


@pytest.mark.parametrize("ranks", [1, 4, 37])
def test_the_largest_logits_are_found_and_of_equal_ones_the_first(level, ranks):
    generator = np.random.default_rng(5)
    logits = generator.integers(-40, 40, 1003).astype(np.float32)  # full of ties
    ids, best = np.empty(ranks, dtype=np.int32), np.empty(ranks, dtype=np.float32)
    library.check(
        library.load().loci_try_rank(level, len(logits), ranks, logits.ctypes.data, ids.ctypes.data, best.ctypes.data)
    )
    order = np.argsort(-logits, kind="stable")[:ranks]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, logits[order])


def test_unknown_levels_are_refused():
    for wrong in (-1, 4):
        with pytest.raises(LociError, match="instruction set"):
            elementwise(wrong, 3, np.zeros(32, np.float32), np.zeros(32, np.float32))
