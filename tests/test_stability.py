"""The page of promises has the versions that CI runs, the tiers, and the answer to a former
option."""

import importlib.util
import re
from types import ModuleType

import pytest

from adapterkit.cli.group import RENAMED
from adapterkit.core.registry import TIERS
from tests.support.documents import ROOT, blocks
from tests.support.forks import command

PAGE = ROOT / "docs" / "stability.md"
TEXT = PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stability", ROOT / "docs" / "stability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_workflows_and_floors(script: ModuleType):
    assert script.document() == TEXT, "stability.md is out of date: run `python docs/stability.py`"


def test_every_python_of_a_workflow_and_every_floor_is_in_the_table(script: ModuleType):
    """Read again, without the script's own reading."""
    table = script.versions()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for names in re.findall(r"python: \[(.*?)\]", path.read_text("utf-8")):
            for name in re.findall(r"[\d.]+", names):
                assert name in table, (path.name, name)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in ("torch", "transformers", "huggingface_hub", "peft", "diffusers"):
        floor = re.search(rf'"{name}>=([\d.]+)', project)
        assert floor and re.search(rf"\| {name} \| {floor[1]} \|", table, re.IGNORECASE), name
    assert "Linux, macOS, Windows" in table and "| vLLM | " in script.engines()


def test_a_floor_of_another_value_changes_the_table(script: ModuleType, monkeypatch):
    data = script.project()
    data["dependencies"] = [
        "torch>=9.9,<10" if one.startswith("torch") else one for one in data["dependencies"]
    ]
    monkeypatch.setattr(script, "project", lambda: data)
    assert "| torch | 9.9 | newest below 10 |" in script.versions()


def test_the_page_has_every_tier():
    assert re.findall(r"^\| (core|stable|experimental) \|", TEXT, re.MULTILINE) == [*TIERS]


def test_a_former_option_is_refused_with_the_new_name_as_the_page_shows():
    (block,) = blocks(PAGE, "text")
    old, new = re.findall(r"--[\w-]+", block.text)
    assert RENAMED[old] == new
    done = command("fit", "BASE", "a", "b", "--data", "x", old, "answers", "--out", "f.json")
    assert done.returncode == 2 and done.stderr.endswith(block.text)
