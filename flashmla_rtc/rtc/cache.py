"""Compiled kernels on disk, named by the content they were compiled from.

An entry is one file, ``<key>.kernel``: the SHA-256 of the rest in hexadecimal, a line of JSON with
what the compiler reported, and the cubin.  The key covers everything that decides the cubin, so an
entry is never out of date.  An entry that fails its digest is dropped and compiled again.  There is
no lock: entries appear by an atomic rename, and two processes that compile the same key write the
same thing.  A cache that can't be written is as good as none; it never raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from .._version import __version__
from .compiler import DEFAULT_ARCH, CompiledKernel, KernelSource, compile_options, nvrtc_version

# Raise it when the layout of an entry changes.
SCHEMA = 1

DIRECTORY_VARIABLE = "FLASHMLA_RTC_CACHE_DIR"
_SUFFIX = ".kernel"


def default_directory() -> Path | None:
    """FLASHMLA_RTC_CACHE_DIR, else XDG_CACHE_HOME/flashmla_rtc, else ~/.cache/flashmla_rtc.

    None if there is no home directory either (a container run under an unknown user id).
    """
    if chosen := os.environ.get(DIRECTORY_VARIABLE):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # relative ones are invalid by the XDG specification
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "flashmla_rtc") if os.path.isabs(base) else None


def cache_key(source: KernelSource, arch: str = DEFAULT_ARCH) -> str:
    """SHA-256, in hexadecimal, of everything that decides the cubin of ``source``.

    Raises CompilerMissing without NVRTC, whose version is part of the key.
    """
    ingredients = [
        SCHEMA,
        __version__,
        nvrtc_version(),
        compile_options(source, arch),
        source.name,
        source.entry,
        source.source,
        sorted(source.headers.items()),
    ]
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


class CacheState(NamedTuple):
    """What ``doctor`` shows.

    path: None if there is no place for a cache.  writable: an entry could be stored.
    entries, bytes: what is stored now.  problem: a sentence if not writable, else None.
    """

    path: Path | None
    writable: bool
    entries: int
    bytes: int
    problem: str | None


class CubinCache:
    """The cache in ``directory``, which is created when the first entry is stored.

    directory: None stores nothing.
    failure: the first error met while storing an entry, or None.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.failure: OSError | None = None

    def get(self, key: str) -> CompiledKernel | None:
        """The kernel stored under ``key``, or None.  Drops an entry that is damaged."""
        if self.directory is None:
            return None
        path = self._path(self.directory, key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        kernel = _decode(content, key)
        if kernel is None:
            with contextlib.suppress(OSError):
                path.unlink()
        return kernel

    def put(self, key: str, kernel: CompiledKernel) -> bool:
        """Store ``kernel``; False, with ``failure`` set, if the directory can't be written."""
        if self.directory is None:
            return False
        path = self._path(self.directory, key)
        temporary = path.with_name(f".{key}.{secrets.token_hex(8)}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                # Plain open, unlike tempfile, leaves the permissions to the umask: a directory
                # shared by several users works.  Mode "x" fails rather than follow a planted link.
                with open(temporary, "xb") as file:
                    file.write(_encode(key, kernel))
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            self.failure = self.failure or error
            return False
        return True

    def state(self) -> CacheState:
        """The place and size of the cache, found without writing anything."""
        if self.directory is None:
            homeless = f"There is no home directory; set {DIRECTORY_VARIABLE} to a writable folder."
            return CacheState(None, False, 0, 0, homeless)
        entries = size = 0
        with contextlib.suppress(OSError), os.scandir(self.directory) as files:
            for file in files:
                if file.name.endswith(_SUFFIX):
                    with contextlib.suppress(OSError):  # dropped by another process meanwhile
                        size += file.stat().st_size
                        entries += 1
        problem = self._problem(self.directory)
        return CacheState(self.directory, problem is None, entries, size, problem)

    def _problem(self, directory: Path) -> str | None:
        if self.failure is not None:
            reason = self.failure.strerror or str(self.failure)
            return f"An entry could not be stored in {directory} ({reason})."
        there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        if not there.is_dir():
            return f"{there} is not a folder."
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} is not writable."
        return None

    @staticmethod
    def _path(directory: Path, key: str) -> Path:
        return directory / f"{key}{_SUFFIX}"


def _encode(key: str, kernel: CompiledKernel) -> bytes:
    report: dict[str, Any] = {
        field.name: getattr(kernel, field.name)
        for field in dataclasses.fields(kernel)
        if field.name != "cubin"
    }
    body = json.dumps({"key": key, **report}).encode() + b"\n" + kernel.cubin
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(content: bytes, key: str) -> CompiledKernel | None:
    """The kernel of an entry, or None if the entry is damaged or belongs to another key."""
    digest, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    header, _, cubin = body.partition(b"\n")
    try:
        report = json.loads(header)
        if report.pop("key") != key:
            return None
        return CompiledKernel(cubin=cubin, **report)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
