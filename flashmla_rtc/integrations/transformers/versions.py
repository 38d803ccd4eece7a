"""The versions of transformers that models are turned in."""

from __future__ import annotations

import transformers
from packaging.specifiers import SpecifierSet

SUPPORTED_VERSIONS = ">=5.17,<5.24"
"""Those that were tried. From 5.24 on models take their cache under another name."""


def check_version() -> None:
    """Raises NotImplementedError in a version of transformers that is not supported."""
    found = transformers.__version__
    if not SpecifierSet(SUPPORTED_VERSIONS).contains(found, prereleases=True):
        raise NotImplementedError(
            f"use_flash_mla does not support transformers {found}; it supports "
            f"transformers{SUPPORTED_VERSIONS}. Install one of these, pip install "
            f"'transformers{SUPPORTED_VERSIONS}'."
        )
