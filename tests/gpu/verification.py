"""What a full green run on a Hopper GPU is, and the record that it leaves."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def why_not() -> str | None:
    """Why the tests of this folder can't run here, as a sentence; None where they can."""
    try:
        import torch
    except ImportError:
        return "The GPU tests need torch and a Hopper GPU, and torch is not installed."
    if not torch.cuda.is_available():
        return "The GPU tests need torch and a Hopper GPU, and torch sees no CUDA device."
    if torch.cuda.get_device_capability() != (9, 0):
        name = torch.cuda.get_device_name()
        return f"The GPU tests need torch and a Hopper GPU, and device 0 is an {name}."
    return None


@dataclass
class Ledger:
    """What became of the tests of ``folder`` in one run."""

    folder: Path
    collected: dict[str, Path] = field(default_factory=dict)  # test -> its file
    deselected: int = 0
    passed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)  # allowed skips, with their reasons
    spoiled: set[str] = field(default_factory=set)  # failed, xfailed, skipped without leave

    def note(self, report: Any) -> None:
        """Take in one phase of one test."""
        if report.failed or hasattr(report, "wasxfail"):
            self.spoiled.add(report.nodeid)
        elif report.skipped:
            if "allowed_skip" in report.keywords:
                self.skipped[report.nodeid] = str(report.longrepr[2])
            else:
                self.spoiled.add(report.nodeid)
        elif report.when == "call":
            self.passed.add(report.nodeid)

    def is_complete(self, given: list[Path], narrowed: bool) -> bool:
        """Whether the whole folder was asked for, nothing was left out, and all of it is well."""
        whole = any(path.resolve() in (self.folder, *self.folder.parents) for path in given)
        files = set(self.folder.glob("test_*.py"))
        return (
            whole
            and not narrowed
            and self.deselected == 0
            and files == set(self.collected.values())
            and not self.spoiled
            and self.passed | set(self.skipped) == set(self.collected)
        )

    def write_if_complete(self, given: list[Path], narrowed: bool) -> None:
        """Write ``verified.json`` beside the tests."""
        if self.is_complete(given, narrowed):
            record = {**machine(), "passed": len(self.passed), "skipped": len(self.skipped)}
            record["skipped_tests"] = dict(sorted(self.skipped.items()))
            record["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            path = self.folder / "verified.json"
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """The sources that were tested, and what they ran on."""
    import torch

    from flashmla_rtc import variants
    from flashmla_rtc.cli.machine import driver_version
    from flashmla_rtc.rtc import nvrtc_version

    return {
        "digest": variants.sources_digest(),
        "device": torch.cuda.get_device_name(),
        "driver": driver_version() or "unknown",
        "nvrtc": ".".join(str(part) for part in nvrtc_version()),
        "torch": torch.__version__,
    }
