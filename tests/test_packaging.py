"""The wheel and the source distribution hold the formats, and install one package."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import adapterkit
from tests.support.forks import command

ROOT = Path(__file__).parents[1]
PACKAGE = Path(adapterkit.__file__).parent
LIST = "from adapterkit.cli import main; main(['convert', '--list', '--json'])"


def build(source: Path, kind: str, target: Path) -> Path:
    """What hatchling builds of a source tree."""
    words = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, unpacked, and the wheel that is built from it, unpacked as an
    installer does it. The package is the one under test, wherever it is installed."""
    tree, root = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns("__pycache__", "_formats")
    shutil.copytree(PACKAGE, tree / "adapterkit", ignore=ignored)
    for name in ("formats", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "llms.txt"):
        shutil.copy(ROOT / name, tree)
    with tarfile.open(build(tree, "sdist", root / "sdist")) as archive:
        archive.extractall(root / "source", filter="data")
    (source,) = (root / "source").iterdir()
    with zipfile.ZipFile(build(source, "wheel", root / "wheel")) as archive:
        archive.extractall(root / "installed")
    return source, root / "installed"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.toml")
    }


def test_both_hold_every_format_and_architecture(built: tuple[Path, Path]):
    source, installed = built
    wanted = files(ROOT / "formats")
    assert any("/" in name for name in wanted) and any("/" not in name for name in wanted)
    assert files(source / "formats") == wanted
    assert files(installed / "adapterkit" / "_formats") == wanted


def test_only_the_package_is_installed(built: tuple[Path, Path]):
    names = {path.name.partition("-")[0] for path in built[1].iterdir()}
    assert names == {"adapterkit"}
    assert PathFinder.find_spec("formats", [str(built[1])]) is None


def test_the_installed_package_lists_its_own_formats(built: tuple[Path, Path]):
    """Away from the repository, whose formats/ it must not need."""
    environment = os.environ | {"PYTHONPATH": str(built[1])}
    code = f"import adapterkit; print(adapterkit.__file__); {LIST}"
    listed = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=built[1].parent, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    where, _, formats = listed.stdout.partition("\n")
    assert where.startswith(str(built[1])), where
    here = command("convert", "--list", "--json")
    assert formats == here.stdout and len(formats) > 1000


def test_the_index_would_take_both(built: tuple[Path, Path]):
    files = [next(built[1].parent.glob(pattern)) for pattern in ("sdist/*.tar.gz", "wheel/*.whl")]
    words = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_workflows_fit_their_schema():
    """And need nothing that a fork lacks."""
    workflows = [*(ROOT / ".github" / "workflows").iterdir()]
    words = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert workflows and done.returncode == 0, done.stdout + done.stderr
    assert not any("{{ secrets." in path.read_text(encoding="utf-8") for path in workflows)
