"""The versions of transformers that models are turned in, and what differs between them."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.specifiers import SpecifierSet
from transformers.modeling_outputs import BaseModelOutputWithPast

SUPPORTED_VERSIONS = ">=5.17,<5.25"
"""From the oldest that was tried to before what comes after the newest."""

_OLD_CACHE = "past_key_values"

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else _OLD_CACHE
"""The cache among the keywords of a forward, the fields of its output and what generate() hands on:
``cache`` from 5.24 on, ``past_key_values`` before.
"""


def name_cache(given: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a forward, the cache by the name of this version. Models still take the old one.

    Where both are given nothing is changed: the model says what it makes of them.
    """
    if CACHE in given or _OLD_CACHE not in given:
        return given
    return {CACHE if name == _OLD_CACHE else name: value for name, value in given.items()}


def check_version() -> None:
    """Raises NotImplementedError in a version of transformers that is not supported."""
    found = transformers.__version__
    if not SpecifierSet(SUPPORTED_VERSIONS).contains(found, prereleases=True):
        raise NotImplementedError(
            f"use_flash_mla does not support transformers {found}; it supports "
            f"transformers{SUPPORTED_VERSIONS}. Install one of these, pip install "
            f"'transformers{SUPPORTED_VERSIONS}'."
        )
