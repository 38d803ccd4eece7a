"""Code in a process of its own, which may fork, end badly or not end at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def python(code: str, timeout: float = 200) -> str:
    """What ``code`` prints in a fresh interpreter that finds the helpers of this folder.

    Fails if it has not ended after ``timeout`` seconds; it is killed then.
    """
    begin = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(ROOT)!r}]\n"
    result = subprocess.run(
        [sys.executable, "-c", begin + code],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
