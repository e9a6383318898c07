"""Texts on consoles whose encoding lacks letters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit
from adapterkit.cli.console import PLAIN, _plain
from tests.support.usual import usual

HELP = (
    "import sys\n"
    "from adapterkit.cli import console, main\n"
    "console.never_fail()\n"
    "for name in sorted(main.list_commands(None)):\n"
    "    main([name, '--help'], standalone_mode=False)\n"
)


def test_every_letter_of_the_package_has_a_stand_in():
    texts = [p.read_text(encoding="utf-8") for p in Path(adapterkit.__file__).parent.rglob("*.py")]
    letters = {letter for text in texts for letter in text if not letter.isascii()}
    assert PLAIN.keys() & letters and "?" not in map(_plain, letters)


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
