"""The help: complete, short, quick, and in agreement with the methods that there are."""

import re
import subprocess
import sys
from pathlib import Path

import click
import click.testing
import pytest

from adapterkit.cli import main
from adapterkit.core import registry
from adapterkit.verbs.combine.methods import ALIASES

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(main.commands)
FAMILIES = ["combinations", "inits", "codecs"]


def help_of(*words: str, columns: int = 80, flag: str = "--help") -> str:
    runner = click.testing.CliRunner(env={"COLUMNS": str(columns)})
    result = runner.invoke(main, [*words, flag], terminal_width=columns)
    assert result.exit_code == 0
    return result.output


def test_each_command_has_one_complete_line_in_one_section_at_80_columns():
    sections = re.split(r"^(\w[\w ]*):\n", help_of(), flags=re.MULTILINE)[1:]
    listed = {}
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        if title != "Options":
            listed |= {line.split()[0]: (title, line) for line in text.strip().splitlines()}
    assert sorted(listed) == COMMANDS == sorted(main.names)
    assert {title for title, _ in listed.values()} >= {
        "Models",
        "Adapters",
        "Quantization",
        "Inspection",
    }
    for name, (_, line) in listed.items():
        summary = main.commands[name].help.partition("\n\n")[0]
        assert line.split(maxsplit=1)[1] == " ".join(summary.split()) and len(line) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_an_example(command: str):
    assert re.search(rf"Example:\n +adapterkit {command} \S+", help_of(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_options_is_a_sentence(command: str):
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            text = parameter.help or ""
            assert text.endswith((".", ")")) and not text.startswith(("Of ", "Whose ")), parameter


def test_writing_commands_have_the_options_of_writing():
    written = ("--out", "--dry-run", "--json", "--device", "--engine", "--resume", "--overwrite")
    assert all(option in help_of("merge") for option in written)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["combine", "--help"], ["quantize", "--help"], ["completion", "bash"]],
    ids=" ".join,
)
def test_help_is_light(words: list[str]):
    """Neither torch nor transformers, nor numpy, is imported, whatever the help lists, and few
    modules of Python's own: 190 in all, in 0.15 s."""
    command = [sys.executable, "-X", "importtime", "-m", "adapterkit", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    loaded = {name.partition(".")[0] for name in modules}
    assert len(modules) < 240
    assert done.returncode == 0 and "adapterkit" in loaded and "click" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tqdm"}


def test_import_is_light():
    code = "import adapterkit, sys; print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", FAMILIES)
def test_declarations_are_those_of_the_records(package: str):
    records, declared = registry.members(package), registry.declarations(package)
    assert list(records) == list(declared)
    for name, record in records.items():
        if package != "codecs":  # a codec's fields are of one weight, no options
            assert declared[name].options == tuple(registry.options(record)), name
        for key, value in declared[name].constants.items():
            assert getattr(record, key) == value, (name, key)
        assert declared[name].summary, name


def test_options_of_methods_are_listed_as_they_are_given():
    """As options of the command where it has them, else by --set."""
    own = {parameter.name for parameter in main.commands["combine"].params}
    rows = dict(row for rows in main.commands["combine"].lists().values() for row in rows)
    for name, method in registry.members("combinations").items():
        for option in registry.options(method):
            flag = f"--{option}" if option in own else f"--set {option}"
            assert re.search(rf"[( ]{flag}[,)]", rows[name]), (name, option)


def test_help_lists_every_method_and_format():
    from adapterkit.bases.quantized.records.quantize import targets

    names = lambda command: {
        name
        for rows in main.commands[command].lists().values()
        for row in rows
        for name in row[0].split(", ")
    }
    assert names("combine") == {*registry.members("combinations"), *ALIASES}
    assert names("init") == {*registry.members("inits")}
    assert names("quantize") == set(targets())


WRITING = [name for name, command in main.commands.items() if getattr(command, "writes", False)]


@pytest.mark.parametrize("command", WRITING)
def test_one_line_at_the_end_of_the_help_names_the_common_options(command: str):
    text = " ".join(help_of(command).splitlines()[-6:])
    line = " ".join(text.partition("Common options (")[2].split())
    assert line.startswith(f"described by main {command} --help-all): --dry-run, --plan, --json, ")
    assert line.endswith("--hash.") and not re.search(r"\n  --resume  ", help_of(command))


def test_reading_commands_have_no_second_help():
    assert len(WRITING) == 14 and "--help-all" not in help_of("inspect")
    result = click.testing.CliRunner().invoke(main, ["inspect", "--help-all"])
    assert result.exit_code == 2


@pytest.mark.parametrize("command", WRITING)
def test_common_options_follow_the_command_s_own(command: str):
    """Each option once, and the required ones with the command's own."""
    text = help_of(command, columns=100, flag="--help-all")
    own, _, common = text.partition("\nCommon options:\n")
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            flag = re.compile(rf"^  {parameter.opts[0]}(?=[ ,\n])", re.MULTILINE)
            count = len(flag.findall(own)), len(flag.findall(common))
            assert sum(count) == 1 and (count[0] or not parameter.required), parameter.opts


def test_the_lists_of_the_help_end_in_complete_sentences():
    for command in ("combine", "init", "quantize"):
        for rows in main.commands[command].lists().values():
            assert all(text.endswith((".", "inputs", "exact")) for _, text in rows)


SECTIONS = {
    "Methods and weights of several adapters": [
        ("merge", "method density density_for majority settings weight_for weights"),
        ("combine", "density majority settings weight_for weights fit seed"),
    ],
    "Quantization and rounding": [
        ("merge", "original dequantize rounding stats fail_below"),
        ("quantize", "skip block_size double_quant rounding stats"),
        ("init", "quantize skip block_size double_quant"),
        ("loftq", "skip block_size double_quant"),
    ],
    "Models in GGUF files": [
        ("merge", "changed_type gguf_scales modelfile imatrix"),
        ("quantize", "modelfile imatrix"),
        ("verify", "imatrix"),
    ],
    "Image and video models": [("merge", "lbw variant"), ("convert", "architecture component")],
    "Common options": [("merge", "memory device dry_run plan"), ("fit", "memory device")],
}


@pytest.mark.parametrize("title", SECTIONS)
def test_options_of_a_product_stand_under_its_heading(title: str):
    for command, names in SECTIONS[title]:
        flag = "--help-all" if command in WRITING else "--help"
        text = help_of(command, columns=100, flag=flag)
        text = text.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        flags = {p.name: p.opts[0] for p in main.commands[command].params}
        for name in names.split():
            assert re.search(rf"^  {flags[name]}\b", text, re.MULTILINE), (command, name)


def test_the_own_options_of_merge_are_of_any_base():
    own = help_of("merge", columns=100).partition("\nOptions:\n")[2].partition("\n\n")[0]
    assert not re.search("GGUF model|quantized|image model's|method", own) and "--out" in own
    assert len(re.findall("^  -", own, re.MULTILINE)) == 15
