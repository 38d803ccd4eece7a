"""The kernels as they are shipped: each compiles to code that a Hopper GPU runs at full speed."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmla_rtc import geometry, variants, workspace
from flashmla_rtc.bench import timeline
from flashmla_rtc.rtc import CompileError, KernelSource, cache, compile_kernel

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(variants.__file__).parent
NAMES = [variant.name for variant in variants.all_variants()]
AT_IMPORT = {"mla_decode_bf16", "mla_decode_bf16_few_rows", "mla_decode_fp16", "mla_schedule"}
WHEN_NEEDED = {f"{name}_any_layout" for name in AT_IMPORT if "decode" in name}

REGISTERS_OF_AN_SM = 65536
SHARED_OF_A_BLOCK = 227 * 1024
STATIC_SHARED_OF_A_BLOCK = 48 * 1024


@pytest.fixture
def nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")


def planted(name: str, file: str, pattern: str, replacement: str) -> KernelSource:
    """A variant's source with one change in one header."""
    source = variants.by_name(name).source()
    text, count = re.subn(pattern, replacement, source.headers[file])
    assert count == 1, f"{pattern!r} is {count} times in {file}"
    return KernelSource(source.name, source.entry, source.source, {**source.headers, file: text})


def complaint(source: KernelSource) -> str:
    """The first paragraph of what refuses ``source``."""
    with pytest.raises(CompileError) as caught:
        compile_kernel(source)
    return str(caught.value).partition("\n\n")[0]


# -- the code that is shipped ---------------------------------------------------------------------


def test_the_variants() -> None:
    assert {variant.name for variant in variants.default_variants()} == AT_IMPORT
    assert set(NAMES) == AT_IMPORT | WHEN_NEEDED
    assert len(NAMES) == len(AT_IMPORT | WHEN_NEEDED)
    for name in NAMES:
        assert variants.by_name(name).name == name
    with pytest.raises(KeyError):
        variants.by_name("mla_decode_fp32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("plain", [True, False])
def test_every_call_has_its_kernel(dtype: str, plain: bool) -> None:
    """The kernel counts on how the host lays out the workspace, and on plain layouts or not."""
    for rows in range(1, 200):
        constants = {
            name: value
            for _, name, value in variants.by_name(
                variants.decode_name(dtype, rows, plain)
            ).constants
        }
        strips, in_halves = workspace.layout(132, rows, dtype).kind
        assert constants["KEPT_IN_HALVES"] == in_halves
        assert constants["PLAIN"] == plain
        assert in_halves == (dtype == "bfloat16" and rows > 32)
        assert strips == min(-(-rows // 16) * 2, geometry.TILE_STRIPS)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_without_a_spill_or_a_warning_and_fits(name: str) -> None:
    variant = variants.by_name(name)
    kernel = compile_kernel(variant.source())
    assert kernel.cubin.startswith(b"\x7fELF")
    assert kernel.entry == variant.entry
    assert kernel.spill_bytes == 0
    assert kernel.stack_bytes == 0
    assert "Potential Performance Loss" not in kernel.log
    assert "warning" not in kernel.log
    # Allotted to a warp in units of 8 a thread.
    assert -(-kernel.registers // 8) * 8 * variant.threads <= REGISTERS_OF_AN_SM
    assert kernel.smem_bytes <= STATIC_SHARED_OF_A_BLOCK
    assert kernel.smem_bytes + variant.dynamic_smem_bytes <= SHARED_OF_A_BLOCK


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mla_decode")])
def test_the_kernel_that_keeps_a_log_hardly_spills(name: str) -> None:
    """As ``timeline`` compiles it: the log needs a register or two of its own."""
    traced = variants.by_name(name).but(f"{name}_traced", TRACE_EVENTS=timeline.EVENTS)
    assert compile_kernel(traced.source(), may_spill=True).spill_bytes <= 32


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", NAMES)
def test_the_host_launches_as_many_threads_as_the_kernel_has(name: str) -> None:
    """A static_assert that is wrong shows that the kernel's THREADS is the variant's."""
    variant = variants.by_name(name)
    source = variant.source()
    text = source.source + f'static_assert(THREADS != {variant.threads}, "as many as they are");\n'
    with pytest.raises(CompileError, match="as many as they are"):
        compile_kernel(KernelSource(source.name, source.entry, text, source.headers))


def test_warpgroups_share_out_the_registers_that_there_are() -> None:
    text = variants.by_name("mla_decode_bf16").source().headers["mla_decode_block.cuh"]

    def constant(name: str) -> int:
        found = re.findall(rf"\b{name} = (\d+)[,;]", text)
        assert len(found) == 1, name
        return int(found[0])

    producer, scorer, output, merge = (
        constant(f"{role}_REGISTERS") for role in ("PRODUCER", "SCORE", "OUTPUT", "MERGE")
    )
    for registers in (producer, scorer, output, merge):
        assert registers % 8 == 0  # setmaxnreg takes nothing else
        assert 24 <= registers <= 256
    assert 128 * (producer + scorer + 2 * output) <= REGISTERS_OF_AN_SM
    assert 128 * (2 * producer + 2 * merge) <= REGISTERS_OF_AN_SM  # scorers give theirs back
    # ptxas places what products hold from register 24 on, and wants two more.
    query = 16 * constant("Q_IN_REGISTERS")
    assert scorer >= query + 32 + 26  # and the scores of a thread
    assert output >= 128 + 26  # half the output


# -- code that must not be shipped ----------------------------------------------------------------


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("role", ["SCORE", "OUTPUT"])
def test_a_spill_planted_in_the_decode_kernel_is_refused(role: str) -> None:
    answer = complaint(
        planted(
            "mla_decode_bf16",
            "mla_decode_block.cuh",
            rf"\b{role}_REGISTERS = \d+",
            f"{role}_REGISTERS = 144",
        )
    )
    assert "it spills registers" in answer
    assert "mla_decode_bf16" in answer


@pytest.mark.usefixtures("nvrtc")
def test_a_setmaxnreg_ignored_in_the_decode_kernel_is_refused() -> None:
    answer = complaint(
        planted("mla_decode_bf16", "mla_decode.cuh", r"__launch_bounds__\(THREADS, 1\) ", "")
    )
    assert "'setmaxnreg' ignored" in answer


@pytest.mark.usefixtures("nvrtc")
def test_products_that_ptxas_has_to_wait_for_are_refused() -> None:
    """Nobody waits for a product before its accumulators are read, so ptxas serialises all products
    or, where the branches allow it, puts waits of its own between them.
    """
    answer = complaint(
        planted(
            "mla_decode_bf16",
            "ptx/wgmma.cuh",
            r'asm volatile\("wgmma\.wait_group\.sync\.aligned %0;"',
            'asm volatile("// %0"',
        )
    )
    assert re.search(r"instructions are serialized|wait(_group)? is injected", answer)


@pytest.mark.usefixtures("nvrtc")
def test_shared_memory_that_the_host_does_not_ask_for_does_not_compile() -> None:
    struct = r"struct alignas\(1024\) Shared \{"
    source = planted(
        "mla_decode_bf16",
        "mla_decode_block.cuh",
        struct,
        "struct alignas(1024) Shared { u8 more[1024];",
    )
    with pytest.raises(CompileError, match="the host asks for exactly this much"):
        compile_kernel(source)


@pytest.mark.usefixtures("nvrtc")
def test_a_parameter_that_the_host_does_not_pack_does_not_compile() -> None:
    source = planted(
        "mla_schedule", "mla_schedule.cuh", r"params\.num_parts;", "params.parts_count;"
    )
    with pytest.raises(CompileError, match=r"MlaScheduleParams.*has no member .parts_count"):
        compile_kernel(source)


# -- the translation unit -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_constants_are_one_named_block(name: str) -> None:
    variant = variants.by_name(name)
    text = variant.source().source
    block = text.split("namespace config {")[1].split("}  // namespace config")[0]
    for kind, constant, value in variant.constants:
        assert f"constexpr {kind} {constant} = {value};" in block
    assert ("using Element" in block) == (variant.element is not None)
    assert text.count(f"struct {variant.params.name} {{") == 1
    assert text.rstrip().endswith(f'#include "{variant.file}"')


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_that_is_passed_is_used(name: str) -> None:
    variant = variants.by_name(name)
    stem = variant.file.removesuffix(".cuh")
    files = variants.kernels_dir().glob(f"{stem}*.cuh")  # mla_decode.cuh and its parts
    text = "\n".join(file.read_text() for file in files)
    for _, constant, _ in variant.constants:
        assert f"config::{constant}" in text
    # ... and none that is used is forgotten.
    used = set(re.findall(r"config::(\w+)", text)) - {"Element"}
    assert used == {constant for _, constant, _ in variant.constants}


def test_sources_of_different_variants_have_different_keys() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings")
    keys = {cache.cache_key(variant.source()) for variant in variants.all_variants()}
    assert len(keys) == len(NAMES)


def test_a_constant_is_part_of_the_source() -> None:
    variant = variants.by_name("mla_schedule")
    assert variant.but(variant.name) == variant
    changed = variant.but("other", BLOCK_KEYS=32, MAX_PARTS=7)
    assert changed.name == "other"
    expected = variant.source().source
    for kind, constant, value in variant.constants:
        now = {"BLOCK_KEYS": 32, "MAX_PARTS": 7}.get(constant, value)
        expected = expected.replace(f"{kind} {constant} = {value};", f"{kind} {constant} = {now};")
    assert changed.source().source == expected != variant.source().source
    with pytest.raises(KeyError, match=r"mla_schedule has no constant named BLOCKS, PARTS\."):
        variant.but("other", PARTS=1, MAX_PARTS=2, BLOCKS=3)


def test_headers_are_self_contained() -> None:
    """No CUDA header: NVRTC finds none by itself."""
    headers = variants.by_name("mla_schedule").source().headers
    assert set(headers) == {
        path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.cuh")
    }
    for name, text in headers.items():
        assert not re.search(r"#\s*include\s*<", text), name
        for included in re.findall(r'#\s*include\s*"([^"]+)"', text):
            assert included in headers, f"{name} includes {included}"


def test_the_kernels_know_the_geometry_that_python_knows() -> None:
    decode = variants.by_name("mla_decode_bf16")
    assert decode.threads == geometry.DECODE_THREADS
    assert decode.dynamic_smem_bytes == geometry.DECODE_SHARED_BYTES
    plan = variants.kernels_dir() / "mla_plan.cuh"
    assert f"PLAN_ROW_INTS = {geometry.PLAN_COLUMNS};" in plan.read_text()


# -- where the source is, and its digest ----------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources, laid out as in a checkout, that ``variants`` takes for its own."""
    ignore = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(PACKAGE, tmp_path / "flashmla_rtc", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(variants, "_PACKAGE", tmp_path / "flashmla_rtc")
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    variants.kernels_dir.cache_clear()
    variants._headers.cache_clear()


def digest() -> str:
    forget()
    return variants.sources_digest()


def test_the_source_is_beside_the_package_in_a_checkout(clone: Path) -> None:
    assert variants.kernels_dir() == clone / "kernels"


def test_the_source_is_inside_the_package_when_installed(clone: Path) -> None:
    shutil.copytree(clone / "kernels", clone / "flashmla_rtc" / "kernels")
    (clone / "kernels" / "mla_decode.cuh").write_text("another checkout")
    assert variants.kernels_dir() == clone / "flashmla_rtc" / "kernels"
    assert variants._headers()["mla_decode.cuh"] != "another checkout"


def test_an_unrelated_folder_called_kernels_is_not_taken(clone: Path) -> None:
    (clone / "flashmla_rtc" / "kernels").mkdir()
    assert variants.kernels_dir() == clone / "kernels"


def test_source_that_is_missing_is_one_sentence(clone: Path) -> None:
    shutil.rmtree(clone / "kernels")
    with pytest.raises(FileNotFoundError, match="The CUDA source is missing") as caught:
        variants.kernels_dir()
    assert "Reinstall flashmla_rtc." in str(caught.value)
    assert str(clone / "kernels") in str(caught.value)


def test_the_digest_is_the_same_in_a_copy(clone: Path) -> None:
    here = digest()
    assert re.fullmatch("[0-9a-f]{64}", here)
    variants._PACKAGE = PACKAGE  # the fixture's monkeypatch restores it
    assert digest() == here


def launching() -> list[str]:
    return [f"flashmla_rtc/{name}" for name in variants._LAUNCHING_PYTHON]


def kernel_files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.cuh"))


def test_the_digest_changes_with_every_kernel_file_and_every_launching_module(clone: Path) -> None:
    seen = {digest()}
    for name in [*kernel_files(), *launching()]:
        file = clone / name
        text = file.read_text()
        file.write_text(text + "\n")
        assert digest() not in seen, name
        seen.add(digest())
        file.write_text(text)
    assert digest() in seen


def test_the_digest_changes_with_names_and_new_files(clone: Path) -> None:
    seen = {digest()}
    (clone / "kernels" / "new.cuh").write_text("")
    assert digest() not in seen
    seen.add(digest())
    (clone / "kernels" / "new.cuh").rename(clone / "kernels" / "newer.cuh")
    assert digest() not in seen


def test_the_digest_does_not_change_with_what_no_launch_depends_on(clone: Path) -> None:
    before = digest()
    for name in ("messages.py", "reference.py", "cli/demo.py", "bench/report.py", "__main__.py"):
        file = clone / "flashmla_rtc" / name
        file.write_text(file.read_text() + "\n")
    (clone / "kernels" / "NOTES.md").write_text("no source")
    assert digest() == before


def test_the_digest_of_the_kernels_is_that_of_what_is_compiled(clone: Path) -> None:
    seen = {variants.kernels_digest()}
    for name in launching():
        file = clone / name
        file.write_text(file.read_text() + "\n")
    forget()
    assert {variants.kernels_digest()} == seen
    for name in kernel_files():
        file = clone / name
        file.write_text(file.read_text() + "\n")
        forget()
        assert variants.kernels_digest() not in seen, name
        seen.add(variants.kernels_digest())


def test_the_digest_of_the_kernels_changes_with_their_constants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = variants.kernels_digest()
    first, *rest = variants.all_variants()
    changed = first.but(first.name, MERGE_PATIENCE=1)
    monkeypatch.setattr(variants, "all_variants", lambda: (changed, *rest))
    assert variants.kernels_digest() != before


# What the public calls import beside: nothing here decides what a kernel is given or gives.
NOT_LAUNCHING = {
    "_version.py": "a name in the cache key",
    "messages.py": "the text of errors",
    "plan_html.py": "shows a plan",
    "plan_picture.py": "shows a plan",
    "plan_reading.py": "reads a plan to show it",
    "reference.py": "computes elsewhere",
    "rtc/__init__.py": "names",
    "rtc/build.py": "when to compile",
    "rtc/cache.py": "where the compiled is kept, checked by its digest",
    "validation.py": "reads and raises",
}


def imported_by(module: Path) -> set[Path]:
    """The package's modules that ``module`` imports, by the text of its imports."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.parents[node.level - 1]
            base = base.joinpath(*(node.module or "").split(".")) if node.module else base
            for name in node.names:
                for path in (
                    base / f"{name.name}.py",
                    base.with_suffix(".py"),
                    base / "__init__.py",
                ):
                    if path.is_file():
                        found.add(path)
                        break
    return found


def test_every_module_behind_the_public_calls_is_in_the_digest_or_known_not_to_matter() -> None:
    reached = {PACKAGE / "interface.py"}
    waiting = list(reached)
    while waiting:
        new = imported_by(waiting.pop()) - reached
        reached |= new
        waiting.extend(new)
    names = {path.relative_to(PACKAGE).as_posix() for path in reached}
    assert "sm90.py" in names
    assert "rtc/launch.py" in names
    names.add("overrides.py")  # which exchanges what is launched
    assert names - set(NOT_LAUNCHING) == set(variants._LAUNCHING_PYTHON)
