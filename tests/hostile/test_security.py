"""Every promise of docs/SECURITY.md has a row of tests that exist, and each file of these tests is
named."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "SECURITY.md").read_text("utf-8")
PROMISES = re.findall(r"^- \*\*(.*?)\.\*\*", PAGE.replace("\n  ", " "), re.MULTILINE)
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in Path(__file__).with_name("README.md").read_text("utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| promise")
]
# what holds the package itself, and not a promise to its users
OTHERS = {"conftest.py", "test_layers.py", "test_security.py"}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_promise_names_tests_that_exist(row: list[str]):
    assert len(row) == 2, "promise, tests"
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[1])
    assert named and row[1] == ", ".join(f"`{file}::{test}`" for file, test in named)
    for file, test in named:
        source = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file} has no {test}"


def test_every_file_of_hostile_tests_holds_a_promise():
    files = {path.name for path in Path(__file__).parent.glob("*.py")} - OTHERS
    text = " ".join(row[1] for row in ROWS)
    assert not [name for name in sorted(files) if f"hostile/{name}::" not in text]


def test_every_promise_has_its_row_and_every_row_a_promise():
    assert [promise.lower() for promise in PROMISES] == [row[0].lower() for row in ROWS]
    assert len(ROWS) > 30
