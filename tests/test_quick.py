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
