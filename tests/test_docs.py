"""Documents do not drift: the README's tree, commands and options are those of the code, its Python runs, the examples run."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import adapterkit
from adapterkit.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGE = Path(adapterkit.__file__).parent


def commands(text):
    """(verb, options) of every `adapterkit ...` line in a code block."""
    for line in re.findall(r"^adapterkit (\w+ .*)$", text, re.MULTILINE):
        words = line.split("#")[0].split()
        yield words[0], [word for word in words[1:] if word.startswith("--")]


def options(verb):
    return {
        name for p in main.commands[verb].params if isinstance(p, click.Option) for name in p.opts
    }


def test_the_tree_of_the_readme_is_the_tree_of_the_package():
    block = README[README.index("```\nadapterkit/") :].split("```")[1]
    said = set(re.findall(r"^  (\S+)  ", block, re.MULTILINE))
    there = {
        p.name + ("/" if p.is_dir() else "")
        for p in PACKAGE.iterdir()
        if not p.name.startswith("__")
    }
    assert said == there - {"py.typed"}


def test_every_command_has_a_line_in_the_readme_and_an_example_in_its_help():
    said = {verb for verb, _ in commands(README)}
    assert said == set(main.commands)
    for verb, command in main.commands.items():
        assert f"adapterkit {verb}" in command.help, verb


def test_options_in_the_readme_and_in_the_help_exist():
    texts = README + "".join(command.help for command in main.commands.values())
    for verb, used in commands(re.sub(r"^ +", "", texts, flags=re.MULTILINE)):
        assert set(used) <= options(verb), verb


def test_every_option_has_help():
    for verb, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{verb} {parameter.opts}"


def test_verbs_of_python_and_of_the_command_line_have_the_same_names_and_options():
    import inspect

    for verb in main.commands:
        python = set(inspect.signature(getattr(adapterkit, verb)).parameters) - {"progress"}
        line = {p.name for p in main.commands[verb].params} - {"as_json", "quiet"}
        assert python == line, verb


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
    command = [
        str(ROOT / "examples" / "benchmarks" / "merge.py"),
        "--size",
        "0.02",
        "--repeat",
        "1",
        "--only",
        "cp,adapterkit",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--work", str(tmp_path / "work"), "--json", str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert out.exists() and str(tmp_path) not in out.read_text()
