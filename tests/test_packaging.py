"""The wheel and the source distribution: what they hold, what the index shows, and by which name
and address the other files call them."""

import email
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import adapterkit
from tests.support.documents import ROOT
from tests.support.forks import command

PACKAGE = Path(adapterkit.__file__).parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NAME, SOURCE = SETTINGS["project"]["name"], SETTINGS["project"]["urls"]["Source"]
IGNORED = (
    ".git",
    "PKG-INFO",
    *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split()),
)
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
    ignored = shutil.ignore_patterns(*IGNORED, "_formats")
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(*IGNORED, "adapterkit"), dirs_exist_ok=True
    )
    shutil.copytree(PACKAGE, tree / "adapterkit", ignore=ignored)
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


def test_the_wheel_holds_the_package_and_the_formats_alone(built: tuple[Path, Path]):
    def names(folder: Path) -> set[str]:
        return {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not any(fnmatch.fnmatch(path.name, name) for name in IGNORED)
        }

    source, installed = built
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert names(installed) == {
        *(f"adapterkit/{name}" for name in names(source / "adapterkit")),
        *(f"adapterkit/_formats/{name}" for name in names(source / "formats")),
        *(f"{NAME}-{adapterkit.__version__}.dist-info/{name}" for name in about),
    }
    suffixes = {Path(name).suffix for name in names(installed / "adapterkit")}
    assert suffixes <= {".py", ".typed", ".toml", ".md"}, suffixes


def test_the_source_holds_all_of_the_repository(built: tuple[Path, Path]):
    there = {path.name for path in built[0].iterdir()}
    here = {path.name for path in ROOT.iterdir()}
    assert {
        name for name in here if not any(fnmatch.fnmatch(name, one) for one in IGNORED)
    } <= there
    assert {
        "adapterkit",
        "conformance",
        ".ci",
        ".pre-commit-config.yaml",
        "hatch_build.py",
    } <= there


def test_the_tests_find_their_imports_in_the_source(built: tuple[Path, Path]):
    """.ci/run runs them all there; here those that read other folders are collected."""
    folder = built[0]
    words = [*"-m pytest --collect-only -qq -p no:cacheprovider -n 0".split(), "-m", ""]
    files = [f"tests/{name}.py" for name in ("formats/test_conformance", "test_docs", "test_site")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *words, *files],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "error" not in done.stdout, done.stdout[-5000:] + done.stderr
    assert all(name in done.stdout for name in files), done.stdout


def metadata(installed: Path) -> email.message.Message:
    (path,) = installed.glob("*.dist-info/METADATA")
    return email.message_from_bytes(path.read_bytes())


def test_the_page_of_the_index_has_absolute_links_to_files_of_this_version(
    built: tuple[Path, Path],
):
    page = metadata(built[1]).get_payload(decode=True).decode()
    wanted = (ROOT / "README.md").read_text("utf-8")
    there = re.compile(rf"\]\({re.escape(SOURCE)}/(blob|raw)/v{adapterkit.__version__}/")
    found = there.findall(page)
    assert there.sub("](", page) == wanted and found.count("raw") == 1 and found.count("blob") > 10
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert target.startswith(("https://", "#")), target


def test_the_page_of_the_index_names_version_authors_and_places(built: tuple[Path, Path]):
    found = metadata(built[1])
    assert found["Name"] == NAME and found["Version"] == adapterkit.__version__
    assert found["Author"] == "The adapterkit developers"
    places = dict(line.split(", ") for line in found.get_all("Project-URL"))
    assert {"Source", "Documentation", "Changelog", "Issues"} <= {*places}
    assert all(place.startswith(SOURCE) for place in places.values())
    assert f"## {adapterkit.__version__} " in (ROOT / "docs" / "CHANGELOG.md").read_text("utf-8")


def test_other_files_have_the_name_and_the_address_of_the_project():
    """pyproject.toml defines both; what a Dockerfile or a page installs is this name."""
    texts = {
        path: path.read_text("utf-8")
        for folder in ("docs", "examples/integrations", ".github")
        for path in [*(ROOT / folder).rglob("*"), *ROOT.glob("*.*"), *ROOT.glob("examples/*.ipynb")]
        if path.suffix in {".md", ".yml", ".toml", ".py", ".cff", ".ipynb", ""} and path.is_file()
    }
    for path, text in texts.items():
        for found in re.findall(rf"https://github\.com/[\w-]+/{NAME}\b", text):
            assert found == SOURCE, path
    folder = ROOT / "examples" / "integrations"
    extras = "|".join(SETTINGS["project"]["optional-dependencies"])
    for name, pattern in {
        "docker/Dockerfile": r'pip install --no-cache-dir "([\w-]+)(?:\[({})\])?',
        "github-action/action.yml": r"default: ([\w-]+)\nruns:",
        "comfyui/pyproject.toml": r'dependencies = \["([\w-]+)"\]',
        "hf-jobs/merge.py": r'dependencies = \["([\w-]+)"\]',
    }.items():
        found = re.search(pattern.replace("{}", extras), texts[folder / name])
        assert found is not None and found[1] == NAME, name
    assert "not on PyPI yet" in texts[ROOT / "docs" / "integrations.md"]


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
