"""What a kernel shows of itself is what was compiled."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flashmla_rtc
from flashmla_rtc import __main__ as program
from flashmla_rtc import geometry, inspection_html, occupancy, overrides, variants
from flashmla_rtc.inspection import KernelInspection, inspect_kernel, kernel_names
from flashmla_rtc.rtc import CompilerMissing, KernelSource, compile_kernel, nvrtc_version, sass

SCHEDULE = "mla_schedule"

try:
    nvrtc_version()
except CompilerMissing as error:
    pytest.skip(str(error), allow_module_level=True)

needs_disassembler = pytest.mark.skipif(
    sass.find_disassembler() is None, reason=f"needs nvdisasm ({sass.INSTALL})"
)


@pytest.fixture(scope="module")
def schedule() -> KernelInspection:
    return inspect_kernel(SCHEDULE)


def edited(**replaced: str) -> dict[str, str]:
    """The planner's header with ``old`` replaced by ``new``."""
    text = overrides.kernel_sources()["mla_schedule.cuh"]
    assert text.count(replaced["old"]) == 1
    return {"mla_schedule.cuh": text.replace(replaced["old"], replaced["new"])}


def test_the_names_are_those_of_all_kernels() -> None:
    names = kernel_names()
    assert names == [variant.name for variant in variants.all_variants()]
    assert names[: len(variants.default_variants())] == [
        variant.name for variant in variants.default_variants()
    ]


def test_the_figures_are_those_of_the_compiled_kernel(schedule: KernelInspection) -> None:
    variant = variants.by_name(SCHEDULE)
    kernel = variants.builder.obtain(variant.source())
    assert (schedule.registers, schedule.spill_bytes, schedule.stack_bytes) == (
        kernel.registers,
        kernel.spill_bytes,
        kernel.stack_bytes,
    )
    assert schedule.static_smem_bytes == kernel.smem_bytes > 0
    assert schedule.dynamic_smem_bytes == variant.dynamic_smem_bytes == 0
    assert schedule.threads == geometry.SCHEDULE_THREADS
    assert schedule.cubin == kernel.cubin
    assert schedule.cubin_bytes == len(kernel.cubin)
    assert schedule.compile_seconds == kernel.compile_seconds
    assert schedule.digest == variants.sources_digest()
    assert schedule.log == kernel.log


def test_the_source_is_whole_and_compiles_alone(schedule: KernelInspection) -> None:
    """Without headers it gives the same machine code."""
    assert "#include" not in schedule.source
    assert schedule.source.count("struct PlanRow {") == 1
    assert schedule.source.index("// ==== ptx/types.cuh") < schedule.source.index(
        "namespace config"
    )
    alone = compile_kernel(KernelSource(SCHEDULE, schedule.entry, schedule.source))
    assert alone.registers == schedule.registers
    assert alone.smem_bytes == schedule.static_smem_bytes
    assert len(alone.cubin) == schedule.cubin_bytes
    assert schedule.headers == dict(variants.headers())
    assert schedule.unit == variants.by_name(SCHEDULE).source().source


def test_ptx(schedule: KernelInspection) -> None:
    assert re.search(r"^\.target sm_90a", schedule.ptx, re.MULTILINE)
    assert re.search(rf"\.visible \.entry {SCHEDULE}\(", schedule.ptx)


def test_ptx_of_the_decode_kernel_has_its_products() -> None:
    decode = inspect_kernel("mla_decode_bf16")
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in decode.ptx
    assert decode.blocks_per_sm == 1
    assert decode.threads == geometry.DECODE_THREADS
    assert decode.dynamic_smem_bytes == geometry.DECODE_SHARED_BYTES


@needs_disassembler
def test_sass(schedule: KernelInspection) -> None:
    assert f".text.{SCHEDULE}" in schedule.sass
    # An instruction takes 16 bytes.
    addresses = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+\S", schedule.sass, re.MULTILINE)
    assert schedule.opcodes.total() == len(addresses) > 500
    assert schedule.opcodes["BAR"] > 0
    assert schedule.opcodes["HGMMA"] == 0
    assert inspect_kernel("mla_decode_bf16").opcodes["HGMMA"] > 30


LISTING = """
mla_schedule:
.text.mla_schedule:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P2 BRA `(.L_x_0) ;
        /*0020*/             @!UP0 UIADD3 UR4, UR4, -0x1, URZ ;
        /*0030*/               @P0 HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0040*/              @UPT R2UR UR4, R2 ;
.L_x_0:
        /*10050*/                  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*10060*/                  BRA `(.L_x_0);
                                                         /* 0x000fea0003800000 */
"""


def test_instructions_are_counted_without_predicates_and_modifiers() -> None:
    assert sass.count_opcodes(LISTING) == {"LDC": 1, "BRA": 2, "UIADD3": 1, "HGMMA": 2, "R2UR": 1}


# -- the disassembler ----------------------------------------------------------------------------


def stand_in(folder: Path, script: str) -> Path:
    tool = folder / sass.TOOL
    folder.mkdir(parents=True, exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a disassembler."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)


def test_without_a_disassembler_it_is_said_what_to_install(
    nowhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = inspect_kernel(SCHEDULE)
    words = r"needs NVIDIA's disassembler nvdisasm.*: pip install nvidia-cuda-nvdisasm\."
    with pytest.raises(sass.DisassemblerMissing, match=words):
        _ = kernel.sass
    with pytest.raises(sass.DisassemblerMissing, match=words):
        _ = kernel.opcodes
    assert "pip install nvidia-cuda-nvdisasm" in kernel._repr_html_()
    assert "pip install nvidia-cuda-nvdisasm" in str(kernel.diff(kernel))
    assert "pip install nvidia-cuda-nvdisasm" in kernel.diff(kernel)._repr_html_()
    assert program.main(["kernels", SCHEDULE, "--sass"]) == 1
    captured = capsys.readouterr()
    assert re.search(words, captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_it_is_found_in_a_toolkit(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    tool = stand_in(tmp_path / "cuda" / "bin", "")
    monkeypatch.setenv(variable, str(tmp_path / "cuda"))
    assert sass.find_disassembler() == str(tool)
    first = stand_in(tmp_path / "path", "")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert sass.find_disassembler() == str(first)


@pytest.mark.parametrize(
    "place", ["nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "triton/backends/nvidia/bin"]
)
def test_it_is_found_in_python_packages(tmp_path: Path, place: str) -> None:
    tool = stand_in(tmp_path / place, "")
    if place.startswith("triton"):
        (tmp_path / "triton" / "__init__.py").write_text("raise SystemError('imported')")
    code = (
        f"import sys\nsys.path = [{str(tmp_path)!r}] + [p for p in sys.path if 'site-' not in p]\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('sass', {sass.__file__!r})\n"
        "sass = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(sass)\n"
        "print(sass.find_disassembler())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tool)


def test_a_disassembler_that_fails(
    nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule: KernelInspection
) -> None:
    tool = stand_in(tmp_path, "echo 'fatal: no such architecture' >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RuntimeError, match=r"failed with exit status 3: fatal: no such arch"):
        sass.disassemble(schedule.cubin)
    assert str(tool)


# -- occupancy -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "registers, threads, shared, blocks",
    [
        (128, 512, 232_448, 1),  # the decode kernel: all of an SM's registers and shared memory
        (57, 1024, 40_620, 1),  # registers come in eights: 64 · 1024 are all
        (32, 1024, 0, 2),  # warps
        (16, 32, 0, 32),  # thread blocks
        (255, 128, 0, 2),  # 4 warps of 8,192 registers
        (24, 128, 57_344, 4),  # shared memory, of which the driver takes a kilobyte a block
        (24, 128, 57_345, 3),
        (24, 100, 0, 16),  # warps that are not full count whole
    ],
)
def test_occupancy_from_hoppers_limits(
    registers: int, threads: int, shared: int, blocks: int
) -> None:
    assert occupancy.computed(registers, threads, shared) == blocks


def test_without_a_gpu_occupancy_is_computed_and_said_so() -> None:
    kernel = inspect_kernel(SCHEDULE, device="cpu")
    assert kernel.blocks_per_sm == 1
    assert kernel.occupancy_found == "computed from the limits of compute capability 9.0"


def test_on_a_gpu_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def call(name: str, *arguments: object) -> int:
        asked.append((name, *arguments))
        return 7

    class Facts:
        name = "a Hopper GPU"

    class Loaded:
        class kernel:
            handle = "handle"

    monkeypatch.setattr(occupancy.backends, "why_not", lambda where: None)
    monkeypatch.setattr(occupancy, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(occupancy.sm90, "launcher", lambda name, device: Loaded)
    monkeypatch.setattr(occupancy, "call", call)
    monkeypatch.setattr(occupancy, "device_facts", lambda index: Facts)
    kernel = inspect_kernel(SCHEDULE, device=1)
    assert kernel.blocks_per_sm == 7
    assert kernel.occupancy_found == "by the driver for a Hopper GPU"
    assert asked == [("cuOccupancyMaxActiveBlocksPerMultiprocessor", "handle", 1024, 0)]


# -- differences -----------------------------------------------------------------------------------


def test_a_kernel_does_not_differ_from_itself(schedule: KernelInspection) -> None:
    same = schedule.diff(inspect_kernel(SCHEDULE))
    assert same.facts() == {}
    assert same.source() == ""
    if sass.find_disassembler():
        assert same.opcodes() == {}


def test_what_an_edit_changes(schedule: KernelInspection) -> None:
    edit = edited(
        old="    wait_for_previous_kernel();",
        new="    __shared__ volatile int more[1024];\n    more[threadIdx.x] = 1;\n"
        "    wait_for_previous_kernel();",
    )
    with overrides.override_sources(edit, kernels=[SCHEDULE]):
        after = inspect_kernel(SCHEDULE)
    assert inspect_kernel(SCHEDULE).digest == schedule.digest != after.digest
    difference = schedule.diff(after)
    old, new = schedule.static_smem_bytes, after.static_smem_bytes
    assert new - old >= 4096
    assert difference.facts()["static shared memory"] == (f"{old:,} bytes", f"{new:,} bytes")
    assert "+    more[threadIdx.x] = 1;" in difference.source().splitlines()
    assert "--- mla_schedule.cuh" in difference.source()
    shown = difference._repr_html_()
    assert "more[threadIdx.x]" in shown
    assert f"{new:,} bytes" in shown
    if sass.find_disassembler():
        changed = difference.opcodes()
        assert changed
        for name, (before, now) in changed.items():
            assert (schedule.opcodes[name], after.opcodes[name]) == (before, now)
            assert before != now
        assert f"SASS instructions: {schedule.opcodes.total():,} -> " in str(difference)


def test_two_kernels(schedule: KernelInspection) -> None:
    decode = inspect_kernel("mla_decode_bf16")
    facts = schedule.diff(decode).facts()
    assert facts["kernel"] == (SCHEDULE, "mla_decode_bf16")
    assert facts["threads a thread block"] == ("1024", "512")
    assert "mla_decode.cuh" in schedule.diff(decode).source()


# -- what is shown ---------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Fails where tags do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_figures_and_folded_texts(schedule: KernelInspection) -> None:
    parser = Tags()
    parser.feed(schedule._repr_html_())
    parser.close()
    assert parser.open == []
    for name, value in schedule.facts().items():
        assert name in parser.text
        assert value in parser.text
    assert schedule.source in parser.text  # with < and & and all
    assert schedule._repr_html_().count("<details>") in (2, 3)
    assert schedule.ptx[: inspection_html._MOST_CHARACTERS] in parser.text


def test_long_texts_are_cut() -> None:
    shown = inspection_html._folded("PTX", lambda: "x" * 1000, most=10)
    assert "x" * 11 not in shown
    assert "… 990 more characters" in shown


def test_as_text(schedule: KernelInspection) -> None:
    assert str(schedule).splitlines()[0] == SCHEDULE
    assert f"registers a thread, at entry  {schedule.registers}" in str(schedule)
    assert len(repr(schedule)) < 800  # no source, no machine code


def test_a_kernel_that_is_not_there() -> None:
    for name in ("mla_decode", "", None, 3):
        with pytest.raises(ValueError, match=r"There is no kernel called .*mla_schedule"):
            inspect_kernel(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='such as "cuda:1"'):
        inspect_kernel(SCHEDULE, device="gpu")


# -- the command line ------------------------------------------------------------------------------


def test_command_line(schedule: KernelInspection, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> str:
        assert program.main(["kernels", SCHEDULE, *arguments]) == 0
        return capsys.readouterr().out

    assert printed() == f"{schedule}\n"
    assert printed("--source") == f"{schedule.source}\n"
    assert printed("--ptx") == f"{schedule.ptx}\n"
    document = json.loads(printed("--json"))
    assert document["digest"] == schedule.digest
    assert document["registers"] == schedule.registers
    assert document["cubin_bytes"] == schedule.cubin_bytes
    if sass.find_disassembler():
        assert printed("--sass") == f"{schedule.sass}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mla"], "There is no kernel called 'mla'; there are mla_decode_bf16, "),
        (["--ptx"], "--ptx shows one kernel: kernels NAME --ptx."),
    ],
)
def test_command_line_errors(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["kernels", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_public_names() -> None:
    assert flashmla_rtc.inspect_kernel is inspect_kernel
    assert flashmla_rtc.kernel_names is kernel_names
    with pytest.raises(AttributeError, match="has no attribute 'inspect'"):
        _ = flashmla_rtc.inspect
    assert set(flashmla_rtc.__all__) <= set(dir(flashmla_rtc))
    for name in flashmla_rtc.__all__:
        assert getattr(flashmla_rtc, name) is not None
