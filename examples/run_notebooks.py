"""Run the notebooks of this folder in place and write down where: device, versions, sources.

    python examples/run_notebooks.py [--output FOLDER] [NAME.ipynb ...]

Needs nbclient and ipykernel (extra `notebooks`), no Jupyter server and no installed kernel: the
kernel is this interpreter. The notebooks are committed as this leaves them on a Hopper GPU;
tests/test_notebooks.py runs them again on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CELL_SECONDS = 300
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
RUNNERS = ("nbformat", "nbclient", "ipykernel")
PACKAGES = (
    "numpy", "torch", "cupy-cuda13x", "cupy-cuda12x", "jax", "matplotlib", "cuda-bindings",
)  # fmt: skip


def execute(path: Path, **environment: str) -> NotebookNode:
    """The notebook with the outputs of a run from top to bottom; ``path`` itself stays as it is.

    Args:
        environment: variables for the kernel, besides those of this process.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message shows it.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(KernelSpecManager):  # type: ignore[misc]
        """Has one kernel under any name, whatever is or is not installed on the machine."""

        def get_kernel_spec(self, kernel_name: str) -> Any:
            launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=launch, display_name="Python 3", language="python")

    with contextlib.suppress(ImportError):  # its cache of fonts, which it would report on
        importlib.import_module("matplotlib.font_manager")
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {
            name: str(Path(scratch) / name)
            for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
        }
        paths = [str(ROOT), *filter(None, sys.path), os.environ.get("PYTHONPATH", "")]
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=ThisInterpreter(),
            connection_file=str(Path(scratch) / "kernel.json"),
            transport="ipc",
        )
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(path.parent)}},
            coalesce_streams=True,
            record_timing=False,  # times would make a difference in every run
        )
        client.execute(
            cleanup_kc=True,  # the manager is ours; the kernel is not to outlive the run
            cwd=str(path.parent),
            env={
                **os.environ,
                **folders,
                "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's remarks on the machine
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                **environment,
            },
        )
    return notebook


def where() -> dict[str, Any]:
    """What a run is worth knowing of: device, date, versions, and the digest of the kernels."""
    import flashmla_rtc
    from flashmla_rtc import variants

    return {
        "device": device(),
        "kernels_digest": variants.kernels_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "flashmla_rtc": flashmla_rtc.__version__,
            **versions(),
        },
    }


def device() -> str:
    """The name of CUDA device 0, or the CPU if there is none."""
    try:
        import torch

        if torch.cuda.is_available():
            return str(torch.cuda.get_device_name(0))
    except ImportError:
        pass
    try:
        import cupy

        if cupy.is_available():
            return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    except ImportError:
        pass
    return f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tidy(notebook: NotebookNode) -> None:
    """Drop from the metadata what changes with the machine and not with the notebook."""
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


def needs_packages() -> None:
    """Say what to install if one of the packages that run notebooks is not there."""
    missing = [name for name in RUNNERS if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Running notebooks needs {', '.join(missing)}: pip install 'flashmla_rtc[notebooks]' "
            "(from a checkout: pip install -e '.[notebooks]')."
        )


def main() -> None:
    sys.path.insert(0, str(ROOT))  # this clone's package, installed or not
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks of this folder; all if none is given")
    parser.add_argument(
        "--output", type=Path, help="a folder to write them to, not in place of those that are run"
    )
    arguments = parser.parse_args()
    needs_packages()
    import nbformat

    names, output = arguments.names, arguments.output
    paths = [HERE / Path(name).name for name in names] or sorted(HERE.glob("*.ipynb"))
    recorded = where()
    if output is None and not HOPPER.search(recorded["device"]):
        raise SystemExit(
            "The notebooks hold the outputs of a Hopper GPU, and there is none here: name another "
            "folder for what they give on this machine, --output FOLDER."
        )
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"The folder {output} can't be made: {error.strerror}.") from None
    print(f"On {recorded['device']}:")
    for path in paths:
        start = time.perf_counter()
        notebook = execute(path)
        tidy(notebook)
        notebook.metadata["flashmla_rtc"] = recorded
        nbformat.write(notebook, (output or HERE) / path.name)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
