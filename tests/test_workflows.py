"""The files for GitHub fit their schemas, pin every action, need no secret, and run scripts that
exist. The hooks of pre-commit pass and fail as they should."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTION = ROOT / "examples" / "integrations" / "github-action" / "action.yml"
SCHEMAS = {
    "github-workflows": WORKFLOWS,
    "github-actions": [ACTION],
    "github-issue-forms": [GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("bug", "format")],
    "github-issue-config": [GITHUB / "ISSUE_TEMPLATE" / "config.yml"],
    "dependabot": [GITHUB / "dependabot.yml"],
    "citation-file-format": [ROOT / "CITATION.cff"],
}
# only these jobs may do more than read; nobody else gets a token that can publish
WRITES = {
    ("docs", "deploy"): {"pages", "id-token"},
    ("release", "attest"): {"attestations", "id-token"},
    ("release", "publish"): {"id-token"},
    ("release", "announce"): {"contents"},
}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def id_of(path: object) -> str | None:
    return path.stem if isinstance(path, Path) else None


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_for_github_fit_their_schema(schema: str):
    words = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert SCHEMAS[schema] and done.returncode == 0, done.stdout + done.stderr


def test_every_action_is_pinned_by_one_commit_with_its_version():
    pins: dict[str, set[str]] = {}
    for path in (*WORKFLOWS, ACTION):
        for line in re.findall(r"\buses: (.*)", path.read_text("utf-8")):
            if line.startswith("./"):  # of this repository, at the same commit
                assert (ROOT / line).exists(), line
                continue
            match = re.fullmatch(r"([\w-]+/[\w-]+)@([0-9a-f]{40} # v\d+\.\d+\.\d+)", line)
            assert match, f"{path.name}: {line}"
            pins.setdefault(match[1], set()).add(match[2])
    assert len(pins) >= 8 and all(len(one) == 1 for one in pins.values()), pins


@pytest.mark.parametrize("path", WORKFLOWS, ids=id_of)
def test_a_workflow_needs_no_secret_and_writes_only_where_it_must(path: Path):
    text, workflow = path.read_text("utf-8"), read(path)
    assert "{{ secrets" not in text and "pull_request_target" not in text
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        given = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert given == WRITES.get((path.stem, name), set()), name
        assert "uses" in job or given or job["timeout-minutes"] <= 90


@pytest.mark.parametrize("path", WORKFLOWS, ids=id_of)
def test_a_workflow_runs_scripts_and_extras_that_exist(path: Path):
    text = path.read_text("utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in re.findall(r"(?<=\[)[\w-]+(?=\]\")", text):
        assert name in extras["optional-dependencies"], name
    for name in re.findall(r"\.(?:ci|github)/[\w./-]+\w", re.sub(r"#.*", "", text)):
        script = ROOT / name
        assert script.exists(), name
        assert name.startswith(".github/") or os.access(script, os.X_OK), name
    # a value of the event in a script could be a stranger's command
    for job in read(path)["jobs"].values():
        for step in job.get("steps", ()):
            assert "${{ github.event" not in step.get("run", ""), step


def test_the_release_is_built_checked_and_attested_before_it_is_published():
    jobs = read(GITHUB / "workflows" / "release.yml")["jobs"]
    assert jobs["check"]["uses"] == "./.github/workflows/check.yml"
    assert set(jobs["attest"]["needs"]) == {"check", "build"}
    assert jobs["publish"]["needs"] == "attest" and jobs["announce"]["needs"] == "publish"
    runs = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert any('.ci/release-check "$GITHUB_REF_NAME"' in one for one in runs)
    assert jobs["publish"]["environment"]["name"] == "pypi"


def test_contributing_names_what_a_maintainer_sets_up_for_the_workflows():
    page = (ROOT / "docs" / "CONTRIBUTING.md").read_text("utf-8").partition("\n## Release\n")[2]
    environments = {
        job["environment"]["name"]
        for path in WORKFLOWS
        for job in read(path)["jobs"].values()
        if "environment" in job
    }
    assert environments == {"pypi", "github-pages"}
    assert all(f"`{name}`" in page for name in (*environments, "release.yml"))


def test_scripts_of_the_shell_parse():
    for path in (ROOT / ".ci").iterdir():
        if path.read_text("utf-8").startswith("#!/usr/bin/env bash"):
            assert subprocess.run(["bash", "-n", path]).returncode == 0, path.name


def test_hooks_pass_a_clean_file_and_name_one_that_is_not(tmp_path: Path):
    """All hooks except pyright, which `.ci/run` starts itself."""
    pytest.importorskip("pre_commit", reason="needs pre-commit")
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, repository)
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "pyright"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "PATH": programs, "PRE_COMMIT_HOME": str(tmp_path / "home"), "SKIP": "pyright",
    }  # fmt: skip

    def run(text: str) -> tuple[int, list[str]]:
        (repository / "program.py").write_text(text, "utf-8")
        for words in (["git", "init", "--quiet"], ["git", "add", "."]):
            subprocess.run(words, cwd=repository, check=True)
        words = [sys.executable, "-m", "pre_commit", "run", "--all-files", "--color", "never"]
        done = subprocess.run(
            words, cwd=repository, env=environment, capture_output=True, encoding="utf-8"
        )
        return done.returncode, re.findall(r"\.(Passed|Failed|Skipped)$", done.stdout, re.MULTILINE)

    assert run('print("text")\n') == (0, ["Passed", "Passed", "Skipped"])
    assert run("import os\nprint( 'text' )\n") == (1, ["Failed", "Failed", "Skipped"])
