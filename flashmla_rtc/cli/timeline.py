"""``timeline``: what each thread block of one decode call did when, on this GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from flashmla_rtc.bench.shapes import Shape, parse_pattern
from flashmla_rtc.bench.timeline import record

from . import CommandError
from .bench import require_hopper


def _shape(text: str) -> Shape:
    try:
        batch, seq_len_q, heads_q, seqlen = parse_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if batch is None or seq_len_q is None or heads_q is None or seqlen is None:
        raise argparse.ArgumentTypeError(f"one shape, without stars; got {text!r}")
    return Shape(batch, seq_len_q, heads_q, seqlen)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", type=_shape, help="batch,seq_len_q,heads_q,seqlen")
    parser.add_argument("output", type=Path, help="the JSON file to write, for plot timeline")


def run(arguments: argparse.Namespace) -> int:
    require_hopper("timeline")
    document: dict[str, Any] = record(arguments.shape)
    try:
        arguments.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{arguments.output} could not be written: {error.strerror}.") from None
    print(f"{len(document['blocks'])} thread blocks, wrote {arguments.output}")
    return 0
