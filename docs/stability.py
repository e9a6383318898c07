"""Write the tables of docs/stability.md: the versions from pyproject.toml and the workflows, the
engines from formats/engines.

python docs/stability.py
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "stability.md"
TABLE = re.compile(r"(<!-- (\w+): python docs/stability.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# as they are written; the others' versions follow from these
LIBRARIES = {"torch": "torch", "transformers": "transformers", "peft": "PEFT",
             "diffusers": "diffusers", "huggingface_hub": "huggingface_hub",
             "safetensors": "safetensors", "numpy": "numpy"}  # fmt: skip
ORACLES = {
    "peft": "peft",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "mlx": "mlx-lm",
    "llama.cpp": "xllamacpp",
}  # engine: the package that the tests run
SYSTEMS = {"ubuntu": "Linux", "macos": "macOS", "windows": "Windows"}


def document() -> str:
    """The whole page: its text, with each table generated again."""
    tables = {"versions": versions(), "engines": engines()}
    return TABLE.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[4]}", PAGE.read_text("utf-8"))


def versions() -> str:
    """One row for each system, Python and library, with the workflows that try it."""
    pythons, systems = matrix("check", "whole")["python"], matrix("systems", "try")
    names = ", ".join(SYSTEMS[one.partition("-")[0]] for one in systems["system"])
    lowest = project()["requires-python"].removeprefix(">=")
    tried = f"*check*: {', '.join(pythons)}; *systems*: {', '.join(systems['python'])}"
    highest = max((*pythons, *systems["python"]), key=_numbers)
    rows = ["| | lowest | newest | workflows |", "|---|---|---|---|",
            f"| {names} | – | – | *systems*: quick tests; *check*: all tests on Linux |",
            f"| Python | {lowest} | {highest} | {tried} |"]  # fmt: skip
    nightly = newest()
    for name, written in LIBRARIES.items():
        low, bound = bounds(name)
        most = f"newest below {bound}" if bound else "newest"
        workflows = "*check*, *nightly*" if name in nightly else "*check*"
        rows.append(f"| {written} | {low} | {most} | {workflows} |")
    return "\n".join(rows)


def engines() -> str:
    """One row for each program whose rules `check` knows."""
    rows = ["| program | rules of version | do the tests run it? |", "|---|---|---|"]
    packages = {one.name for one in requirements()}
    for path in sorted((ROOT / "formats" / "engines").glob("*.toml")):
        engine = tomllib.loads(path.read_text("utf-8"))
        runs = ORACLES.get(path.stem) in packages
        rows.append(f"| {engine['title']} | {engine['version']} | {'yes' if runs else 'no'} |")
    return "\n".join(rows)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def requirements() -> list[Requirement]:
    """Of the package and its tests."""
    data = project()
    return [*map(Requirement, (*data["dependencies"], *data["optional-dependencies"]["test"]))]


def bounds(name: str) -> tuple[str, str]:
    """The lowest version of a package, and the bound above; "" without one."""
    specifiers = next(one.specifier for one in requirements() if one.name == name)
    values = {one.operator: one.version for one in specifiers}
    return values[">="], values.get("<", "")


def matrix(workflow: str, job: str) -> dict[str, list[str]]:
    text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text("utf-8")
    return yaml.safe_load(text)["jobs"][job]["strategy"]["matrix"]


def newest() -> set[str]:
    """The libraries that the nightly run upgrades."""
    text = (ROOT / ".ci" / "newest").read_text("utf-8")
    found = re.search(r"--upgrade --pre (.+)", text)
    assert found is not None
    return set(found[1].split())


def _numbers(version: str) -> list[int]:
    return [*map(int, version.split("."))]


if __name__ == "__main__":
    PAGE.write_text(document(), "utf-8")
