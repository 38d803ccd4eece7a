"""``plot``: a picture of what ``bench --json`` or ``timeline`` wrote. No GPU needed."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from flashmla_rtc.bench.pictures import PICTURES

from . import CommandError

# What docs/api.md promises; matplotlib writes more.
_ENDINGS = (".svg", ".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", choices=tuple(PICTURES), help="what to draw")
    parser.add_argument("results", type=Path, help="a file that bench --json or timeline wrote")
    parser.add_argument("output", type=Path, help="where to write it: .svg, .png or .pdf")


def run(arguments: argparse.Namespace) -> int:
    ending = arguments.output.suffix.lower()
    if ending not in _ENDINGS:
        raise CommandError(
            f"{arguments.output} can't be written: "
            "plot writes files that end in .svg, .png or .pdf."
        )
    text, document = _read(arguments.results)
    try:
        import matplotlib
    except ImportError:
        raise CommandError(
            "plot needs matplotlib, which is not installed: pip install 'flashmla_rtc[plot]'."
        ) from None
    source = "timeline" if arguments.picture == "timeline" else "bench --json"
    needs = f"{arguments.picture} needs what {source} writes."
    try:
        figure = PICTURES[arguments.picture](document)
    except KeyError as error:
        raise CommandError(f"{arguments.results} has no {error.args[0]}: {needs}") from None
    except (TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise CommandError(f"{arguments.results} can't be drawn ({error}): {needs}") from None
    # The same results give the same file, which names them.
    origin = f"results sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    metadata = {"Date": None, "Description": origin} if ending == ".svg" else None
    try:
        with matplotlib.rc_context({"svg.hashsalt": "flashmla_rtc", "svg.fonttype": "none"}):
            figure.savefig(arguments.output, dpi=150, metadata=metadata)
    except (OSError, ValueError) as error:
        raise CommandError(f"{arguments.output} could not be written: {error}.") from None
    print(f"wrote {arguments.output}")
    return 0


def _read(path: Path) -> tuple[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)
    except OSError as error:
        raise CommandError(f"{path} could not be read: {error.strerror}.") from None
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}.") from None
