"""Commands in hints hold names of strangers: each is quoted, and made in one place."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import adapterkit
from adapterkit.adapters.formats.files.pickles import rewritten_name, unsafe
from adapterkit.cli.completion import module_suffixes
from adapterkit.core.commands import command, filled
from adapterkit.core.errors import AdapterkitError
from adapterkit.doors import VERBS
from tests.support.raw_files import base, normal, plain, tensors_file
from tests.support.sources import parsed, walked

PACKAGE = Path(adapterkit.__file__).parent
# how a command begins
PROGRAM = re.compile(
    rf"\b(adapterkit ({'|'.join(VERBS)})|ollama \w+|vllm serve|llama-\w+|hf [a-z]+|pip|python) "
)
# what may follow without quotes: names of the program's own
OWN = {"install", "MODELFILE"}
HOSTILE = ["a b", "$(touch owned)", "`touch owned`", "x';touch owned;'", '";touch owned;"', "a\nb",
           "--push", "-c", "é", "a\x1b[2Jb", "\u202ex", "%PATH%", "!x", "*", "~"]  # fmt: skip


def unquoted(source: str) -> list[str]:
    """Values that an f-string, or a sum of texts, puts behind the beginning of a command."""
    found = []
    for node in walked(parsed(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += part.value
            else:
                value = ast.unparse(part.value)  # type: ignore[attr-defined]
                if PROGRAM.search(text) and value not in OWN:
                    found.append(f"{text}{{{value}}}")
                text += "X "
    return found


def test_every_command_with_a_value_is_made_by_one_function():
    sources = (path for path in PACKAGE.rglob("*.py") if path.name != "commands.py")
    found = {path.name: unquoted(path.read_text("utf-8")) for path in sources}
    assert not {name: texts for name, texts in found.items() if texts}


@pytest.mark.parametrize("source", [
    'f"adapterkit resize {source} --rank 2"', 'f"run: adapterkit verify {out}"',
    'f"hf download {repo} {path}"', """f'python -c "load({name})"'""", 'f"vllm serve {base}"',
    'f"adapterkit merge MODEL {shown(name)}=-1"',
])  # fmt: skip
def test_the_check_sees_a_command_without_quotes(source: str):
    assert unquoted(source)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shell_reads_the_words_that_were_meant(name: str, tmp_path: Path):
    """Control characters are escaped, a dash in front is no option; nothing runs."""
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    as_argument = f"./{shown}" if name.startswith("-") else shown
    text = command("printf '%s\\n'", name, "BASE", out=name, verify=True, rank=0, nothing=None)
    words = subprocess.check_output(["sh", "-c", text], cwd=tmp_path, text=True).splitlines()
    assert words == [as_argument, "BASE", "--out", shown, "--verify", "--rank", "0"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ['"); evil(); ("', "\\", "a\nb", "x' y"])
def test_a_call_of_python_holds_a_name_as_a_text(name: str):
    (call,) = ast.parse(filled('load("{file}")', file=name)).body
    (argument,) = call.value.args  # type: ignore[attr-defined]
    assert argument.value == name.replace("\n", "\\n")


@pytest.mark.parametrize("name", ["x' + evil() + '.bin", '$(touch owned)".bin', "a`b`.pt"])
def test_the_hint_on_a_pickle_runs_nothing_of_its_name(name: str, tmp_path: Path):
    hint = unsafe(name, "folder").hint
    text = hint.splitlines()[1].replace("python", "printf %s")
    code = subprocess.check_output(["sh", "-c", text], cwd=tmp_path, text=True).removeprefix("-c")
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert name in texts and rewritten_name(name) in texts and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["$(touch owned)", "a'b;touch owned;'"])
def test_hints_of_commands_on_such_folders(name: str, tmp_path: Path, monkeypatch):
    """What is copied out of a refusal, and run, touches nothing."""
    monkeypatch.chdir(tmp_path)
    model, adapter = base().write(tmp_path / f"base{name}"), tmp_path / f"adapter{name}"
    plain().folder().write(adapter)
    adapterkit.merge(model, adapter, out=tmp_path / "once")
    twice = tmp_path / "twice"
    adapterkit.merge(tmp_path / "once", adapter, out=twice)
    rows = adapterkit.diagnose(twice, base=tmp_path / "once")["findings"]
    hints = [row["command"] for row in rows]
    assert any(hints)
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.init(model, method="eva", rank=2, stats=adapter / "adapter_config.json", out="x")
    hints.append(str(caught.value))
    commands = re.findall(r"adapterkit .*", "\n".join(hints))
    assert commands
    for text in commands:
        subprocess.run(["sh", "-c", text.replace("adapterkit", "echo")], check=False, cwd=tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_shell_completes_no_name_that_it_would_run(tmp_path: Path):
    """What completion puts into the line is run by the next Enter."""
    names = ("q_proj", "$(touch owned)", "a;b", "`x`")
    tensors = {f"m.{name}.weight": normal(4, 4) for name in names}
    (tmp_path / "model.safetensors").write_bytes(tensors_file(tensors))
    (tmp_path / "config.json").write_text("{}")
    assert module_suffixes(str(tmp_path)) == ["q_proj"]
