"""The cache on disk: its key, its place, and what it survives."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")

from flashmla_rtc.rtc import cache
from flashmla_rtc.rtc.cache import CubinCache, cache_key, default_directory
from flashmla_rtc.rtc.compiler import CompiledKernel, KernelSource

ROOT = Path(__file__).resolve().parents[1]
KEY = "ab" * 32
SOURCE = KernelSource("name", "entry", "text", {"a.cuh": "A", "b.cuh": "B"}, ("-DX=1",))
KERNEL = CompiledKernel(
    name="name",
    entry="entry",
    cubin=b"\x7fELF\n\x00cubin\nwith newlines\n",
    registers=168,
    spill_bytes=0,
    smem_bytes=1024,
    compile_seconds=1.5,
    log="ptxas info : Used 168 registers\nä",
    stack_bytes=8,
)


@pytest.fixture
def store(tmp_path):
    return CubinCache(tmp_path / "deep" / "cache")


def entry(store: CubinCache, key: str = KEY) -> Path:
    assert store.directory is not None
    return store.directory / f"{key}.kernel"


# --- The key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"entry": "other"},
        {"source": "text "},
        {"options": ()},
        {"options": ("-DX=2",)},
        {"options": ("-DX=1", "-lineinfo")},
        {"headers": {"a.cuh": "A"}},
        {"headers": {"a.cuh": "A", "b.cuh": "B "}},
        {"headers": {"a.cuh": "A", "c.cuh": "B"}},
        {"headers": {"a.cuh": "B", "b.cuh": "A"}},
        {"headers": {"a.cuh": "A", "b.cuh": "B", "c.cuh": ""}},
        {"headers": {"a.cuh": "Ab.cuh", "": "B"}},
    ],
    ids=str,
)
def test_the_key_changes_with_every_part_of_the_source(change):
    assert cache_key(dataclasses.replace(SOURCE, **change)) != cache_key(SOURCE)


def test_the_key_changes_with_the_architecture():
    assert cache_key(SOURCE, "sm_100a") != cache_key(SOURCE, "sm_90a")


@pytest.mark.parametrize(
    "name, value",
    [
        ("SCHEMA", cache.SCHEMA + 1),
        ("__version__", "0.1.0.dev1"),
        ("nvrtc_version", lambda: (99, 0)),
        ("compile_options", lambda source, arch: ("-std=c++20",)),
    ],
)
def test_the_key_changes_with_versions_and_base_options(name, value, monkeypatch):
    before = cache_key(SOURCE)
    monkeypatch.setattr(cache, name, value)
    assert cache_key(SOURCE) != before


def test_the_key_does_not_depend_on_the_order_of_headers_or_on_the_process():
    swapped = dataclasses.replace(SOURCE, headers={"b.cuh": "B", "a.cuh": "A"})
    assert cache_key(swapped) == cache_key(SOURCE)
    script = (
        "from flashmla_rtc.rtc.cache import cache_key\n"
        "from flashmla_rtc.rtc.compiler import KernelSource\n"
        f"print(cache_key({SOURCE!r}))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONHASHSEED": "7",
        "FLASHMLA_RTC_COMPILE": "lazy",
    }
    answer = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
    )
    assert answer.stdout.strip() == cache_key(SOURCE), answer.stderr


# --- The place -----------------------------------------------------------------------------------


def test_the_place_is_the_variable_else_xdg_else_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLASHMLA_RTC_CACHE_DIR", raising=False)
    assert default_directory() == tmp_path / ".cache" / "flashmla_rtc"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert default_directory() == tmp_path / ".cache" / "flashmla_rtc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "flashmla_rtc"
    monkeypatch.setenv("FLASHMLA_RTC_CACHE_DIR", "~/mine")
    assert default_directory() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHMLA_RTC_CACHE_DIR", "here")
    assert default_directory() == tmp_path / "here"


def test_without_a_home_nothing_is_stored(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FLASHMLA_RTC_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert default_directory() is None
    store = CubinCache(None)
    assert store.put(KEY, KERNEL) is False
    assert store.get(KEY) is None
    state = store.state()
    assert state[:4] == (None, False, 0, 0)
    assert "FLASHMLA_RTC_CACHE_DIR" in (state.problem or "")


def test_the_directory_appears_with_the_first_entry_only(store):
    assert store.get(KEY) is None
    assert store.state()[1:] == (True, 0, 0, None)
    assert not store.directory.parent.exists()
    assert store.put(KEY, KERNEL)
    assert os.listdir(store.directory) == [f"{KEY}.kernel"]


# --- What is stored comes back -------------------------------------------------------------------


def test_a_kernel_comes_back_as_it_was(store):
    assert store.put(KEY, KERNEL)
    assert CubinCache(store.directory).get(KEY) == KERNEL
    assert store.get("cd" * 32) is None
    assert store.state() == (store.directory, True, 1, entry(store).stat().st_size, None)


def test_permissions_follow_the_umask(store):
    old = os.umask(0o022)
    try:
        store.put(KEY, KERNEL)
    finally:
        os.umask(old)
    assert entry(store).stat().st_mode & 0o777 == 0o644


# --- Damage --------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def damaged() -> dict[str, bytes]:
    whole = cache._encode(KEY, KERNEL)
    cuts = {f"cut at {n}": whole[:n] for n in range(0, len(whole), 37)}
    flips = {
        f"flip at {n}": whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :]
        for n in range(0, len(whole), 41)
    }
    return {
        **cuts,
        **flips,
        "one byte more": whole + b"\0",
        "zeros of the same size": bytes(len(whole)),
        "another key": cache._encode("cd" * 32, KERNEL),
        "not JSON": sealed(b"hello\ncubin"),
        "JSON of another kind": sealed(b"[1, 2]\ncubin"),
        "no key": sealed(b"{}\ncubin"),
        "too few fields": sealed(json.dumps({"key": KEY, "name": "n"}).encode() + b"\ncubin"),
        "unknown field": sealed(json.dumps({"key": KEY, "novel": 1}).encode() + b"\ncubin"),
    }


@pytest.mark.parametrize("content", damaged().values(), ids=damaged().keys())
def test_a_damaged_entry_is_dropped_and_can_be_stored_again(store, content):
    store.put(KEY, KERNEL)
    entry(store).write_bytes(content)
    assert store.get(KEY) is None
    assert not entry(store).exists()
    assert store.put(KEY, KERNEL)
    assert store.get(KEY) == KERNEL


def test_a_folder_in_the_place_of_an_entry_is_tolerated(store):
    entry(store).mkdir(parents=True)
    assert store.get(KEY) is None
    assert store.put(KEY, KERNEL) is False
    assert os.listdir(store.directory) == [f"{KEY}.kernel"]


# --- Places that can't be written ----------------------------------------------------------------


def test_a_place_under_a_file_is_tolerated(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = CubinCache(tmp_path / "file" / "cache")
    assert store.get(KEY) is None
    state = store.state()
    assert not state.writable
    assert "is not a folder" in (state.problem or "")
    assert store.put(KEY, KERNEL) is False
    assert isinstance(store.failure, OSError)
    assert "could not be stored" in (store.state().problem or "")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory_serves_what_it_holds(store):
    store.put(KEY, KERNEL)
    store.directory.chmod(0o555)
    try:
        assert store.get(KEY) == KERNEL
        assert store.put("cd" * 32, KERNEL) is False
        assert not CubinCache(store.directory).state().writable
    finally:
        store.directory.chmod(0o755)


def test_a_full_disk_leaves_the_old_entry_and_no_rubbish(store, monkeypatch):
    store.put(KEY, KERNEL)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert store.put(KEY, dataclasses.replace(KERNEL, registers=9)) is False
    assert store.failure is not None
    assert store.failure.errno == 28
    assert os.listdir(store.directory) == [f"{KEY}.kernel"]
    assert store.get(KEY) == KERNEL


# --- Readers and writers at once -----------------------------------------------------------------


def test_a_reader_sees_the_old_entry_or_the_new_one_and_nothing_between(store):
    large = [dataclasses.replace(KERNEL, registers=n, cubin=bytes([n]) * 300_000) for n in range(4)]
    store.put(KEY, large[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for kernel in large:
                assert store.put(KEY, kernel)

    writers = [threading.Thread(target=rewrite) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen = [store.get(KEY) for _ in range(200)]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert all(kernel in large for kernel in seen)
    assert os.listdir(store.directory) == [f"{KEY}.kernel"]
