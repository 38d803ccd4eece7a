"""Models of Hugging Face transformers on the paged MLA kernels.

    from flashmla_rtc.integrations.transformers import use_flash_mla

    use_flash_mla(model)
    model.generate(**inputs, max_new_tokens=256)

Needs torch and transformers 5.17 to 5.24.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flashmla_rtc.integrations.transformers needs the build of torch that fits your machine "
        "(pip install torch), and transformers 5.17 to 5.24 "
        f"(pip install 'flashmla_rtc[transformers]'): {error}."
    ) from error

from .cache import CacheMemory, MLAPagedCache
from .convert import remove_flash_mla, use_flash_mla
from .families import FAMILIES as _FAMILIES
from .pages import PagesExhausted

SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)
"""What ``use_flash_mla`` takes, by ``model.config.model_type``."""

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "CacheMemory",
    "MLAPagedCache",
    "PagesExhausted",
    "remove_flash_mla",
    "use_flash_mla",
]
