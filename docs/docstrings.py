"""How the site has docstrings, by an extension that mkdocs.yml names.

What several names share, ``a, b: what both are``, gets an entry for each. Functions whose types are
in overloads have them there, and not once more beside what their arguments mean.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(
    r"^(?P<indent> {4})(?P<names>\w+(?:,\s+\w+)+): (?P<text>.*(?:\n {5,}\S.*)*)", re.MULTILINE
)


def one_entry_a_name(docstring: str) -> str:
    def entries(shared: re.Match[str]) -> str:
        names = re.split(r",\s+", shared["names"])
        return "\n".join(f"{shared['indent']}{name}: {shared['text']}" for name in names)

    return _SHARED.sub(entries, docstring)


class Docstrings(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = one_entry_a_name(func.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in pkg.modules.values():
            for function in module.functions.values():
                if not function.is_alias and function.overloads:
                    for parameter in function.parameters:
                        parameter.annotation = None
