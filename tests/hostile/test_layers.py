"""The parts import each other one way, and what only parses and prints loads nothing heavy."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit

pytestmark = pytest.mark.quick

PACKAGE = Path(adapterkit.__file__).parent

# DESIGN.md section 2, top to bottom. A part may import parts of its own level and of those below it.
LEVELS = [
    "cli __main__",
    "verbs runtime",
    "planning reports engines",
    "tasks",
    "execute receipt plan",
    "formats adapters inits combinations hub",
    "weights gguf",
    "checkpoint",
    "kernels",
    "options patterns registry dtypes errors",
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts.split()}

# Names of the package itself: `from adapterkit import __version__` needs nothing.
PLAIN = {"__version__"}


def imports(source: str) -> set[str]:
    """The adapterkit parts that a source imports, anywhere in it, as top-level names; "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {
                alias.name for alias in node.names if alias.name.split(".")[0] == "adapterkit"
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "adapterkit":
                found |= {
                    f"adapterkit.{alias.name}" for alias in node.names if alias.name not in PLAIN
                }
            elif (node.module or "").startswith("adapterkit."):
                found.add(node.module)
    return {name.split(".")[1] if "." in name else "" for name in found}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def upwards(part: str, source: str) -> list[str]:
    return sorted(other for other in imports(source) if other == "" or LEVEL[other] < LEVEL[part])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path):
    assert part_of(path) in LEVEL, "a new part: give it a level in LEVELS and in DESIGN.md"
    assert not upwards(part_of(path), path.read_text())


@pytest.mark.parametrize("part, source", [
    ("checkpoint", "from adapterkit.adapters.record import Adapter"), ("errors", "import adapterkit.dtypes, adapterkit.plan"),
    ("kernels", "def f():\n    from adapterkit import plan"), ("plan", "from adapterkit.verbs.merge import merge"),
    ("verbs", "from adapterkit import cli"), ("weights", "import adapterkit"),
])  # fmt: skip
def test_the_check_sees_an_import_upwards(part, source):
    assert upwards(part, source)


def test_no_two_files_import_each_other():
    """Within a level too: an order in which the files could be read exists."""
    names = {
        ".".join(("adapterkit", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): p
        for p in FILES
    }
    needs = {}
    for name, path in names.items():
        needs[name] = set()
        for node in ast.parse(
            path.read_text()
        ).body:  # those at the top: the others wait for a call
            if isinstance(node, ast.ImportFrom) and node.module in names:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                needs[name] |= (below & set(names)) or {node.module}
            elif isinstance(node, ast.ImportFrom) and node.module == "adapterkit":
                needs[name] |= {f"adapterkit.{alias.name}" for alias in node.names} & set(names)
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a ring among {sorted(needs)}"
        for name in free:
            del needs[name]


HEAVY = [
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "tqdm",
    "regex",
]
WATCH = """
import sys
{code}
print("loaded:", *[name for name in {heavy} if name in sys.modules])
"""
HELP = """
from adapterkit.cli import main
for words in (["--help"], ["--version"], ["merge", "--help"], ["verify", "--help"], ["merge"], ["nonsense"]):
    main(words, standalone_mode=False) if words[-1] == "--help" else None
"""


@pytest.mark.parametrize(
    "code",
    ["import adapterkit", "import adapterkit; dir(adapterkit)", "import adapterkit.cli", HELP],
)
def test_nothing_heavy_is_loaded_to_say_hello(code):
    script = WATCH.format(code=code, heavy=HEAVY)
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_watch_sees_what_is_loaded():
    script = WATCH.format(code="import numpy", heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert "numpy" in done.stdout


def test_a_refusal_of_the_arguments_needs_no_torch():
    """Wrong usage is status 2 and immediate."""
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    script = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    script += "from adapterkit.cli import main\nmain(['merge'])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
