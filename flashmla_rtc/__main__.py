"""``python -m flashmla_rtc``: its commands. Errors are sentences."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flashmla_rtc import variants
from flashmla_rtc._version import __version__
from flashmla_rtc.cli import CommandError, bench, demo, doctor, kernels, plot, timeline
from flashmla_rtc.rtc.build import compile_mode
from flashmla_rtc.validation import validation_enabled

PROGRAM = "python -m flashmla_rtc"
COMMANDS = {
    "demo": (demo, "decode a random DeepSeek-V3-shaped batch and check it against float64"),
    "doctor": (doctor, "say what this machine has, what works, and what to install"),
    "kernels": (kernels, "compile the kernels and list what each one uses"),
    "bench": (bench, "measure the kernels beside the device's limits and their peers"),
    "timeline": (timeline, "record what the thread blocks of one decode call did when"),
    "plot": (plot, "draw what bench --json or timeline wrote"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog=PROGRAM, description="Multi-head Latent Attention decode for Hopper GPUs."
    )
    top.add_argument("--version", action="version", version=f"flashmla_rtc {__version__}")
    top.add_argument(
        "--traceback", action="store_true", help="show where an unexpected error came from"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=_sentence(summary))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 worked, 1 did not work, 2 asked wrongly, 130
    interrupted.
    """
    arguments = parser().parse_args(argv)
    try:
        _check_environment()
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has left. Python flushes stdout once more at exit: give that somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nflashmla_rtc: interrupted.", file=sys.stderr)
        return 130
    except CommandError as error:
        print(f"flashmla_rtc: {error}", file=sys.stderr)
        return error.code
    except Exception as error:
        if arguments.traceback:
            raise
        print(f"flashmla_rtc: {describe(error)}", file=sys.stderr)
        return 1
    return status


def _check_environment() -> None:
    try:
        compile_mode()
        validation_enabled()
        variants.headers()
    except ValueError as error:
        raise CommandError(str(error), code=2) from error


def describe(error: Exception) -> str:
    """An error that no command expected, as a sentence. The package's own errors are sentences
    already.
    """
    text = str(error).strip()
    if type(error).__module__.partition(".")[0] == "flashmla_rtc" and text:
        return text
    return (
        f"it stopped with {type(error).__name__}{': ' + text if text else ''} "
        f"({PROGRAM} --traceback … shows where)."
    )


if __name__ == "__main__":
    sys.exit(main())
