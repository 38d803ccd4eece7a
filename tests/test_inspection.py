"""What a kernel shows of itself is what was compiled."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import flashmla_rtc
from flashmla_rtc import __main__ as program
from flashmla_rtc import geometry, inspection_html, overrides, variants
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
