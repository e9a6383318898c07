"""The parts import each other one way, and what only parses and prints loads nothing heavy."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit
from adapterkit.errors import codes
from tests.support.error_sites import sites

pytestmark = pytest.mark.quick

PACKAGE = Path(adapterkit.__file__).parent

# docs/architecture.md, top to bottom. A part imports parts of its own level and of those below it.
LEVELS = [
    "cli integrations __main__",
    "jobs",
    "fitting",
    "runtime",
    "reports",
    "statistics",
    "planning",
    "engines",
    "tasks",
    "execute receipt plan budget",
    "verbs",
    "verb",
    "calls",
    "run_options",
    "formats adapters inits combinations hub",
    "weights gguf",
    "checkpoint commands",
    "kernels",
    "shared_options product_options",
    "pages",
    "options optional patterns registry records dtypes errors lazy",
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts.split()}

# Names of the package itself: `from adapterkit import __version__` needs nothing.
PLAIN = {"__version__"}


def imports(source: str) -> set[str]:
    """The parts that a source imports, anywhere in it; "" for the package itself."""
    return {name.split(".")[1] if "." in name else "" for name in imported_modules(source)}


@functools.cache
def imported_modules(source: str) -> set[str]:
    """The modules of the package that a source imports, in functions too, but for those of types
    alone. `from a.b import c` is both a.b and a.b.c, of which one may be no module."""
    modules = set()
    tree = ast.parse(source)
    of_types = (node for node in ast.walk(tree) if _is_of_types(node))
    left_out = {id(child) for node in of_types for child in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if id(node) not in left_out):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names if a.name.split(".")[0] == "adapterkit"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {alias.name for alias in node.names} - PLAIN
            if node.module == "adapterkit":
                modules |= {f"adapterkit.{name}" for name in names}
            elif (node.module or "").startswith("adapterkit."):
                modules |= {node.module, *(f"{node.module}.{name}" for name in names)}
    return modules


def _is_of_types(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def upwards(part: str, source: str) -> list[str]:
    return sorted(other for other in imports(source) if other == "" or LEVEL[other] < LEVEL[part])


def test_imports_go_downwards():
    new = {part_of(path) for path in FILES} - set(LEVEL)
    assert not new, "a new part: give it a level in LEVELS and in docs/architecture.md"
    found = {str(path): upwards(part_of(path), path.read_text("utf-8")) for path in FILES}
    assert not {path: others for path, others in found.items() if others}


@pytest.mark.parametrize("part, source", [
    ("checkpoint", "from adapterkit.adapters.record import Adapter"),
    ("errors", "import adapterkit.dtypes, adapterkit.plan"),
    ("kernels", "def f():\n    from adapterkit import plan"),
    ("plan", "from adapterkit.runtime import attach"),
    ("verbs", "from adapterkit.planning import sites"),
    ("weights", "import adapterkit"),
])  # fmt: skip
def test_the_check_sees_an_import_upwards(part, source):
    assert upwards(part, source)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("adapterkit", *parts)).removesuffix(".__init__")


def ring(sources: dict[str, str]) -> list[str]:
    """Modules (name -> source) that import each other, in functions too; none where an order exists
    in which they can be read. A package needs its submodules only where it imports them."""
    needs = {
        name: {module for module in imported_modules(source) if module in sources} - {name}
        for name, source in sources.items()
    }
    for name, modules in needs.items():  # `from a.b import c`: b itself only if c is not its module
        inner = {m for m in modules if any(other.startswith(f"{m}.") for other in modules)}
        modules -= {m for m in inner if name.startswith(f"{m}.") or not sources[m].strip("\n")}
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        if not free:
            return sorted(needs)
        for name in free:
            del needs[name]
    return []


def test_no_files_import_each_other():
    """Within a level too, function-level imports included."""
    assert not ring({module_of(path): path.read_text("utf-8") for path in FILES})


def test_the_check_sees_a_ring():
    first = "def f():\n    from adapterkit.verbs import verify"
    second = "from adapterkit.verbs.merge import plan"
    assert ring({"adapterkit.verbs.merge": first, "adapterkit.verbs.verify": second})
    assert not ring({"adapterkit.verbs.merge": "", "adapterkit.verbs.verify": second})


def test_no_verb_imports_another():
    for path in (PACKAGE / "verbs").glob("*.py"):
        others = imported_modules(path.read_text("utf-8")) - {"adapterkit.verbs"}
        assert not [n for n in others if n.startswith("adapterkit.verbs.")], path.stem


def test_a_class_name_occurs_once():
    """What it means needs no folder to tell."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert not {name: files for name, files in homes.items() if len(files) > 1}


MOST_LINES = 60  # of a function's body


def long_functions(source: str) -> list[str]:
    """Functions whose body, without the docstring, is too long to be read at once."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            found += [node.name] * (lines > MOST_LINES)
    return found


def test_every_place_that_makes_an_error_gives_its_code():
    """And errors.toml explains each code, and no other."""
    made = [site for site in sites() if site.place != "records:placed"]  # passes an error's code on
    assert len(made) > 700
    assert not sorted({site.place for site in made if not site.code})
    assert {site.code for site in made} == set(codes())


def test_functions_are_short():
    found = {str(path): long_functions(path.read_text("utf-8")) for path in FILES}
    assert not {path: names for path, names in found.items() if names}


def test_the_check_sees_a_long_function():
    lines = "\n".join(["    x = 1"] * (MOST_LINES + 1))
    assert long_functions(f"def f():\n{lines}") == ["f"]
    assert not long_functions(f'def f():\n    """{lines}"""\n    return 1')


HEAVY = [
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "tqdm",
    "regex",
    "datasets",
    "gguf",
    "matplotlib",
    "peft",
    "pyarrow",
    "ray",
]
WATCH = """
import sys
{code}
print("loaded:", *[name for name in {heavy} if name in sys.modules])
"""
HELP = """
from adapterkit.cli import main
for words in ([], *([name] for name in main.names)):
    main([*words, "--help"], standalone_mode=False)
"""


CONFIG = "from adapterkit import LoraConfig\nLoraConfig(4, 8, ['q_proj'])"


@pytest.mark.parametrize(
    "code",
    [
        "import adapterkit",
        "import adapterkit; dir(adapterkit)",
        "import adapterkit.cli",
        HELP,
        CONFIG,
    ],
)
def test_nothing_heavy_is_loaded_to_say_hello(code):
    script = WATCH.format(code=code, heavy=HEAVY)
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_watch_sees_what_is_loaded():
    script = WATCH.format(code="import numpy", heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60
    )
    assert "numpy" in done.stdout


def test_the_headers_of_a_model_need_no_torch(llama):
    """Checkpoints of any size are looked at in a moment."""
    code = f"import adapterkit; adapterkit.inspect({str(llama)!r}, headers=True)"
    script = WATCH.format(code=code, heavy="('torch', 'transformers')")
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", env=env
    )
    assert done.stdout.splitlines()[-1].strip() == "loaded:", done.stderr


def test_a_refusal_of_the_arguments_needs_no_torch():
    """Wrong usage is status 2 and immediate."""
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    script = "import sys, atexit\natexit.register(lambda: print('torch' in sys.modules))\n"
    script += "from adapterkit.cli import main\nmain(['merge'])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=60, env=env
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
