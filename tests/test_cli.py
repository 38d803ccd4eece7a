"""``python -m flashmla_rtc`` on any machine: its output, its exit status, its errors."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashmla_rtc import __main__ as program
from flashmla_rtc.arrays import CPU, Device
from flashmla_rtc.cli import CommandError, bench, demo, doctor, kernels, machine, sample
from flashmla_rtc.cli.machine import Cuda, CudaDevice

H100 = CudaDevice(0, "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 << 30)
RTX = CudaDevice(0, "NVIDIA GeForce RTX 4090", (8, 9), 128, 24 << 30)


def python_m(*arguments, **options):
    """Run the command as a user does, without any GPU in sight."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FLASHMLA_RTC_COMPILE": "lazy"}
    root = str(Path(program.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "flashmla_rtc", *arguments],
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        env=environment,
        **options,
    )


def is_one_sentence(stderr):
    lines = stderr.strip().splitlines()
    return len(lines) == 1 and lines[0].startswith("flashmla_rtc: ") and lines[0].endswith(".")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "query_cuda", lambda: Cuda(problem="No NVIDIA driver here."))


def devices(monkeypatch, *found, **facts):
    cuda = Cuda(tuple(found), (13, 0), "580.1", None)
    monkeypatch.setattr(machine, "query_cuda", lambda: cuda)


# The program


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("demo", "doctor", "kernels", "bench"))


def test_version(capsys):
    from flashmla_rtc import __version__

    with pytest.raises(SystemExit):
        program.main(["--version"])
    assert capsys.readouterr().out == f"flashmla_rtc {__version__}\n"


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["bench", "--peers", "flash_attn"], "flash_mla"),
        (["bench", "--grid", "huge"], "huge"),
        (["bench", "--only", "1,2"], "batch,seq_len_q,heads_q,seqlen"),
        (["bench", "--held-seconds", "0"], "0.01"),
        (["demo", "--batch", "0"], "0"),
    ],
)
def test_wrong_arguments_are_status_2(capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, text",
    [
        (CommandError("It is closed.", 2), 2, "flashmla_rtc: It is closed.\n"),
        (KeyboardInterrupt(), 130, "\nflashmla_rtc: interrupted.\n"),
        (
            ZeroDivisionError("division by zero"),
            1,
            (
                "flashmla_rtc: it stopped with ZeroDivisionError: division by zero "
                "(python -m flashmla_rtc --traceback … shows where).\n"
            ),
        ),
    ],
)
def test_errors_are_sentences(monkeypatch, capsys, error, status, text):
    def fail(arguments):
        raise error

    monkeypatch.setattr(kernels, "run", fail)
    assert program.main(["kernels"]) == status
    assert capsys.readouterr().err == text


def test_the_packages_own_errors_are_shown_as_they_are(monkeypatch, capsys):
    from flashmla_rtc.rtc.compiler import CompilerMissing

    def fail(arguments):
        raise CompilerMissing("Compiling needs NVRTC.")

    monkeypatch.setattr(kernels, "run", fail)
    assert program.main(["kernels"]) == 1
    assert capsys.readouterr().err == "flashmla_rtc: Compiling needs NVRTC.\n"


def test_a_developer_can_ask_for_the_traceback(monkeypatch):
    def fail(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(kernels, "run", fail)
    with pytest.raises(ZeroDivisionError):
        program.main(["--traceback", "kernels"])


@pytest.mark.skipif(os.name != "posix", reason="closes a pipe as a POSIX shell does")
def test_a_reader_that_leaves_is_met_with_silence():
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "FLASHMLA_RTC_COMPILE": "lazy", "CUDA_VISIBLE_DEVICES": ""}
    root = str(Path(program.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "flashmla_rtc", "doctor", "--no-try"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
    assert done.stderr == ""
    assert done.returncode == 1


# demo


def test_demo_runs_on_the_cpu_and_says_so():
    done = python_m("demo", "--batch", "2", "--heads", "16", "--seqlen", "200")
    assert done.returncode == 0, done.stderr
    assert "the CPU backend" in done.stdout
    assert "(2, 1, 16, 576)" in done.stdout
    assert "(2, 1, 16, 512)" in done.stdout
    assert "TFLOPS" in done.stdout
    assert "GB/s" in done.stdout
    assert "The result agrees with float64." in done.stdout
    assert done.stderr == ""


def test_demo_with_numpy_alone(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(demo, "cpu_library", sample.NumPyLibrary)
    status = program.main(["demo", "--batch", "2", "--heads", "3", "--seqlen", "90"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert "float16 arrays of NumPy" in text
    assert "No NVIDIA driver here." in text


def test_demo_with_several_query_tokens(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(demo, "cpu_library", sample.NumPyLibrary)
    arguments = ["demo", "--batch", "3", "--heads", "2", "--seqlen", "2", "--seq-len-q", "3"]
    assert program.main(arguments) == 0, capsys.readouterr()


def test_demo_fails_when_the_result_is_wrong(no_gpu, monkeypatch, capsys):
    def wrong(batch):
        decode = sample.decoder(batch)

        def decode_wrongly():
            out, lse = decode()
            return out * np.float16(1.01), lse

        return decode_wrongly

    monkeypatch.setattr(demo, "cpu_library", sample.NumPyLibrary)
    monkeypatch.setattr(demo, "decoder", wrong)
    assert program.main(["demo", "--batch", "1", "--heads", "2", "--seqlen", "64"]) == 1
    captured = capsys.readouterr()
    assert "agrees" not in captured.out
    assert "further from float64" in captured.err


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:-1", ""])
def test_demo_refuses_what_is_no_device(no_gpu, device):
    with pytest.raises(CommandError, match="auto, cpu, cuda or cuda:N") as refusal:
        demo.choose(device)
    assert refusal.value.code == 2


def test_demo_does_not_fall_back_when_a_gpu_was_asked_for(no_gpu, monkeypatch):
    with pytest.raises(CommandError, match="No NVIDIA driver here"):
        demo.choose("cuda")
    devices(monkeypatch, H100)
    with pytest.raises(CommandError, match=r"no cuda:3: this machine has one CUDA device"):
        demo.choose("cuda:3")


def test_demo_says_why_a_gpu_that_nothing_reaches_is_not_used(monkeypatch):
    devices(monkeypatch, H100)
    monkeypatch.setattr(demo, "gpu_library", lambda device: None)
    choice = demo.choose("auto")
    assert choice.library.device == CPU
    assert "H100" in choice.reason
    assert "neither torch with CUDA nor CuPy" in choice.reason


@pytest.mark.parametrize("backend", ["sm90", "reference"])
def test_demo_takes_the_gpu_where_there_is_one(monkeypatch, backend):
    from flashmla_rtc import backends

    class Library:
        device = Device("cuda", 0)

    devices(monkeypatch, H100 if backend == "sm90" else RTX)
    monkeypatch.setattr(demo, "gpu_library", lambda device: Library())
    reason = None if backend == "sm90" else "It is not a Hopper GPU."
    monkeypatch.setattr(backends, "why_not", lambda device: reason)
    choice = demo.choose("auto")
    assert choice.library.device == Device("cuda", 0)
    assert choice.backend == backend
    assert choice.reason == (reason or "")


@pytest.mark.parametrize("missing", ["torch", "array-api-compat"])
def test_the_cpu_library_is_numpy_where_torch_cannot_serve(monkeypatch, missing):
    if missing == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(machine, "package_version", lambda name: None)
    assert isinstance(demo.cpu_library(), sample.NumPyLibrary)


# samples and their check


def test_a_batch_uses_every_page_once_and_counts_its_work():
    batch = sample.make_batch(sample.NumPyLibrary(), np.array([1, 64, 65, 200], np.int32), 2, 3)
    used = batch.block_table[batch.block_table >= 0]
    assert sorted(used.tolist()) == list(range(batch.k_cache.shape[0]))
    assert (batch.block_table >= 0).sum(axis=1).tolist() == [1, 1, 2, 4]
    assert batch.flops == 2 * 330 * 6 * (576 + 512)
    assert batch.bytes == 2 * (330 * 576 + 4 * 6 * (576 + 512))


def test_the_check_sees_a_wrong_value_and_a_wrong_lse():
    batch = sample.make_batch(sample.NumPyLibrary(), np.array([1, 70], np.int32), 2, 3)
    out, lse = sample.decoder(batch)()
    assert np.isposinf(lse).any()  # the first of two queries over one key sees none
    assert sample.compare(batch, out, lse).small
    assert not sample.compare(batch, np.roll(out, 1, axis=2), lse).small
    assert not sample.compare(batch, out, lse + 1e-4).small
    assert not sample.compare(batch, out, np.where(np.isposinf(lse), 0, lse)).small
    out[0, 0, 0, 0] = np.nan
    assert not sample.compare(batch, out, lse).small


# kernels


@pytest.fixture
def nvrtc():
    from flashmla_rtc.rtc.compiler import CompilerMissing, nvrtc_version

    try:
        nvrtc_version()
    except CompilerMissing as error:
        pytest.skip(str(error))


def test_kernels_json_has_the_agreed_keys(nvrtc, capsys):
    from flashmla_rtc import variants

    assert program.main(["kernels", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"digest", "kernels"}
    assert document["digest"] == variants.sources_digest()
    assert [k["name"] for k in document["kernels"]] == [
        variant.name for variant in variants.default_variants()
    ]
    for kernel, variant in zip(document["kernels"], variants.default_variants(), strict=True):
        assert set(kernel) == {
            "name",
            "registers",
            "spill_bytes",
            "smem_bytes",
            "compile_seconds",
        }
        assert kernel["registers"] > 0
        assert kernel["spill_bytes"] == 0
        assert variant.dynamic_smem_bytes <= kernel["smem_bytes"] <= 227 * 1024
        assert kernel["compile_seconds"] > 0


def test_kernels_table(capsys):
    kernels.print_table(
        {
            "digest": "abc",
            "kernels": [
                {
                    "name": "mla_decode_bf16",
                    "registers": 168,
                    "spill_bytes": 0,
                    "smem_bytes": 230000,
                    "compile_seconds": 4.56,
                }
            ],
        }
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len(lines[0]) == len(lines[1])
    assert lines[1].split() == ["mla_decode_bf16", "168", "0", "230,000", "4.6", "s"]
    assert lines[2] == "digest abc"


# doctor


def test_doctor_without_a_gpu(no_gpu, capsys):
    assert program.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "No NVIDIA driver here." in text
    assert "reference backend: works" in text
    assert "There is no GPU here" in text


@pytest.mark.parametrize("compiler", [True, False])
def test_doctor_with_nothing_installed(monkeypatch, capsys, compiler):
    from flashmla_rtc.rtc import compiler as compiler_module

    def missing():
        raise compiler_module.CompilerMissing("NVRTC is not installed.")

    devices(monkeypatch, H100)
    monkeypatch.setattr(machine, "package_version", lambda name: None)
    monkeypatch.setattr(doctor, "gpu_library", lambda device: None)
    if not compiler:
        monkeypatch.setattr(compiler_module, "nvrtc_version", missing)
    assert program.main(["doctor", "--no-try"]) == 0
    text = capsys.readouterr().out
    assert "H100" in text
    assert "compute capability 9.0" in text
    assert "No array library reaches cuda:0" in text
    assert ("pip install 'flashmla_rtc[cu13]': it brings NVRTC" in text) is not compiler


def test_doctor_survives_answers_that_fail(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise RuntimeError("odd\nfailure")

    from flashmla_rtc import backends, variants

    devices(monkeypatch, H100)
    monkeypatch.setattr(backends, "why_not", fail)
    monkeypatch.setattr(doctor, "cpu_library", fail)
    monkeypatch.setattr(doctor, "_torch", fail)
    monkeypatch.setattr(kernels, "describe", fail)
    monkeypatch.setattr(type(variants.builder.cache), "state", fail)
    program.main(["doctor"])
    text = capsys.readouterr().out
    assert text.count("asking failed (RuntimeError: odd)") == 5


def test_doctor_sees_a_backend_that_is_wrong(no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "attempt", lambda library: (False, "is WRONG"))
    assert program.main(["doctor"]) == 1
    assert "is WRONG" in capsys.readouterr().out


def test_doctor_says_what_failed(monkeypatch):
    def fail(batch):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(doctor, "decoder", fail)
    works, verdict = doctor.attempt(sample.NumPyLibrary())
    assert not works
    assert "no such kernel" in verdict


def test_doctor_knows_which_extra_fits_the_driver():
    assert doctor._extra(Cuda((H100,), (12, 8), "570.1")) == "cu12"
    assert doctor._extra(Cuda((H100,), (13, 0), "580.1")) == "cu13"
    assert doctor._extra(Cuda()) == "cu13"


def test_doctor_on_a_gpu_that_is_not_hopper(monkeypatch):
    from flashmla_rtc import backends

    devices(monkeypatch, RTX)
    monkeypatch.setattr(backends, "why_not", lambda device: "It is not a Hopper GPU.")
    monkeypatch.setattr(doctor, "gpu_library", lambda device: sample.NumPyLibrary())
    text = "\n".join(doctor.examine(try_devices=False).lines)
    assert "reference backend (It is not a Hopper GPU)" in text
    assert "is not a Hopper GPU: the reference backend takes arrays on it." in text


# machine


class FakeDriver:
    """libcuda with one H100."""

    def __init__(self, status=0, count=1):
        self.status, self.count = status, count

    def cuInit(self, flags):
        return self.status

    def cuDriverGetVersion(self, out):
        out._obj.value = 13010

    def cuDeviceGetCount(self, out):
        out._obj.value = self.count

    def cuDeviceGet(self, out, index):
        out._obj.value = index

    def cuDeviceGetName(self, text, size, handle):
        text.value = b"NVIDIA H100"

    def cuDeviceTotalMem_v2(self, out, handle):
        out._obj.value = 80 << 30

    def cuDeviceGetAttribute(self, out, which, handle):
        out._obj.value = {75: 9, 76: 0, 16: 132}[which]


def libraries(monkeypatch, **found):
    def load(name):
        for key, library in found.items():
            if name.startswith(f"lib{key}"):
                return library
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_devices_are_read_from_the_driver_alone(monkeypatch):
    libraries(monkeypatch, cuda=FakeDriver())
    cuda = machine.query_cuda()
    assert cuda.problem is None
    assert cuda.cuda_version == (13, 1)
    assert cuda.driver_version is None
    assert cuda.devices == (CudaDevice(0, "NVIDIA H100", (9, 0), 132, 80 << 30),)


@pytest.mark.parametrize(
    "driver, words",
    [
        (None, "No NVIDIA driver is installed"),
        (FakeDriver(status=100), "sees no GPU"),
        (FakeDriver(status=803), "CUDA error 803"),
        (FakeDriver(count=0), "sees no GPU"),
        (object(), "could not be asked (AttributeError"),
    ],
)
def test_a_driver_that_is_absent_or_refuses_is_a_sentence(monkeypatch, driver, words):
    libraries(monkeypatch, **({} if driver is None else {"cuda": driver}))
    cuda = machine.query_cuda()
    assert cuda.devices == ()
    assert cuda.problem is not None
    assert words in cuda.problem
    assert cuda.problem.endswith(".")


def test_versions_name_python_and_numpy():
    versions = machine.package_versions()
    assert versions["numpy"] == np.__version__
    assert versions["python"].startswith(f"{sys.version_info[0]}.")
    assert "cupy-cuda12x" not in versions or "cupy-cuda13x" not in versions


# bench


def test_bench_without_a_gpu_is_one_sentence():
    done = python_m("bench", "--grid", "quick")
    assert done.returncode == 1
    assert done.stdout == ""
    assert is_one_sentence(done.stderr), done.stderr
    assert "Hopper GPU" in done.stderr


def test_bench_without_torch_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert program.main(["bench"]) == 1
    error = capsys.readouterr().err
    assert is_one_sentence(error), error
    assert "torch" in error


@pytest.mark.parametrize(
    "name, words", [("missing/figures.json", "does not exist"), (".", "is a folder")]
)
def test_bench_says_first_that_the_file_cannot_be_written(tmp_path, capsys, name, words):
    assert program.main(["bench", "--json", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert is_one_sentence(error)
    assert words in error


def test_bench_with_no_matching_shape(capsys):
    assert program.main(["bench", "--only", "7,*,1,1"]) == 2
    assert is_one_sentence(capsys.readouterr().err)


def test_bench_describes_what_it_measured(monkeypatch):
    torch = pytest.importorskip("torch")
    from flashmla_rtc.bench.peers import Found, Peer

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(sys, "argv", ["x", "bench", "--grid", "quick"])
    arguments = program.parser().parse_args(["bench", "--grid", "quick"])
    found = Found([Peer("flash_mla", "sgl-flash-mla 1.0.0", lambda *_: [])], {"flashinfer": "no"})
    facts = bench.facts(torch, arguments, found)
    known = {"device", "digest", "kernels_digest", "driver", "nvrtc", "versions", "command"}
    assert known <= set(facts)
    assert facts["command"] == "python -m flashmla_rtc bench --grid quick"
    assert facts["peers"] == {"flash_mla": "sgl-flash-mla 1.0.0"}
    assert facts["peers_absent"] == {"flashinfer": "no"}
    assert facts["versions"]["torch"]
    json.dumps(facts)


def test_rows_are_printed_as_they_come(capsys):
    from flashmla_rtc.bench.report import Table, make_row
    from flashmla_rtc.bench.shapes import Shape
    from flashmla_rtc.bench.timing import Timing

    shape = Shape(1, 1, 16, 4096)
    seen = []

    def rows():
        for index in range(2):
            seen.append(capsys.readouterr().out.count("\n"))
            yield make_row(shape, Timing(1e-5 * (index + 1), None), {}, {}, {})

    bench.show(rows(), Table([], False), 2)
    assert seen == [1, 1]  # the header before the first row, the first row before the second
    assert "20.0" in capsys.readouterr().out
