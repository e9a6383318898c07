"""Every command that a message prints stands on a line of its own, holds the paths that were given,
and runs as it is printed."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import AdapterkitError, codes
from tests.support import oracle
from tests.support.documents import ROOT
from tests.support.forks import command as run
from tests.support.sources import sources, walked

# what no job can know: which model or adapter would do, and where an output is sent
UNKNOWN = {
    "BASE", "ORIGINAL", "ADAPTER", "ADAPTERS", "ADAPTERS=W", "INITIAL", "MERGED", "MODEL", "FILE",
    "PLAN", "PART", "FOLDER", "A", "NAME", "ORG/NAME", "ADAPTER=-1", "hf://ORG/NAME",
}  # fmt: skip
KNOWN = {"A": "8", "PART": "unet"}  # values that the parser looks at
VERB = re.compile(rf"\badapterkit ({'|'.join(main.commands)})\b(?![`,;.])")


def texts_of(tree: ast.Module) -> Iterator[str]:
    """All texts of a module but docstrings and the helps of commands."""
    left_out: set[ast.AST] = set()
    for node in walked(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            left_out.add(body[0].value)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "command":
            left_out.add(node.value)
        if isinstance(node, ast.keyword) and node.arg == "help":
            left_out |= {*ast.walk(node.value)}
    for node in walked(tree):
        if (
            node in left_out
            or not isinstance(node, ast.Constant)
            or not isinstance(node.value, str)
        ):
            continue
        yield re.sub(r"`[^`]*`", "", node.value)


def static_texts() -> dict[str, str]:
    """Texts with commands: of the package, of formats and engines, of the errors' page."""
    texts = {
        text: name.rpartition("/")[2]
        for name, tree in sources().items()
        if not name.endswith(("/page.py", "/cards.py"))
        for text in texts_of(tree)
    }
    for path in (ROOT / "formats").rglob("*.toml"):
        table = tomllib.loads(path.read_text("utf-8"))
        texts |= {re.sub(r"`[^`]*`", "", text): path.name for text in strings(table)}
    for entry in codes().values():
        texts |= dict.fromkeys((re.sub(r"`[^`]*`", "", entry["do"]), entry["example"]), "errors")
    return {text: where for text, where in texts.items() if VERB.search(text)}


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from strings(inner)


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if VERB.search(line)]


STATIC = static_texts()


@pytest.mark.parametrize("text", STATIC)
def test_a_command_is_a_line_of_its_own_and_parses(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text in ("adapterkit convert", "adapterkit resize"):  # the beginning of `command(...)`
        return
    for line in lines_of(text):
        assert line.startswith("adapterkit "), line
        words = shlex.split(line)[1:]
        if len(words) == 1:
            continue
        assert {word for word in words if word.isupper() or "=" in word} <= UNKNOWN, line
        name, *rest = (KNOWN.get(word, word) for word in words)
        main.get_command(click.Context(main), name).make_context(name, rest)


def commands_in(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("adapterkit ")]


def runs(line: str, folder: Path, **known: Any) -> None:
    """A command as it is printed, but for what is not known."""
    words = [str(known.pop(word, word)) for word in shlex.split(line)]
    assert not {*words} & UNKNOWN and not known, line
    done = run(*words[1:], cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def here(llama, lora, tmp_path, monkeypatch) -> Path:
    """A folder with the base, a LoRA and a DoRA of it, with a space in each name."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("the base", llama), ("my lora", lora)):
        (tmp_path / name).symlink_to(source)
    oracle.train(oracle.llama(), tmp_path / "my dora", use_dora=True, target_modules=["q_proj"])
    return tmp_path


def refused(verb: str, *sources: Any, **options: Any) -> list[str]:
    with pytest.raises(AdapterkitError) as caught:
        getattr(adapterkit, verb)(*sources, **options)
    return commands_in(str(caught.value))


def test_a_refused_dora_is_made_plain(here: Path):
    """Of two adapters the one that is meant is in the command."""
    (line,) = refused("subtract", "my lora", general="my dora", out="c")
    assert line == "adapterkit resize 'my dora' --base BASE --energy 0.99 --out plain"
    runs(line, here, BASE="the base")


def test_a_refused_quantized_base_is_made_floats(here: Path):
    adapterkit.quantize("the base", to="nf4", out="in nf4")
    (line,) = refused("quantize", "in nf4", to="int8", out="o")
    assert line == "adapterkit dequantize 'in nf4' --out floats"
    runs(line, here)


def test_statistics_that_lack_are_collected(here: Path):
    (here / "data.jsonl").write_text('{"input_ids": [1, 2, 3, 4]}\n' * 4)
    (line,) = refused("init", "the base", method="corda", rank=2, out="o")
    runs(line, here, FILE="data.jsonl")
    adapterkit.init(
        "the base", method="corda", rank=2, targets="q_proj", stats="stats.safetensors", out="o"
    )


@pytest.mark.parametrize("words", [
    ["merge", "the base", "my lora", "--out", "the model"],
    ["resize", "my lora", "--rank", "2", "--out", "small one"],
    ["merge", "the base", "my lora", "--out", "o", "--plan", "the plan.json"],
    ["convert", "my lora", "--to", "peft", "--base", "the base", "--out", "for peft"],
])  # fmt: skip
def test_the_next_command_runs_as_printed(words: list[str], here: Path):
    done = run(*words, cwd=here)
    assert done.returncode == 0, done.stderr
    found = [line.partition(": ")[2] for line in done.stderr.splitlines() if VERB.search(line)]
    found = [line for line in found if line.startswith("adapterkit ")]
    assert len(found) == 1 + ("--plan" in words)
    for line in found:
        runs(line, here)


def test_check_advises_commands_that_run(here: Path):
    oracle.train(oracle.llama(), here / "wide one", r=32, target_modules=["q_proj"])
    for adapter, base in [("my dora", "the base"), ("wide one", None)]:
        rows = adapterkit.check(adapter, program="vllm", base=base)["findings"]
        assert rows and all(row["command"] for row in rows)
        printed = run("check", adapter, "--for", "vllm", *(["--base", base] * bool(base)), cwd=here)
        assert commands_in(printed.stdout) == [row["command"] for row in rows]
        for number, row in enumerate(rows):
            runs(row["command"].replace("--out ", f"--out {number}-"), here)


def test_diagnose_advises_commands_that_run(here: Path):
    adapterkit.merge("the base", "my lora=0.2", out="merged")
    adapterkit.merge("the base", "my lora=2", out="twice")
    for model, expected in [
        ("merged", "adapterkit merge 'the base' 'my lora' --out merged-again --verify"),
        ("twice", "adapterkit merge twice 'my lora=-1' --out unmerged"),
    ]:
        rows = adapterkit.diagnose(model, base="the base", adapters="my lora")["findings"]
        assert expected in [row["command"] for row in rows]
        printed = run("diagnose", model, "--base", "the base", "--adapter", "my lora", cwd=here)
        assert commands_in(printed.stdout) == [row["command"] for row in rows if row["command"]]
        runs(expected, here)
