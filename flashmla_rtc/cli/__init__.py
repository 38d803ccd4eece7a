"""The commands of ``python -m flashmla_rtc``, one module each: ``add_arguments(parser)`` and
``run(arguments)``.
"""

from __future__ import annotations


class CommandError(Exception):
    """A failure that is told in a sentence. ``code`` is the exit status: 1 did not work, 2 asked
    wrongly.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
