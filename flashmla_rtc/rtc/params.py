"""One declaration per kernel-parameter struct, which renders the C++ struct and packs its bytes.

So the two can't disagree.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

# kind -> (C++ type, size, alignment, struct format). A pointer names what it points at, such as
# "const u16*".
_KINDS: dict[str, tuple[str, int, int, str]] = {
    "int": ("int", 4, 4, "i"),
    "i64": ("i64", 8, 8, "q"),
    "float": ("float", 4, 4, "f"),
    "TensorMap": ("TensorMap", 128, 64, "128s"),
}


@dataclass(frozen=True)
class ParamStruct:
    """A struct of kernel parameters.

    name: of the C++ struct.
    fields: (kind, name) pairs in order; kind is ``int``, ``i64``, ``float``, ``TensorMap`` or a
        pointer type such as ``const u16*``.
    """

    name: str
    fields: tuple[tuple[str, str], ...]
    _packer: struct.Struct = field(init=False, repr=False, compare=False)
    _in_order: Callable[[dict[str, Any]], tuple[Any, ...]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        formats, offset, largest = ["<"], 0, 1
        for kind, _ in self.fields:
            _, size, alignment, code = _kind(kind)
            padding = -offset % alignment
            formats.append(f"{padding}x" * bool(padding) + code)
            offset += padding + size
            largest = max(largest, alignment)
        formats.append(f"{-offset % largest}x")
        object.__setattr__(self, "_packer", struct.Struct("".join(formats)))
        names = [name for _, name in self.fields]
        pick = itemgetter(*names)  # of one name it picks the value itself
        in_order = pick if len(names) > 1 else lambda values: (pick(values),)
        object.__setattr__(self, "_in_order", in_order)

    @property
    def size(self) -> int:
        """sizeof, in bytes."""
        return self._packer.size

    def cpp(self) -> str:
        """The C++ definition. The kernels' headers define ``TensorMap`` and the integer names."""
        lines = [f"    {_kind(kind)[0]} {name};" for kind, name in self.fields]
        check = f"sizeof({self.name}) == {self.size}"
        size = f'static_assert({check}, "the host packs {self.size} bytes");'
        return "\n".join([f"struct {self.name} {{", *lines, "};", size, ""])

    def pack_into(self, buffer: Any, values: dict[str, Any]) -> None:
        """Write ``values``, one per field by name, to ``buffer``.

        Raises KeyError for a missing field and TypeError for one too many.
        """
        if len(values) > len(self.fields):
            extra = set(values) - {name for _, name in self.fields}
            raise TypeError(f"{self.name} has no field {', '.join(sorted(extra))}.")
        self._packer.pack_into(buffer, 0, *self._in_order(values))


def _kind(kind: str) -> tuple[str, int, int, str]:
    return (kind, 8, 8, "Q") if kind.endswith("*") else _KINDS[kind]
