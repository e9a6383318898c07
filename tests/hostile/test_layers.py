"""The parts import each other one way, and what only parses and prints loads nothing heavy."""

import ast
import functools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import adapterkit
from adapterkit import doors
from adapterkit.core.errors import codes
from adapterkit.core.registry import load
from adapterkit.doors import VERBS
from tests.support.error_sites import sites
from tests.support.sources import parsed, walked

pytestmark = pytest.mark.quick

PACKAGE = Path(adapterkit.__file__).parent

# The core, top to bottom: a part imports parts of its own line and of those below it.
CORE = [
    "verify",
    "merge",
    "outputs",
    "inputs",
    "engine",
    "tasks execute",
    "receipt plan budget",
    "verb calls hints shared_options",
    "adapter",
    "weights",
    "output checkpoint system commands",
    "options patterns registry records dtypes errors lazy libraries",
]
LEVEL = {f"core.{part}": level for level, parts in enumerate(CORE) for part in parts.split()}

# What each extension imports besides the core, kernels and doors, those that need least first.
# docs/architecture.md has both. `cli` and the package itself import what they like.
NEEDS: dict[str, str] = {
    "adapters.formats": "adapters.kinds bases.hub",
    "verbs.shared": "adapters.formats",
    "verbs.stats": "bases.hub verbs.shared",
    "bases.quantized": "verbs.shared",
    "verbs.combine": "adapters.kinds verbs.shared verbs.stats",
    "bases.images": "adapters.formats bases.quantized verbs.combine",
    "verbs.init": "adapters.kinds bases.quantized verbs.combine verbs.shared",
    "bases.gguf": "adapters.formats bases.images bases.quantized",
    "many.workflows": "adapters.formats bases.hub bases.images many.workers verbs.shared",
    "runtime": ("adapters.formats verbs.combine verbs.init verbs.shared verbs.stats"),
    "verbs.score": "bases.quantized many.workflows verbs.shared verbs.stats",
    "verbs.look": (
        "adapters.formats adapters.kinds bases.gguf bases.images verbs.score verbs.shared"
    ),
    "integrations": "adapters.formats verbs.look",
    "verbs.fit": "runtime verbs.combine verbs.look verbs.shared verbs.stats",
}

# Names of the package itself: `from adapterkit import __version__` needs nothing.
PLAIN = {"__version__"}


@functools.cache
def imported_modules(source: str) -> set[str]:
    """The modules of the package that a source imports, in functions too, but for those of types
    alone. `from a.b import c` is both a.b and a.b.c, of which one may be no module."""
    modules = set()
    tree = parsed(source)
    of_types = (node for node in walked(tree) if _is_of_types(node))
    left_out = {id(child) for node in of_types for child in ast.walk(node)}
    for node in (node for node in walked(tree) if id(node) not in left_out):
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


GROUPS = {"core", "bases", "adapters", "verbs", "many"}  # folders of parts


def part_of(module: str) -> str:
    """The part of a module: `core.merge`, `bases.gguf`, `runtime`; "" for the package itself."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 1 + (parts[:1] != [] and parts[0] in GROUPS)])


def parts_needed(module: str, source: str) -> set[str]:
    """The parts that a module imports, besides its own and those that all may."""
    parts = {part_of(name) for name in imported_modules(source)}
    return parts - GROUPS - {part_of(module), "doors", "kernels"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem == "doors")


def outwards(module: str, source: str, needs: dict[str, str]) -> list[str]:
    """The parts that a module must not import, of those that it does."""
    part, others = part_of(module), parts_needed(module, source)
    if part == "cli":
        return []
    if part == "doors":
        return sorted(imported_modules(source))
    if part in LEVEL or part == "kernels":
        level = LEVEL.get(part, LEVEL["core.dtypes"])
        return sorted(other for other in others if LEVEL.get(other, -1) < level)
    return sorted(others - {*LEVEL, *needs.get(part, "").split()})


def test_the_core_imports_downwards_and_no_product_and_extensions_what_they_declare():
    found = {str(path): outwards(module_of(path), path.read_text("utf-8"), NEEDS) for path in FILES}
    assert not {path: others for path, others in found.items() if others}


def test_no_need_is_declared_for_nothing_and_none_leads_back():
    needed: dict[str, set[str]] = {}
    for path in FILES:
        module = module_of(path)
        others = parts_needed(module, path.read_text("utf-8")) - {*LEVEL}
        needed.setdefault(part_of(module), set()).update(others)
    declared = {part: set(others.split()) for part, others in NEEDS.items()}
    assert declared == {
        part: others for part, others in needed.items() if others and part not in ("cli", *LEVEL)
    }
    for part in NEEDS:  # in the order in which they are declared
        assert not declared.pop(part) & set(declared), f"{part} needs what needs it"


def entries(table: dict) -> list[str]:
    values = [entries(value) if isinstance(value, dict) else [value] for value in table.values()]
    return [entry for own in values for entry in own]


def test_there_is_something_behind_every_door():
    tables = [value for name, value in vars(doors).items() if name.isupper()]
    for entry in (entry for table in tables for entry in entries(table)):
        if ":" in entry:
            assert load(entry) is not None
        else:
            assert find_spec(f"adapterkit.{entry}"), entry


def test_the_core_asks_for_nothing_that_has_no_door():
    """Names in load(TABLE["name"]), whatever else comes of it."""
    asked = re.compile(r'load\((BASES|ADAPTERS|MERGES|HUB)\["([^"]+)"\]\)')
    found = {pair for path in FILES for pair in asked.findall(path.read_text("utf-8"))}
    named = {(t, name) for t in ("ADAPTERS", "MERGES", "HUB") for name in getattr(doors, t)}
    assert found == named


@pytest.mark.parametrize("module, source", [
    ("core.checkpoint.spec", "from adapterkit.core.adapter.record import Adapter"),
    ("core.errors", "import adapterkit.core.dtypes, adapterkit.core.plan"),
    ("kernels.rows", "def f():\n    from adapterkit.core import plan"),
    ("core.plan", "from adapterkit.runtime import attach"),
    ("core.merge.plan", "from adapterkit.bases.gguf import header"),
    ("bases.gguf.model", "from adapterkit.verbs.stats import sums"),
    ("core.weights.parameters", "import adapterkit"),
    ("core.tasks.rows", "def f():\n    from adapterkit.verbs.combine.methods import ties"),
    ("verbs.stats.sums", "from adapterkit.cli import group"),
    ("doors", "from adapterkit.core import registry"),
])  # fmt: skip
def test_the_check_sees_an_import_outwards(module, source):
    assert outwards(f"adapterkit.{module}", source, {})


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
    first = "def f():\n    from adapterkit.b import verify"
    second = "from adapterkit.a import plan"
    assert ring({"adapterkit.a": first, "adapterkit.b": second})
    assert not ring({"adapterkit.a": "", "adapterkit.b": second})


def test_no_verb_imports_another():
    homes = {f"adapterkit.{module}" for module in VERBS.values()}
    for home in homes:
        source = (PACKAGE.parent / home.replace(".", "/")).with_suffix(".py").read_text("utf-8")
        assert not imported_modules(source) & homes, home


def test_a_class_name_occurs_once():
    """What it means needs no folder to tell."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in parsed(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert not {name: files for name, files in homes.items() if len(files) > 1}


MOST_LINES = 60  # of a function's body


def long_functions(source: str) -> list[str]:
    """Functions whose body, without the docstring, is too long to be read at once."""
    found = []
    for node in walked(parsed(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            found += [node.name] * (lines > MOST_LINES)
    return found


def test_every_place_that_makes_an_error_gives_its_code():
    """And errors.toml explains each code, and no other."""
    made = [
        site for site in sites() if site.place != "core.records:placed"
    ]  # passes an error's code on
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
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=240, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_watch_sees_what_is_loaded():
    script = WATCH.format(code="import numpy", heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=240
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
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=240, env=env
    )
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
