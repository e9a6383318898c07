"""GitHub's actions: what they run is pinned, and what they write of an adapter is text."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.support.documents import ROOT
from tests.support.raw_files import plain

FILES = [*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob("examples/integrations/**/action.yml")]
USES = re.compile(r"^\s*-?\s*uses:\s*(\S+)(.*)$", re.M)
EVIL = [
    "[x](https://evil.test)", "![x](https://evil.test/a.png)", "<img src=//evil.test>", "@team",
    "a@evil.test", "www.evil.test", "a | b |", "`` ` [x](//e) `", "\\", "\n# Title\n", "\u202egnp",
    "::error::x", "##[error]x", "",
]  # fmt: skip


def test_every_action_is_pinned_by_its_commit_and_names_its_version():
    used = [found for file in FILES for found in USES.findall(file.read_text("utf-8"))]
    assert len(FILES) > 1 and len(used) > 2
    for name, comment in used:
        if name.startswith("./"):  # a workflow of the same commit
            assert (ROOT / name).is_file()
            continue
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", name), name
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), name


@pytest.fixture
def action():
    path = ROOT / "examples" / "integrations" / "github-action" / "action.py"
    spec = importlib.util.spec_from_file_location("action", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    """The texts of a row's code spans, as GitHub reads them; all else has to be ours."""
    spans = re.compile(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)")
    rest = spans.sub("", line)
    assert re.fullmatch(r"\| +\| [\d,–]+ \| *(none|(<br>|; )*|and \d+ more) *\|", rest), line
    return [text[1:-1] for _, text in spans.findall(line)]


@pytest.mark.parametrize("name", EVIL)
def test_a_problem_is_no_markdown(action, name):
    (text,) = cells(action.row(name, 5, []))
    (first, *found) = cells(action.row("x", 5, [name, "plain"]))
    assert first == "x" and found == [text, "plain"]
    assert "|" not in text and text.isprintable() and text
    plain_name = not set(name) & set("|\n\u202e")
    assert not name or not plain_name or text == name


def test_the_summary_of_hostile_adapters(action, tmp_path, monkeypatch, capsys):
    """Refused or read, each has one row; the log's lines are no commands of the runner."""
    names = ["a`b", "[x](y)", "<img>", "@team", "##[error]x"]
    for name in names:
        config = {"base_model_name_or_path": name, "r": 0 if name == "<img>" else 2}
        files = plain()
        files.config.update(config)
        files.folder().write(tmp_path / name)
    (tmp_path / "@team" / "adapter_config.json").write_text("{")
    summary = tmp_path / "summary.md"
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "CHECK": " ".join(f"'{name}'" for name in names),
        "ENGINES": "vllm", "BASE": "", "MOST": "10", "GITHUB_STEP_SUMMARY": str(summary),
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    assert action.check() == 1
    head, line, *rows = summary.read_text("utf-8").splitlines()
    assert (head, line) == ("| adapter | bytes | problems |", "|---|---|---|")
    assert [cells(row)[0] for row in rows] == names
    assert all(len(cells(row)) > 1 for row in rows)
    assert str(tmp_path) not in summary.read_text("utf-8")


def test_workflow_commands_in_output_are_not_executed(action, monkeypatch, capfd):
    monkeypatch.setenv("RUN", "inspect '##[error]x'")
    assert action.main("run") != 0
    first, *_, last = capfd.readouterr().out.strip().splitlines()
    token = first.removeprefix("::stop-commands::")
    assert re.fullmatch("[0-9a-f]{32}", token) and last == f"::{token}::"


def test_many_problems_are_cut(action):
    row = action.row("x", 5, ["y" * 10_000] * 1000)
    assert len(row) < 20_000 and "and 980 more" in row


def test_the_action_runs_no_module_of_the_repository(tmp_path):
    """A pull request may add a pip.py, a click.py."""
    for name in ("pip", "click", "json", "adapterkit"):
        (tmp_path / f"{name}.py").write_text("open('owned', 'w')")
    folder = ROOT / "examples" / "integrations" / "github-action"
    steps = yaml.safe_load((folder / "action.yml").read_text("utf-8"))["runs"]["steps"]
    assert all(step["env"]["PYTHONSAFEPATH"] == "1" for step in steps if "run" in step)
    environment = os.environ | {"RUN": "--version", "PYTHONSAFEPATH": "1"}
    words = [sys.executable, str(folder / "action.py"), "run"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "version" in done.stdout, done.stderr
    assert not (tmp_path / "owned").exists()
