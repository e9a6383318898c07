"""The image is built from stated versions: of Python by its digest, and of every package."""

import contextlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import adapterkit

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "integrations" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text("utf-8")
LINES = (FOLDER / "constraints.txt").read_text("utf-8").splitlines()
PINS = dict(line.split("==") for line in LINES if not line.startswith("#"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OURS = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gguf"]]


def python() -> str:
    """The version of Python in the image; its tag and its digest are there."""
    found = re.findall(r"^FROM (.*)$", DOCKERFILE, re.MULTILINE)
    base = re.fullmatch(r"python:(3\.\d+\.\d+)-slim-[a-z]+@sha256:[0-9a-f]{64}", found[0])
    assert base and len(found) == 1, found
    return base[1]


def required(by: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements that hold in the image."""
    version = python()
    environment = {
        **default_environment(),
        "python_full_version": version,
        "python_version": version.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    for one in map(Requirement, by):
        wanted = ({**environment, "extra": extra} for extra in ("", *extras))
        if one.marker is None or any(map(one.marker.evaluate, wanted)):
            yield one


def test_the_base_has_a_digest_and_a_python_that_the_tests_ran_on():
    minor = python().rpartition(".")[0]
    assert python() in SpecifierSet(PROJECT["requires-python"])
    assert f"Programming Language :: Python :: {minor}" in PROJECT["classifiers"]


def test_the_image_installs_this_version_with_these_packages():
    assert re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE) == [adapterkit.__version__]
    lines = re.sub(r"\\\n *", "", DOCKERFILE)
    installs = re.findall(r"pip install --no-cache-dir (?:--no-deps )?(\S+) ([^&]*)", lines)
    assert [name for name, _ in installs] == ["torch", f'"{PROJECT["name"]}[gguf]==$VERSION"']
    assert all("--constraint /context/constraints.txt" in words for _, words in installs)
    assert "--index-url https://download.pytorch.org/whl/cpu" in installs[0][1]


def test_every_package_of_the_image_has_one_version_within_the_bounds():
    """What a package requires is read from the one here, if it is of the same version."""
    seen, waiting = set(), list(required(OURS))
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        assert name in PINS and PINS[name] in one.specifier, one
        if (name, *one.extras) in seen:
            continue
        seen.add((name, *one.extras))
        with contextlib.suppress(PackageNotFoundError):
            here = distribution(name)
            if here.version.partition("+")[0] == PINS[name]:
                waiting += required(here.requires or (), one.extras)
    assert len({name for name, *_ in seen}) > len(OURS)
    assert sorted(PINS) == [*PINS]


def test_pull_requests_move_the_base_and_the_versions():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text("utf-8"))["updates"]
    here = f"/{FOLDER.relative_to(ROOT).as_posix()}"
    kinds = {
        one["package-ecosystem"]
        for one in updates
        if here in one.get("directories", [one.get("directory")])
    }
    assert kinds == {"docker", "pip"}
