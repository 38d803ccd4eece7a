"""The public types: what type checkers make of programs that use the package, right and wrong."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import flashmla_rtc

HERE = Path(__file__).resolve().parent / "typed"
PACKAGE = Path(flashmla_rtc.__file__).resolve().parent
STUB = PACKAGE / "__init__.pyi"


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **changes}


def complaints(programs: list[Path], cache: Path) -> dict[Path, set[tuple[int, str]]]:
    """Line and code of each error that mypy finds in ``programs``, with no settings of ours."""
    installed = "site-packages" in PACKAGE.parts  # there mypy looks by itself, and for py.typed
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={cache}"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--show-absolute-path", *map(str, programs)],
        cwd=cache,
        env=environment(MYPYPATH="" if installed else str(PACKAGE.parent), PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    found: dict[Path, set[tuple[int, str]]] = {program: set() for program in programs}
    pattern = r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$"
    for name, line, code in re.findall(pattern, result.stdout, re.MULTILINE):
        found[Path(name)].add((int(line), code))
    return found


def expected(program: Path) -> set[tuple[int, str]]:
    """What the comments of ``program`` say."""
    return {
        (number, found[1])
        for number, line in enumerate(program.read_text(encoding="utf-8").splitlines(), 1)
        if (found := re.search(r"# error: ([a-z-]+)$", line))
    }


def test_good_use_is_accepted_and_wrong_use_is_refused(tmp_path: Path) -> None:
    """Every line that says so, for the reason it says, and no other line."""
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    programs = sorted(HERE.glob("*.py"))
    if find_spec("torch") is None:
        programs.remove(HERE / "with_torch.py")
    wanted = {program: expected(program) for program in programs}
    assert len(wanted[HERE / "ill_typed.py"]) > 15
    assert complaints(programs, tmp_path) == wanted


@pytest.mark.parametrize("name, needs", [("well_typed", "numpy"), ("with_torch", "torch")])
def test_the_programs_run(name: str, needs: str, tmp_path: Path) -> None:
    for package in (needs, "typing_extensions"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    program = str(HERE / f"{name}.py")
    subprocess.run([sys.executable, program], cwd=tmp_path, env=environment(), check=True)


# -- the stub says of the functions what is so ----------------------------------------------------


def stub_functions() -> dict[str, list[ast.arguments]]:
    functions: dict[str, list[ast.arguments]] = {}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            functions.setdefault(node.name, []).append(node.args)
    return functions


def test_the_stub_has_every_public_name() -> None:
    names = [
        ast.literal_eval(node.value)
        for node in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert names == [flashmla_rtc.__all__]
    own = {"flashmla_rtc.interface", "flashmla_rtc.metadata"}  # others have their types with them
    public = {name: getattr(flashmla_rtc, name) for name in flashmla_rtc.__all__}
    functions = {
        name for name, it in public.items() if inspect.isfunction(it) and it.__module__ in own
    }
    assert functions == set(stub_functions())


def defaults_of(signature: ast.arguments) -> dict[str, Any]:
    """The arguments of one overload that have defaults, with these."""
    positional = signature.args[len(signature.args) - len(signature.defaults) :]
    pairs = [
        *zip(positional, signature.defaults, strict=True),
        *zip(signature.kwonlyargs, signature.kw_defaults, strict=True),
    ]
    return {
        argument.arg: ast.literal_eval(default)
        for argument, default in pairs
        if default is not None
    }


@pytest.mark.parametrize("name", stub_functions())
def test_the_stub_has_the_functions_arguments(name: str) -> None:
    parameters = inspect.signature(getattr(flashmla_rtc, name)).parameters
    positional = [
        parameter.name
        for parameter in parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    seen: set[str] = set()
    for signature in stub_functions()[name]:
        given = [argument.arg for argument in signature.args]
        assert given == positional[: len(given)]
        by_name = {argument.arg for argument in signature.kwonlyargs}
        assert by_name <= set(parameters)
        seen |= by_name.union(given)
        for argument, default in defaults_of(signature).items():
            assert parameters[argument].default == default
    assert seen == set(parameters)
