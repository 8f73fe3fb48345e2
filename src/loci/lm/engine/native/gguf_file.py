"""The tensors of a GGUF file, as they lie in it.

Source  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3 (and 2, which is laid out alike).
Ours    only what the engine needs: names, formats and bytes. The reader of the package `gguf` also makes an object of
        every token of the vocabulary, which takes seconds.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from loci.errors import BadModel

# Formats that the engine knows: their number in a file, numbers in a block, and bytes of a block.
FORMATS = {0: ("F32", 1, 4), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the plain kinds of values
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """`rows` are bytes, one row of the matrix (or the whole vector) after the other; empty for unknown formats."""

    format: str
    rows: UInt8[np.ndarray, "row byte"]


def read(file: Path) -> dict[str, StoredTensor]:
    """All tensors by name, their bytes mapped from the file.

    Raises:
        BadModel: this is no GGUF file, or it is cut short.
    """
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return _read(mapped)
    except (OSError, ValueError, struct.error, UnicodeDecodeError, KeyError) as error:
        raise BadModel(f"{file} cannot be read as a GGUF file ({error}). Copy or download it again.") from error


def _read(data: mmap.mmap) -> dict[str, StoredTensor]:
    magic, version, tensors, values = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    place, alignment = 24, 32
    for _ in range(values):
        key, place = _text(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        place += 4
        if key == "general.alignment":
            (alignment,) = struct.unpack_from("<I", data, place)
        place = _skip(data, place, kind)
    found = []
    for _ in range(tensors):
        name, place = _text(data, place)
        (count,) = struct.unpack_from("<I", data, place)
        *sides, kind, offset = struct.unpack_from(f"<{count}QIQ", data, place + 4)
        place += 4 + 8 * count + 12
        found.append((name, sides, kind, offset))
    start = (place + alignment - 1) // alignment * alignment
    result = {}
    for name, sides, kind, offset in found:
        if kind not in FORMATS:
            result[name] = StoredTensor(format=f"format {kind}", rows=np.zeros((0, 0), dtype=np.uint8))
            continue
        label, block, size = FORMATS[kind]
        row, rows = sides[0] // block * size, int(np.prod(sides[1:], dtype=np.int64))
        content = np.frombuffer(data, dtype=np.uint8, count=row * rows, offset=start + offset)
        result[name] = StoredTensor(format=label, rows=content.reshape(rows, row))
    return result


def _text(data: mmap.mmap, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    end = place + 8 + length
    return data[place + 8 : end].decode(), end


def _skip(data: mmap.mmap, place: int, kind: int) -> int:
    """The place behind a value of this kind."""
    if kind in _SIZES:
        return place + _SIZES[kind]
    if kind == _STRING:
        return place + 8 + int(struct.unpack_from("<Q", data, place)[0])
    if kind != _ARRAY:
        raise ValueError(f"it holds a value of the unknown kind {kind}")
    inner, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if inner in _SIZES:
        return place + int(count) * _SIZES[inner]
    for _ in range(count):
        place = _skip(data, place, inner)
    return place
