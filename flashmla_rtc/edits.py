"""Edited CUDA headers in place of the package's: what a folder or a mapping replaces."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from .rtc.compiler import INCLUDE

Edits = str | os.PathLike[str] | Mapping[str, str]
"""A folder with ``.cuh`` files, or their texts by name, such as ``{"ptx/sync.cuh": "…"}``."""


def read_folder(folder: Path) -> dict[str, str]:
    """The ``.cuh`` files under ``folder``, by their names as kernels include them.

    Raises OSError or UnicodeDecodeError for a file that can't be read.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.cuh"))
    }


def included_in(text: str) -> list[str]:
    """The headers that ``text`` includes, in order."""
    return INCLUDE.findall(text)


def replaced(headers: Mapping[str, str], edits: Edits, name: str) -> dict[str, str]:
    """``headers`` with those of ``edits`` in place of their namesakes, the others as they are.

    A new header is taken if an edited one, or another new one, includes it.

    Args:
        edits: a folder, or texts by name. A whole copy of the kernels does as well as one file.
        name: what messages call ``edits``.

    Raises:
        TypeError: ``edits`` is neither, or holds something other than text.
        ValueError: it is no folder, can't be read, replaces nothing, or holds a header that is
            none of the package's and that nothing includes.
    """
    texts = _texts(edits, name)
    if not texts.keys() & headers.keys():
        raise ValueError(
            f"{name} replaces nothing: it holds {_listed(texts) or 'no .cuh file'}, and the "
            f"package's headers are {_listed(headers)}."
        )
    used = {other for text in texts.values() for other in included_in(text)}
    for unknown in texts.keys() - headers.keys() - used:
        near = difflib.get_close_matches(unknown, headers, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"{name} holds {unknown!r}, which is none of the package's headers and which no "
            f"edited header includes{hint}"
        )
    return dict(sorted({**headers, **texts}.items()))


def _texts(edits: Edits, name: str) -> dict[str, str]:
    if isinstance(edits, Mapping):
        for header, text in edits.items():
            if not isinstance(header, str) or not isinstance(text, str):
                raise TypeError(
                    f"{name} must map names of headers to their texts, but it maps {header!r} to "
                    f"an object of type {type(text).__name__}."
                )
        return dict(edits)
    if not isinstance(edits, (str, os.PathLike)):
        raise TypeError(
            f"{name} must be a folder or a mapping from names of headers to their texts, but it is "
            f"of type {type(edits).__name__}."
        )
    folder = Path(edits).expanduser()
    if not os.path.isdir(folder):  # False, too, for names that no file system takes
        if "\n" in str(folder) or any(len(part) > 255 for part in folder.parts):
            raise ValueError(
                f"{name} must name a folder with .cuh files, but it is a text of "
                f"{len(str(edits)):,} characters; if it is CUDA source, a mapping from the header "
                'that it replaces is meant: {"mla_decode.cuh": text}.'
            )
        raise ValueError(
            f"{name} must name a folder with .cuh files, and {str(folder)!r} is not one."
        )
    try:
        return read_folder(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} names {str(folder)!r}, which can't be read: {error}.") from None


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(sorted(names))
