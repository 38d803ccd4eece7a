"""``bench``: the grid of shapes on this GPU, with ceilings and peers in the same process."""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from flashmla_rtc._version import __version__
from flashmla_rtc.bench.ceilings import measure_ceilings
from flashmla_rtc.bench.peers import KNOWN, Found, find_peers
from flashmla_rtc.bench.problem import Pool
from flashmla_rtc.bench.report import Report, Table
from flashmla_rtc.bench.run import HOST_SHAPE, Grid, host_times
from flashmla_rtc.bench.shapes import GRIDS, Shape, parse_pattern, select
from flashmla_rtc.bench.timing import GraphTimer, Timer

from . import CommandError, machine


def _peers(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    unknown = [name for name in names if name not in KNOWN]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"known peers are {', '.join(KNOWN)} (or none); got {text!r}"
        )
    return names


def _pattern(text: str) -> Any:
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 60:
        raise argparse.ArgumentTypeError(f"between 0.01 and 60 seconds; got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grid", choices=tuple(GRIDS), default="full", help="64 shapes, or eight of them"
    )
    parser.add_argument(
        "--peers",
        type=_peers,
        default=None,
        metavar="NAMES",
        help=f"{','.join(KNOWN)} or none (default: every one that is installed)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures there, row by row"
    )
    parser.add_argument(
        "--held-seconds",
        type=_seconds,
        default=0.5,
        metavar="S",
        help="how long each kernel is held at each shape (default 0.5)",
    )
    parser.add_argument(
        "--no-held", action="store_true", help="measure bursts only: faster, and flattering"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of queries and keys"
    )
    parser.add_argument(
        "--only",
        type=_pattern,
        action="append",
        default=[],
        metavar="B,S_Q,HEADS,KEYS",
        help="only these shapes, * for any; may be repeated",
    )


def _without_folders(arguments: list[str]) -> list[str]:
    """Where a result was written on the machine that made it is nobody's business."""
    return [os.path.basename(argument) or argument for argument in arguments]


def run(arguments: argparse.Namespace) -> int:
    shapes = select(GRIDS[arguments.grid](arguments.dtype), arguments.only)
    if not shapes:
        raise CommandError("No shape of the grid matches --only.", 2)
    check_writable(arguments.json)
    torch = require_hopper()
    found = find_peers(arguments.peers if arguments.peers is not None else KNOWN)
    for name, reason in found.absent.items():
        print(f"{name} is not measured: {reason}.", file=sys.stderr)
    report = Report(facts(torch, arguments, found), arguments.json)
    try:
        measure(torch, shapes, found, report, None if arguments.no_held else arguments.held_seconds)
    except torch.cuda.OutOfMemoryError as error:
        raise CommandError(
            f"The GPU ran out of memory ({str(error).splitlines()[0]}). The grid needs about 8 GB; "
            "close other programs, or choose smaller shapes with --only."
        ) from error
    return 0


def check_writable(path: Path | None) -> None:
    """Say so before the measurement that FILE cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise CommandError(f"--json must name a file, but {path} is a folder.", 2)
    if not path.parent.is_dir():
        raise CommandError(f"--json names {path}, but the folder {path.parent} does not exist.", 2)
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"--json names {path}, but {path.parent} cannot be written to.", 2)


def require_hopper(command: str = "bench") -> ModuleType:
    """torch, on a machine whose current CUDA device runs the kernels; a sentence otherwise."""
    try:
        import torch
    except ImportError as error:
        raise CommandError(
            f"{command} needs torch with CUDA and a Hopper GPU, and torch cannot be imported "
            f"({error}). See https://pytorch.org/get-started."
        ) from None
    if not torch.cuda.is_available():
        problem = machine.query_cuda().problem
        if problem is None:
            built = torch.version.cuda is not None
            problem = "torch finds no usable GPU." if built else "This torch is built without CUDA."
        raise CommandError(f"{command} needs a Hopper GPU and torch with CUDA. {problem}")
    from flashmla_rtc import backends
    from flashmla_rtc.arrays import Device

    reason = backends.why_not(Device("cuda", torch.cuda.current_device()))
    if reason is not None:
        raise CommandError(f"{command} needs a Hopper GPU and its kernels. {reason}")
    found: ModuleType = torch
    return found


def facts(torch: Any, arguments: argparse.Namespace, found: Found) -> dict[str, Any]:
    """The keys of the document that say what was measured, on what, and how."""
    from flashmla_rtc import variants

    return {
        "device": torch.cuda.get_device_name(),
        "digest": variants.sources_digest(),
        "kernels_digest": variants.kernels_digest(),
        "driver": machine.driver_version(),
        "nvrtc": machine.nvrtc_version_text(),
        "versions": {"flashmla_rtc": __version__, **machine.package_versions()},
        "command": f"python -m flashmla_rtc {shlex.join(_without_folders(sys.argv[1:]))}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "grid": arguments.grid,
        "held_seconds": None if arguments.no_held else arguments.held_seconds,
        "peers": {peer.name: peer.version for peer in found.peers},
        "peers_absent": found.absent,
    }


def measure(
    torch: Any,
    shapes: Sequence[Shape],
    found: Found,
    report: Report,
    held_seconds: float | None,
    timer: Timer | None = None,
    device: str = "cuda",
) -> None:
    """Ceilings, host times, then the grid, each printed and saved as it comes."""
    started = time.monotonic()
    timer = timer or GraphTimer()
    print(f"{report.facts['device']}, driver {report.facts['driver']}", flush=True)
    report.ceilings = measure_ceilings(timer, device, held_seconds)
    release(torch)
    print(_ceilings_line(report.ceilings), flush=True)
    report.save()

    pool = Pool([*shapes, HOST_SHAPE], device, shapes[0].dtype)
    report.host_us, notes = host_times(pool, found.peers, torch.cuda.synchronize)
    print("Host time of one call: " + _host_line(report.host_us), flush=True)
    report.save()

    grid = Grid(
        timer=timer,
        pool=pool,
        peers=found.peers,
        report=report,
        held_seconds=held_seconds,
        notes=notes,
        release=lambda: release(torch),
    )
    table = Table([peer.name for peer in found.peers], held_seconds is not None)
    show(grid.play(shapes), table, len(shapes))
    report.complete = True
    report.facts["seconds"] = round(time.monotonic() - started, 1)
    if grid.notes:
        report.facts["notes"] = grid.notes
    report.save()
    for line in table.summary(report.rows):
        print(line)
    for note in grid.notes:
        print(note, file=sys.stderr)


def release(torch: Any) -> None:
    """Give the memory of one shape's graphs back before the next shape's."""
    gc.collect()
    torch.cuda.empty_cache()


def _ceilings_line(ceilings: dict[str, float]) -> str:
    held = ceilings.get("bf16_matmul_held_TFLOPS")
    return (
        f"Ceilings: reads {ceilings['read_TBps']:.2f} TB/s, "
        f"bf16 matrix product {ceilings['bf16_matmul_TFLOPS']:.0f} TFLOPS"
        + (f" ({held:.0f} held)" if held else "")
    )


def _host_line(host_us: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f} µs" for name, value in host_us.items())


def show(rows: Any, table: Table, total: int) -> None:
    """Print each row as it comes, below a progress bar where stderr is a terminal and tqdm is
    installed.
    """
    write, advance, close = _progress(total)
    write(table.header())
    try:
        for row in rows:
            write(table.line(row))
            advance()
    finally:
        close()


def _progress(
    total: int,
) -> tuple[Callable[[str], Any], Callable[[], Any], Callable[[], Any]]:
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            bar = tqdm(total=total, unit="shape", leave=False)
            return (lambda text: tqdm.write(text)), bar.update, bar.close
    return (lambda text: print(text, flush=True)), (lambda: None), (lambda: None)
