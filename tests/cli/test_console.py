"""Texts on consoles whose encoding lacks letters."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit
from adapterkit.cli.output import STAND_INS, _plain
from tests.support.forks import program
from tests.support.usual import usual

HELP = (
    "import sys\n"
    "from adapterkit.cli import main, output\n"
    "output.never_fail()\n"
    "for name in sorted(main.list_commands(None)):\n"
    "    main([name, '--help'], standalone_mode=False)\n"
)


def test_every_letter_of_the_package_has_a_stand_in():
    texts = [p.read_text(encoding="utf-8") for p in Path(adapterkit.__file__).parent.rglob("*.py")]
    letters = {letter for text in texts for letter in text if not letter.isascii()}
    assert STAND_INS.keys() & letters and "?" not in map(_plain, letters)


@pytest.mark.parametrize("encoding", usual(["cp1252", "cp437"], {"cp1252"}))
def test_help_is_printed_in_every_encoding(encoding: str):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", HELP], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "||" in done.stdout.decode(encoding)


def test_the_process_prints_so(tmp_path: Path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "adapterkit", "combine", "--help"]
    done = subprocess.run(argv, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0 and b"delta" in done.stdout, done.stderr


NAME = "模型-Ω-é-e\u0301-😀"
# what a person does, in a folder of that name, on a terminal; the expected exit status of each
MERGE = "merge base style=0.5 --out 'merged Ω' --verify"
REFUSED = "combine law 模型-Ω --method linear --out there"
DOCUMENT = "merge base '模 lora' --out 'json Ω' --dry-run --json"
FEW = {
    MERGE: 0,
    "diff base 'merged Ω'": 1,
    "verify 'merged Ω'": 0,
    "combine law medicine --method linear --out '模 lora'": 0,
    "inspect '模 lora'": 0,
    REFUSED: 1,
    "convert --list": 0,
    DOCUMENT: 0,
}
ALL = FEW | {
    "merge base style --out ranks-Ω --plan Ω.plan.json": 0,
    "run Ω.plan.json": 0,
    "finish Ω.plan.json": 0,
    "quantize base --to w8a16 --out 'small Ω'": 0,
    "dequantize 'small Ω' --out 'floats Ω'": 0,
    "loftq base32 --rank 4 --out 'loftq Ω'": 0,
    "init base32 --method pissa --rank 4 --targets all-linear --out 'start Ω'": 0,
    "extract base32 tuned --rank 3 --out 'extracted Ω'": 0,
    "convert style --to mlx --base base --out 'mlx Ω'": 0,
    "convert 'mlx Ω' --detect": 0,
    "resize style --rank 2 --out 'resized Ω'": 0,
    "subtract law --general medicine --out 'less Ω'": 0,
    "arrow law medicine --out 'experts Ω'": 0,
    "stats base32 --data ids.jsonl --targets q_proj --out 'Ω.safetensors'": 0,
}
LARGER = "from tests.golden.inputs import create_inputs\ncreate_inputs(Path())"
SMALL = """
from tests.support.hub_models import adapter_files, base_files, write
write(Path("base"), base_files(2))
for name in ("style", "law", "medicine"):
    write(Path(name), adapter_files(layers=range(2)))
"""
TERMINAL = """
import io, json, os, pty, shlex, sys, termios, threading
from pathlib import Path
from unittest import mock
os.mkdir({name!r})
os.chdir({name!r})
from adapterkit.cli import main, output
{inputs}
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
master, terminal = pty.openpty()
termios.tcsetwinsize(terminal, (24, 80))
for number, name in ((1, "stdout"), (2, "stderr")):
    os.dup2(terminal, number)
    setattr(sys, name, io.TextIOWrapper(open(number, "wb", 0, closefd=False), "cp1252"))
output.never_fail()
shown = []
def watch():
    while data := os.read(master, 1 << 16):
        shown.append(data)
threading.Thread(target=watch, daemon=True).start()
ended = {{}}
for number, line in enumerate({lines!r}, start=1):
    with mock.patch.object(os, "_exit", sys.exit):
        try:
            main(shlex.split(line), prog_name="adapterkit")
        except SystemExit as status:
            ended[line] = status.code
    sys.stdout.flush(), sys.stderr.flush()
    os.write(terminal, b"\\0")
    while b"".join(shown).count(b"\\0") < number:
        threading.Event().wait(0.01)
print(json.dumps([ended, b"".join(shown).decode("cp1252")]), file=answers, flush=True)
"""


@pytest.mark.parametrize("jobs", usual([FEW, ALL], lambda jobs: jobs is FEW), ids=["few", "all"])
def test_a_terminal_of_code_page_1252(jobs: dict[str, int], tmp_path: Path, one_thread: None):
    """Bars, tables and errors with names that it lacks: stand-ins, and JSON that is right."""
    inputs = LARGER if jobs is ALL else SMALL
    done = program(TERMINAL.format(name=NAME, lines=[*jobs], inputs=inputs), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ended, shown = json.loads(done.stdout.splitlines()[-1])
    texts = dict(zip(jobs, shown.split("\0"), strict=False))
    unlike = [texts[line] for line, status in jobs.items() if ended[line] != status]
    assert not unlike and "Traceback" not in shown, unlike
    assert re.search(r"\d%\|.*\|", texts[MERGE]) and "merged Omega: " in texts[MERGE]
    assert "no such path: ??-Omega" in texts[REFUSED] and "hint: " in texts[REFUSED]
    named = [one["name"] for one in json.loads(texts[DOCUMENT])["inputs"]]
    assert named == ["base", "模 lora"]
