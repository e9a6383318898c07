"""A tag is released only if package, changelog, CITATION.cff and image have its version, if the
repository has an owner, and if two builds are the same bytes."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

import adapterkit

ROOT = Path(__file__).parents[1]
PACKAGE = Path(adapterkit.__file__).parent
VERSION = adapterkit.__version__
NOTES = f"## {VERSION} (unreleased)"
TIME = 1_800_000_000  # of the release, in seconds
NOBODY = "github.com/ORG/"  # the placeholder of the owner, and the files that have it
OWNED = [
    *("README.md", "docs/CONTRIBUTING.md", "docs/SECURITY.md"),
    *("examples/quickstart.ipynb", "pyproject.toml"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The source tree on the day of its release, wherever the package is installed."""
    tree, ignored = tmp_path / "tree", shutil.ignore_patterns("__pycache__", "_formats")
    shutil.copytree(PACKAGE, tree / "adapterkit", ignore=ignored)
    for name in (".ci", "formats", "docs", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    changes = tree / "docs" / "CHANGELOG.md"
    text = changes.read_text("utf-8")
    assert NOTES in text
    changes.write_text(text.replace(NOTES, f"## {VERSION} (2027-01-31)"), "utf-8")
    for path in OWNED:
        text = (tree / path).read_text("utf-8")
        assert NOBODY in text, path
        (tree / path).write_text(text.replace(NOBODY, "github.com/somebody/"), "utf-8")
    return tree


def check(tree: Path, tag: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ".ci/release-check", tag, *words], cwd=tree, capture_output=True,
        text=True, env=os.environ | {"SOURCE_DATE_EPOCH": str(TIME)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("release_check", str(ROOT / ".ci" / "release-check"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module, sys.dont_write_bytecode, old = module_from_spec(spec), True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = old
    return module


def test_the_tag_of_a_dated_version_is_built_once_as_wheel_and_source(tree: Path, tmp_path: Path):
    out, notes = tmp_path / "out", tmp_path / "notes.md"
    done = check(tree, f"v{VERSION}", "--out", str(out), "--notes", str(notes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2, done.stdout
    wheel, source = (next(out.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    assert len(list(out.iterdir())) == 2 and f"-{VERSION}-" in wheel.name
    with tarfile.open(source) as archive:
        assert {one.mtime for one in archive.getmembers()} == {TIME}
    with zipfile.ZipFile(wheel) as archive:
        assert {one.date_time[:3] for one in archive.infolist()} == {(2027, 1, 15)}
    text = notes.read_text("utf-8")
    assert text.startswith("This is the first version.")
    assert f"[merge](https://github.com/somebody/adapterkit/blob/v{VERSION}/docs/merge.md)" in text


def test_every_disagreement_about_the_version_is_named_and_nothing_is_built(
    tree: Path, tmp_path: Path
):
    done = check(tree, "v9.9.9", "--out", str(tmp_path / "out"))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    for name in ("adapterkit.__version__ is", "CITATION.cff is", "CHANGELOG.md has no heading"):
        assert name in done.stderr
    assert f"docker/Dockerfile is {VERSION}, the tag v9.9.9" in done.stderr
    assert check(tree, VERSION).stderr == f"error: {VERSION}: a tag is v and the version\n"


def test_a_version_without_a_date_is_not_released(script: ModuleType, tree: Path):
    changes = tree / "docs" / "CHANGELOG.md"
    assert script.problems(f"v{VERSION}", tree) == []
    changes.write_text(changes.read_text("utf-8").replace("(2027-01-31)", "(unreleased)"), "utf-8")
    (problem,) = script.problems(f"v{VERSION}", tree)
    assert problem == f"docs/CHANGELOG.md has no heading: ## {VERSION} (YYYY-MM-DD)"


def test_a_repository_without_an_owner_is_not_released_and_the_command_gives_it_one(
    script: ModuleType, tree: Path
):
    for name in OWNED:
        shutil.copy(ROOT / name, tree / name)
    (problem,) = script.problems(f"v{VERSION}", tree)
    text, _, command = problem.partition("\n")
    assert text == (
        f"{len(OWNED)} files have ORG as the owner of the repository: put yours for OWNER, and "
        "remove that it is not published yet"
    )
    words = shlex.split(command.replace("OWNER", "somebody"))
    assert words[0] == "sed" and {*OWNED} == {*words[3:]}
    assert subprocess.run(words, cwd=tree).returncode == 0
    assert script.problems(f"v{VERSION}", tree) == []
    assert script.repository(tree) == "somebody/adapterkit"


def test_this_tree_names_one_version(script: ModuleType, tree: Path):
    assert script.CITED.search((ROOT / "CITATION.cff").read_text("utf-8"))[1] == VERSION
    assert script.VERSION.search((PACKAGE / "__init__.py").read_text("utf-8"))[1] == VERSION
    assert script.IMAGE.search((ROOT / script.DOCKERFILE).read_text("utf-8"))[1] == VERSION


def test_this_tree_has_the_placeholder_or_an_owner_everywhere(script: ModuleType):
    assert script.without_owner(ROOT) in ([], OWNED)


def test_builds_with_other_bytes_or_files_differ(script: ModuleType, tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.whl").write_bytes(b"1")
    assert script.differing(one, other) == []
    (other / "a.whl").write_bytes(b"2")
    (one / "a.tar.gz").write_bytes(b"1")
    assert script.differing(one, other) == ["a.tar.gz", "a.whl"]
