"""The Builder: memory, disk, compile; threads, processes and forks; what it says and when."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")

from flashmla_rtc.rtc import build
from flashmla_rtc.rtc.build import Builder, compile_mode
from flashmla_rtc.rtc.cache import CubinCache
from flashmla_rtc.rtc.compiler import (
    CompiledKernel,
    CompileError,
    CompilerMissing,
    KernelSource,
    compile_kernel,
)

ROOT = Path(__file__).resolve().parents[1]


def source(number: int = 0) -> KernelSource:
    text = f'extern "C" __global__ void k(int* p) {{ p[threadIdx.x] += {number}; }}'
    return KernelSource(f"kernel_{number}", "k", text)


BROKEN = KernelSource("broken", "k", 'extern "C" __global__ void k(int* p) { *p = q; }')


class Recorder:
    """A compiler that compiles nothing, counts its calls and takes its time."""

    def __init__(self, seconds: float = 0.0, error: BaseException | None = None) -> None:
        self.seconds = seconds
        self.error = error
        self.calls: list[str] = []

    def __call__(self, source: KernelSource, arch: str) -> CompiledKernel:
        self.calls.append(source.name)
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return CompiledKernel(source.name, source.entry, b"cubin", 32, 0, 0, self.seconds, "")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache"


def entries(place: Path) -> list[str]:
    return sorted(os.listdir(place)) if place.exists() else []


# --- Memory, disk, compile -----------------------------------------------------------------------


def test_real_kernels_are_compiled_then_read_from_disk_then_from_memory(place):
    sources = [source(n) for n in range(3)]
    cold = Builder(CubinCache(place)).obtain_many(sources)
    assert [kernel.name for kernel in cold] == ["kernel_0", "kernel_1", "kernel_2"]
    assert all(kernel.cubin.startswith(b"\x7fELF") for kernel in cold)
    assert len(entries(place)) == 3

    recorder = Recorder()
    warm = Builder(CubinCache(place), compiler=recorder)
    assert warm.obtain_many(sources) == cold
    for file in place.iterdir():
        file.unlink()
    assert warm.obtain(sources[1]) is warm.obtain(sources[1])
    assert warm.obtain(sources[1]) == cold[1]
    assert recorder.calls == []


def test_the_order_asked_for_is_the_order_returned_and_twins_compile_once(place):
    recorder = Recorder()
    builder = Builder(CubinCache(place), compiler=recorder)
    builder.obtain(source(1))
    kernels = builder.obtain_many([source(2), source(1), source(2), source(0)])
    assert [kernel.name for kernel in kernels] == ["kernel_2", "kernel_1", "kernel_2", "kernel_0"]
    assert sorted(recorder.calls) == ["kernel_0", "kernel_1", "kernel_2"]
    assert builder.obtain_many([]) == []


def test_a_damaged_entry_is_compiled_again_and_healed(place):
    before = Builder(CubinCache(place)).obtain(source())
    (name,) = entries(place)
    whole = (place / name).read_bytes()
    for damage in (whole[: len(whole) // 2], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (place / name).write_bytes(damage)
        after = Builder(CubinCache(place)).obtain(source())
        assert after.cubin == before.cubin
        assert CubinCache(place).get(name.removesuffix(".kernel")) == after


def test_the_default_cache_is_where_the_variable_says(place, monkeypatch):
    monkeypatch.setenv("FLASHMLA_RTC_CACHE_DIR", str(place))
    Builder(compiler=Recorder()).obtain(source())
    assert len(entries(place)) == 1


def test_several_kernels_compile_at_the_same_time(place, monkeypatch):
    monkeypatch.setattr(build, "_usable_cpus", lambda: 3)
    meeting = threading.Barrier(3, timeout=30)
    recorder = Recorder()

    def compiler(source: KernelSource, arch: str) -> CompiledKernel:
        meeting.wait()  # breaks unless three are here together
        return recorder(source, arch)

    builder = Builder(CubinCache(place), compiler=compiler)
    assert len(builder.obtain_many([source(n) for n in range(3)])) == 3


# --- Errors --------------------------------------------------------------------------------------


def test_one_failure_raises_after_the_others_are_built(place):
    builder = Builder(CubinCache(place))
    with pytest.raises(CompileError, match=r"> 1 \|"):
        builder.obtain_many([source(0), BROKEN, source(1)])
    assert len(entries(place)) == 2
    assert builder.obtain(source(1)).name == "kernel_1"


def test_a_failure_is_remembered_and_keeps_nobodys_frames(place):
    calls = []

    def compiler(source: KernelSource, arch: str) -> CompiledKernel:
        calls.append(source.name)
        return compile_kernel(source, arch)

    builder = Builder(CubinCache(place), compiler=compiler)
    raised = []
    for _ in range(2):
        with pytest.raises(CompileError, match="did not compile") as caught:
            builder.obtain(BROKEN)
        raised.append(caught.value)
    assert calls == ["broken"]
    assert raised[0] is not raised[1]
    assert str(raised[0]) == str(raised[1])
    assert entries(place) == []


@pytest.mark.parametrize("error", [MemoryError("full"), KeyboardInterrupt()], ids=str)
def test_an_accident_is_not_remembered(place, error):
    recorder = Recorder(error=error)
    builder = Builder(CubinCache(place), compiler=recorder)
    with pytest.raises((MemoryError, RuntimeError)):
        builder.obtain(source())
    recorder.error = None
    assert builder.obtain(source()).name == "kernel_0"


def test_an_interrupted_build_can_be_repeated(place, monkeypatch):
    builder = Builder(CubinCache(place), compiler=Recorder())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder.cache, "get", interrupt)
        with pytest.raises(KeyboardInterrupt):
            builder.obtain(source())
    assert builder.obtain(source()).name == "kernel_0"


# --- Import time ---------------------------------------------------------------------------------


def test_import_mode_is_the_default_and_compiles_at_start(place, monkeypatch):
    for value in (None, "", "import"):
        if value is None:
            monkeypatch.delenv("FLASHMLA_RTC_COMPILE", raising=False)
        else:
            monkeypatch.setenv("FLASHMLA_RTC_COMPILE", value)
        recorder = Recorder()
        builder = Builder(CubinCache(None), compiler=recorder)
        builder.start([source(0), source(1)])
        assert sorted(recorder.calls) == ["kernel_0", "kernel_1"]
        builder.obtain(source(0))
        assert len(recorder.calls) == 2


def test_lazy_mode_compiles_nothing_until_asked(place, monkeypatch):
    monkeypatch.setenv("FLASHMLA_RTC_COMPILE", "lazy")
    recorder = Recorder()
    builder = Builder(CubinCache(place), compiler=recorder)
    builder.start([source(0), source(1)])
    assert recorder.calls == []
    assert not place.exists()
    builder.obtain(source(1))
    assert recorder.calls == ["kernel_1"]


def test_another_mode_is_an_error_that_lists_both(place, monkeypatch):
    monkeypatch.setenv("FLASHMLA_RTC_COMPILE", "eager")
    with pytest.raises(ValueError, match=r"'eager', but must be 'import' .* or 'lazy'"):
        compile_mode()
    with pytest.raises(ValueError, match="FLASHMLA_RTC_COMPILE"):
        Builder(CubinCache(place)).start([])


def test_errors_at_start_wait_for_the_first_use(place, monkeypatch):
    monkeypatch.setenv("FLASHMLA_RTC_COMPILE", "import")
    builder = Builder(CubinCache(place))
    builder.start([source(0), BROKEN])
    assert builder.obtain(source(0)).name == "kernel_0"
    with pytest.raises(CompileError, match='identifier "q" is undefined'):
        builder.obtain(BROKEN)


def test_a_missing_compiler_is_silent_at_start_and_raises_at_use(place, monkeypatch, capsys):
    monkeypatch.setenv("FLASHMLA_RTC_COMPILE", "import")

    def missing(*_: object) -> str:
        raise CompilerMissing("Compiling needs a compiler.")

    monkeypatch.setattr(build, "cache_key", missing)
    builder = Builder(CubinCache(place))
    builder.start([source()])
    assert capsys.readouterr() == ("", "")
    with pytest.raises(CompilerMissing):
        builder.obtain(source())


# --- What it says --------------------------------------------------------------------------------


def test_a_slow_cold_build_says_once_what_it_does(place, monkeypatch, capsys):
    builder = Builder(CubinCache(place), compiler=Recorder(seconds=1.2))
    monkeypatch.setattr(build, "_usable_cpus", lambda: 2)
    builder.obtain_many([source(0), source(1)])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("flashmla_rtc: compiling 2 kernels for sm_90a with NVRTC 1")
    assert err.endswith(f"(once; cached in {place})\n")
    builder.obtain_many([source(0), source(1)])
    assert capsys.readouterr().err == ""


def test_a_quick_build_and_a_warm_one_say_nothing(place, capsys):
    for _ in range(2):
        Builder(CubinCache(place)).obtain_many([source(0), source(1)])
    assert capsys.readouterr() == ("", "")


def test_a_cache_that_can_not_be_written_is_said_once_and_kernels_stay_in_memory(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder()
    builder = Builder(CubinCache(tmp_path / "file" / "cache"), compiler=recorder)
    for number in (0, 1, 0, 1):
        assert builder.obtain(source(number)).name == f"kernel_{number}"
    assert recorder.calls == ["kernel_0", "kernel_1"]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"can't store compiled kernels in {tmp_path / 'file' / 'cache'}" in err
    assert "FLASHMLA_RTC_CACHE_DIR" in err


def test_a_process_without_stderr_is_tolerated(place, monkeypatch, capsys):
    monkeypatch.setattr(build, "_PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", None)
    Builder(CubinCache(place), compiler=Recorder(seconds=0.1)).obtain(source())
    assert capsys.readouterr().out == ""


# --- Threads -------------------------------------------------------------------------------------


def in_threads(count: int, work) -> list:
    results: list = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def test_threads_that_ask_for_one_kernel_share_one_compile(place):
    recorder = Recorder(seconds=0.3)
    builder = Builder(CubinCache(place), compiler=recorder)
    kernels = in_threads(6, lambda: builder.obtain(source()))
    assert recorder.calls == ["kernel_0"]
    assert all(kernel is kernels[0] for kernel in kernels)


def test_threads_that_ask_for_overlapping_kernels_do_not_wait_for_each_other_for_ever(place):
    recorder = Recorder(seconds=0.05)
    builder = Builder(CubinCache(place), compiler=recorder)
    orders = iter([[0, 1, 2], [2, 1, 0], [1, 3, 0], [3, 2, 1]])
    lock = threading.Lock()

    def work() -> list[str]:
        with lock:
            order = next(orders)
        return [kernel.name for kernel in builder.obtain_many([source(n) for n in order])]

    assert len(in_threads(4, work)) == 4
    assert sorted(recorder.calls) == [f"kernel_{n}" for n in range(4)]


def test_threads_that_wait_for_a_kernel_that_fails_all_hear_of_it(place):
    recorder = Recorder(seconds=0.3, error=CompileError("no good"))
    builder = Builder(CubinCache(place), compiler=recorder)
    errors = in_threads(4, lambda: builder.obtain(source()))
    assert [str(error) for error in errors] == ["no good"] * 4
    assert len({id(error) for error in errors}) == 4
    assert recorder.calls == ["kernel_0"]


# --- Processes -----------------------------------------------------------------------------------


def python(script: str, place: Path) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "FLASHMLA_RTC_CACHE_DIR": str(place),
        "FLASHMLA_RTC_COMPILE": "lazy",
    }
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_race_for_one_kernel_all_get_it(place, tmp_path):
    start = tmp_path / "start"
    script = f"""
import hashlib, os, sys, time
from flashmla_rtc.rtc import Builder, KernelSource, nvrtc_version
nvrtc_version()
print("ready", flush=True)
while not os.path.exists({str(start)!r}):
    time.sleep(0.001)
kernel = Builder().obtain({source()!r})
assert kernel.cubin.startswith(b"\\x7fELF")
print(hashlib.sha256(kernel.cubin).hexdigest())
"""
    processes = [python(script, place) for _ in range(4)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        start.touch()
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, answers
    digests = {out for out, _ in answers}
    assert len(digests) == 1
    assert len(digests.pop()) == 65
    (name,) = entries(place)  # one entry, and nothing temporary left
    assert CubinCache(place).get(name.removesuffix(".kernel")) is not None


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_child_forked_after_use_compiles_and_reads_on(place):
    script = f"""
import os
from flashmla_rtc.rtc import Builder
from flashmla_rtc.rtc.compiler import KernelSource
builder = Builder()
first = builder.obtain({source(0)!r})
child = os.fork()
if child == 0:
    try:
        assert builder.obtain({source(0)!r}) is first
        assert builder.obtain({source(1)!r}).cubin.startswith(b"\\x7fELF")
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert builder.obtain({source(1)!r}).name == "kernel_1"
print("done")
"""
    process = python(script, place)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "done\n"), err
    assert len(entries(place)) == 2


@needs_fork
def test_a_child_forked_in_the_middle_of_a_compile_does_not_wait_for_it(place):
    """The thread that compiles, and the one that holds the lock, don't exist in the child."""
    script = f"""
import os, threading, time
from flashmla_rtc.rtc import Builder, CompiledKernel, CubinCache, KernelSource
source = {source(0)!r}
parent, begun, finish = os.getpid(), threading.Event(), threading.Event()
def compiler(source, arch):
    begun.set()
    if os.getpid() == parent:
        finish.wait()
    return CompiledKernel(source.name, source.entry, b"cubin", 1, 0, 0, 0.0, "")
builder = Builder(CubinCache(None), compiler=compiler)
thread = threading.Thread(target=builder.obtain, args=(source,))
thread.start()
assert begun.wait(60)
builder._lock.acquire()
child = os.fork()
if child == 0:
    os._exit(0 if builder.obtain(source).cubin == b"cubin" else 1)
builder._lock.release()
deadline = time.monotonic() + 60
done = (0, 0)
while done == (0, 0) and time.monotonic() < deadline:
    done = os.waitpid(child, os.WNOHANG)
    time.sleep(0.01)
if done == (0, 0):
    os.kill(child, 9)
finish.set()
thread.join()
assert done == (child, 0), done
print("done")
"""
    process = python(script, place)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "done\n"), err


def test_a_warm_start_is_quick(place):
    """Five kernels from the cache, in a fresh process, with the load of NVRTC."""
    sources = [source(n) for n in range(5)]
    Builder(CubinCache(place)).obtain_many(sources)
    script = f"""
import time
import cuda.bindings.nvrtc
from flashmla_rtc.rtc import Builder
from flashmla_rtc.rtc.compiler import KernelSource
def fail(source, arch):
    raise AssertionError("compiled")
begin = time.perf_counter()
Builder(compiler=fail).obtain_many({sources!r})
print(time.perf_counter() - begin)
"""
    process = python(script, place)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert float(out) < 1.0  # about 0.02 s; the margin is for a busy machine
