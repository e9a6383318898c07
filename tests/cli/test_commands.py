"""The command line as scripts see it: what goes to stdout and to stderr, exit statuses, and sources
with a weight."""

import io
import json
import re
import subprocess
import sys

import click.testing
import pytest

from adapterkit.cli import main
from adapterkit.cli.output import ProgressBar
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.sources import open_source, weight_of
from tests.support import oracle
from tests.support.forks import command as run
from tests.support.oracle import stored


def test_a_merge_and_its_verification(llama, lora, tmp_path):
    """stdout stays empty without --json; messages go to stderr."""
    done = run("merge", llama, lora, "--out", tmp_path / "out", "--verify")
    assert (done.returncode, done.stdout) == (0, "") and "14 of 21 tensors changed" in done.stderr
    assert "verified: 42 rows of 14 tensors, recomputed in float64, match" in done.stderr
    checked = run("verify", tmp_path / "out", "--base", llama, "--adapter", lora, "--json")
    document = json.loads(checked.stdout)
    assert checked.returncode == 0 and document["tensors"] == 14 and document["rows"] == 42
    oracle.merge(llama, lora, out=tmp_path / "python")
    oracle.assert_same(stored(tmp_path / "out"), stored(tmp_path / "python"))


def test_a_pattern_that_no_shell_has_replaced(tmp_path, monkeypatch):
    """cmd and PowerShell replace none."""
    monkeypatch.chdir(tmp_path)
    for name in ("lora-2", "lora-10", "odd[1]", "odd1"):
        (tmp_path / name).mkdir()
    words = ["lora-*", "odd[1]", "none-*", "o/n:a*=0.5", "--method", "linear", "--out", "sum"]
    context = main.commands["combine"].make_context("combine", words)
    sources = ("lora-10", "lora-2", "odd[1]", "none-*", "o/n:a*=0.5")
    assert context.params["adapters"] == sources
    with pytest.raises(Refused, match="none-[*](.|\n)*the pattern matches none"):
        open_source("none-*")


def test_windows_does_not_expand_patterns(tmp_path):
    """click would put names of files in the place of regular expressions there."""
    (tmp_path / ".hidden").touch()
    code = (
        "import os, sys, types, click.core, adapterkit.cli\n"
        "click.core.os = types.SimpleNamespace(**vars(os) | {'name': 'nt'})\n"
        "sys.argv = ['adapterkit', '.*']\n"
        "adapterkit.cli.process()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "No such command '.*'" in done.stderr


def test_json_is_one_document(llama, lora, tmp_path):
    done = run("merge", llama, f"{lora}=0.5", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0
    receipt = json.loads(done.stdout)
    assert (
        receipt["recipe"]["options"]["weights"] == [0.5]
        and receipt["totals"]["tensors_changed"] == 14
    )
    assert receipt["files"] == json.loads((tmp_path / "out/adapterkit.json").read_text())["files"]


def test_quiet_prints_nothing(llama, lora, tmp_path):
    """As a process of its own, which imports all: no library prints either."""
    words = ["merge", llama, lora, "--out", tmp_path / "out", "--quiet"]
    line = [sys.executable, "-m", "adapterkit", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(as_json, llama, lora, tmp_path):
    words = [
        "merge",
        str(llama),
        str(lora),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
        *(["--json"] if as_json else []),
    ]
    result = click.testing.CliRunner().invoke(main, words)
    assert result.exit_code == 0 and list(tmp_path.iterdir()) == []
    if not as_json:
        assert re.search(r"tensors changed +14\n", result.stdout) and re.search(
            r"disk needed +[\d.]+ KB\n", result.stdout
        )
        return
    plan = json.loads(result.stdout)
    real = oracle.merge(llama, lora, out=tmp_path / "out").data
    assert plan["totals"] == real["totals"] and len(plan["changed"]) == 14
    written = sum(
        f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "adapterkit.json"
    )
    assert plan["totals"]["bytes_written"] == written


def test_a_refusal_is_a_message_and_status_1(llama, lora, tmp_path):
    done = run("merge", llama, tmp_path / "nowhere", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("Error: ")
        and "expected: " in done.stderr
        and "hint: " in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_damage_is_status_1(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run("verify", tmp_path / "out", "--json")
    assert (
        done.returncode == 1
        and [one["code"] for one in json.loads(done.stdout)["errors"]] == ["AK607"]
        and "model.safetensors" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_verification_reports_what_it_did_not_check(llama, lora, tmp_path):
    oracle.merge(llama, lora, out=tmp_path / "out")
    result = click.testing.CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert (
        result.exit_code == 0
        and "arithmetic of a merge too, give --base and --adapter" in result.stderr
    )
    oracle.merge(llama, lora, out=tmp_path / "none", hash="none")
    result = click.testing.CliRunner().invoke(main, ["verify", str(tmp_path / "none")])
    assert result.exit_code == 0 and "which holds no hashes" in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_on_a_terminal_only(stream, quiet, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with ProgressBar(quiet) as bar:
        bar.expect(4_000_000)
        bar(1_000_000)
        bar.bar.refresh()
    shown = "25%" in sys.stderr.getvalue() and "1.00M/4.00M" in sys.stderr.getvalue()
    assert shown == (stream is Terminal and not quiet)
    assert shown or not sys.stderr.getvalue()


WRONG = {
    "no-out": ["merge", "base", "adapter"],
    "no-adapter": ["merge", "base", "--out", "x"],
    "no-command": ["conjure"],
    "option": ["merge", "base", "adapter", "--out", "x", "--sing"],
}
WRITING = ["merge", "base", "adapter", "--out", "x"]
WRONG_VALUES = {
    "choice": [*WRITING, "--tied", "loose"],
    "dtype": [*WRITING, "--dtype", "int4"],
    "method": [*WRITING, "--method", "x"],
    "share": [*WRITING, "--method", "ties", "--density", "2"],
    "number": [*WRITING, "--seed", "x"],
    "regex": [*WRITING, "--include", "("],
    "two": [*WRITING, "--density", "0.5"],
    "plan": [*WRITING, "--plan", "plan.json", "--dtype", "x"],
    "list": ["convert", "--from-list", "x", "--to", "peft", "--out-pattern", "y", "--rank", "0"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_status_2(name):
    result = click.testing.CliRunner().invoke(main, WRONG[name])
    assert result.exit_code == 2 and result.stdout == "" and "Usage" in result.stderr


@pytest.mark.parametrize(
    "command, old, new",
    [
        ("merge", "--touched-as", "--changed-type"),
        ("merge", "--scales", "--gguf-scales"),
        ("merge", "--base16", "--original"),
        ("fit", "--per", "--granularity"),
        ("fit", "--hold", "--holdout"),
        ("stats", "--whole", "--whole-model"),
        ("convert", "--prefix-only", "--component"),
        ("edit", "--base-model", "--base-id"),
    ],
)
def test_a_former_name_of_an_option_is_refused_with_the_present_one(command, old, new):
    result = click.testing.CliRunner().invoke(main, [command, "x", old, "y"])
    assert result.exit_code == 2 and re.search(f"Did you mean.*'{new}'", result.stderr)


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_of_any_option_is_status_2_with_a_code(name, tmp_path):
    done = run(*WRONG_VALUES[name], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and not list(tmp_path.iterdir())
    assert re.match(r"Error: .* \[AK10[124]\]\n  expected: .*\n  hint: ", done.stderr)


def test_values_that_only_the_planner_reads_are_status_2(llama, lora, tmp_path):
    """Of a method, of a format; a value that does not fit these files is a refusal."""
    words = ("combine", lora, lora, "--method", "ties", "--out", tmp_path / "out")
    assert run(*words).returncode == 2  # without a density
    assert run(*words, "--density", "0.5", "--set", "x=1").returncode == 2
    assert run("convert", lora, "--to", "nowhere", "--out", tmp_path / "out").returncode == 2
    merge = ("merge", llama, lora, "--out", tmp_path / "out")
    assert run(*merge, "--weight-for", "q_proj").returncode == 2
    assert run(*merge, "--include", "no_such_module").returncode == 1
    (tmp_path / "recipe.yaml").write_text(
        f"merge_method: x\nbase_model: {llama}\nmodels: [{{model: {llama}}}]\n"
    )
    done = run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert done.returncode == 1  # a wrong value in a file


@pytest.mark.parametrize("name, short", [("bfloat16", "bf16"), ("float16", "fp16")])
def test_a_dtype_has_torchs_name_too_and_the_short_one_in_the_plan(name, short, llama, lora):
    words = ("merge", llama, lora, "-o", "out", "--dtype", name, "--dry-run", "--json")
    done = run(*words)
    assert json.loads(done.stdout)["options"]["dtype"] == short


def test_o_is_out_and_q_is_quiet(llama, lora, tmp_path):
    done = run("merge", llama, lora, "-o", tmp_path / "out", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run("verify", tmp_path / "out", "-q").stderr == ""


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("a", "a", 1.0),
        ("a=0.7", "a", 0.7),
        ("a=-1", "a", -1.0),
        ("a=1e-3", "a", 1e-3),
        ("lr=1e-4/a=0.5", "lr=1e-4/a", 0.5),
        ("org/name@main:sub=2", "org/name@main:sub", 2.0),
    ],
)
def test_weight_after_the_last_equals_sign(text, source, weight):
    assert weight_of(text) == (source, weight)


def test_a_path_with_an_equals_sign_is_not_split(llama, lora, tmp_path):
    """Such folders are common (`lr=1e-4`); only what does not exist is cut."""
    whole = oracle.edit_config(lora, tmp_path / "lr=0.5")
    assert weight_of(whole) == (str(whole), 1.0)
    oracle.merge(llama, whole, out=tmp_path / "out")
    oracle.merge(llama, lora, out=tmp_path / "plain")
    oracle.assert_same(stored(tmp_path / "out"), stored(tmp_path / "plain"))
    oracle.merge(llama, f"{whole}=2", out=tmp_path / "twice")
    oracle.merge(llama, f"{lora}=2", out=tmp_path / "plain2")
    oracle.assert_same(stored(tmp_path / "twice"), stored(tmp_path / "plain2"))
