"""Kernels on request: from memory, else from the cache on disk, else compiled, several at a time.

A Builder keeps no thread and no file open between calls and never touches the driver, so a process
may fork after using one, and the child uses it on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from .cache import DIRECTORY_VARIABLE, CubinCache, cache_key, default_directory
from .compiler import (
    DEFAULT_ARCH,
    CompiledKernel,
    CompileError,
    KernelSource,
    compile_kernel,
    nvrtc_version,
)

MODE_VARIABLE = "FLASHMLA_RTC_COMPILE"
_MODES = ("import", "lazy")

# A build that takes longer than this, in seconds, says what it is doing.
_PATIENCE = 1.0


def compile_mode() -> str:
    """ "import" or "lazy", from FLASHMLA_RTC_COMPILE; "import" when it is not set.

    Raises ValueError for any other value.
    """
    mode = os.environ.get(MODE_VARIABLE) or "import"
    if mode not in _MODES:
        raise ValueError(
            f"{MODE_VARIABLE} is {mode!r}, but must be 'import' (compile when the package is "
            "imported) or 'lazy' (compile at first use)."
        )
    return mode


class Builder:
    """Compiles each kernel at most once per process, and once per cache directory.

    cache: where cubins are kept between processes; by default that of the environment variables.
    arch: the architecture of every kernel.
    compiler: what compiles, called as ``compiler(source, arch)`` from several threads.

    Safe to use from several threads: those that ask for a kernel while it is being compiled wait
    for that compile.
    """

    def __init__(
        self,
        cache: CubinCache | None = None,
        arch: str = DEFAULT_ARCH,
        compiler: Callable[[KernelSource, str], CompiledKernel] = compile_kernel,
    ) -> None:
        self.cache = CubinCache(default_directory()) if cache is None else cache
        self.arch = arch
        self._compiler = compiler
        self._lock = threading.Lock()
        # key -> the kernel, its CompileError, or the promise of either.
        self._outcomes: dict[str, Future[CompiledKernel]] = {}
        self._told_failure = False
        _builders.add(self)

    def start(self, sources: Iterable[KernelSource]) -> None:
        """Build ``sources`` now unless FLASHMLA_RTC_COMPILE is "lazy".  For import time.

        A kernel that fails, or a compiler that is missing, raises when the kernel is first asked
        for and not here.  Raises ValueError if the variable holds anything but "import" or "lazy".
        """
        if compile_mode() == "lazy":
            return
        with contextlib.suppress(Exception):
            self.obtain_many(sources)

    def obtain(self, source: KernelSource) -> CompiledKernel:
        """The compiled form of ``source``.

        Raises CompileError, the same each time without compiling again, or CompilerMissing; and
        ValueError for a bad FLASHMLA_RTC_COMPILE.
        """
        return self.obtain_many((source,))[0]

    def obtain_many(self, sources: Iterable[KernelSource]) -> list[CompiledKernel]:
        """The compiled forms of ``sources``, in order, those to be compiled in parallel.

        If some fail, raises the first one's CompileError after the others are done; CompilerMissing
        if there is no compiler; ValueError for a bad FLASHMLA_RTC_COMPILE, which an import keeps to
        itself.
        """
        compile_mode()
        wanted = [(cache_key(source, self.arch), source) for source in sources]
        mine: dict[str, KernelSource] = {}
        with self._lock:
            for key, source in wanted:
                if key not in self._outcomes:
                    self._outcomes[key] = Future()
                    mine[key] = source
            outcomes = {key: self._outcomes[key] for key, _ in wanted}
        try:
            missing = {}
            for key, source in mine.items():
                kernel = self.cache.get(key)
                if kernel is None:
                    missing[key] = source
                else:
                    outcomes[key].set_result(kernel)
            if missing:
                self._compile_in_parallel(missing, outcomes)
        except BaseException as error:  # also Ctrl-C: whoever waits must not wait for ever
            for key in mine:
                if not outcomes[key].done():
                    self._give_up(key, outcomes[key], error)
            raise
        return [_kernel_or_raise(outcomes[key]) for key, _ in wanted]

    def _compile_in_parallel(
        self, missing: dict[str, KernelSource], outcomes: dict[str, Future[CompiledKernel]]
    ) -> None:
        pool = ThreadPoolExecutor(min(len(missing), _usable_cpus()), "flashmla_rtc")
        try:
            tasks = [
                pool.submit(self._compile, key, source, outcomes[key])
                for key, source in missing.items()
            ]
            _, unfinished = wait(tasks, timeout=_PATIENCE)
            if unfinished:
                _say(self._announcement(len(missing)))
            wait(tasks)
        finally:
            pool.shutdown(cancel_futures=True)
        self._tell_failure()

    def _compile(self, key: str, source: KernelSource, outcome: Future[CompiledKernel]) -> None:
        try:
            kernel = self._compiler(source, self.arch)
        except CompileError as error:
            outcome.set_exception(error)  # kept: the same text can only fail again
        except BaseException as error:
            self._give_up(key, outcome, error)
        else:
            self.cache.put(key, kernel)
            outcome.set_result(kernel)

    def _give_up(self, key: str, outcome: Future[CompiledKernel], error: BaseException) -> None:
        """Fail those who wait for ``key`` now; who asks later tries again."""
        with self._lock:
            self._outcomes.pop(key, None)
        if not isinstance(error, Exception):  # the Ctrl-C of one thread is not that of another
            error = RuntimeError("The compilation of a kernel was interrupted; ask for it again.")
        outcome.set_exception(error)

    def _announcement(self, count: int) -> str:
        major, minor = nvrtc_version()
        kernels = "1 kernel" if count == 1 else f"{count} kernels"
        place = self.cache.directory
        fate = "not cached: there is no home directory" if place is None else f"cached in {place}"
        return f"compiling {kernels} for {self.arch} with NVRTC {major}.{minor} (once; {fate})"

    def _tell_failure(self) -> None:
        failure = self.cache.failure
        if failure is None or self._told_failure:
            return
        self._told_failure = True
        _say(
            f"can't store compiled kernels in {self.cache.directory} "
            f"({failure.strerror or failure}), so every process compiles them again; set "
            f"{DIRECTORY_VARIABLE} to a writable folder"
        )

    def _after_fork_in_child(self) -> None:
        # The threads that held the lock or were compiling are not in this process.
        self._lock = threading.Lock()
        self._outcomes = {key: f for key, f in self._outcomes.items() if f.done()}


_builders: weakref.WeakSet[Builder] = weakref.WeakSet()


def _reset_builders() -> None:
    for builder in list(_builders):
        builder._after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_builders)


def _kernel_or_raise(outcome: Future[CompiledKernel]) -> CompiledKernel:
    error = outcome.exception()
    if isinstance(error, CompileError):
        # A new one each time: a kept exception would keep the frames, and the arrays in them, of
        # everyone who ever met it.
        raise CompileError(*error.args)
    return outcome.result()


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(text: str) -> None:
    """One line on stderr, if there is one: a daemon or a windowed program may have none."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"flashmla_rtc: {text}", file=sys.stderr, flush=True)
