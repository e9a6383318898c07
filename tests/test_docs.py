"""The documents say what is true: their commands run, and the options, files and links they name exist.

`DOCUMENTS` are README.md and docs/*.md. In them a block marked `sh` holds commands that a user types, `console` commands with what
they print, and `python` a program, or a file to add where its first line is a comment with the file's path. The commands and
programs run one after another, each document's in a folder of its own, on a tiny Llama whose adapter goes by the names in CAST.
"""

import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import registry
from adapterkit.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = Path(adapterkit.__file__).parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WIDTH = 100

CAST = (
    "ADAPTER style skill english french german law medicine code a b c high-rank older newer other-depth"
).split()
PREPARATION = [
    "merge BASE ADAPTER=0.5 --out TUNED",
    "init BASE --method pissa --rank 2 --out residual",
    "quantize BASE --to nf4 --out base-nf4",
]
# Commands with one of these words are parsed and not run: what they need is not on a test machine.
PARSED_ONLY = re.compile(r"^[\w.-]+/[\w.-]+(@|:|$)|\.gguf$|^oft$|^--push$|^/|^cuda")

CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?<![\w./<-])(?:adapterkit|tests|examples|docs|formats|\.ci)/[\w./*-]*[\w/*]")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")


class Block(NamedTuple):
    document: Path
    language: str
    text: str


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Path) else None


def blocks(document: Path, *languages: str) -> list[Block]:
    found = [Block(document, *match.groups()) for match in FENCE.finditer(document.read_text())]
    return [block for block in found if not languages or block.language in languages]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for last, group in itertools.groupby(words, key=lambda word: word == "&&"):
            if not last:
                yield list(group)


def sessions(text: str) -> Iterator[tuple[list[str], str]]:
    """Each command of a console block, with what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            line, _, output = output.partition("\n")
            command = command[:-1] + line
        yield shlex.split(command, comments=True), output


def typed(document: Path) -> list[list[str]]:
    """All commands of a document's blocks."""
    lines = [words for block in blocks(document, "sh") for words in commands(block.text)]
    return lines + [w for block in blocks(document, "console") for w, _ in sessions(block.text)]


def options(verb: str) -> set[str]:
    parameters = (p for p in main.commands[verb].params if isinstance(p, click.Option))
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"--help"}


def api_script():
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- commands and options ------------------------------------------------------------------------


def test_every_command_is_in_the_readme_and_has_an_example_in_its_help():
    assert {words[1] for words in typed(README) if words[0] == "adapterkit"} == set(main.commands)
    for verb, command in main.commands.items():
        assert command.help is not None and f"adapterkit {verb}" in command.help, verb


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_parse(document: Path):
    for words in typed(document):
        if words[0] == "adapterkit":
            main.commands[words[1]].make_context(words[1], words[2:])


def test_options_in_the_helps_exist():
    for verb, command in main.commands.items():
        for line in re.findall(r"^ *adapterkit (.*)$", command.help or "", re.MULTILINE):
            named, *words = shlex.split(line, comments=True)
            assert {w for w in words if w.startswith("--")} <= options(named), verb


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_in_the_text_exist(document: Path):
    scripts = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")]
    known = set.union(*map(options, main.commands), {"--version"})
    known |= {name for s in scripts for name in re.findall(r'"(--[\w-]+)"', s.read_text())}
    methods = registry.members("combinations").values()
    known |= {f"--{option}" for record in methods for option in registry.options(record)}
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
            source = (ROOT / words[0]).read_text()
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
            assert program in ("git", "cd", "ruff", "pyright", "pre-commit", ".ci/run"), program


def test_the_readme_says_how_to_install_and_test():
    lines = [" ".join(words) for words in typed(README)]
    assert "pip install ." in lines and "pip install .[test]" in lines and "pytest" in lines


def test_every_option_has_help():
    for verb, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{verb} {parameter.opts}"


def test_verbs_of_python_and_of_the_command_line_have_the_same_names_and_options():
    for verb in set(main.commands) & set(adapterkit.__all__):
        python = set(inspect.signature(getattr(adapterkit, verb)).parameters) - {"progress"}
        line = {p.name for p in main.commands[verb].params} - {"as_json", "quiet"}
        assert python == line, verb
    assert set(main.commands) - set(adapterkit.__all__) <= {"completion"}


# -- documents run -------------------------------------------------------------------------------

# Each command is a fork of one process, which has imported the verbs once.
RUN = """
import json, os, sys, tempfile, traceback
import adapterkit
from adapterkit.cli import main
for verb in main.commands:
    getattr(adapterkit, verb, None)
for folder, words, program in json.loads(sys.stdin.read()):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, start=1):
            os.dup2(file.fileno(), number)
        os.chdir(folder)
        try:
            if program:
                exec(compile(program, folder, "exec"), {"__name__": "__main__"})
            else:
                sys.argv = ["adapterkit", *words]
                main(words)
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
        sys.stdout.flush()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [file.seek(0) or file.read() for file in files]
    print(json.dumps([status, *texts]), flush=True)
"""


class Task(NamedTuple):
    """One command or program of a document, and what it should print (None: not said)."""

    folder: Path
    words: list[str]
    program: str = ""
    output: str | None = None


def run(tasks: list[Task], path: Path) -> list[tuple[int, str, str]]:
    """Status, output and messages of each, by the package in the folder `path`."""
    request = json.dumps([(str(t.folder), t.words, t.program) for t in tasks])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
        "PYTHONPATH": str(path),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN],
        input=request,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def tasks_of(document: Path, folder: Path) -> Iterator[Task]:
    """What a document's blocks say to do, in order."""
    for block in blocks(document, "sh", "console", "python"):
        if block.language == "python":
            if not block.text.startswith("# "):
                yield Task(folder, [], block.text)
            continue
        shell = block.language == "sh"
        pairs = ((w, None) for w in commands(block.text)) if shell else sessions(block.text)
        for words, output in pairs:
            if words[0] == "adapterkit" and not any(map(PARSED_ONLY.search, words)):
                yield Task(folder, words[1:], "", output)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, to which the documents' files are added."""
    path = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, path / "adapterkit", ignore=shutil.ignore_patterns("__pycache__"))
    for block in itertools.chain.from_iterable(blocks(d, "python") for d in DOCUMENTS):
        if block.text.startswith("# adapterkit/"):
            file = path / block.text.partition("\n")[0].removeprefix("# ")
            assert file.parent.is_dir() and not file.exists(), file
            file.write_text(block.text)
    return path


@pytest.fixture(scope="module")
def stage(
    tmp_path_factory: pytest.TempPathFactory, cached_folder: Callable[..., Path], package: Path
) -> Path:
    """A folder with what the documents' commands start from."""
    from tests.support import oracle

    base = cached_folder("llama", lambda folder: oracle.save_base(oracle.llama(), folder, "bf16"))
    train = lambda folder: oracle.train(
        oracle.load(oracle.llama, base), folder, target_modules=oracle.LINEAR
    )
    stage = tmp_path_factory.mktemp("stage")
    for name in ("BASE", "ORIGINAL"):
        shutil.copytree(base, stage / name)
    for name in CAST:
        shutil.copytree(cached_folder("lora", train), stage / name)
    for status, _, errors in run([Task(stage, line.split()) for line in PREPARATION], package):
        assert status == 0, errors
    weights = stage / "other-depth" / "adapter_model.safetensors"
    renamed = lambda key: key.replace("layers.1.self_attn.q", "layers.7.self_attn.q")
    save_file({renamed(key): value for key, value in load_file(weights).items()}, weights)
    train_hra(oracle.load(oracle.llama, base), stage / "hra")
    save_fbgemm(base, stage / "fbgemm")
    for name in ("pissa", "pissa-init"):
        shutil.copytree(stage / "residual" / "adapter", stage / name)
    shutil.copytree(stage / "residual" / "base", stage / "pissa-base")
    return stage


def train_hra(model, folder: Path) -> None:
    """An adapter of the type that CONTRIBUTING.md adds."""
    import peft

    config = peft.HRAConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)


def save_fbgemm(base: Path, folder: Path) -> None:
    """A base in the format that CONTRIBUTING.md adds."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors[key].float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors |= {key: (weight / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def documents(stage: Path, package: Path, tmp_path_factory) -> dict[Path, list[tuple[Task, tuple]]]:
    """Every document's tasks, and the status, output and messages of each."""
    root, tasks = tmp_path_factory.mktemp("documents"), {}
    for document in DOCUMENTS:
        folder = shutil.copytree(stage, root / document.stem)
        tasks[document] = list(tasks_of(document, folder))
    results = iter(run([task for of_one in tasks.values() for task in of_one], package))
    return {document: [(t, next(results)) for t in of_one] for document, of_one in tasks.items()}


@pytest.mark.timeout(280)
@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_what_a_document_says_to_type_runs(document: Path, documents):
    for task, (status, output, errors) in documents[document]:
        if task.output is not None:
            pattern = ".*".join(map(re.escape, task.output.split("...")))
            assert re.fullmatch(pattern, output + errors, re.DOTALL), output + errors
        else:
            expected = (0, 1) if task.words[:1] == ["diff"] else (0,)
            assert status in expected, f"{task.words or task.program}\n{output}{errors}"


def test_every_key_of_the_receipts_is_explained(documents):
    text = (ROOT / "docs" / "receipts.md").read_text()
    explained = {word for code in CODE.findall(text) for word in re.findall(r"\w+", code)}
    receipts = [
        json.loads(path.read_bytes())
        for folder in {tasks[0][0].folder for tasks in documents.values() if tasks}
        for path in folder.glob("*/adapterkit.json")
    ]
    assert len({receipt["recipe"]["verb"] for receipt in receipts}) > 10
    keys = {key for receipt in receipts for key in receipt}
    for receipt in receipts:
        keys |= {key for metrics in receipt["parameters"].values() for key in metrics}
        keys |= set(receipt["recipe"]) | set(receipt["totals"]) | set(receipt["timings"])
    assert keys <= explained, sorted(keys - explained)


def test_schema_versions_are_those_of_the_code(documents, package):
    text = (ROOT / "docs" / "CHANGELOG.md").read_text()
    written = dict(re.findall(r"^\| `?(\w+)`? \| (\d+) \|", text, re.MULTILINE))
    tasks = [
        ["inspect", "BASE", "--json"],
        ["diff", "BASE", "BASE", "--json"],
        ["merge", "BASE", "ADAPTER", "--out", "planned", "--dry-run", "--json"],
    ]
    folder = documents[README][0][0].folder
    results = [
        json.loads(output) for _, output, _ in run([Task(folder, t) for t in tasks], package)
    ]
    now = {"inspect": results[0]["inspect"], "diff": results[1]["diff"], "plan": results[2]["plan"]}
    receipt = next(folder.glob("*/adapterkit.json")).read_bytes()
    assert written == {k: str(v) for k, v in now.items()} | {
        "receipt": str(json.loads(receipt)["adapterkit"])
    }


# -- files, links, words -------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_exist(document: Path):
    text = document.read_text()
    for block in blocks(document, "python"):
        text = text.replace(block.text, "")
    for name in set(FILE.findall(text)):
        inside = PACKAGE.parent if name.startswith("adapterkit/") else ROOT
        assert any(inside.glob(name.rstrip("/"))), name
    folders = (ROOT / "tests", ROOT / "examples", ROOT / "docs", PACKAGE)
    names = {path.name for folder in folders for path in folder.rglob("*.py")}
    for name in re.findall(r"(?<![\w./*])\w+\.py\b", prose(document)):
        assert name in names, name


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


def test_the_readme_is_short_and_names_every_document():
    assert len(README.read_text().splitlines()) <= 150
    linked = {target.partition("#")[0] for target in LINK.findall(README.read_text())}
    assert {f"docs/{document.name}" for document in DOCUMENTS[1:]} <= linked


def test_the_tree_of_the_architecture_is_the_tree_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text[text.index("```\nadapterkit/") :].split("```")[1]
    described, parents = set(), [""]
    for indent, name in re.findall(r"^( +)(\S+)", block, re.MULTILINE):
        if len(indent) % 2 == 0 and len(indent) <= 2 * len(parents):
            parents = [*parents[: len(indent) // 2], name]
            described.add("".join(parents))
    assert all((PACKAGE / name).exists() for name in described), described
    folders = {p.name + "/" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    files = {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    assert {name for name in described if "/" not in name.rstrip("/")} == folders | files


def test_every_method_and_format_has_its_row():
    combine, quantized = (
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("combine", "quantized")
    )
    for name in registry.members("combinations"):
        assert f"| `{name}` |" in combine, name
    for record in registry.members("weights.codecs").values():
        for target in record.targets:
            assert f"{target}`" in quantized, target


def test_the_api_is_that_of_the_docstrings():
    api = api_script()
    written = (ROOT / "docs" / "api.md").read_text()
    assert written == api.document(), "docs/api.md is out of date: run `python docs/api.py`"


# -- examples ------------------------------------------------------------------------------------


@pytest.mark.timeout(280)
def test_the_quickstart_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the merged model is the base with the adapter on it" in done.stdout


def test_the_benchmark_runs_on_a_small_checkpoint(tmp_path):
    out = tmp_path / "figures.json"
    script = str(ROOT / "examples" / "benchmarks" / "merge.py")
    small = ["--size", "0.02", "--repeat", "1", "--only", "cp,adapterkit"]
    done = subprocess.run(
        [sys.executable, script, *small, "--work", str(tmp_path / "work"), "--json", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.exists() and str(tmp_path) not in out.read_text()
