"""What keeps the code easy to find one's way in, imports that go down only and short functions, and commands quick."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 80
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "minigpt4").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported_at_once(tree: ast.Module) -> list[ast.ImportFrom]:
    """Imports that run with the module; those for type checkers and those in functions do not."""
    return [node for node in tree.body if isinstance(node, ast.ImportFrom)]


def targets(node: ast.ImportFrom) -> set[str]:
    return {full if (full := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}


def test_imports_have_no_circles_through_packages_either():
    graph = {}
    for name, tree in TREES.items():
        used = {target for node in imported_at_once(tree) for target in targets(node) if target in FILES}
        packages = {".".join(target.split(".")[:end]) for target in used for end in range(1, target.count(".") + 1)}
        graph[name] = used | {package for package in packages if not f"{name}.".startswith(f"{package}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_imports_the_face_of_its_own_package():
    faults = [
        f"{name} imports {alias.name} from {node.module}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == name.rpartition(".")[0] and "." in node.module
        for alias in node.names
        if f"{node.module}.{alias.name}" not in FILES
    ]
    assert not faults


def test_functions_fit_on_a_screen():
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= LONGEST
    ]
    assert not long


def test_commands_name_a_wrong_option_without_waiting_for_torch():
    slow = {"make_instructions", "pretrain_mini_vision", "to_safetensors", "first_gpu_run"}
    files = [ROOT / f"{name}.py" for name in ("train", "demo", "serve")]
    files += [file for folder in ("eval_scripts", "scripts") for file in sorted((ROOT / folder).glob("*.py"))]
    code = (
        "import runpy, sys\n"
        "for file in sys.argv[1:]:\n"
        "    runpy.run_path(file)\n"
        "    assert 'torch' not in sys.modules, file\n"
    )
    command = [sys.executable, "-c", code, *(file for file in files if file.stem not in slow)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
