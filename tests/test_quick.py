"""`pytest -m quick` runs the suites that it promises, and none that waits for peft."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

TESTS = Path(__file__).parent
WITH_MLX = {"test_affine.py"}  # which the extra `quick` lacks
KERNELS = [path for path in (TESTS / "kernels").glob("test_*.py") if path.name not in WITH_MLX]
SUITES = {
    *(path.relative_to(TESTS).as_posix() for path in KERNELS),
    *(f"combine/{name}.py" for name in ("test_methods", "test_single_methods", "test_trimming")),
    *(
        f"formats/{name}.py"
        for name in ("test_configs", "test_fusing", "test_pickles", "test_rows")
    ),
    "hostile/test_layers.py",
    "jobs/test_launcher.py",
    "options/test_options.py",
    "planning/test_budget.py",
    "runtime/test_config.py",
    "runtime/test_misuse.py",
    "runtime/test_report.py",
    "runtime/test_signatures.py",
    "runtime/test_target_rules.py",
    "score/test_intervals.py",
    "test_errors.py",
    "test_no_torch.py",
    "test_quick.py",
    "weights/test_slots.py",
}
QUICK = {
    path.relative_to(TESTS).as_posix(): path.read_text("utf-8")
    for path in TESTS.rglob("test_*.py")
    if "pytest.mark.quick" in path.read_text("utf-8")
}


def test_the_suites_are_quick():
    assert set(QUICK) == SUITES and len(SUITES) >= 13


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_file_is_quick_as_a_whole_and_imports_no_model(name):
    """conftest.py goes by the text alone, and does not import what is not quick."""
    assert re.search(r"^pytestmark = \[?pytest\.mark\.quick\b", QUICK[name], re.MULTILINE)
    modules = set()
    for node in ast.parse(QUICK[name]).body:
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    heavy = {"peft", *(f"tests.support.{name}" for name in ("oracle", "deltas", "architectures"))}
    assert not {module for module in modules if module in heavy or module.startswith("peft.")}


def imported(path: Path) -> set[Path]:
    """The files of the tests that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = (
        TESTS.parent / f"{name.replace('.', '/')}.py" for name in names if name[:6] == "tests."
    )
    return {file for file in files if file.exists()}


def without_encoding(path: Path) -> list[str]:
    """The calls of a file that read or write text in the system's own encoding."""
    before = {"read_text": 0, "write_text": 1}  # arguments before the encoding
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            options = {keyword.arg for keyword in node.keywords}
            is_text = len(node.args) <= before.get(node.func.attr, -1) or "text" in options
            if is_text and "encoding" not in options:
                found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    return found


def test_quick_files_and_what_they_import_name_their_encoding():
    """.github/workflows/systems.yml runs them where a missing encoding is an error."""
    reached, todo = set(), [TESTS / name for name in (*QUICK, "conftest.py")]
    while todo:
        reached.add(path := todo.pop())
        todo += imported(path) - reached
    assert TESTS / "golden" / "inputs.py" in reached
    assert not [call for path in sorted(reached) for call in without_encoding(path)]
