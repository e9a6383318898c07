"""Completion by click's protocol, in a process of its own as a shell runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterkit.cli import main
from adapterkit.cli.completion import SHELLS
from adapterkit.core import registry
from adapterkit.verbs.combine.methods import ALIASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that an installation makes of the entry point."""
    path = tmp_path_factory.mktemp("bin") / "adapterkit"
    path.write_text(f"#!{sys.executable}\nfrom adapterkit.cli import process\nprocess()\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    layer = "model.layers.0"
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]
    tensors = {f"{layer}.{name}.weight": np.zeros((2, 2), np.float32) for name in names}
    tensors[f"{layer}.input_layernorm.weight"] = np.zeros(2, np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def environment(**settings: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), **settings}


def complete(program: Path, *words: object) -> list[str]:
    """What is offered for the last word, each with its type."""
    env = environment(
        _ADAPTERKIT_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(["adapterkit", *map(str, words)]),
        COMP_CWORD=str(len(words)),
    )
    done = subprocess.run([program], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_and_options(program: Path):
    assert complete(program, "me") == ["plain,merge"]
    assert complete(program, "merge", "--exp") == ["plain,--expert-layout"]
    assert complete(program, "merge", "a", "b", "--tied", "un") == ["plain,untie"]
    assert complete(program, "completion", "") == [f"plain,{shell}" for shell in SHELLS]


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "./mo"],
        ["merge", "a", "./mo"],
        ["combine", "a", "--base", "./mo"],
        ["subtract", "a", "--general", "./mo"],
        ["loftq", "a", "--stats", "./mo"],
        ["verify", "a", "--adapter", "./mo"],
        ["inspect", "./mo"],
        ["merge", "a", "b", "--out", "./mo"],
    ],
    ids=" ".join,
)
def test_the_shell_completes_paths(program: Path, words: list[str]):
    """The shell itself lists the files."""
    assert complete(program, *words) == ["file,./mo"]


def test_methods_are_completed(program: Path):
    names = (*registry.members("combinations"), *ALIASES)
    offered = complete(program, "combine", "a", "--method", "d")
    assert offered == [f"plain,{name}" for name in names if name.startswith("d")]
    assert complete(program, "init", "a", "--method", "p") == ["plain,pissa"]


def test_quantized_formats_are_completed(program: Path):
    assert complete(program, "quantize", "a", "--to", "n") == ["plain,nf4"]
    assert complete(program, "init", "a", "--quantize", "w4") == ["plain,w4a16"]


@pytest.mark.parametrize("verb", ["init", "loftq"])
def test_targets_are_module_suffixes_of_a_local_base(program: Path, base: Path, verb: str):
    offered = complete(program, verb, base, "--targets", "")
    names = ["all-linear", "down_proj", "k_proj", "q_proj", "v_proj"]
    assert offered == [f"plain,{name}" for name in names]
    assert complete(program, verb, base, "--targets", "q_proj,v") == ["plain,q_proj,v_proj"]
    assert complete(program, verb, base, "--targets", "q_proj,q") == []


@pytest.mark.parametrize("name", ["org/model", "", "model.safetensors"])
def test_targets_of_a_base_elsewhere(program: Path, base: Path, name: str, tmp_path: Path):
    """A Hub id, no base, a damaged one: only what needs none."""
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    words = [damaged] if name == damaged.name else [name] if name else []
    assert complete(program, "init", *words, "--targets", "") == ["plain,all-linear"]


def test_nothing_heavy_is_loaded_to_complete(base: Path):
    code = (
        "import sys, atexit\nsys.argv[0] = 'adapterkit'\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy', 'transformers'} & "
        "set(sys.modules))))\n"
        "from adapterkit.cli import main\n"
        "main()"
    )
    for words in (f"init {base} --targets q", "combine a --method t", "quantize a --to n"):
        env = environment(
            _ADAPTERKIT_COMPLETE="bash_complete", COMP_WORDS=f"adapterkit {words}", COMP_CWORD="4"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]" and len(done.stdout.splitlines()) > 1


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_for_each_shell(shell: str):
    result = click.testing.CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0 and f"_ADAPTERKIT_COMPLETE={shell}_complete" in result.stdout


def test_another_shell_is_wrong_usage():
    result = click.testing.CliRunner().invoke(main, ["completion", "tcsh"])
    assert result.exit_code == 2 and "'bash', 'zsh', 'fish'" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_printed_script_completes_in_bash(program: Path, base: Path):
    """As bash itself does: source the printed script, call its function, read `COMPREPLY`."""
    script = """
    source <(adapterkit completion bash)
    offers() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
               compopt() { :; }; _adapterkit_completion adapterkit; echo "${COMPREPLY[*]}"; }
    complete -p adapterkit
    offers adapterkit com
    offers adapterkit combine a --method ti
    offers adapterkit quantize a --to fp
    offers adapterkit init "$BASE" --targets q_proj,
    """
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment(PATH=path, BASE=str(base)),
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    first, *offers = done.stdout.splitlines()
    assert "_adapterkit_completion adapterkit" in first
    assert [line.split() for line in offers] == [
        ["combine", "compare", "completion"],
        ["ties", "ties_svd"],
        ["fp4", "fp8"],
        ["q_proj,down_proj", "q_proj,k_proj", "q_proj,v_proj"],
    ]
