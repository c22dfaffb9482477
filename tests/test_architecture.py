"""Rules of the code base that no type checker sees: which file may know which, sizes, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "auto_round"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
# Each file or folder may import only what stands on an earlier line, or its own folder.
LAYERS = (
    ("__init__", "errors"),
    ("registry", "schemes", "elements", "memory", "background", "option_values"),
    ("tensors", "config", "distributed", "auto_scheme"),
    ("device", "calls", "channels", "recipes"),
    ("layouts", "data_types", "models", "calibration"),
    ("shards", "calib_dataset", "progress", "conversion", "block", "layer_patterns"),
    ("stored_tensors",),
    ("streamed_tensors",),
    ("checkpoint",),
    ("skeleton",),
    ("blocks", "plan", "store", "extra_tensors"),
    ("tuning", "formats", "inference"),
    ("sources",),
    ("outside",),
    ("end_to_end",),
    ("session",),
    ("blockwise", "model_free", "mixed_bits", "quality"),
    ("pipeline", "evaluation", "report"),
    ("api",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MAY_PRINT = {"cli", "report"}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def module_of(file: Path) -> str:
    parts = ["auto_round", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Returns the file or folder directly below the package."""
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_of(file): file for file in FILES}


def imports_of(file: Path, *, also_inside_functions: bool) -> Iterator[str]:
    """Yields modules of this package that a file imports; type-checking imports count, as they tie files too."""
    tree = TREES[file]
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in inside and not also_inside_functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "auto_round")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            if node.module and node.module.split(".")[0] == "auto_round":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in MODULES else node.module


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(PACKAGE)) for file in files]


def test_the_package_is_found():
    assert len(FILES) > 40


def test_every_file_has_its_layer():
    assert {part_of(module) for module in MODULES} <= set(RANK)


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_a_file_imports_only_earlier_layers(file):
    own = part_of(module_of(file))
    wrong = [
        module
        for module in imports_of(file, also_inside_functions=False)
        if part_of(module) != own and RANK[part_of(module)] >= RANK[own]
    ]
    assert not wrong, f"{own} may not import {wrong}"


def test_there_is_no_import_cycle():
    """At module level, a package's __init__ counted as a module of its own."""
    edges = {
        module: {target for target in imports_of(file, also_inside_functions=False) if target != module}
        for module, file in MODULES.items()
    }
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            finished.add(module)

    for module in edges:
        visit(module, ())


def test_every_import_of_the_package_exists():
    missing = {
        (str(file.relative_to(PACKAGE)), module)
        for file in FILES
        for module in imports_of(file, also_inside_functions=True)
        if module not in MODULES
    }
    assert not missing


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_files_and_functions_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    assert not long


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_no_exception_is_swallowed_unseen(file):
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert not (
                isinstance(node.type, ast.Name)
                and node.type.id in ("Exception", "BaseException")
                and all(isinstance(step, ast.Pass) for step in node.body)
            ), f"line {node.lineno}: every exception is dropped"


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_only_the_command_line_prints_or_exits(file):
    part = part_of(module_of(file))
    for node in ast.walk(TREES[file]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("exit", "quit", "os._exit"), f"line {node.lineno}: {called}()"
        assert called != "print" or part in MAY_PRINT, f"line {node.lineno}: print()"
        assert called != "sys.exit" or part in ("cli", "__main__"), f"line {node.lineno}: sys.exit()"


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_every_file_says_what_it_is_for(file):
    assert ast.get_docstring(TREES[file])


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_no_file_is_named_after_nothing(file):
    assert not {"utils", "util", "helpers", "helper", "misc", "common"} & set(file.with_suffix("").parts)


HEAVY = ("torch", "transformers", "numpy", "safetensors", "accelerate", "datasets")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_nothing_heavy():
    done = run_python(f"import sys, auto_round; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_command_line_helps_without_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['auto_round', '--help']\n"
        "status = None\n"
        "try:\n"
        "    runpy.run_module('auto_round', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    status = exit.code\n"
        "print('status', status, 'torch' in sys.modules)\n"
    )
    done = run_python(code)
    assert done.stdout.strip().splitlines()[-1] == "status 0 False", done.stdout + done.stderr


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "auto_round", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_exported_names_are_found_where_they_are_said_to_be():
    import auto_round

    for name in auto_round.__all__:
        assert name in dir(auto_round)
        if auto_round._EXPORTS[name].startswith("auto_round."):
            tree = TREES[MODULES[auto_round._EXPORTS[name]]]
            defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            assert name in defined
    with pytest.raises(AttributeError, match="no_such_name"):
        auto_round.no_such_name  # noqa: B018
