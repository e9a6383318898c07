"""The documents say what is true: the commands, options, files and links that they name exist, and
their tables are complete."""

import ast
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import yaml

import adapterkit
from adapterkit import doors, runtime
from adapterkit.adapters.formats.engines import engines
from adapterkit.cli import main
from adapterkit.cli.parameters import arguments_of
from adapterkit.core import registry
from adapterkit.core.shared_options import RUNNING
from adapterkit.core.verb import called, fields_of
from adapterkit.doors import SECTIONS, VERBS
from tests.support.documents import CODE, DOCUMENTS, README, ROOT, blocks, name_of, prose, typed

PACKAGE = Path(adapterkit.__file__).parent
# Options with which a command does something else than the verb of its name
LOOKING = {"convert": {"detect", "listing", "from_list", "out_pattern"}, "inspect": {"modules"}}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WIDTH = 100
INDEX = ROOT / "docs" / "index.md"
FILE = re.compile(r"(?<![\w./<-])(?:adapterkit|tests|examples|docs|formats|\.ci)/[\w./*-]*[\w/*]")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


def options(verb: str) -> set[str]:
    parameters = (p for p in main.commands[verb].params if isinstance(p, click.Option))
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def script(name: str):
    """A generator of a document, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- commands and options ------------------------------------------------------------------------


def test_every_command_is_on_the_first_page_and_has_an_example_in_its_help():
    assert {words[1] for words in typed(INDEX) if words[0] == "adapterkit"} == set(main.commands)
    for verb, command in main.commands.items():
        assert command.help is not None and f"adapterkit {verb}" in command.help, verb


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_parse(document: Path):
    """But for those of a verb or an engine that the document itself adds, which
    tests/test_docs_run.py runs."""
    first = [block.text.partition("\n")[0] for block in blocks(document, "python")]
    homes = ("# adapterkit/verbs/combine/records/", "# adapterkit/many/workers/")
    added = {Path(line).stem for line in first if line.startswith(homes)}
    for words in typed(document):
        if words[0] == "adapterkit" and not added.intersection(words):
            main.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("verb", main.commands)
def test_examples_of_a_help_parse_to_their_end(verb: str):
    """With all that is required, and nothing that the command does not have."""
    lines = re.findall(r"^ *adapterkit (.*)$", str(main.commands[verb].help), re.MULTILINE)
    for line in lines:
        named, *words = shlex.split(line.partition(" > ")[0], comments=True)
        values = main.commands[named].make_context(named, [*words]).params
        is_verb = named in VERBS and not {"--from-list", "--detect"} & {*words}
        if is_verb:
            record = registry.verb_named(named)
            sources, given = arguments_of(record, dict(values))
            known = {field.name for field in fields_of(record)}
            called(record, *sources, **{name: given[name] for name in given.keys() & known})
    assert lines


# what docs/api.md says: names in Python that are not the option's in snake case, and options of the
# command line alone
RENAMED = {"settings": "--set", "program": "--for", "adapters": "--adapter", "served": "--name"}
OF_THE_COMMAND_LINE = {"--json", "--quiet", "--modules", "--plan"}
OF_CONVERT = {"--from-list", "--out-pattern", "--detect", "--list"}
IN_PYTHON = {"progress", "accept"}


@pytest.mark.parametrize("verb", VERBS)
def test_options_of_a_command_are_those_of_its_function(verb: str):
    """In snake case, with the exceptions that docs/api.md lists."""
    own = inspect.signature(getattr(adapterkit, verb)).parameters.values()
    here = [p.name for p in own if p.kind == p.KEYWORD_ONLY and p.name not in IN_PYTHON]
    params = main.commands[verb].params
    flags = [one.opts for one in params if isinstance(one, click.Option)]
    there = [one for one in flags if not {*one} & (OF_THE_COMMAND_LINE | OF_CONVERT)]
    assert len(here) == len(there)
    for name in here:
        flag = RENAMED.get(name, f"--{name.replace('_', '-')}")
        assert sum(flag in one for one in there) == 1, name
    assert [p.name for p in own if p.kind != p.KEYWORD_ONLY] == [
        one.name for one in params if isinstance(one, click.Argument)
    ]


def test_the_page_of_python_names_the_options_that_differ():
    head = script("api").INTRODUCTION
    for flag in (*RENAMED.values(), *OF_THE_COMMAND_LINE, *OF_CONVERT):
        assert re.search(rf"`[a-z ]*{flag}`", head), flag


SHOWN = re.compile(r"(?:adapterkit|hf|pip|python -m pip) .*")  # a command in a line or in code
# what bash, zsh, cmd and PowerShell do not all read as it stands
BETWEEN_QUOTES, ELSEWHERE = re.compile(r"[$`%!\\]"), re.compile(r"[][*?{}|<>;^%!$`~'\\]|\s@")


def misread(command: str) -> list[str]:
    """What some shell would take for something else; a comment is left out, and a line may go on in
    the next one."""
    command = re.sub(r"(^|\s)#.*| \\$", "", command)
    quoted = "".join(re.findall('"[^"]*"', command))
    return BETWEEN_QUOTES.findall(quoted) + ELSEWHERE.findall(re.sub('"[^"]*"', "", command))


def test_commands_are_quoted_for_every_shell():
    lines = [
        *(line for command in main.commands.values() for line in str(command.help).split("\n"))
    ]
    for document in DOCUMENTS:
        for block in blocks(document, "sh", "console"):
            lines += [line.removeprefix("$ ") for line in block.text.split("\n")]
        lines += CODE.findall(prose(document))
    shown = [found[0] for line in lines if (found := SHOWN.fullmatch(line.strip()))]
    every = [one for one in shown if not one.startswith("adapterkit completion ")]  # names a shell
    assert len(every) > 150 and not list(filter(misread, every))
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"(--[\w-]+|pip install) '", path.read_text(encoding="utf-8")), path
    assert misread("--exclude 'a'") and misread('--exclude "$a"') and misread("combine a* b @c")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_in_the_text_exist(document: Path):
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")]
    known = set.union(*map(options, main.commands), {"--version"})
    known |= {name for s in scripts for name in re.findall(r'"(--[\w-]+)"', s.read_text())}
    methods = registry.members("combinations").values()
    known |= {f"--{option}" for record in methods for option in registry.options(record)}
    known |= {f"--{setting}" for engine in engines().values() for setting in engine.settings}
    for code in CODE.findall(prose(document)):
        verb = code.removeprefix("adapterkit ").partition(" ")[0]
        allowed = options(verb) if verb in main.commands else known
        named = {word.partition("=")[0] for word in re.findall(r"(?<!\S)--[\w-]+", code)}
        assert named <= allowed, code


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_other_commands_exist(document: Path):
    """Scripts with their options, paths and markers of pytest, extras of pip."""
    extras = set(PROJECT["optional-dependencies"])
    markers = (ROOT / "pyproject.toml").read_text()
    for program, *words in (w for w in typed(document) if w[0] != "adapterkit"):
        if program == "python" and words[0] != "-m":
            script = ROOT / words[0]
            source = script.read_text()
            if "common.parser_of(" in source:
                source += (script.parent / "common.py").read_text()
            assert all(f'"{w}"' in source for w in words[1:] if w.startswith("--")), words
        elif program == "python":
            if words[1] in ("pytest", "pip"):
                continue
            source = (ROOT / (words[1].replace(".", "/") + ".py")).read_text()
            assert all(f'"{w}"' in source for w in words[2:] if w.startswith("--")), words
        elif program == "pytest":
            for flag, word in zip(["", *words], words, strict=False):
                if flag == "-m":
                    assert f'"{word}:' in markers, word
                elif flag not in ("-k", "-n", "--dist") and not word.startswith("-"):
                    assert (ROOT / word.partition("::")[0]).exists(), word
        elif program == "pip":
            wanted = {name for w in words for name in re.findall(r"\[([\w,]+)\]", w)}
            assert set(",".join(wanted).split(",")) - {""} <= extras, words
        else:
            assert program in (
                "git",
                "cd",
                "ruff",
                "pyright",
                "mypy",
                "pre-commit",
                ".ci/run",
                ".ci/lowest",
            ), program


def test_the_readme_says_how_to_install_and_test():
    lines = [" ".join(words) for words in typed(README)]
    assert "pip install ." in lines and "pip install .[test]" in lines and "pytest" in lines


def test_the_first_page_lists_the_options_of_every_writing_command():
    said = re.search(
        r"Every command that writes an adapter\s+or a model has (.*?)\.",
        INDEX.read_text(),
        re.DOTALL,
    )
    assert said is not None
    words = {*re.findall("`(--[\\w-]+)`", said[1])}
    assert words == {"--dry-run", "--resume", "--overwrite", "--json"}
    writing = {v for name in ("Models", "Adapters", "Quantization") for v in SECTIONS[name]}
    assert writing == {verb for verb in VERBS if words <= options(verb)} and len(writing) > 12
    for verb in {*VERBS} - writing:  # they replace what they write only if asked
        if "--out" in options(verb):
            assert "--overwrite" in options(verb) or verb == "rerun", verb


def test_every_option_has_help():
    for verb, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{verb} {parameter.opts}"


def test_verbs_of_python_and_of_the_command_line_have_the_same_names_and_options():
    for verb in set(main.commands) & set(adapterkit.__all__):
        python = set(inspect.signature(getattr(adapterkit, verb)).parameters) - {
            "progress",
            "accept",
        }
        line = {p.name for p in main.commands[verb].params} - {"as_json", "quiet", "plan"}
        assert python == line - LOOKING.get(verb, set()), verb
    assert set(main.commands) - set(adapterkit.__all__) <= {"completion", "explain"}


# -- files, links, words -------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_exist(document: Path):
    text = document.read_text()
    for block in blocks(document, "python", "toml"):
        text = text.replace(block.text, "")
    for name in set(FILE.findall(text)):
        inside = PACKAGE.parent if name.startswith("adapterkit/") else ROOT
        assert any(inside.glob(name.rstrip("/"))), name
    folders = (*(ROOT / name for name in ("conformance", "docs", "examples", "tests")), PACKAGE)
    names = {path.name for folder in folders for path in folder.rglob("*.py")}
    first = [block.text.partition("\n")[0] for block in blocks(document, "python")]
    names |= {Path(line).name for line in first if line.startswith("# ")}  # files to add
    for name in re.findall(r"(?<![\w./*])\w+\.py\b", prose(document)):
        assert name in names, name


def test_files_that_docstrings_name_exist():
    """By their path in the package, or next to the file that names them."""
    for path in PACKAGE.rglob("*.py"):
        for name in re.findall(r"`([\w/]+\.py)\b", path.read_text("utf-8")):
            assert (PACKAGE / name).exists() or (path.parent / name).exists(), f"{path}: {name}"


def test_pages_that_messages_name_exist_and_have_the_named_section():
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.toml")):
        text = path.read_text("utf-8")
        for section, page in re.findall(r"(?:[Ss]ee (.+) in )?(?<![\w/])(docs/[\w-]+\.md)", text):
            assert (ROOT / page).exists(), f"{path}: {page}"
            headings = re.findall(r"^#+ (.*)$", prose(ROOT / page), re.MULTILINE)
            assert not section or section in headings, f"{path}: {section} in {page}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path):
    for target in LINK.findall(prose(document)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_are_short_and_words_spelled_alike(document: Path):
    text = document.read_text()
    for block in blocks(document, "console"):  # messages are as long as they are
        text = text.replace(block.text, "")
    long = [line for line in text.splitlines() if len(line) > WIDTH and line[0] != "|"]
    assert not long
    if document.name != "CHANGELOG.md":
        words = CODE.sub("", prose(document))
        assert not re.search(r"quantis|what to do:|\bmend", words, re.IGNORECASE)


def test_the_readme_is_short_and_the_first_page_leads_to_every_document():
    assert len(README.read_text().splitlines()) <= 140
    reached, found = {INDEX}, [INDEX]
    while found:
        page = found.pop()
        targets = {target.partition("#")[0] for target in LINK.findall(page.read_text())}
        pages = {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
        found += pages - reached
        reached |= pages
    assert {*DOCUMENTS[1:]} <= reached
    assert "docs/index.md" in README.read_text()


def test_the_tree_of_the_architecture_is_the_tree_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text[text.index("```\nadapterkit/") :].split("```")[1]
    described, parents = set(), [""]
    for indent, name in re.findall(r"^( +)(\S+)", block, re.MULTILINE):
        if len(indent) % 2 == 0 and len(indent) <= 2 * len(parents):
            parents = [*parents[: len(indent) // 2], name]
            described.add("".join(parents))
    assert all((PACKAGE / name).exists() for name in described), described
    folders = {p.parent.relative_to(PACKAGE).as_posix() + "/" for p in PACKAGE.rglob("__init__.py")}
    groups = ("core/", "bases/", "adapters/", "verbs/", "many/")
    folders = {f for f in folders if f.count("/") < 2 + f.startswith(groups)} - {"./"}
    files = {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    assert folders | files <= described


def test_the_levels_and_doors_of_the_architecture_are_those_of_the_package():
    layers = script("layers")
    written = layers.PAGE.read_text("utf-8")
    assert written == layers.document(), "it is old: run `python docs/layers.py`"
    tables = {name for name in vars(doors) if name.isupper()} - {"VERBS"}  # made of SECTIONS
    assert tables == {name for _, name in layers.TABLE.findall(layers.DOORS.read_text("utf-8"))}
    assert all(f"\n| `{name}` | " in written for name in tables)
    assert all(part in written for line in layers.constant("CORE") for part in line.split())


def test_every_method_and_format_has_its_row():
    combine, quantized = (
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("combine", "quantized")
    )
    for name in registry.members("combinations"):
        assert f"| `{name}` |" in combine, name
    for record in registry.members("codecs").values():
        for target in (*record.targets, *record.image_targets):
            assert f"{target}`" in quantized, target


def test_llms_txt_and_the_skill_follow_the_helps():
    skill = script("skill")
    place = ROOT / "examples" / "integrations" / "skill" / "SKILL.md"
    written = {ROOT / "llms.txt": skill.llms(), place: skill.skill()}
    for path, text in written.items():
        assert path.read_text("utf-8") == text, f"{path.name}: run `python docs/skill.py`"
    head = yaml.safe_load(skill.skill().split("---\n")[1])
    assert head["name"] == "adapterkit" and len(head["description"]) < 1024
    assert all(f"### {name}\n" in skill.skill() for name in main.names)
    for text in written.values():
        named = re.findall(r"^- `adapterkit (\w+)`: [A-Z].*\.$", text, re.MULTILINE)
        assert sorted(named) == sorted(main.names)


def names_by_keyword(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def test_the_api_is_that_of_the_docstrings():
    api = script("api")
    written = (ROOT / "docs" / "api.md").read_text()
    assert written == api.document(), "docs/api.md is out of date: run `python docs/api.py`"
    assert "*sources: object,\n" in written
    described = written.partition("## Run options\n")[2].partition("\n## ")[0]
    run_options = re.findall(r"^\| `(\w+): .+` \| \w.+ \|$", described, re.MULTILINE)
    assert {*run_options} == RUNNING - {"out"} and written.count("**run_options") > 10
    for name, signature in re.findall(
        r"```py\n([\w.]+)(\(\n.*?\) -> .*?)\n```", written, re.DOTALL
    ):
        shown = ast.parse(f"def f{signature}: ...").body[0]
        assert isinstance(shown, ast.FunctionDef)
        home = runtime.Adapters if name.startswith("adapters.") else runtime
        function = getattr(home, name.rpartition(".")[2], None)
        function = function if callable(function) else getattr(adapterkit, name)
        kinds = [
            p.kind for p in inspect.signature(function).parameters.values() if p.name != "self"
        ]
        arguments = shown.args
        by_name = [argument.arg for argument in arguments.kwonlyargs]
        if arguments.kwarg and arguments.kwarg.arg == "run_options":
            by_name, arguments.kwarg = [*by_name, *run_options], None
        assert sorted(by_name) == sorted(names_by_keyword(function)), name
        assert bool(arguments.vararg) == (inspect.Parameter.VAR_POSITIONAL in kinds), name
        assert bool(arguments.kwarg) == (inspect.Parameter.VAR_KEYWORD in kinds), name


def test_the_tables_of_formats_are_those_of_the_files():
    generator = script("formats")
    for page in generator.PAGES:
        written, tables = page.read_text("utf-8"), f"{page} is old: run `python docs/formats.py`"
        assert written == generator.document(page), tables
    written = generator.PAGES[0].read_text("utf-8")
    listed = re.findall(r"^\| \[`([\w.-]+)`\]", written, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "formats").glob("*.toml"))


def test_every_difference_from_peft_links_to_its_test():
    """The text of the link is the name of the test, without `test_`."""
    page = ROOT / "docs" / "differences.md"
    lines = page.read_text("utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("evidence |")]
    assert len(rows) > 50
    for row in rows:
        evidence = row.removesuffix(" |").rpartition(" | ")[2]
        tests = re.findall(r"\[`(\w+)`\]\((\.\./tests/[\w/]+\.py)\)", evidence)
        assert tests, row
        for name, path in tests:
            source = (page.parent / path).read_text("utf-8")
            assert f"\ndef test_{name}(" in source, row
