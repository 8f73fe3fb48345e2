"""The C interface of the native engine (csrc/api.h) for Python, and its codes as errors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint64, c_void_p
from functools import cache
from typing import Any

from loci.errors import BadInput, ContextTooLong, ModelError, Unsupported
from loci.lm.engine.native import build

LEVELS = build.LEVELS  # the fastest is the last

# The formats of weights, and the matrices and vectors of a model: the numbers of csrc/kernels.h and csrc/api.h.
FORMATS = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2, "BF16": 3}
QKV, OUT, GATE_UP, DOWN, HEAD, EMBEDDING = range(6)
FIRST_NORM, SECOND_NORM, QKV_BIAS, LAST_NORM = range(4)

_NO_MEMORY, _BAD_SHAPE, _BAD_LEVEL, _TOO_LONG, _NO_THREADS = 1, 2, 3, 9, 14


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "width", "heads", "kv_heads", "head_size", "inner", "vocabulary")),
        ("epsilon", c_float),
        ("scale", c_float),
        ("tied", c_int32),
    ]


class InjectionRecord(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layer", "node", "source", "residual")),
        ("weight", c_void_p),
        ("bias", c_void_p),
    ]


class StepRecord(ctypes.Structure):
    _fields_ = [
        ("rows", c_int32),
        *((name, c_void_p) for name in ("nodes", "past", "tokens", "parents", "embeds")),
        ("embed_count", c_int32),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("positions", c_int32),
        ("hidden_count", c_int32),
        ("hidden_layers", c_void_p),
        ("hidden", c_void_p),
        ("ranks", c_int32),
        ("top_ids", c_void_p),
        ("top_logits", c_void_p),
        ("logits", c_void_p),
        ("injection_count", c_int32),
        ("injections", POINTER(InjectionRecord)),
    ]


_FUNCTIONS: dict[str, tuple[type | None, tuple[Any, ...]]] = {
    "loci_reason": (ctypes.c_char_p, (c_int,)),
    "loci_levels": (c_int, ()),
    "loci_model_new": (c_int, (POINTER(Shape), POINTER(c_void_p))),
    "loci_model_free": (None, (c_void_p,)),
    "loci_model_matrix": (c_int, (c_void_p, c_int, c_int, c_int)),
    "loci_model_rows": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int64, c_int, c_void_p)),
    "loci_model_matches": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int, c_int, c_void_p, POINTER(c_int32))),
    "loci_model_vector": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int)),
    "loci_model_bytes": (c_size_t, (c_void_p,)),
    "loci_session_new": (c_int, (c_void_p, c_int, c_int, POINTER(c_void_p))),
    "loci_session_free": (None, (c_void_p,)),
    "loci_session_rows": (c_int, (c_void_p, c_int)),
    "loci_session_keep": (c_int, (c_void_p, c_void_p, c_int)),
    "loci_session_trim": (c_int, (c_void_p, c_int, c_int)),
    "loci_session_move": (c_int, (c_void_p, c_int, c_int, c_void_p, c_int)),
    "loci_session_bytes": (c_size_t, (c_void_p,)),
    "loci_session_step": (c_int, (c_void_p, POINTER(StepRecord))),
    "loci_try_expand": (c_int, (c_int, c_int, c_void_p, POINTER(c_uint16))),
    "loci_try_multiply": (c_int, (c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_int, c_void_p)),
    "loci_try_attend": (
        c_int,
        (c_int, c_int, c_int, c_int, c_int, POINTER(c_uint64), c_void_p, c_void_p, c_void_p, c_float, c_void_p),
    ),
    "loci_try_elementwise": (c_int, (c_int, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p)),
    "loci_try_rank": (c_int, (c_int, c_int, c_int, c_void_p, c_void_p, c_void_p)),
}


@cache
def load() -> ctypes.CDLL:
    """The library, compiled first if need be.

    Raises:
        Unsupported: it cannot be had on this machine; the message says why.
    """
    try:
        file = build.library()
        library = ctypes.CDLL(str(file))
    except build.CannotBuild as error:
        raise Unsupported(f"the native engine is not available: {error}.") from error
    except OSError as error:
        raise Unsupported(f"the native engine's library cannot be loaded: {error}.") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def levels() -> tuple[str, ...]:
    """The instruction sets that can be used here, slowest first."""
    bits = load().loci_levels()
    return tuple(level for number, level in enumerate(LEVELS) if bits >> number & 1)


def check(code: int) -> None:
    """Raise the error that a code of the library stands for."""
    if not code:
        return
    reason = load().loci_reason(code).decode()
    if code == _NO_MEMORY:
        raise ModelError(f"the native engine stops: {reason}. Use a smaller model, fewer rows or a shorter context.")
    if code in (_BAD_SHAPE, _BAD_LEVEL, _NO_THREADS):
        raise Unsupported(f"the native engine cannot do this: {reason}.")
    if code == _TOO_LONG:
        raise ContextTooLong(f"the native engine was given {reason}.")
    raise BadInput(f"the native engine was given {reason}.")
