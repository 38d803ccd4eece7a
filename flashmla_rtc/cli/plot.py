"""``plot``: a picture of what ``bench --json`` wrote. No GPU needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flashmla_rtc.bench.pictures import PICTURES

from . import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", choices=tuple(PICTURES), help="what to draw")
    parser.add_argument("results", type=Path, help="a file that bench --json wrote")
    parser.add_argument("output", type=Path, help="where to write it: .svg, .png or .pdf")


def run(arguments: argparse.Namespace) -> int:
    document = _read(arguments.results)
    try:
        import matplotlib
    except ImportError:
        raise CommandError(
            "plot needs matplotlib, which is not installed: pip install 'flashmla_rtc[plot]'."
        ) from None
    try:
        figure = PICTURES[arguments.picture](document)
    except (KeyError, TypeError) as error:
        raise CommandError(
            f"{arguments.results} has no {error.args[0] if error.args else 'rows'}: "
            f"{arguments.picture} needs what bench --json writes."
        ) from None
    try:
        # The same data give the same file, and text stays text.
        with matplotlib.rc_context({"svg.hashsalt": "flashmla_rtc", "svg.fonttype": "none"}):
            metadata = {"Date": None} if arguments.output.suffix == ".svg" else None
            figure.savefig(arguments.output, dpi=150, metadata=metadata)
    except (OSError, ValueError) as error:
        raise CommandError(f"{arguments.output} could not be written: {error}.") from None
    print(f"wrote {arguments.output}")
    return 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path} could not be read: {error.strerror}.") from None
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}.") from None
