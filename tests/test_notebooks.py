"""The notebooks: each one runs here, on the CPU, and was committed as a Hopper GPU left it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flashmla_rtc import variants

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
RUN = "Run `python examples/run_notebooks.py` on a Hopper GPU and commit the notebooks."
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
# Paths of a machine and of a user, and what a warning says of where it came from.
COMPILING = re.compile(r"(flashmla_rtc: compiling \d+ kernels? for sm_90a [^\n]*\n)+")
PATHS = re.compile(r"/(home|root|Users|tmp|usr|opt|var|mnt|data|workspace)/|[A-Z]:\\|site-packages")
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    """The Python of a cell, without IPython's own commands."""
    text = "".join(cell["source"])
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("%", "!")))


def prints(code: str) -> bool:
    """Whether a cell's own statements, not those of functions it defines, call ``print``."""

    def calls(node: ast.AST) -> Iterator[ast.Call]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
                continue
            if isinstance(child, ast.Call):
                yield child
            yield from calls(child)

    return any(
        isinstance(call.func, ast.Name) and call.func.id == "print"
        for call in calls(ast.parse(code))
    )


def texts(cell: dict[str, Any]) -> str:
    """What the outputs of a cell say, pictures left out."""
    said = []
    for output in cell["outputs"]:
        said += ["".join(output.get("text", "")), *output.get("traceback", [])]
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/"):
                said.append("".join(data))
    return "\n".join(said)


def wanting(cells: list[dict[str, Any]]) -> list[str]:
    """The cells that print and have no output."""
    return [source(cell) for cell in cells if prints(source(cell)) and not cell["outputs"]]


def test_there_are_notebooks() -> None:
    assert {"quickstart", "how_mla_decode_works"} <= {path.stem for path in NOTEBOOKS}


def test_a_cell_that_prints_is_known() -> None:
    assert prints("for i in range(3):\n    print(i)")
    assert prints("with a as b:\n    x = [print(i) for i in b]")
    assert not prints("def f():\n    print(1)\nx = f")
    assert not prints("pprint(3)")
    code = {"cell_type": "code", "source": ["%matplotlib inline\n", "print(1)"], "outputs": []}
    assert wanting([code]) == ["print(1)"]
    assert wanting([{**code, "outputs": [{"output_type": "stream", "text": ["1"]}]}]) == []


@pytest.mark.parametrize(
    "text", ["/home/ann/x.py:3: UserWarning", "in /opt/lib", "C:\\Users", "site-packages/a"]
)
def test_paths_of_a_machine_are_known(text: str) -> None:
    assert PATHS.search(text)
    assert not PATHS.search("3.1 TB/s, 1/2, and/or, examples/quickstart.ipynb")


@EACH
def test_it_was_run_on_a_hopper_gpu_with_these_kernels(path: Path) -> None:
    record = read(path)["metadata"].get("flashmla_rtc")
    assert record, f"{path.name} says nowhere on which device it was run. {RUN}"
    assert HOPPER.search(record["device"]), f"{path.name} was run on {record['device']}. {RUN}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
    assert {"python", "numpy"} <= set(record["versions"])
    assert record["kernels_digest"] == variants.kernels_digest(), (
        f"{path.name} was run with other kernels. {RUN}"
    )


@EACH
def test_it_was_run_from_top_to_bottom_without_an_error(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], RUN
    assert not wanting(cells), RUN
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds


@EACH
def test_outputs_say_nothing_of_the_machine_but_its_gpu(path: Path) -> None:
    for cell in code_cells(read(path)):
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"]
        found = PATHS.search(texts(cell))
        assert found is None, f"{path.name} shows the path {found and found[0]}: {texts(cell)}"


@EACH
def test_pictures_are_in_the_file(path: Path) -> None:
    notebook = read(path)
    for cell in code_cells(notebook):
        kinds = [set(output.get("data", {})) for output in cell["outputs"]]
        pictures = [kind for kind in kinds if kind & {"image/png", "image/svg+xml"}]
        if "plt.show" in source(cell):
            assert pictures, f"{path.name} draws and shows no picture. {RUN}"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", "".join(cell["source"])):
                assert target.startswith("attachment:"), f"{path.name} shows {target}"


@EACH
def test_links_lead_somewhere(path: Path) -> None:
    for cell in read(path)["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"])):
                if not target.startswith(("http", "#", "mailto:", "attachment:")):
                    assert (EXAMPLES / target.partition("#")[0]).exists(), target


@pytest.fixture(scope="module")
def script() -> Any:
    """The module, which can be imported without what it needs to run notebooks."""
    place = importlib.util.spec_from_file_location("run_notebooks", EXAMPLES / "run_notebooks.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner(script: Any) -> Any:
    for package in script.RUNNERS:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return script


@EACH
def test_it_runs_here(path: Path, runner: Any) -> None:
    """On the CPU, whatever the machine; any error of a cell is an error of the test."""
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    executed = runner.execute(path, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    cells = code_cells(executed)
    assert cells
    assert not wanting(cells)
    for cell in cells:
        said = [out for out in cell["outputs"] if out.get("name") == "stderr"]
        # That a kernel is being compiled, and where it is kept, is said where the cache is cold.
        assert all(COMPILING.fullmatch("".join(out["text"])) for out in said), texts(cell)
        assert said or not PATHS.search(texts(cell)), texts(cell)


def written_with(code: str, folder: Path) -> Path:
    """A notebook of one cell."""
    nbformat = pytest.importorskip("nbformat")
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)
    return path


def test_the_runner_writes_down_where(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "small.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")]), path
    )
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "device", lambda: "CPU")
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py"])
    with pytest.raises(SystemExit, match="--output FOLDER"):
        runner.main()
    assert not code_cells(read(path))[0]["outputs"]
    output = tmp_path / "made" / "output"  # is made, with the folder that it is in
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--output", str(output)])
    runner.main()
    assert not code_cells(read(path))[0]["outputs"]
    written = read(output / path.name)
    (cell,) = code_cells(written)
    assert texts(cell) == "42\n"
    assert cell["execution_count"] == 1
    record = written["metadata"]["flashmla_rtc"]
    assert record["kernels_digest"] == variants.kernels_digest()
    assert record["device"] == runner.device()
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize("package", ["nbformat", "nbclient", "ipykernel"])
def test_the_runner_says_what_to_install(
    package: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--output", "unused"])
    for name in script.RUNNERS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == (
        f"Running notebooks needs {package}: pip install 'flashmla_rtc[notebooks]' "
        "(from a checkout: pip install -e '.[notebooks]')."
    )


def test_an_output_that_can_t_be_a_folder_is_said_before_anything_runs(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "--output", str(tmp_path / "file")])
    monkeypatch.setattr(runner, "execute", lambda path: pytest.fail(f"{path} was run"))
    with pytest.raises(SystemExit, match="can't be made: File exists"):
        runner.main()


def test_a_failing_cell_is_an_error(runner: Any, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    errors = pytest.importorskip("nbclient.exceptions")
    path = tmp_path / "wrong.ipynb"
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")]), path
    )
    before = path.read_bytes()
    with pytest.raises(errors.CellExecutionError, match="AssertionError"):
        runner.execute(path)
    assert path.read_bytes() == before
