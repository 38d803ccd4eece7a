"""The Python in the pages runs on the GPU: all of it, in order, as it stands."""

from __future__ import annotations

from pathlib import Path

import pages  # from the folder above, which holds a conftest.py and so is on the path
import pytest

WITH_PYTHON = [page for page in pages.pages() if pages.python_blocks(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_pages_python_runs(page: Path, tmp_path: Path) -> None:
    available = {pages.GPU, *pages.installed()}
    result = pages.run_apart(page, available, tmp_path)
    assert result.returncode == 0, result.stderr
    needs = set().union(*(block.needs for block in pages.python_blocks(page)))
    if missing := sorted(needs - available):
        pytest.skip(f"needs {', '.join(missing)}, which is not installed")
