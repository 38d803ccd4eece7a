"""The debug switch: checks of what the arrays hold, which no other check looks at.

Bad contents never fault and never reach a valid row (pages out of range read as empty, lengths are
clamped), so a wrong table gives a wrong answer in silence. ``FLASHMLA_RTC_VALIDATE=1`` makes every
call copy the table and the lengths to the host and say what is wrong with them. That waits for the
device: not for production, and not under graph capture.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import View

if TYPE_CHECKING:
    from .checks import DecodeShape

VARIABLE = "FLASHMLA_RTC_VALIDATE"


@functools.cache
def validation_enabled() -> bool:
    """Whether ``FLASHMLA_RTC_VALIDATE`` asks for validation.

    The variable is read once, at the first call: reading the environment costs more than all other
    checks of a call. ``validation_enabled.cache_clear()`` makes the next call read it again.

    Raises:
        ValueError: the variable holds something other than 1 or 0.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        return False
    if value not in ("", "0", "1"):
        raise ValueError(
            f"The environment variable {VARIABLE} must be 1 or 0, but it is {value!r}."
        )
    return value == "1"


def validate_contents(shape: DecodeShape, block_table: View, cache_seqlens: View) -> None:
    """Look into a checked ``block_table`` and ``cache_seqlens``. Waits for the device.

    Raises:
        ValueError: a length that is negative or past its row of the table, or a used entry of the
            table outside ``[0, num_blocks)``. Names the first such place.
    """
    page = shape.page_block_size
    room = shape.max_blocks * page
    lengths = _to_host(cache_seqlens).astype(np.int64)
    bad = (lengths < 0) | (lengths > room)
    if bad.any():
        request = int(bad.argmax())
        keys = int(lengths[request])
        if keys < 0:
            raise ValueError(f"cache_seqlens[{request}] must be at least 0, but it is {keys}.")
        raise ValueError(
            f"cache_seqlens[{request}] must be at most {room}, the room of a row of block_table "
            f"({shape.max_blocks} pages of {page} keys), but it is {keys}."
        )

    table = _to_host(block_table)
    used = np.arange(shape.max_blocks) < -(-lengths // page)[:, np.newaxis]
    bad = used & ((table < 0) | (table >= shape.num_blocks))
    if bad.any():
        request, column = (int(index) for index in np.argwhere(bad)[0])
        keys = int(lengths[request])
        if shape.num_blocks == 0:
            raise ValueError(
                f"cache_seqlens[{request}] must be 0, since k_cache has no pages, but it is {keys}."
            )
        raise ValueError(
            f"block_table[{request}, {column}] must be a page of k_cache, from 0 to "
            f"{shape.num_blocks - 1}, since request {request} has {keys} keys, but it is "
            f"{table[request, column]}."
        )


def _to_host(array: View) -> np.ndarray:
    native: Any = array.native
    if array.library == "torch":
        native = native.cpu()
    elif hasattr(native, "get"):  # CuPy, also where it stands in for JAX or DLPack
        native = native.get()
    return np.asarray(native)
